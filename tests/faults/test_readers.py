"""Row G7: whatever the bytes, a reader gives a value that it gives again from what it writes, or one plain message."""

import csv
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pspnet.errors import InputError
from pspnet.labels import CITYSCAPES, IGNORE_INDEX, ClassInfo, ClassTable, read_class_table
from pspnet.manifest import Manifest, Selection, ShardInfo, read_manifest
from segfleet.checkpoint import MANIFEST_FILE, STATE_FILE, load_checkpoint
from segfleet.config import TrainingConfig
from segfleet.config_json import from_json, load_config, to_json
from segfleet.override import differences, flat, override
from segfleet.package import MODEL_FILE, load_package, package_model
from segfleet.search_config import SearchConfig
from segfleet.spool import Channel

pytestmark = pytest.mark.fault("G7", "any bytes, JSON or table in place of a file")
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
few = settings(many, max_examples=20)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([2**63, -1, 10**400, 1e308, "../x", "/etc/passwd", "\0", "\ud800", "x" * 10_000])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


def changed(values: Any, data: st.DataObject) -> Any:
    """Return JSON values with one of their leaves or branches replaced, absent, or under another name."""
    if isinstance(values, dict) and values and data.draw(st.integers(0, 4)):
        name = data.draw(st.sampled_from(sorted(values)))
        return values | {name: changed(values[name], data)}
    if isinstance(values, list) and values and data.draw(st.integers(0, 4)):
        index = data.draw(st.integers(0, len(values) - 1))
        return [*values[:index], changed(values[index], data), *values[index + 1 :]]
    if isinstance(values, dict) and values and data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(values)))
        rest = {key: value for key, value in values.items() if key != name}
        return rest if data.draw(st.booleans()) else rest | {name + "_": values[name]}
    return data.draw(VALUES)


def plain(read: Callable[[], Any]) -> Any:
    """Return what `read` does, or None where it refuses in a line of moderate length."""
    try:
        return read()
    except InputError as error:
        if not 0 < len(str(error)) < 3000:
            pytest.fail(f"a message of {len(str(error))} characters")
        return None


CONFIGS = [TrainingConfig(), SearchConfig()]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
@many
@given(data=st.data())
def test_a_configuration_round_trips_or_is_refused(config: Any, data: st.DataObject) -> None:
    text = json.dumps(changed(json.loads(to_json(config)), data))
    read = plain(lambda: from_json(type(config), text))
    if read is None:
        return
    assert from_json(type(read), to_json(read)) == read
    assert override(config, differences(config, read)) == read
    assert override(read, differences(read, config)) == config
    json.loads(to_json(read), parse_constant=pytest.fail)


@many
@given(content=st.binary())
def test_bytes_are_no_configuration(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert plain(lambda: load_config(TrainingConfig, path)) is None


@many
@given(
    changes=st.dictionaries(
        st.sampled_from(
            [*sorted(flat(TrainingConfig())), "optim", "data", "nothing", "", ".", "optim.", ".optim"]
        )
        | st.text(max_size=6),
        VALUES,
        max_size=3,
    )
)
def test_any_override_is_made_or_refused(changes: dict[str, Any]) -> None:
    made = plain(lambda: override(TrainingConfig(), changes))
    if made is not None:
        assert override(TrainingConfig(), differences(TrainingConfig(), made)) == made


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=12).filter(
    lambda name: name == name.strip() and name.lower() != "void"
)


@st.composite
def class_tables(draw: st.DrawFn) -> ClassTable:
    """Tables of up to six classes, some of them merged or ignored."""
    ids = draw(st.lists(st.integers(0, 65535), min_size=1, max_size=6, unique=True))
    number = draw(st.integers(1, len(ids)))
    train_ids = [*range(number)]
    train_ids += [draw(st.sampled_from([*range(number), IGNORE_INDEX])) for _ in ids[number:]]
    colours = st.tuples(*[st.integers(0, 255)] * 3)
    return ClassTable(
        draw(NAMES),
        tuple(
            ClassInfo(draw(NAMES), id_, train_id, draw(colours), draw(NAMES))
            for id_, train_id in zip(ids, train_ids, strict=True)
        ),
    )


@many
@given(table=class_tables())
def test_a_class_table_is_read_back_from_json_and_csv(tmp_path: Path, table: ClassTable) -> None:
    assert ClassTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    path = tmp_path / "table.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "name", "r", "g", "b", "train_id", "category"])
        for info in table.classes:
            writer.writerow([info.id, info.name, *info.colour, info.train_id, info.category])
    assert read_class_table(path).classes == table.classes


@many
@given(data=st.data())
def test_a_changed_class_table_is_one_or_is_refused(data: st.DataObject) -> None:
    values = changed(CITYSCAPES.to_dict(), data)
    table = plain(lambda: ClassTable.from_dict(values))
    if table is not None:
        assert ClassTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


CELLS = (
    st.text(max_size=6)
    | st.integers().map(str)
    | st.sampled_from(["0", "255", "-1", "1e3", "٣", "0x1", '"', "\0"])
)


@many
@given(
    content=st.binary() | st.text().map(str.encode), rows=st.lists(st.lists(CELLS, max_size=9), max_size=4)
)
def test_any_csv_is_a_class_table_or_is_refused(
    tmp_path: Path, content: bytes, rows: list[list[str]]
) -> None:
    path = tmp_path / "classes.csv"
    written = io.StringIO()
    written.write("id,name,r,g,b,train_id\n")
    for row in rows:
        written.write(",".join(row) + "\n")
    for text in (content, written.getvalue().encode(errors="surrogatepass")):
        path.write_bytes(text)
        table = plain(lambda: read_class_table(path))
        if table is not None:
            assert ClassTable.from_dict(table.to_dict()) == table


def shard(file: str, num_images: int) -> ShardInfo:
    return ShardInfo(
        file=file,
        num_images=num_images,
        num_labelled=num_images,
        num_pixels=num_images * 100,
        channel_sums=[1, 2, 3],
        channel_square_sums=[1, 2, 3],
        class_counts=[5] * (CITYSCAPES.num_classes + 1),
        sizes={"10 x 10": num_images},
        digest=file.encode().hex(),
        num_bytes=7,
        file_digest="0" * 64,
    )


MANIFEST = Manifest(
    name="made up",
    class_table=CITYSCAPES,
    splits={"train": [shard("train-0.arrow", 3), shard("train-1.arrow", 2)], "val": [shard("val.arrow", 1)]},
    mean=(1.0, 2.0, 3.0),
    std=(4.0, 5.0, 6.0),
    source={"root": "somewhere"},
    selection=Selection(
        fraction=0.4,
        rule="group",
        groups=["a"],
        indices=[1, 4],
        class_counts=[1] * (CITYSCAPES.num_classes + 1),
    ),
    left_out=["train/x: cut"],
)


def signed(values: Any) -> Any:
    """Give a changed manifest the digest that fits, as somebody would who knows how."""
    try:
        table = ClassTable.from_dict(values["class_table"])
        content = [table.digest_text]
        content += [
            f"{name}:{info['digest']}" for name in sorted(values["splits"]) for info in values["splits"][name]
        ]
        if values["selection"]:
            content.append(f"selection:{values['selection']['indices']}")
        return values | {"digest": hashlib.sha256("\n".join(content).encode()).hexdigest()}
    except (InputError, KeyError, TypeError, AttributeError, UnicodeError):
        return values


@many
@given(data=st.data())
def test_a_manifest_round_trips_or_is_refused(data: st.DataObject) -> None:
    assert read_manifest(MANIFEST.to_json().encode(), "a store") == MANIFEST
    values = signed(changed(json.loads(MANIFEST.to_json()), data))
    manifest = plain(lambda: read_manifest(json.dumps(values).encode(), "a store"))
    if manifest is None:
        return
    assert read_manifest(manifest.to_json().encode(), "a store") == manifest
    for split in manifest.split_names:
        assert manifest.num_images(split) >= 0
        assert len(manifest.class_counts(split)) == manifest.class_table.num_classes + 1
        assert manifest.largest_side(split) > 0
        assert manifest.num_unlabelled(split) >= 0
    for shards in manifest.splits.values():
        assert all(Path("/store", info.file).resolve().parent == Path("/store") for info in shards)


@many
@given(content=st.binary())
def test_bytes_are_no_manifest(content: bytes) -> None:
    assert plain(lambda: read_manifest(content, "a store")) is None


@pytest.mark.slow
@few
@given(data=st.data())
def test_a_checkpoint_s_manifest_and_state_are_as_written_or_refused(
    checkpoint: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """With digests that fit, as somebody would give them who knows how."""
    folder = tmp_path / "epoch_0001"
    folder.mkdir(exist_ok=True)
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    if data.draw(st.booleans()):
        manifest = changed(manifest, data)
    else:
        state = json.dumps(changed(json.loads((checkpoint / STATE_FILE).read_text()), data)).encode()
        (folder / STATE_FILE).write_bytes(state)
        manifest["files"][STATE_FILE] = {"size": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    read = plain(lambda: load_checkpoint(folder))
    if read is not None:
        assert read.model_state.keys() == load_checkpoint(checkpoint).model_state.keys()
        assert isinstance(read.state.get("epoch", 0), int)


@few
@given(content=st.binary())
@pytest.mark.parametrize("name", [MANIFEST_FILE, STATE_FILE, "model.safetensors", "optimizer.safetensors"])
def test_bytes_are_no_part_of_a_checkpoint(
    checkpoint: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    folder = tmp_path / "epoch_0001"
    folder.mkdir(exist_ok=True)
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / name).write_bytes(content)
    if name != MANIFEST_FILE:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert plain(lambda: load_checkpoint(folder)) is None


@pytest.mark.slow
@few
@given(data=st.data())
def test_a_package_is_a_model_or_is_refused(checkpoint: Path, tmp_path: Path, data: st.DataObject) -> None:
    package = tmp_path / "package"
    if not package.exists():
        package_model(checkpoint, package)
    written = (package / MODEL_FILE).read_text()
    try:
        (package / MODEL_FILE).write_text(json.dumps(changed(json.loads(written), data)))
        model = plain(lambda: load_package(package, device="cpu"))
        if model is not None:
            assert model.network.num_classes == model.class_table.num_classes
            assert len(model.mean) == len(model.std) == 3
            assert model.scores is None or isinstance(model.scores.miou, float)
            assert model.crop_size
    finally:
        (package / MODEL_FILE).write_text(written)


@pytest.mark.slow
def test_every_field_of_a_package_s_network_is_looked_at(checkpoint: Path, tmp_path: Path) -> None:
    package = package_model(checkpoint, tmp_path / "package")
    written = json.loads((package / MODEL_FILE).read_text())
    scalars: list[Any] = [None, True, 0, -1, 10**400, 2**62, 1e308, "", "timm:x", "x" * 10_000, {}]
    for name, real in written["architecture"].items():
        for value in [*scalars, *([item] for item in scalars), [1] * 3000]:
            values = written | {"architecture": written["architecture"] | {name: value}}
            (package / MODEL_FILE).write_text(json.dumps(values))
            model = plain(lambda: load_package(package, device="cpu"))
            if model is not None:
                assert type(model.network.architecture[name]) in (type(real), float)
                with torch.inference_mode():
                    model.network(torch.zeros(1, 3, 33, 33))
    for name in ("backbones", "self", "return", "\n"):
        values = written | {"architecture": written["architecture"] | {name: 1}}
        (package / MODEL_FILE).write_text(json.dumps(values))
        assert plain(lambda: load_package(package, device="cpu")) is None


ENTRIES: list[dict[str, Any]] = [
    {"step": 3, "timestamp": 1, "values": {"loss": 0.5}},
    {"status": "FINISHED", "timestamp": 2, "tags": {"a": "b"}},
    {"file": "files/abc/panel.png", "artifact_dir": "pictures"},
]


@many
@given(
    data=st.data(),
    torn=st.binary(max_size=30),
    sent=st.binary(max_size=4) | st.integers().map(lambda n: str(n).encode()),
)
def test_a_spool_gives_its_whole_entries_whatever_lies_between(
    tmp_path: Path, data: st.DataObject, torn: bytes, sent: bytes
) -> None:
    """A writer that died leaves part of a line; the next one begins a new line, and nothing of its own is lost."""
    spool = tmp_path / "spool"
    spool.mkdir(exist_ok=True)
    path = spool / "run.points.jsonl"
    of_two_kinds = data.draw(st.sampled_from(ENTRIES)) | data.draw(st.sampled_from(ENTRIES))
    hostile = json.dumps(changed(of_two_kinds, data)).encode()
    path.write_bytes(b"\n".join([json.dumps(ENTRIES[0]).encode(), torn, hostile, b""]))
    (spool / "run.points.sent").unlink(missing_ok=True)
    channel = Channel(spool, "run", "points")
    channel.append(ENTRIES[1])
    found = channel.entries()
    assert found[0] == ENTRIES[0]
    assert found[-1] == ENTRIES[1]
    for entry in found:
        assert any(entry.keys() == fields.keys() for fields in ENTRIES)
        copy = (spool / entry.get("file", "files/x/x")).resolve()
        assert copy.is_relative_to(spool.resolve() / "files")
        assert copy.parent.parent == spool.resolve() / "files"
    positions = [position for _, position in channel.unsent()]
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size
    channel.mark_sent(positions[0])
    assert channel.entries() == found
    assert [entry for entry, _ in channel.unsent()] == found[1:]
    for mark in (sent, b"17592186040321", str(2**80).encode()):  # the latter two where no file can reach
        (spool / "run.points.sent").write_bytes(mark)
        assert all(isinstance(entry, dict) for entry, _ in channel.unsent())

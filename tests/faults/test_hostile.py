"""Rows G1 to G3 and G7: files of others run no code, take no more memory than they are worth, and fail plainly."""

import json
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pspnet.errors import InputError
from pspnet.labels import read_class_table
from pspnet.manifest import read_manifest
from pspnet.model import PSPNet
from pspnet.weights import read_file
from segfleet.checkpoint import MANIFEST_FILE, load_checkpoint
from segfleet.config import TrainingConfig
from segfleet.config_json import from_json
from segfleet.package import MODEL_FILE, load_package, package_model
from segfleet.sources import zips
from segfleet.sources.files import read_image
from segfleet.sources.zips import member_names, read_bytes

MEGABYTE = 2**20


class Canary:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def package(checkpoint: Path, tmp_path: Path) -> Path:
    return package_model(checkpoint, tmp_path / "package")


def peak_bytes(function: Callable[[], object]) -> int:
    """Return what Python and numpy allocate at most while `function` refuses."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as refused:
            function()
        assert "\n" not in str(refused.value)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.fault("G1", "a zip with names that lead outside")
def test_a_zip_is_read_in_place_and_writes_nothing(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = inside / "hostile.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("../outside.png", "/tmp/outside.png", "a/../../outside.png"):
            file.writestr(name, b"x")
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")
    assert len(member_names(path)) == 4
    assert read_bytes(f"{path}!link.png") == b"/etc/passwd", "the text of a link, not what it points to"
    assert sorted(tmp_path.rglob("*")) == [inside, path]


@pytest.mark.fault("G1", "a zip bomb, declared and undeclared")
def test_a_bomb_is_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zips, "MAX_BYTES", MEGABYTE)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb.png", bytes(64 * MEGABYTE))
    assert peak_bytes(lambda: read_bytes(f"{path}!bomb.png")) < MEGABYTE
    content = path.read_bytes()
    size = (64 * MEGABYTE).to_bytes(4, "little")
    assert content.count(size) == 2
    path.write_bytes(content.replace(size, (1000).to_bytes(4, "little")))
    assert peak_bytes(lambda: read_bytes(f"{path}!bomb.png")) < 3 * MEGABYTE


@pytest.mark.fault("G1", "a zip of a million members")
def test_a_zip_of_too_many_members_is_refused_before_they_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.png", b"")
    content = path.read_bytes()
    # The directory of one member, a million times, and an end that says so as ZIP64 does.
    start = content.index(b"PK\x01\x02")
    end = content.index(b"PK\x05\x06")
    entry, count = content[start:end], 1_000_000
    size = len(entry) * count
    zip64 = b"PK\x06\x06" + (44).to_bytes(8, "little") + bytes([45, 0, 45, 0]) + bytes(8)
    zip64 += count.to_bytes(8, "little") * 2 + size.to_bytes(8, "little") + start.to_bytes(8, "little")
    locator = b"PK\x06\x07" + bytes(4) + (start + size).to_bytes(8, "little") + (1).to_bytes(4, "little")
    last = b"PK\x05\x06" + bytes(4) + b"\xff\xff\xff\xff" + b"\xff" * 8 + bytes(2)
    path.write_bytes(content[:start] + entry * count + zip64 + locator + last)
    assert peak_bytes(lambda: member_names(path)) < MEGABYTE


@pytest.mark.fault("G2", "an image that declares 1.6 billion pixels")
@pytest.mark.parametrize("kind", ["png", "bmp"])
def test_an_image_bomb_is_refused_before_it_is_decoded(tmp_path: Path, kind: str) -> None:
    from tests.segfleet_data.test_checks import bomb

    path = tmp_path / f"bomb.{kind}"
    if kind == "png":
        bomb(path)
    else:
        side = (40000).to_bytes(4, "little")
        header = (40).to_bytes(4, "little") + side * 2 + bytes([1, 0, 24, 0]) + bytes(24)
        path.write_bytes(b"BM" + bytes(8) + (54).to_bytes(4, "little") + header)
    assert peak_bytes(lambda: read_image(path)) < 16 * MEGABYTE  # decoded it takes 4800


@pytest.mark.fault("G3", "a pickle that runs code")
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_of_others_run_no_code(tmp_path: Path, legacy: bool) -> None:
    path, canary = tmp_path / "weights.pth", tmp_path / "canary"
    torch.save({"weight": Canary(canary)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="cannot be read"):
        read_file(path, "model.weights")
    path.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(InputError, match="cannot be read"):
        read_file(path, "model.weights")
    assert not canary.exists()


@pytest.mark.fault("G3", "weights that inflate to a thousand times their file")
def test_weights_that_inflate_are_refused(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain.pth", tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(16 * MEGABYTE // 4)}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    assert path.stat().st_size < 100_000
    with pytest.raises(InputError, match="compressed"):
        read_file(path, "model.weights")
    assert read_file(plain, "model.weights")["weight"].numel() == 16 * MEGABYTE // 4


@pytest.mark.fault("G3", "a description of a network far larger than its weights")
def test_a_network_is_not_built_before_its_weights_fit(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = json.loads((package / MODEL_FILE).read_text())
    info["architecture"]["head_channels"] = 100_000
    (package / MODEL_FILE).write_text(json.dumps(info))
    built: list[torch.device] = []
    real = PSPNet.from_architecture

    def noted(architecture: object) -> object:
        device = torch.get_default_device()
        built.append(device)
        assert device.type == "meta", "100000 channels take 20 GB"
        return real(architecture)  # type: ignore[arg-type]

    monkeypatch.setattr(PSPNet, "from_architecture", noted)
    with pytest.raises(InputError, match="must describe one network"):
        load_package(package)
    assert built


DEEP = "[" * 100_000


@pytest.mark.fault("G7", "hostile JSON and tables")
@pytest.mark.parametrize(
    "text", [DEEP, '{"a":' * 100_000, "NaN", "1" * 10_000, "[]", "null", '"text"', "{}", "\x00"]
)
@pytest.mark.parametrize("reader", ["configuration", "manifest", "package", "checkpoint", "class table"])
def test_a_hostile_text_is_a_plain_error(
    package: Path, checkpoint: Path, tmp_path: Path, reader: str, text: str
) -> None:
    if reader == "configuration" and text == "{}":
        return  # every setting at its default
    path = tmp_path / "classes.csv"
    path.write_text(text)
    (package / MODEL_FILE).write_text(text)
    folder = tmp_path / "epoch_0001"
    folder.mkdir()
    (folder / MANIFEST_FILE).write_text(text)
    readers: dict[str, Callable[[], object]] = {
        "configuration": lambda: from_json(TrainingConfig, text),
        "manifest": lambda: read_manifest(text.encode(), "a store"),
        "package": lambda: load_package(package),
        "checkpoint": lambda: load_checkpoint(folder),
        "class table": lambda: read_class_table(path),
    }
    with pytest.raises(InputError) as refused:
        readers[reader]()
    assert len(str(refused.value)) < 2000

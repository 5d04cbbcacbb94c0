"""Fuzzing of the readers of files that others may have written: `make fuzz`, not part of the tests.

With atheris (libFuzzer; it guides itself by the code that is reached) or, with --random, without: then seeds are
mutated blindly. A reader gives a value or raises InputError; anything else ends the run with the input in a file.

    python tests/fuzz/readers.py --seconds 3600            every reader by turns
    python tests/fuzz/readers.py --reader picture --random
"""

import argparse
import base64
import contextlib
import io
import json
import random
import sys
import tempfile
import time
import types
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pspnet.errors import InputError
from pspnet.labels import CITYSCAPES, ClassTable, read_class_table
from pspnet.manifest import ShardFormat, ShardInfo, read_manifest
from pspnet.store import Split, write_shard
from pspnet.weights import read_file
from segfleet.checkpoint import MANIFEST_FILE, load_checkpoint
from segfleet.config import TrainingConfig
from segfleet.config_json import from_json, load_config, to_json
from segfleet.package import MODEL_FILE, load_package, package_model
from segfleet.sources import Pair
from segfleet.sources.coco import CocoSource, coco_class_table, read_coco
from segfleet.sources.files import read_ids, read_image
from segfleet.sources.labelme import read_labelme
from segfleet.sources.zips import member_names, read_bytes
from segfleet.spool import Channel
from tests.conftest import three_classes, write_checkpoint
from tests.faults.test_readers import ENTRIES, MANIFEST

FOLDER = Path(tempfile.mkdtemp(prefix="segfleet-fuzz-"))
Reader = Callable[[bytes], object]
SHARD: list[ShardInfo] = []
"""What the manifest says of the seeds of shards."""


def _file(name: str, content: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(content)
    return path


def configuration(content: bytes) -> None:
    """A stored configuration."""
    config = load_config(TrainingConfig, _file("config.json", content))
    assert from_json(TrainingConfig, to_json(config)) == config


def manifest(content: bytes) -> None:
    """A store's manifest."""
    found = read_manifest(content, "a store")
    assert read_manifest(found.to_json().encode(), "a store") == found


def table(content: bytes) -> None:
    """A class table."""
    found = read_class_table(_file("classes.csv", content))
    assert ClassTable.from_dict(found.to_dict()) == found


def checkpoint(content: bytes) -> None:
    """A checkpoint's manifest beside good files."""
    folder = FOLDER / "epoch_0001"
    if not folder.exists():
        write_checkpoint(folder)
    (folder / MANIFEST_FILE).write_bytes(content)
    load_checkpoint(folder)


def spool(content: bytes) -> None:
    """A spool."""
    (FOLDER / "run.points.sent").unlink(missing_ok=True)
    _file("run.points.jsonl", content)
    channel = Channel(FOLDER, "run", "points")
    for entry, position in channel.unsent():
        assert 0 < position <= len(content)
        assert (FOLDER / entry.get("file", "files/x/x")).resolve().is_relative_to(FOLDER.resolve() / "files")


def picture(content: bytes) -> None:
    """A picture, and a label map."""
    path = _file("picture", content)
    with contextlib.suppress(InputError):
        image = read_image(path)
        assert image.dtype == np.uint8
        assert image.shape[2:] == (3,)
    assert read_ids(path).ndim == 2


def archive(content: bytes) -> None:
    """A zip archive, and each of its members."""
    path = _file("archive.zip", content)
    for name in member_names(path)[:5]:
        with contextlib.suppress(InputError):
            read_bytes(f"{path}!{name}")


def shard(content: bytes) -> None:
    """A shard, and each window of its images."""
    path = _file("shard.arrow", content)
    split = Split("train", [(path, SHARD[0])])
    for index in range(len(split)):
        assert split.image(index).shape == (*split.size(index), 3)
        split.label(index)


def tiles(content: bytes) -> None:
    """As `shard`, with tiles."""
    shard(content)


def weights(content: bytes) -> None:
    """A checkpoint of somebody else."""
    read_file(_file("weights.pth", content), "model.weights")


def package(content: bytes) -> None:
    """A model package's description beside good weights."""
    (FOLDER / "package" / MODEL_FILE).write_bytes(content)
    model = load_package(FOLDER / "package", device="cpu")
    assert model.network.num_classes == model.class_table.num_classes


def labelme(content: bytes) -> None:
    """LabelMe's annotations of a picture."""
    ids = read_labelme(
        _file("labelme.json", content), shape=(9, 7), class_table=three_classes(), unlabelled_id=7
    )
    assert ids.shape == (9, 7)


def coco(content: bytes) -> None:
    """A COCO file, and the annotations of each of its images."""
    path = _file("coco.json", content)
    files = {"train": path}
    source = CocoSource(FOLDER, coco_class_table(files, name="coco", background="rest"), 7)
    for image in read_coco(path).images.values():
        pair = Pair("train", image.name, "image", "label", image.annotation)
        with contextlib.suppress(InputError):
            assert source._ids(json.loads(image.annotation), (9, 7), pair).shape == (9, 7)


def _annotations() -> tuple[bytes, bytes]:
    """Return every kind of shape there is, of three classes, as LabelMe and COCO write them."""
    mask = io.BytesIO()
    Image.fromarray(np.eye(3, dtype=np.uint8) * 255).save(mask, format="png")
    shapes = [
        {"label": "road", "points": [[0, 0], [6, 0], [3, 8]], "shape_type": "polygon"},
        {"label": "car", "points": [[1, 1], [4, 5]], "shape_type": "rectangle"},
        {"label": "car", "points": [[3, 3], [4, 3]], "shape_type": "circle"},
        {
            "label": "road",
            "points": [[1, 2], [3, 4]],
            "shape_type": "mask",
            "mask": base64.b64encode(mask.getvalue()).decode(),
        },
    ]
    runs = {"size": [9, 7], "counts": [10, 20, 33]}
    packed = {"size": [9, 7], "counts": ":d0Q1"}
    segmentations: list[object] = [[[0, 0, 6, 0, 3, 8]], runs, packed]
    written = {
        "categories": [{"id": 1, "name": "road", "supercategory": "flat"}, {"id": 2, "name": "car"}],
        "images": [{"id": 1, "file_name": "a/b.png", "height": 9, "width": 7}],
        "annotations": [
            {"id": number, "image_id": 1, "category_id": 1 + number % 2, "segmentation": segmentation}
            for number, segmentation in enumerate(segmentations)
        ],
    }
    labelme_ = {"shapes": shapes, "imageHeight": 9, "imageWidth": 7}
    return json.dumps(labelme_).encode(), json.dumps(written).encode()


def _seeds() -> dict[str, tuple[Reader, list[bytes]]]:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    pictures = []
    for kind in ("png", "bmp", "tiff", "jpeg", "webp"):
        for picture_ in (Image.fromarray(image), Image.fromarray(image[..., 0])):
            written = io.BytesIO()
            picture_.save(written, format=kind)
            pictures.append(written.getvalue())
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/b.png", pictures[0])
        file.writestr("c.txt", b"x" * 1000)
    saved = io.BytesIO()
    torch.save({"weight": torch.zeros(3), "state_dict": {"a": torch.ones(2)}}, saved)
    shards = []
    for shard_format in get_args(ShardFormat):
        info = write_shard(
            FOLDER / "seed.arrow", [("a", image, image[..., 0] % 3)], num_classes=3, shard_format=shard_format
        )
        shards.append((FOLDER / "seed.arrow").read_bytes())
    SHARD[:] = [replace(info, num_bytes=0)]
    rows = "\n".join(
        f"{c.id},{c.name},{','.join(map(str, c.colour))},{c.train_id}" for c in CITYSCAPES.classes
    )
    write_checkpoint(FOLDER / "epoch_0001")
    package_model(FOLDER / "epoch_0001", FOLDER / "package")
    of_labelme, of_coco = _annotations()
    return {
        "configuration": (configuration, [to_json(TrainingConfig()).encode()]),
        "manifest": (manifest, [MANIFEST.to_json().encode()]),
        "table": (table, [f"id,name,r,g,b,train_id\n{rows}\n".encode()]),
        "checkpoint": (checkpoint, [(FOLDER / "epoch_0001" / MANIFEST_FILE).read_bytes()]),
        "spool": (spool, [b"\n".join(json.dumps(entry).encode() for entry in ENTRIES) + b"\n"]),
        "picture": (picture, pictures),
        "archive": (archive, [zipped.getvalue()]),
        "shard": (shard, shards[:1]),
        "tiles": (tiles, shards[1:]),
        "weights": (weights, [saved.getvalue()]),
        "package": (package, [(FOLDER / "package" / MODEL_FILE).read_bytes()]),
        "labelme": (labelme, [of_labelme]),
        "coco": (coco, [of_coco]),
    }


def attempt(reader: Reader, content: bytes) -> None:
    """Read; what is refused plainly is well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(InputError):
            reader(content)


def mutated(seed: bytes, chance: random.Random) -> bytes:
    """Return a seed with a few bytes changed, cut out, doubled or replaced by what readers stumble on."""
    content = bytearray(seed)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(content) + 1)
        match chance.randrange(5):
            case 0 if content:
                content[min(at, len(content) - 1)] = chance.randrange(256)
            case 1 if content:
                content[min(at, len(content) - 1)] ^= 1 << chance.randrange(8)
            case 2:
                del content[at : at + chance.choice((1, 4, 64, 4096))]
            case 3:
                content[at:at] = content[at : at + chance.choice((1, 8, 64))]
            case _:
                content[at : at + chance.choice((0, 1, 4))] = chance.choice(TOKENS)
    return bytes(content)


TOKENS = [
    b"\0",
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"-1",
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b'"',
    b"../",
    b"1e999",
]
TOKENS += [b"9" * 50, b"\\ud800", b"\r", b"\n", b",", b"true", b"\x00\x00\x00\x80", b"\x01" + bytes(7)]


def main() -> None:
    """Fuzz the readers that were asked for, for so many seconds together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reader", action="append", help="only this one; may be given again")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--random", action="store_true", help="mutate blindly, without atheris")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    targets = {
        name: found for name, found in _seeds().items() if not options.reader or name in options.reader
    }
    if not options.random:
        _with_atheris(targets, options.seconds)
        return
    chance = random.Random(options.seed)
    for name, (reader, seeds) in targets.items():
        end, number = time.monotonic() + options.seconds / len(targets), 0
        while time.monotonic() < end:
            content = mutated(chance.choice(seeds), chance)
            try:
                attempt(reader, content)
            except BaseException:
                path = Path(f"crash-{name}")
                path.write_bytes(content)
                print(f"{name}: input {number} is in {path}", file=sys.stderr)
                raise
            number += 1
        print(f"{name}: {number} inputs, each read or refused", flush=True)


def _with_atheris(targets: dict[str, tuple[Reader, list[bytes]]], seconds: float) -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("error: atheris is not installed. Install it, or give --random.")
    readers = list(targets.values())
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, (_, seeds) in enumerate(readers):
        for index, seed in enumerate(seeds):
            (corpus / f"{number}-{index}").write_bytes(bytes([number]) + seed)

    def one(content: bytes) -> None:
        if content:
            attempt(readers[content[0] % len(readers)][0], content[1:])

    for name in list(sys.modules):
        if name.partition(".")[0] in ("pspnet", "segfleet"):  # all of torch would take minutes
            for value in vars(sys.modules[name]).values():
                if isinstance(value, types.FunctionType) and value.__module__ == name:
                    atheris.instrument_func(value)
    # A picture of the most pixels that are let in takes 0.6 GB, and some copies, whatever its file holds.
    limits = [f"-max_total_time={int(seconds)}", "-max_len=20000", "-rss_limit_mb=6000"]
    atheris.Setup([sys.argv[0], str(corpus), *limits], one)
    atheris.Fuzz()


if __name__ == "__main__":
    pa.set_cpu_count(1)
    main()

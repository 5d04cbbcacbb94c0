"""Laws of archives: a zip that is read in place gives what its folder gives, and damage is named."""

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pspnet.errors import InputError
from pspnet.store import Store
from segfleet.ingest import ingest
from segfleet.sources.cityscapes import cityscapes_source
from segfleet.sources.files import read_image

DATA = Path(os.environ.get("SEGFLEET_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
ENDING = {"leftImg8bit": "leftImg8bit", "gtFine": "gtFine_labelIds", "gtCoarse": "gtCoarse_labelIds"}


def put(root: Path, part: str, split: str, name: str, pixels: Any) -> None:
    path = root / part / split / name.split("_")[0] / f"{name}_{ENDING[part]}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def zipped(root: Path, part: str, archive: Path, *, only: str = "") -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("README", "as in the official archives")
        for path in sorted((root / part).rglob(f"*{only}.png")):
            file.write(path, path.relative_to(root))
    return archive


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "folders"
    for split, count in (("train", 20), ("val", 3), ("test", 2), ("train_extra", 2)):
        for number in range(count):
            name = f"{split.replace('_', '')}_{number:06d}_000019"
            put(folder, "leftImg8bit", split, name, rng.integers(0, 256, (6, 8, 3)))
            fine = np.zeros((6, 8)) if split == "test" else rng.integers(7, 34, (6, 8))
            if split != "train_extra":
                put(folder, "gtFine", split, name, fine)
            if split != "test":
                put(folder, "gtCoarse", split, name, np.full((6, 8), 7))
    return folder


@pytest.fixture
def zips(root: Path, tmp_path: Path) -> Path:
    zipped(root, "leftImg8bit", tmp_path / "zips" / "leftImg8bit_trainvaltest.zip")
    zipped(root, "gtFine", tmp_path / "zips" / "gtFine_trainvaltest.zip")
    zipped(root, "gtCoarse", tmp_path / "zips" / "gtCoarse.zip")
    return tmp_path / "zips"


@pytest.mark.parametrize("train_labels", ["fine", "coarse"])
def test_a_store_of_archives_is_the_store_of_their_folders(
    root: Path, zips: Path, tmp_path: Path, train_labels: Any
) -> None:
    unpacked = ingest(cityscapes_source(root, train_labels=train_labels), tmp_path / "a")
    in_place = ingest(cityscapes_source(zips, train_labels=train_labels), tmp_path / "b")
    assert in_place.manifest.digest == unpacked.manifest.digest
    assert sorted(path.name for path in zips.iterdir()) == [
        "gtCoarse.zip",
        "gtFine_trainvaltest.zip",
        "leftImg8bit_trainvaltest.zip",
    ]
    store = Store.open(tmp_path / "b")
    assert len(store.split("train")) == (20 if train_labels == "fine" else 22)
    assert (len(store.split("val")), len(store.split("test"))) == (3, 2)
    assert [store.split("test").label(index) for index in range(2)] == [None, None]
    values = {
        split: [set(np.unique(np.asarray(store.split(split).label(index))).tolist()) for index in range(3)]
        for split in ("train", "val")
    }
    assert all(len(found) > 2 for found in values["val"]), "val has fine labels in any case"
    assert (values["train"] == [{0}] * 3) == (train_labels == "coarse")


@pytest.mark.skipif(not DATA.is_dir(), reason="no real data: set SEGFLEET_DATA to the folder that has it")
def test_genuine_pairs_are_the_same_from_folders_and_from_archives(tmp_path: Path) -> None:
    source = DATA / "cityscapes"
    zipped(source, "leftImg8bit", tmp_path / "zips" / "leftImg8bit_trainvaltest.zip")
    zipped(source, "gtFine", tmp_path / "zips" / "gtFine_trainvaltest.zip")
    unpacked = ingest(cityscapes_source(source), tmp_path / "a")
    in_place = ingest(cityscapes_source(tmp_path / "zips"), tmp_path / "b")
    assert in_place.manifest.num_images("train") == 6
    assert in_place.manifest.digest == unpacked.manifest.digest
    assert (
        len(in_place.notes) == len(unpacked.notes) == 11
    )  # ten label maps without image, one image without label


def test_a_folder_and_an_archive_complete_each_other(root: Path, zips: Path) -> None:
    (root / "gtFine").rename(root / "elsewhere")
    with pytest.raises(InputError, match=r"has no gtFine \(nor gtFine_trainvaltest\.zip\)"):
        cityscapes_source(root).listing()
    (zips / "gtFine_trainvaltest.zip").rename(root / "gtFine_trainvaltest.zip")
    assert sum(pair.label is not None for pair in cityscapes_source(root).listing().pairs) == 23


def test_what_is_alone_is_named_in_its_archive(root: Path, zips: Path) -> None:
    zipped(root, "gtFine", zips / "gtFine_trainvaltest.zip", only="train_00000[0-3]_000019_gtFine_labelIds")
    listing = cityscapes_source(zips).listing()
    assert len([pair for pair in listing.pairs if pair.split == "train"]) == 4
    alone = zips / "leftImg8bit_trainvaltest.zip!leftImg8bit/val/val/val_000000_000019_leftImg8bit.png"
    assert f"no label for image {alone}" in listing.notes
    assert len(listing.notes) == 16 + 3


def test_another_process_reads_what_was_sent_to_it(zips: Path) -> None:
    source = cityscapes_source(zips)
    pair = source.listing().pairs[-1]
    image, _ = source.read(pair)
    code = (
        "import pickle, sys; source, pair = pickle.loads(sys.stdin.buffer.read());"  # sent by this test
        "sys.stdout.buffer.write(source.read(pair)[0].tobytes())"
    )
    sent = pickle.dumps((source, pair))
    assert len(sent) < 2000
    there = subprocess.run(
        [sys.executable, "-c", code],
        input=sent,
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert there.stdout == image.tobytes()


def test_an_archive_that_was_replaced_is_read_anew_and_is_other_data(root: Path, zips: Path) -> None:
    source = cityscapes_source(zips)
    pair = source.listing().pairs[-1]
    before, description = source.read(pair)[0], source.describe()
    for path in (root / "leftImg8bit").rglob("*.png"):
        Image.fromarray(np.zeros((6, 8, 3), dtype=np.uint8)).save(path)
    zipped(root, "leftImg8bit", zips / "leftImg8bit_trainvaltest.zip")
    assert before.any()
    assert not source.read(pair)[0].any()
    assert source.describe() != description


def test_an_archive_of_the_same_size_but_of_another_time_is_other_data(zips: Path) -> None:
    source = cityscapes_source(zips)
    image, description = zips / "leftImg8bit_trainvaltest.zip", source.describe()
    pair = source.listing().pairs[-1]
    before = source.read(pair)[0]
    content, changed_ns = image.read_bytes(), image.stat().st_mtime_ns
    image.write_bytes(bytes(len(content)))
    os.utime(image, ns=(changed_ns + 1_000_000_000, changed_ns + 1_000_000_000))
    assert source.describe() != description
    with pytest.raises(InputError, match="must be a whole zip file"):
        source.read(pair)
    image.write_bytes(content)
    assert np.array_equal(source.read(pair)[0], before)


def test_a_damaged_archive_is_named(zips: Path) -> None:
    path = zips / "leftImg8bit_trainvaltest.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"leftImg8bit_trainvaltest\.zip cannot be read.*Download it again"):
        cityscapes_source(zips).listing()
    with zipfile.ZipFile(zips / "gtCoarse.zip") as file:
        info = next(info for info in file.infolist() if info.filename.endswith(".png"))
    damaged = bytearray((zips / "gtCoarse.zip").read_bytes())
    damaged[info.header_offset + 30 + len(info.filename) + 20] ^= 0xFF
    (zips / "gtCoarse.zip").write_bytes(damaged)
    with pytest.raises(InputError, match=r"gtCoarse\.zip!.*Download the archive again"):
        read_image(f"{zips / 'gtCoarse.zip'}!{info.filename}")

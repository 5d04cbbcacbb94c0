"""Rows F1 to F5: data that are not what they should be are named before anything is computed from them."""

import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspnet.errors import InputError
from pspnet.labels import IGNORE_INDEX
from pspnet.manifest import MANIFEST_FILE
from pspnet.store import write_shard
from segfleet.config import TrainingConfig
from segfleet.ingest import ingest
from segfleet.override import override
from segfleet.sources.folder import folder_source
from tests.segfleet_runtime.conftest import TABLE, pictures
from tests.segfleet_runtime.test_training import trained, weights_digest
from tests.stores import write_store

SIZE = (12, 16)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four pairs of a picture and a label."""
    folder = tmp_path / "pictures"
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in (split, f"{split}annot"):
            (folder / kind).mkdir(parents=True)
        for number in range(2):
            name = f"{split}{number}.png"
            Image.fromarray(random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(folder / split / name)
            Image.fromarray(random.integers(0, 2, SIZE, dtype=np.uint8)).save(folder / f"{split}annot" / name)
    (folder / "classes.csv").write_text("id,name,r,g,b\n0,road,128,64,128\n1,tree,0,128,0\n2,void,0,0,0\n")
    return folder


def refused(root: Path, *named: str) -> None:
    """Ingest, and find the pair named, and nothing beside the report."""
    with pytest.raises(InputError) as error:
        ingest(folder_source(root), root.parent / "store")
    text = str(error.value)
    assert text.startswith("1 of 4 pairs cannot be used, and no store was made")
    assert all(part in text for part in named), text
    left = sorted(path.name for path in root.parent.iterdir())
    assert left == ["pictures", "store-report.html", "store-report.json"]


@pytest.mark.fault("F1", "a truncated image or label")
@pytest.mark.parametrize("folder", ["train", "trainannot"])
@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif", "bmp"])
def test_a_truncated_file_is_named_wherever_it_is_cut(root: Path, folder: str, kind: str) -> None:
    path = root / folder / "train1.png"
    if kind != "png":
        if folder == "trainannot" and kind in ("jpg", "webp"):
            pytest.skip("no label is kept in a format that changes its ids")
        picture = Image.open(path)
        path.unlink()
        path = path.with_suffix(f".{kind}")
        picture.save(path)
    content = path.read_bytes()
    for num_bytes in {0, 1, 10, len(content) // 4, len(content) // 2, len(content) * 9 // 10}:
        path.write_bytes(content[:num_bytes])
        refused(root, path.name)
    path.write_bytes(content)
    assert ingest(folder_source(root), root.parent / "store").is_new


@pytest.mark.fault("F2", "an image and a label of two sizes")
@pytest.mark.parametrize("size", [(1, 1), (16, 12), (12, 17), (24, 32)])
def test_a_label_of_another_size_is_named(root: Path, size: tuple[int, int]) -> None:
    Image.fromarray(np.zeros(size, dtype=np.uint8)).save(root / "trainannot" / "train1.png")
    refused(root, "train1.png is 16 x 12", f"train1.png is {size[1]} x {size[0]}")


@pytest.mark.fault("F3", "an id that is not in the class table")
@pytest.mark.parametrize(("value", "kind"), [(3, np.uint8), (255, np.uint8), (65535, np.uint16)])
def test_an_id_out_of_range_is_named_with_its_pixels(root: Path, value: int, kind: type) -> None:
    label: np.ndarray = np.zeros(SIZE, dtype=kind)
    label[5, 3:7] = value
    Image.fromarray(label).save(root / "trainannot" / "train1.png")
    refused(root, f"train1.png has {value} (4 pixels)")


def other_store(path: Path, change: str) -> None:
    """Put a store that differs in one respect into the place of the one at `path`."""

    def changed(split: str, number: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
        samples = list(pictures(split, number))
        name, image, label = samples[0]
        image, label = image.copy(), label.copy()
        if change == "pixel":
            image[0, 0, 0] ^= 1
        if change == "label":
            label[0, 0] = 0 if label[0, 0] != 0 else 1
        return [(name, image, label), *samples[1:]]

    shutil.rmtree(path)
    splits = {"train": changed("train", 11 if change == "image" else 12), "val": changed("val", 3)}
    write_store(path, TABLE, splits)


def contents(run_dir: Path) -> dict[Path, bytes]:
    """Return the files of a run, but for its log."""
    files = [path for path in run_dir.rglob("*") if path.is_file() and path.suffix != ".log"]
    return {path: path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.fault("F4", "the store changed under a resume")
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("pixel", r"digest \w{16}, then \w{16}; mean of the training images"),
        (
            "label",
            r"digest \w{16}, then \w{16}; the same classes and the same mean .* other labels or splits",
        ),
        ("image", r"digest \w{16}, then \w{16}; mean of the training images"),
        ("cut shard", "cannot be read"),
        ("other shard", "A shard must be as it was ingested"),
        ("manifest", "Its digest is not that of its shards"),
    ],
)
def test_a_store_that_changed_is_refused_with_the_difference(
    config: TrainingConfig, store_path: Path, tmp_path: Path, change: str, difference: str
) -> None:
    path = tmp_path / "store"
    shutil.copytree(store_path, path)
    config = override(config, {"data.store": str(path)})
    trained(config, tmp_path / "run", die_after=2)
    before = contents(tmp_path / "run")
    shard = path / "train.arrow"
    if change == "cut shard":
        os.truncate(shard, shard.stat().st_size - 100)
    elif change == "other shard":
        write_shard(shard, pictures("train", 13), num_classes=TABLE.num_classes)
    elif change == "manifest":
        manifest = path / MANIFEST_FILE
        manifest.write_text(manifest.read_text().replace("never seen", "seen", 1))
    else:
        other_store(path, change)
    with pytest.raises(InputError, match=difference):
        trained(config, tmp_path / "run")
    assert contents(tmp_path / "run") == before
    if change in ("label", "cut shard"):
        shutil.rmtree(path)
        shutil.copytree(store_path, path)
        assert trained(config, tmp_path / "run")[-1]["is_last"], "the store that it began with is taken"


@pytest.mark.slow
@pytest.mark.fault("F5", "batches of ignored pixels alone")
@pytest.mark.parametrize(
    "changes", [{}, {"loss.ohem_threshold": 0.7}, {"loss.label_smoothing": 0.1}], ids=str
)
def test_a_batch_of_ignored_pixels_alone_is_no_nan(
    config: TrainingConfig, tmp_path: Path, changes: dict[str, float]
) -> None:
    """Two pictures of three are void: most batches have one, many have no other."""

    def voided() -> list[tuple[str, np.ndarray, np.ndarray]]:
        samples = list(pictures("train", 6))
        return [
            (name, image, np.full_like(label, IGNORE_INDEX) if index % 3 else label)
            for index, (name, image, label) in enumerate(samples)
        ]

    write_store(tmp_path / "store", TABLE, {"train": voided(), "val": pictures("val", 3)})
    config = override(
        config,
        changes
        | {
            "data.store": str(tmp_path / "store"),
            "schedule.global_batch_size": 1,
            "data.class_uniform_share": 0.0,
        },
    )
    with np.errstate(all="raise"):
        reports = trained(override(config, {"model.freeze_batch_norm": "all"}), tmp_path / "run")
    for report in reports:
        assert all(math.isfinite(value) for value in report.values() if isinstance(value, float)), report
    assert 0 < reports[-1]["loss"] < math.inf
    assert weights_digest(tmp_path / "run")

"""Laws of the demo data set: official layout and ids, the same bytes always, whole files, streets worth learning."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspnet.errors import InputError
from pspnet.labels import CITYSCAPES, IGNORE_INDEX
from segfleet.sources.cityscapes import cityscapes_source
from segfleet.sources.demo import CITIES, draw_demo, draw_scene

SIZE = (128, 64)
NUM_VAL = 16


@pytest.fixture(scope="module")
def val_scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    return [draw_scene(seed=0, split="val", index=index, size=(256, 128)) for index in range(NUM_VAL)]


def digests(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.png"))}


def test_folders_names_and_ids_are_official_so_the_cityscapes_reader_reads_it(tmp_path: Path) -> None:
    report = draw_demo(tmp_path, num_train=7, num_val=4, size=SIZE)
    assert (report.num_drawn, report.num_kept, report.num_removed) == (11, 0, 0)
    source = cityscapes_source(tmp_path)
    listing = source.listing()
    assert listing.notes == []
    assert [pair.split for pair in listing.pairs] == ["train"] * 7 + ["val"] * 4
    for pair in listing.pairs:
        image, ids = source.read(pair)
        assert ids is not None
        assert image.shape == (64, 128, 3)
        assert image.dtype == np.uint8
        assert ids.shape == (64, 128)
        source.class_table.train_id_of(ids, where=pair.name)
    assert set(CITIES["train"]).isdisjoint(CITIES["val"])
    for split in ("train", "val"):
        city = CITIES[split][0]
        for path in (
            f"leftImg8bit/{split}/{city}/{city}_000001_000019_leftImg8bit.png",
            f"gtFine/{split}/{city}/{city}_000001_000019_gtFine_labelIds.png",
        ):
            with Image.open(tmp_path / path) as picture:
                assert picture.mode == ("RGB" if "leftImg8bit" in path else "L")
                assert picture.size == SIZE


def test_bytes_do_not_depend_on_the_number_of_scenes_or_processes(tmp_path: Path) -> None:
    draw_demo(tmp_path / "few", num_train=2, num_val=1, size=SIZE, seed=5)
    draw_demo(tmp_path / "many", num_train=12, num_val=4, size=SIZE, seed=5, num_processes=2)
    few, many = digests(tmp_path / "few"), digests(tmp_path / "many")
    assert len(few) == 6
    assert len(many) == 32
    assert few == {name: many[name] for name in few}


def test_another_seed_split_or_index_is_another_street() -> None:
    drawn = [
        draw_scene(seed=seed, split=split, index=index, size=SIZE)[1].tobytes()
        for seed, split, index in ((0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 8))
    ]
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("size", [(512, 256), (97, 33), (64, 200), (300, 300)])
def test_any_size(size: tuple[int, int]) -> None:
    image, ids = draw_scene(seed=3, split="train", index=1, size=size)
    assert image.shape == (size[1], size[0], 3)
    assert ids.shape == (size[1], size[0])


def test_one_scene_is_the_same_street_at_every_size() -> None:
    _, small = draw_scene(seed=0, split="train", index=3, size=(128, 64))
    _, large = draw_scene(seed=0, split="train", index=3, size=(512, 256))
    assert (small == large[2::4, 2::4]).mean() > 0.9


def test_all_19_classes_occur_in_16_validation_scenes(
    val_scenes: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    ids = np.concatenate([ids for _, ids in val_scenes])
    counts = np.bincount(CITYSCAPES.train_id_of(ids, where="demo").ravel(), minlength=IGNORE_INDEX + 1)[:19]
    missing = [name for name, count in zip(CITYSCAPES.class_names, counts, strict=True) if count < 30]
    assert not missing


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_all_19_classes_occur_whatever_the_seed(seed: int) -> None:
    ids = np.concatenate(
        [draw_scene(seed=seed, split="val", index=index, size=(256, 128))[1] for index in range(NUM_VAL)]
    )
    assert len(np.unique(CITYSCAPES.train_id_of(ids, where="demo"))) == 20


def test_classes_are_about_as_frequent_as_in_cityscapes(
    val_scenes: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    ids = np.concatenate([ids for _, ids in val_scenes])
    share = {info.name: float((ids == info.id).mean()) for info in CITYSCAPES.classes}
    for name, low, high in (
        ("road", 0.28, 0.40),
        ("building", 0.14, 0.28),
        ("vegetation", 0.08, 0.22),
        ("sky", 0.02, 0.12),
        ("car", 0.03, 0.11),
        ("sidewalk", 0.03, 0.09),
        ("pole", 0.005, 0.03),
        ("person", 0.003, 0.02),
    ):
        assert low < share[name] < high, f"{name}: {share[name]:.3f}"
    ignored = sum(share[info.name] for info in CITYSCAPES.classes if info.train_id == IGNORE_INDEX)
    assert ignored < 0.08


def test_labels_end_where_the_picture_changes(val_scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Across a label's edge the picture changes more than the same rows and columns shifted by 6 pixels do."""
    at_edge, beside_edge = [], []
    for image, ids in val_scenes:
        change = np.abs(np.diff(image.astype(int), axis=1)).sum(2)
        edge = ids[:, 1:] != ids[:, :-1]
        at_edge.append(change[edge])
        beside_edge.append(np.roll(change, 6, axis=1)[edge & ~np.roll(edge, -6, axis=1)])
    assert np.concatenate(at_edge).mean() > 1.8 * np.concatenate(beside_edge).mean()


def test_colour_alone_does_not_give_the_class(val_scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """The best guess by coarse colour is far from right, or the demo would teach nothing about a network."""
    colours = np.concatenate([(image // 32).reshape(-1, 3) @ [64, 8, 1] for image, _ in val_scenes])
    target = np.concatenate([CITYSCAPES.train_id_of(ids, where="demo").ravel() for _, ids in val_scenes])
    valid = target != IGNORE_INDEX
    counts = np.zeros((512, 19), int)
    np.add.at(counts, (colours[valid], target[valid]), 1)
    accuracy = counts.max(1).sum() / counts.sum()
    assert 0.35 < accuracy < 0.75


def test_drawing_again_keeps_what_is_there(tmp_path: Path) -> None:
    draw_demo(tmp_path, num_train=2, num_val=1, size=SIZE)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    report = draw_demo(tmp_path, num_train=3, num_val=1, size=SIZE)
    assert (report.num_drawn, report.num_kept) == (1, 3)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_a_damaged_or_lost_file_is_drawn_again(tmp_path: Path) -> None:
    draw_demo(tmp_path, num_train=2, num_val=1, size=SIZE)
    whole = digests(tmp_path)
    first, second = sorted(tmp_path.rglob("*labelIds.png"))[:2]
    first.write_bytes(first.read_bytes()[:100])
    second.unlink()
    assert draw_demo(tmp_path, num_train=2, num_val=1, size=SIZE).num_drawn == 2
    assert digests(tmp_path) == whole


def test_other_settings_replace_the_earlier_scenes(tmp_path: Path) -> None:
    draw_demo(tmp_path / "changed", num_train=3, num_val=2, size=SIZE, seed=1)
    report = draw_demo(tmp_path / "changed", num_train=2, num_val=1, size=(64, 64), seed=2)
    assert (report.num_drawn, report.num_removed) == (3, 10)
    draw_demo(tmp_path / "fresh", num_train=2, num_val=1, size=(64, 64), seed=2)
    assert digests(tmp_path / "changed") == digests(tmp_path / "fresh")


def test_killed_it_leaves_no_half_picture_and_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "killed"
    code = (
        "from segfleet.sources.demo import draw_demo\n"
        f"draw_demo({str(root)!r}, num_train=60, num_val=1, size={SIZE})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(root.rglob("*.png"))) < 6 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = sorted(root.rglob("*.png"))
    assert 6 <= len(left) < 122
    for path in left:
        with Image.open(path) as image:
            image.load()
    report = draw_demo(root, num_train=8, num_val=1, size=SIZE)
    assert report.num_kept >= 2
    draw_demo(tmp_path / "whole", num_train=8, num_val=1, size=SIZE)
    assert digests(root) == digests(tmp_path / "whole")
    assert not list(root.rglob("*.part"))


def test_a_folder_with_other_images_is_refused_and_untouched(tmp_path: Path) -> None:
    own = tmp_path / "leftImg8bit" / "train" / "aachen" / "aachen_000000_000019_leftImg8bit.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    with pytest.raises(InputError, match="Give another --root"):
        draw_demo(tmp_path, num_train=1, num_val=1, size=SIZE)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [own]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train": 0}, "num_train must be 1 or more, but got 0"),
        ({"num_val": -1}, "num_val must be 1 or more"),
        ({"seed": -3}, "seed must be 0 or more"),
        ({"size": (16, 64)}, "32 to 4096 pixels, but got 16 x 64"),
        ({"num_processes": 0}, "num_processes must be 1 or more"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    arguments = {"num_train": 1, "num_val": 1, "size": SIZE, **change}
    with pytest.raises(InputError, match=message):
        draw_demo(tmp_path / "demo", **arguments)
    assert not (tmp_path / "demo").exists()


def test_a_file_as_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="root must be"):
            draw_demo(root, num_train=1, num_val=1, size=SIZE)


def test_the_folder_says_how_it_was_drawn(tmp_path: Path) -> None:
    draw_demo(tmp_path, num_train=1, num_val=1, size=SIZE, seed=7)
    settings = json.loads((tmp_path / "demo.json").read_text())
    assert (settings["seed"], settings["width"], settings["height"]) == (7, 128, 64)

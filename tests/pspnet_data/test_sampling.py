"""Laws of sampling by class: mmseg's rule on the finished crop, equal classes, the same windows on any workers."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pspnet import sampling
from pspnet.data import Batch, draw_sample, train_batches
from pspnet.errors import InputError
from pspnet.labels import IGNORE_INDEX, NYUV2_13
from pspnet.photometric import Photometric
from pspnet.sampling import ClassPixels, class_uniform, draw_focus, is_mixed, place_window
from pspnet.store import Split
from pspnet.transforms import Sample, prepare_batch
from tests.stores import write_store

NUM_CLASSES, RARE, ABSENT = 13, 5, 12
DRAW: dict[str, Any] = {
    "min_scale": 0.5,
    "max_scale": 2.0,
    "flip_probability": 0.5,
    "rotate_degrees": 10.0,
    "blur_probability": 0.5,
}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """12 images mostly of one class each, a patch of another, ignored stripes; 4 pixels of a rare class in one."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(12):
        size = (64 + 5 * number, 120 - 7 * number)
        label = np.full(size, number % 4, dtype=np.uint8)
        top, left = rng.integers(0, 30, 2)
        label[top : top + 30, left : left + 25] = 6 + number % 5
        label[:, 3::11] = IGNORE_INDEX
        if number == 7:
            label[40:42, 60:62] = RARE
        samples.append((f"image{number}", rng.integers(0, 256, (*size, 3), dtype=np.uint8), label))
    path = tmp_path_factory.mktemp("store") / "store"
    return write_store(path, NYUV2_13, {"train": samples}).split("train")


def finished_label(split: Split, sample: Sample, size: int) -> np.ndarray:
    """Resize the whole label to the nearest pixels, then cut the crop out of it; not turned, not mirrored."""
    rows, columns = (
        (2 * np.arange(scaled) + 1) * extent // (2 * scaled)
        for extent, scaled in zip(sample.size, sample.scaled_size, strict=True)
    )
    label = split.label(sample.index)
    assert label is not None
    whole = np.pad(label[np.ix_(rows, columns)], size, constant_values=IGNORE_INDEX)
    return whole[sample.top + size :, sample.left + size :][:size, :size]


def mmseg_accepts(label: np.ndarray, cat_max_ratio: float) -> bool:
    train_ids, counts = np.unique(label, return_counts=True)
    counts = counts[train_ids != IGNORE_INDEX]
    return len(counts) > 1 and bool(np.max(counts) / np.sum(counts) < cat_max_ratio)


def drawn(split: Split, position: int, size: int) -> Sample:
    index = position % len(split)
    return draw_sample(
        seed=1,
        epoch=0,
        position=position,
        index=index,
        size=split.size(index),
        crop_size=size,
        is_photometric=True,
        **DRAW,
    )


@pytest.mark.parametrize("share", [0.6, 0.75, 0.9])
def test_a_window_keeps_mmsegs_rule_or_was_placed_anew_ten_times(
    split: Split, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[Sample] = []
    count = sampling._window_counts

    def spied(sample: Sample, split: Split, crop_size: int) -> np.ndarray:
        looked_at.append(sample)
        return count(sample, split, crop_size)

    monkeypatch.setattr(sampling, "_window_counts", spied)
    read = Split.read_window

    def read_label(split: Split, index: int, *, image: None, **rest: Any) -> None:
        assert image is None
        read(split, index, image=image, **rest)

    monkeypatch.setattr(Split, "read_window", read_label)
    tries: Counter[int] = Counter()
    for position in range(120):
        first = drawn(split, position, 41)
        looked_at.clear()
        placed = place_window(
            first,
            split,
            seed=1,
            epoch=0,
            position=position,
            crop_size=41,
            focus=None,
            max_class_share=share,
        )
        assert replace(placed, top=first.top, left=first.left) == first
        assert looked_at[0] == first
        accepted = [mmseg_accepts(finished_label(split, sample, 41), share) for sample in looked_at]
        assert not any(accepted[:-1])
        if accepted[-1]:
            assert placed == looked_at[-1]
        else:
            assert len(accepted) == 10
        tries[len(accepted)] += 1
    assert min(tries[1], tries[10], sum(tries[number] for number in range(2, 10))) > 0, tries


def test_a_share_of_one_takes_every_window_and_one_class_is_never_mixed(split: Split) -> None:
    sample = drawn(split, 0, 41)
    assert (
        place_window(
            sample,
            split,
            seed=1,
            epoch=0,
            position=0,
            crop_size=41,
            focus=None,
            max_class_share=1.0,
        )
        is sample
    )
    assert not is_mixed(np.array([0, 7, 0]), 0.9)
    assert not is_mixed(np.array([0, 0, 0]), 0.9)
    assert not is_mixed(np.array([3, 1]), 0.75)
    assert is_mixed(np.array([3, 2]), 0.75)


def test_which_images_hold_which_class_is_found_out(split: Split) -> None:
    classes = class_uniform(split, 0.5)
    assert ABSENT not in classes.images
    assert classes.images[RARE].tolist() == [7]
    for train_id in range(NUM_CLASSES):
        expected = [index for index in range(len(split)) if (split.label(index) == train_id).any()]
        assert classes.images.get(train_id, np.array([])).tolist() == expected


def test_every_class_that_there_is_is_drawn_equally_often(split: Split) -> None:
    classes = class_uniform(split, 1.0)
    number = 4000
    found = [draw_focus(classes, seed=0, epoch=3, position=position) for position in range(number)]
    assert found == [draw_focus(classes, seed=0, epoch=3, position=position) for position in range(number)]
    counts = Counter(focus.train_id for focus in found)
    assert set(counts) == set(classes.images)
    chance = 1 / len(classes.images)
    bound = 4 * (number * chance * (1 - chance)) ** 0.5
    assert all(abs(count - number * chance) < bound for count in counts.values())
    of_class_0 = Counter(focus.index for focus in found if focus.train_id == 0)
    assert set(of_class_0) == set(classes.images[0].tolist())
    some = [draw_focus(replace(classes, share=0.3), seed=0, epoch=3, position=p) for p in range(number)]
    assert abs(sum(focus is not None for focus in some) / number - 0.3) < 0.03


@pytest.mark.parametrize("max_class_share", [1.0, 0.75])
@pytest.mark.parametrize("size", [33, 97])
def test_a_window_holds_a_pixel_of_the_class_that_was_drawn(
    split: Split, size: int, max_class_share: float
) -> None:
    classes = class_uniform(split, 1.0)
    for position in range(150):
        focus = draw_focus(classes, seed=1, epoch=0, position=position)
        sample = draw_sample(
            seed=1,
            epoch=0,
            position=position,
            index=focus.index,
            size=split.size(focus.index),
            crop_size=size,
            **DRAW,
        )
        placed = place_window(
            sample,
            split,
            seed=1,
            epoch=0,
            position=position,
            crop_size=size,
            focus=focus,
            max_class_share=max_class_share,
        )
        assert (finished_label(split, placed, size) == focus.train_id).any()
        for offset, scaled in zip((placed.top, placed.left), placed.scaled_size, strict=True):
            assert 0 <= offset <= scaled - size or (scaled < size and offset == -((size - scaled) // 2))


@pytest.mark.parametrize("scaled_size", [(10, 21), (3, 4), (5, 7)])
def test_pixels_of_a_class_are_drawn_from_the_scaled_label_with_equal_chances(
    scaled_size: tuple[int, int],
) -> None:
    label = np.random.default_rng(3).integers(0, 3, (5, 7))
    rows, columns = (
        (2 * np.arange(scaled) + 1) * extent // (2 * scaled)
        for extent, scaled in zip(label.shape, scaled_size, strict=True)
    )
    places = np.argwhere(label[np.ix_(rows, columns)] == 1)
    pixels = ClassPixels(label == 1, scaled_size)
    number = 300 * len(places)
    found = Counter(pixels.draw(chances) for chances in np.random.default_rng(0).random((number, 2)))
    assert set(found) == {tuple(place) for place in places.tolist()}
    assert all(abs(count - 300) < 5 * 300**0.5 for count in found.values())


def test_a_class_that_the_scaled_label_has_lost_is_looked_for_where_it_was() -> None:
    mask = np.zeros((8, 8), dtype=bool)
    mask[2, 4] = True  # at half the size every second row and column from 1 on is left
    assert ClassPixels(mask, (4, 4)).draw(np.array([0.3, 0.9])) == (1, 2)


ALL: dict[str, Any] = {**DRAW, "is_photometric": True, "max_class_share": 0.75, "seed": 3, "crop_size": 41}


def batches(split: Split, rank: int, world_size: int, **changes: Any) -> list[Batch]:
    settings = {
        **ALL,
        "epoch": 2,
        "global_batch_size": 6,
        "classes": class_uniform(split, 0.5),
        "num_prefetch_threads": 1 + rank,
        **changes,
    }
    return list(train_batches(split, rank=rank, world_size=world_size, **settings))


def contents(batch: Batch) -> list[tuple[Any, ...]]:
    images, targets = prepare_batch(
        batch, crop_size=41, mean=(100.0, 110.0, 120.0), std=(50.0, 60.0, 70.0), device="cpu"
    )
    return [
        (name, image.numpy().tobytes(), target.numpy().tobytes())
        for name, image, target in zip(batch.names, images, targets, strict=True)
    ]


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_same_windows_are_seen_for_any_number_of_workers_with_all_options(
    split: Split, world_size: int
) -> None:
    alone = [sorted(contents(batch)) for batch in batches(split, 0, 1)]
    ranks = [batches(split, rank, world_size) for rank in range(world_size)]
    together = [
        sorted(row for batch in iteration for row in contents(batch))
        for iteration in zip(*ranks, strict=True)
    ]
    assert together == alone
    assert [len(rows) for rows in alone] == [6, 6]


def test_starting_in_the_middle_gives_the_rest_of_the_epoch_with_all_options(split: Split) -> None:
    whole = [contents(batch) for batch in batches(split, 0, 1, global_batch_size=2)]
    rest = [contents(batch) for batch in batches(split, 0, 1, global_batch_size=2, start_iteration=2)]
    assert len(whole) == 6
    assert rest == whole[2:]


def test_each_option_alone_changes_only_what_it_is_for(split: Split) -> None:
    off = {"is_photometric": False, "max_class_share": 1.0, "classes": None}
    plain = [sample for batch in batches(split, 0, 1, **off) for sample in batch.samples]
    varied = [
        sample
        for batch in batches(split, 0, 1, **{**off, "is_photometric": True})
        for sample in batch.samples
    ]
    assert [replace(sample, photometric=None) for sample in varied] == plain
    assert any(isinstance(sample.photometric, Photometric) for sample in varied)
    moved = [
        sample
        for batch in batches(split, 0, 1, **{**off, "max_class_share": 0.75})
        for sample in batch.samples
    ]
    assert [replace(sample, top=0, left=0) for sample in moved] == [
        replace(sample, top=0, left=0) for sample in plain
    ]
    assert moved != plain


def test_a_training_image_without_a_label_is_refused(tmp_path: Path) -> None:
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    split = write_store(tmp_path / "store", NYUV2_13, {"train": [("alone", image, None)]}).split("train")
    with pytest.raises(InputError, match="must have a label, but alone has none"):
        class_uniform(split, 0.5)

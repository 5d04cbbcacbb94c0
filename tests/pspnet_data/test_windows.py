"""Laws of reading: a window is resize-then-crop of the whole; every worker count sees the same windows."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from pspnet import transforms
from pspnet.data import _read_batch, draw_sample, epoch_order, num_iterations, shard_indices, train_batches
from pspnet.errors import InputError
from pspnet.labels import IGNORE_INDEX, NYUV2_13
from pspnet.photometric import Photometric
from pspnet.sizes import Size, sides
from pspnet.store import Store, publish_store, write_shard
from pspnet.transforms import Sample, blur, crop, normalise, prepare_batch, source_window

MEAN = (100.0, 110.0, 120.0)
TIE = 200
DRAW: dict[str, Any] = {
    "min_scale": 0.5,
    "max_scale": 2.0,
    "flip_probability": 0.5,
    "rotate_degrees": 10.0,
    "blur_probability": 0.5,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    aside = folder / "aside"
    aside.mkdir()
    shards = []
    for shard in range(2):
        samples = []
        for number in range(5):
            size = (50 + 7 * number, 80 - 3 * shard)
            image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            samples.append((f"image{shard}{number}", image, rng.integers(0, 13, size, dtype=np.uint8)))
        shards.append(write_shard(aside / f"train-{shard}.arrow", samples, num_classes=13))
    publish_store(
        aside, folder / "store", name="random", class_table=NYUV2_13, splits={"train": shards}, source={}
    )
    return Store.open(folder / "store")


def whole_then_crop(image: np.ndarray, label: np.ndarray, sample: Sample, size: Size) -> tuple[Any, Any]:
    """Resize the whole image with torch's own interpolation in float64, then cut the crop out of it."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].double()
    whole = functional.interpolate(pixels, size=sample.scaled_size, mode="bilinear", align_corners=False)[0]
    ids = torch.from_numpy(label.copy())[None, None].double()
    labels = functional.interpolate(ids, size=sample.scaled_size, mode="nearest-exact")[0, 0]
    for axis in (
        0,
        1,
    ):  # torch decides ties, where a centre falls between two pixels, by float32: not compared
        doubled = (2 * torch.arange(sample.scaled_size[axis]) + 1) * sample.size[axis]
        labels.index_fill_(axis, torch.nonzero(doubled % (2 * sample.scaled_size[axis]) == 0)[:, 0], TIE)
    out = torch.tensor(MEAN, dtype=torch.float64)[:, None, None].repeat(1, *sides(size))
    out_label = torch.full(sides(size), IGNORE_INDEX)
    for y in range(sides(size)[0]):
        for x in range(sides(size)[1]):
            row, column = sample.top + y, sample.left + x
            if 0 <= row < sample.scaled_size[0] and 0 <= column < sample.scaled_size[1]:
                out[:, y, x] = whole[:, row, column]
                out_label[y, x] = int(labels[row, column])
    return (out.flip(-1), out_label.flip(-1)) if sample.flip else (out, out_label)


@pytest.mark.parametrize("size", [33, 65, 97, "33x64", "97x33"])
def test_a_window_read_is_the_resize_of_the_whole_then_crop(store: Store, size: Size) -> None:
    split = store.split("train")
    num_padded = 0
    for position in range(12):
        index = position % len(split)
        sample = draw_sample(
            seed=1,
            epoch=0,
            position=position,
            index=index,
            size=split.size(index),
            crop_size=size,
            **{**DRAW, "rotate_degrees": 0.0, "blur_probability": 0.0},
        )
        area = source_window(sample, size)
        image, label = split.window(index, top=area.top, left=area.left, height=area.height, width=area.width)
        assert label is not None
        got, got_label = crop(
            torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label), sample, size, mean=MEAN
        )
        whole_label = split.label(index)
        assert whole_label is not None
        expected, expected_label = whole_then_crop(split.image(index), whole_label, sample, size)
        assert (got.double() - expected).abs().max() < 1e-4
        compared = expected_label != TIE
        assert torch.equal(got_label.long()[compared], expected_label[compared])
        assert compared.float().mean() > 0.4
        num_padded += bool((expected_label == IGNORE_INDEX).any())
        assert area.height <= math.ceil(sides(size)[0] * sample.size[0] / sample.scaled_size[0]) + 2
    assert num_padded > 0


def test_a_turn_by_nothing_is_upright_and_by_90_degrees_is_a_transposition(store: Store) -> None:
    split = store.split("train")
    image = torch.from_numpy(split.image(0).copy()).permute(2, 0, 1)
    label = torch.from_numpy(np.array(split.label(0)))
    sample = Sample(index=0, size=split.size(0), scaled_size=split.size(0), top=5, left=20)
    for angle, turn in ((1e-9, 0), (90.0, 1)):
        turned = Sample(**{**vars(sample), "angle": angle})
        area = source_window(turned, 33)
        rows, columns = slice(area.top, area.top + area.height), slice(area.left, area.left + area.width)
        got, got_label = crop(image[:, rows, columns], label[rows, columns], turned, 33, mean=MEAN)
        upright, upright_label = image[:, 5:38, 20:53].float(), label[5:38, 20:53]
        expected = torch.rot90(upright, -turn, (1, 2))
        assert torch.equal(got_label, torch.rot90(upright_label, -turn))
        assert (got - expected).abs().max() < 1e-2


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("size", [(33, 65), (65, 41)])
def test_a_rectangle_is_the_middle_of_the_square_around_it_however_it_is_turned(
    store: Store, size: tuple[int, int], is_compiled: bool, flip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms, "_HAS_NUMBA", is_compiled)
    split, (height, width) = store.split("train"), size
    down, across = (65 - height) // 2, (65 - width) // 2
    colours = Photometric(brightness=3.0, contrast=1.1, saturation=0.9, hue=4)
    for angle, photometric in ((0.0, None), (0.0, colours), (9.0, None), (-40.0, None)):
        sample = Sample(0, split.size(0), (90, 131), 7, 21, flip, angle, photometric=photometric)
        around = replace(sample, top=7 - down, left=21 - across)
        (images, targets), (whole, labels) = (
            prepare_batch(
                _read_batch(split, [it], side), crop_size=side, mean=MEAN, std=(50.0,) * 3, device="cpu"
            )
            for it, side in ((sample, size), (around, 65))
        )
        middle = (..., slice(down, down + height), slice(across, across + width))
        assert images.shape == (1, 3, *size)
        torch.testing.assert_close(images, whole[middle], atol=2e-4, rtol=0)
        assert torch.equal(targets, labels[middle])


def test_a_square_given_as_a_rectangle_is_the_square(store: Store) -> None:
    split, found = store.split("train"), []
    for size in (65, "65x65", (65, 65)):
        draw = {**DRAW, "is_photometric": True, "max_class_share": 0.1}
        batches = train_batches(
            split, seed=5, epoch=0, rank=0, world_size=1, global_batch_size=10, crop_size=size, **draw
        )
        batch = next(iter(batches))
        images, targets = prepare_batch(batch, crop_size=size, mean=MEAN, std=MEAN, device="cpu")
        found.append((images, targets))
    for images, targets in found[1:]:
        assert torch.equal(images, found[0][0])
        assert torch.equal(targets, found[0][1])


@pytest.mark.parametrize("size", [33, 41, 97, "41x97", "97x33"])
def test_a_crop_on_the_cpu_is_the_plain_crop_normalised(store: Store, size: Size) -> None:
    """The banded products of pspnet.cpu_crop against transforms.crop, over every mixture of turn, blur and flip."""
    split = store.split("train")
    std = (50.0, 60.0, 70.0)
    kinds = set()
    batches = (
        batch
        for epoch in range(4)
        for batch in train_batches(
            split, seed=5, epoch=epoch, rank=0, world_size=1, global_batch_size=10, crop_size=size, **DRAW
        )
    )
    for batch in batches:
        images, targets = prepare_batch(batch, crop_size=size, mean=MEAN, std=std, device="cpu")
        assert images.is_contiguous(memory_format=torch.channels_last)
        for window, label, sample, image, target in zip(
            batch.windows, batch.targets, batch.samples, images, targets, strict=True
        ):
            plain, plain_label = crop(window, label, sample, size, mean=MEAN)
            difference = (image - normalise(plain, MEAN, std)).abs().max()
            # grid_sample takes float32 coordinates: a turned crop is 1e-2 grey levels of 50 uncertain
            assert difference < (2e-4 if sample.angle else 1e-5)
            # ... and its labels are read in fixed point: where two pixels are equally near, either may be taken
            assert (target != plain_label.long()).float().mean() <= (1e-3 if sample.angle else 0)
            kinds.add((sample.angle != 0, sample.is_blurred, sample.flip))
    assert len(kinds) == 8


def test_a_blur_has_the_weights_1_4_6_4_1_along_rows_and_columns() -> None:
    image = torch.zeros(3, 9, 9)
    image[:, 4, 4] = 256
    weights = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0])
    assert torch.equal(blur(image)[:, 2:7, 2:7], torch.outer(weights, weights).expand(3, 5, 5))
    assert blur(image).sum() == 3 * 256


def test_a_blur_is_semsegs_call_of_opencv() -> None:
    """Of whole grey levels both are exact: multiples of 1/256; of uint8 OpenCV rounds them, halves upwards."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV is in the extra bench")
    image = np.random.default_rng(0).integers(0, 256, (41, 57, 3), dtype=np.uint8)
    levels = np.float32(image)
    found = blur(torch.from_numpy(levels).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found, cv2.GaussianBlur(levels, (5, 5), 0))
    np.testing.assert_array_equal(np.floor(found + 0.5), cv2.GaussianBlur(image, (5, 5), 0))


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_the_same_windows_are_seen_for_any_number_of_workers(store: Store, world_size: int) -> None:
    split = store.split("train")

    def seen(world_size: int) -> dict[int, list[Any]]:
        found: dict[int, list[Any]] = {}
        for rank in range(world_size):
            batches = train_batches(
                split,
                seed=3,
                epoch=2,
                rank=rank,
                world_size=world_size,
                global_batch_size=6,
                crop_size=41,
                num_prefetch_threads=1 + rank,
                **DRAW,
            )
            for iteration, batch in enumerate(batches):
                images, targets = prepare_batch(
                    batch, crop_size=41, mean=MEAN, std=(50, 60, 70), device="cpu"
                )
                rows = zip(batch.names, images, targets, strict=True)
                found.setdefault(iteration, []).extend(
                    (n, i.numpy().tobytes(), t.numpy().tobytes()) for n, i, t in rows
                )
        return {iteration: sorted(rows) for iteration, rows in found.items()}

    assert seen(world_size) == seen(1)
    assert [len(rows) for rows in seen(world_size).values()] == [6]


def test_starting_in_the_middle_of_an_epoch_gives_the_rest_of_it(store: Store) -> None:
    split = store.split("train")

    def names(start: int) -> list[list[str]]:
        batches = train_batches(
            split,
            seed=3,
            epoch=0,
            rank=0,
            world_size=1,
            global_batch_size=2,
            crop_size=33,
            start_iteration=start,
            max_iterations=4,
            **DRAW,
        )
        return [batch.names for batch in batches]

    assert len(names(0)) == 4
    assert names(2) == names(0)[2:]


def test_an_epoch_is_a_permutation_and_each_differs() -> None:
    orders = [epoch_order(100, seed=0, epoch=epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] == epoch_order(100, seed=0, epoch=0).tolist()


@pytest.mark.parametrize(("num_images", "world_size"), [(10, 3), (2, 4), (7, 1), (0, 2)])
def test_evaluation_shards_hold_each_image_once(num_images: int, world_size: int) -> None:
    shards = [shard_indices(num_images, rank, world_size) for rank in range(world_size)]
    assert sorted(index for shard in shards for index in shard) == list(range(num_images))


def test_a_batch_that_the_split_cannot_fill_is_refused(store: Store) -> None:
    split = store.split("train")
    assert num_iterations(len(split), 4) == 2
    assert num_iterations(len(split), 4, 1) == 1
    with pytest.raises(InputError, match="at most the number of training images, 10, but got 11"):
        num_iterations(len(split), 11)


def test_scales_flips_and_places_cover_their_ranges() -> None:
    samples = [
        draw_sample(seed=0, epoch=0, position=position, index=0, size=(100, 200), crop_size=33, **DRAW)
        for position in range(400)
    ]
    scales = [sample.scaled_size[1] / 200 for sample in samples]
    assert 0.5 <= min(scales) < 0.55
    assert 1.95 < max(scales) <= 2.0
    assert 0.4 < np.mean([sample.flip for sample in samples]) < 0.6
    assert 0.4 < np.mean([sample.angle != 0 for sample in samples]) < 0.6
    assert max(abs(sample.angle) for sample in samples) <= 10
    assert {sample.top for sample in samples} >= {0}
    assert all(0 <= sample.top <= sample.scaled_size[0] - 33 for sample in samples)


def test_a_store_whose_files_are_gone_or_altered_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no manifest\.json"):
        Store.open(tmp_path)
    with pytest.raises(InputError, match=r"no split 'test'\. There are: train"):
        store.split("test")
    for content, message in (
        ("{", "must be JSON"),
        ('{"format": 99}', "of format 99"),
        ("[]", "has no format"),
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(InputError, match=message):
            Store.open(tmp_path)
    text = (Path(store.location.path) / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"digest": "', '"digest": "0', 1))
    with pytest.raises(InputError, match="digest"):
        Store.open(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="cannot be read"):
        Store.open(tmp_path).split("train")

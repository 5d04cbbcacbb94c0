"""Laws of photometric distortion: OpenCV's colours, mmsegmentation's steps, padding left alone, CPU = plain crop."""

import colorsys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pspnet.cpu_crop import crop_into
from pspnet.cpu_photometric import OUTSIDE, distort_into
from pspnet.labels import IGNORE_INDEX
from pspnet.photometric import Photometric, distort, draw_photometric, from_hsv, to_hsv
from pspnet.transforms import Sample, crop, normalise, source_window

MEAN, STD = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)


@pytest.fixture
def image() -> Tensor:
    """Whole grey levels (3, 24, 40): noise above, nearly grey below."""
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (3, 12, 40))
    grey = rng.integers(0, 248, (1, 12, 40)) + rng.integers(0, 8, (3, 12, 40))
    return torch.from_numpy(np.concatenate([noise, grey], axis=1)).float()


def test_colours_turn_into_those_of_opencv_and_back() -> None:
    table = np.loadtxt(Path(__file__).parent / "opencv_hsv.csv", delimiter=",", skiprows=2, dtype=np.int64)
    rgb, hsv, back = torch.from_numpy(table).float().T.split(3)
    assert torch.equal(torch.stack(to_hsv(rgb)), hsv)
    difference = (from_hsv(hsv[0], hsv[1], hsv[2]) - back).abs()
    # OpenCV fuses a multiplication with an addition: what is a whole number may be cut to the one below
    assert difference.max() <= 1
    assert difference.count_nonzero() <= 2


def test_hue_saturation_and_value_are_those_of_colorsys(image: Tensor) -> None:
    hue, saturation, value = (plane.flatten().tolist() for plane in to_hsv(image))
    for pixel, h, s, v in zip(image.flatten(1).T.tolist(), hue, saturation, value, strict=True):
        turn, share, level = colorsys.rgb_to_hsv(*pixel)
        assert 0 <= h < 180
        assert abs((h - turn * 180 + 90) % 180 - 90) <= 0.66  # rounded, by factors of 12 bits; 0 is 180
        assert abs(s - share * 255) <= 0.54
        assert v == level


def test_a_step_is_what_one_would_write_with_colorsys(image: Tensor) -> None:
    """Saturation, then hue, each from rounded to cut values: within two levels of the real numbers' result."""
    got = distort(image, Photometric(saturation=1.3, hue=-7)).flatten(1).T.tolist()
    for pixel, found in zip(image.flatten(1).T.tolist(), got, strict=True):
        turn, share, level = colorsys.rgb_to_hsv(*pixel)
        expected = colorsys.hsv_to_rgb((turn - 7 / 180) % 1, min(1.0, share * 1.3), level)
        # each of hue and saturation is half a step off, twice: a step of hue is level / 30 at most
        assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) <= 3 + level / 30


def test_brightness_and_contrast_are_clipped_and_cut(image: Tensor) -> None:
    levels = torch.tensor([0.0, 10.0, 100.0, 250.0]).expand(3, 4)
    brighter = distort(levels, Photometric(brightness=7.6))
    assert brighter[0].tolist() == [7, 17, 107, 255]
    assert distort(levels, Photometric(brightness=-20.5))[0].tolist() == [0, 0, 79, 229]
    assert distort(levels, Photometric(contrast=1.25))[0].tolist() == [0, 12, 125, 255]
    # 17 * 1.25 = 21.25; on grey the steps in between change nothing
    assert distort(levels, Photometric(brightness=7.6, contrast=1.25))[0].tolist() == [8, 21, 133, 255]
    turned = distort(image, Photometric(contrast=1.4, hue=5, is_contrast_first=True))
    by_hand = distort(distort(image, Photometric(contrast=1.4)), Photometric(hue=5))
    assert torch.equal(turned, by_hand)
    turned = distort(image, Photometric(contrast=1.4, hue=5))
    assert torch.equal(turned, distort(distort(image, Photometric(hue=5)), Photometric(contrast=1.4)))


def test_steps_are_drawn_in_mmsegs_ranges_each_for_half_of_the_windows() -> None:
    number = 4000
    drawn = [draw_photometric(seed=2, epoch=1, position=position) for position in range(number)]
    assert drawn == [draw_photometric(seed=2, epoch=1, position=position) for position in range(number)]
    assert abs(sum(steps is None for steps in drawn) / number - 1 / 16) < 0.02
    steps = [found or Photometric() for found in drawn]
    for name, low, high in (("brightness", -32, 32), ("contrast", 0.5, 1.5), ("saturation", 0.5, 1.5)):
        values = [getattr(found, name) for found in steps if getattr(found, name) is not None]
        assert abs(len(values) / number - 0.5) < 0.04
        margin = (high - low) / 100
        assert low <= min(values) < low + margin
        assert high - margin < max(values) < high
    assert {found.hue for found in steps} == {None, *range(-18, 18)}
    assert abs(sum(found.is_contrast_first for found in drawn if found) / number - 15 / 32) < 0.04


def test_the_compiled_loop_gives_the_same_numbers(image: Tensor) -> None:
    image = image[:, :, :24]
    mean = torch.tensor(MEAN)  # whole numbers: what is subtracted and added again is exact
    for position in range(60):
        steps = draw_photometric(seed=4, epoch=0, position=position) or Photometric()
        found = (image.permute(1, 2, 0) - mean).contiguous()
        ids = torch.zeros(image.shape[1:], dtype=torch.int64)
        ids[3] = OUTSIDE
        distort_into(found.numpy(), ids.numpy(), steps, mean=MEAN, std=(1.0, 1.0, 1.0))
        expected = distort(image, steps)
        expected[:, 3] = image[:, 3]
        assert torch.equal((found + mean).permute(2, 0, 1), expected), steps
        assert ids.unique().tolist() == [0, IGNORE_INDEX]


@pytest.mark.parametrize("angle", [0.0, 8.0])
@pytest.mark.parametrize("is_blurred", [False, True])
@pytest.mark.parametrize("size", [33, 81])
def test_a_crop_is_distorted_before_it_is_normalised_and_its_padding_is_not(
    angle: float, is_blurred: bool, size: int
) -> None:
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    ids = torch.from_numpy(rng.integers(0, 5, (50, 70), dtype=np.uint8))
    top = (61 - size) // 2
    plain = Sample(0, (50, 70), (61, 86), top, 12, flip=True, angle=angle, is_blurred=is_blurred)
    area = source_window(plain, size)
    part = slice(area.top, area.top + area.height), slice(area.left, area.left + area.width)
    window, target = pixels[part].permute(2, 0, 1), ids[part]
    steps = Photometric(brightness=12.5, contrast=1.2, saturation=0.7, hue=9)
    sample = replace(plain, photometric=steps)

    before, label = crop(window, target, plain, size, mean=MEAN)
    after, distorted_label = crop(window, target, sample, size, mean=MEAN)
    assert torch.equal(label, distorted_label)
    valid = label != 255  # every pixel of the image has a class
    assert torch.equal(after[:, valid], distort(before, steps)[:, valid])
    assert torch.equal(after[:, ~valid], before[:, ~valid])
    assert bool(valid.all()) == (size == 33)

    image, label_on_cpu = torch.empty(size, size, 3), torch.empty(size, size, dtype=torch.int64)
    crop_into(image, label_on_cpu, window, target, sample, mean=MEAN, std=STD)
    difference = (image.permute(2, 0, 1) - normalise(after, MEAN, STD)).abs().amax(dim=0)
    # where a sum lies between two levels, float32 decides which: two levels more or less, and what colours make of it
    assert (difference > 1e-3).float().mean() < 0.01
    assert difference[~valid & (label_on_cpu == 255)].max() < 1e-3 if size == 81 else True

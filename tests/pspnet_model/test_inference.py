"""Predictions by strips, windows, mirror images and scales are what their definitions say."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from pspnet.errors import InputError
from pspnet.inference import argmax_by_strips, normalised, predict, predict_logits, scaled_size, window_starts
from pspnet.loss import CELLS_PER_STRIP
from pspnet.model import PSPNet, upsampled
from pspnet.sizes import Size, sides

MEAN, STD = (120.0, 110.0, 100.0), (60.0, 61.0, 62.0)
HOW: dict[str, Any] = {"mean": MEAN, "std": STD, "device": "cpu"}


@pytest.fixture(scope="module")
def model() -> PSPNet:
    torch.manual_seed(0)
    return PSPNet(5, backbone="resnet18", head_channels=8).eval()


def image_of(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("num_cells", [1, 2, CELLS_PER_STRIP, CELLS_PER_STRIP + 1, 3 * CELLS_PER_STRIP])
@pytest.mark.parametrize("cut", [0, 3])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_the_argmax_by_strips_is_that_of_the_upsampled_logits(
    num_cells: int, cut: int, output_stride: int
) -> None:
    logits = torch.randn(2, 5, num_cells, 4, generator=torch.Generator().manual_seed(num_cells))
    height, width = max(1, output_stride * (num_cells - 1) + 1 - cut), output_stride * 3 + 1 - cut
    expected = upsampled(logits, output_stride).argmax(1)[:, :height, :width]
    assert torch.equal(argmax_by_strips(logits, output_stride, height, width).long(), expected)


@pytest.mark.parametrize("size", [(65, 65), (48, 77), (9, 5), (1, 1)])
@pytest.mark.parametrize(
    "how", [{}, {"flip": True}, {"crop_size": 33}, {"scales": (0.5, 1.25), "flip": True}]
)
def test_a_prediction_is_the_argmax_of_its_logits(
    model: PSPNet, size: tuple[int, int], how: dict[str, Any]
) -> None:
    image = image_of(*size)
    logits = predict_logits(model, image, **HOW, **how)
    prediction = predict(model, image, **HOW, **how)
    assert logits.shape == (5, *size)
    assert prediction.dtype == np.uint8
    assert np.array_equal(prediction, logits.argmax(0).numpy())


def test_logits_of_one_whole_view_are_the_networks(model: PSPNet) -> None:
    image = image_of(40, 57)
    pixels = (torch.tensor(image).float() - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.no_grad():
        expected = model(pixels.permute(2, 0, 1)[None]).logits[0]
    torch.testing.assert_close(predict_logits(model, image, **HOW), expected)


def test_flip_averages_the_softmax_of_the_image_and_its_mirror_image(model: PSPNet) -> None:
    image = image_of(40, 57)
    plain = predict_logits(model, image, **HOW).softmax(0)
    mirrored = predict_logits(model, np.ascontiguousarray(image[:, ::-1]), **HOW).softmax(0).flip(2)
    both = predict_logits(model, image, **HOW, flip=True).softmax(0)
    torch.testing.assert_close(both, (plain + mirrored) / 2)
    turned = predict_logits(model, np.ascontiguousarray(image[:, ::-1]), **HOW, flip=True).softmax(0)
    torch.testing.assert_close(turned.flip(2), both)


def test_scales_average_the_softmax_of_the_resized_images(model: PSPNet) -> None:
    image = image_of(40, 57)
    expected = torch.zeros(5, 40, 57)
    with torch.no_grad():
        for size in ((40, 57), (20, 28)):
            pixels = functional.interpolate(normalised(image[None], MEAN, STD, "cpu"), size, mode="bilinear")
            scores = model(pixels).logits.softmax(1)
            expected += functional.interpolate(scores, (40, 57), mode="bilinear")[0] / 2
    logits = predict_logits(model, image, **HOW, scales=(1.0, 0.5))
    torch.testing.assert_close(logits.softmax(0), expected)


def test_a_window_larger_than_the_image_is_the_image_continued_with_the_mean(model: PSPNet) -> None:
    image = image_of(20, 33)
    continued = torch.zeros(1, 3, 41, 41)
    continued[:, :, 10:30, 4:37] = normalised(image[None], MEAN, STD, "cpu")
    with torch.no_grad():
        expected = model(continued).logits.softmax(1)[0, :, 10:30, 4:37]
    torch.testing.assert_close(predict_logits(model, image, **HOW, crop_size=41).softmax(0), expected)


def test_whole_views_that_resize_logits_are_mmsegmentations(model: PSPNet) -> None:
    """Each view's logits are made as large as the image, softmax last, as in `whole_inference` and `aug_test`."""
    image, scales = image_of(40, 57), (0.5, 1.0, 1.5)
    pixels = normalised(image[None], MEAN, STD, "cpu")
    expected = torch.zeros(5, 40, 57)
    with torch.no_grad():
        for scale in scales:
            scaled = functional.interpolate(pixels, size=scaled_size(40, 57, scale), mode="bilinear")
            for turn in (lambda view: view, lambda view: view.flip(3)):
                logits = turn(model(turn(scaled)).logits)
                expected += functional.interpolate(logits, size=(40, 57), mode="bilinear").softmax(1)[0] / 6
    how: dict[str, Any] = {**HOW, "scales": scales, "flip": True}
    ours = predict_logits(model, image, **how, average="logits")
    torch.testing.assert_close(ours.softmax(0), expected)
    assert not torch.allclose(predict_logits(model, image, **how).softmax(0), expected)


def test_windows_average_where_they_overlap(model: PSPNet) -> None:
    """A side of 49 by windows of 33: one at 0 and one flush with the end, at 16; 33 x 33 high and wide."""
    image = image_of(33, 49)
    left, right = (
        predict_logits(model, np.ascontiguousarray(image[:, begin : begin + 33]), **HOW).softmax(0)
        for begin in (0, 16)
    )
    expected = torch.cat([left[..., :16], (left[..., 16:] + right[..., :17]) / 2, right[..., 17:]], dim=2)
    torch.testing.assert_close(predict_logits(model, image, **HOW, crop_size=33).softmax(0), expected)


@pytest.mark.parametrize("size", [(33, 49), (20, 57), (70, 30)])
def test_a_window_across_the_whole_height_slides_along_the_width_alone(
    model: PSPNet, size: tuple[int, int]
) -> None:
    """Rectangles of the image's height and the square's width are what squares are on an image of that height."""
    image, (height, width) = image_of(*size), size
    windows = [
        predict_logits(model, np.ascontiguousarray(image[:, begin : begin + 25]), **HOW).softmax(0)
        for begin in window_starts(width, 25)
    ]
    total, counts = torch.zeros(5, height, width), torch.zeros(width)
    for begin, window in zip(window_starts(width, 25), windows, strict=True):
        total[..., begin : begin + 25] += window
        counts[begin : begin + 25] += 1
    assert counts.min() > 0
    ours = predict_logits(model, image, **HOW, crop_size=(height, 25))
    torch.testing.assert_close(ours.softmax(0), total / counts)


@pytest.mark.parametrize("size", [(65, 97), (40, 57), (20, 33)])
@pytest.mark.parametrize(
    ("window", "stride", "steps"),
    [
        (33, None, (22, 22)),
        (33, 17, (17, 17)),
        (33, 33, (33, 33)),
        ("25x41", None, (17, 28)),
        ("25x41", "9x30", (9, 30)),
    ],
)
def test_windows_that_average_logits_are_mmsegmentations(
    model: PSPNet, size: tuple[int, int], window: Size, stride: Size | None, steps: tuple[int, int]
) -> None:
    """The sum over windows of padded logits by their number, softmax last, as in `slide_inference`."""
    image, (h_crop, w_crop), (h_stride, w_stride) = image_of(*size), sides(window), steps

    def slide_inference(pixels: torch.Tensor) -> torch.Tensor:
        h_img, w_img = pixels.shape[2:]
        total, count = torch.zeros(1, 5, h_img, w_img), torch.zeros(1, 1, h_img, w_img)
        for h_idx in range(max(h_img - h_crop + h_stride - 1, 0) // h_stride + 1):
            for w_idx in range(max(w_img - w_crop + w_stride - 1, 0) // w_stride + 1):
                y2, x2 = min(h_idx * h_stride + h_crop, h_img), min(w_idx * w_stride + w_crop, w_img)
                y1, x1 = max(y2 - h_crop, 0), max(x2 - w_crop, 0)
                with torch.no_grad():
                    logits = model(pixels[:, :, y1:y2, x1:x2]).logits
                total += functional.pad(logits, (x1, w_img - x2, y1, h_img - y2))
                count[:, :, y1:y2, x1:x2] += 1
        return (total / count).softmax(1)

    pixels = normalised(image[None], MEAN, STD, "cpu")
    expected = (slide_inference(pixels) + slide_inference(pixels.flip(3)).flip(3))[0] / 2
    ours = predict_logits(model, image, **HOW, crop_size=window, stride=stride, average="logits", flip=True)
    torch.testing.assert_close(ours.softmax(0), expected)


@pytest.mark.parametrize(
    ("size", "crop_size", "stride", "starts"),
    [
        (33, 33, None, [0]),
        (20, 33, None, [0]),
        (34, 33, None, [0, 1]),
        (100, 30, None, [0, 20, 40, 60, 70]),
        (90, 30, None, [0, 20, 40, 60]),
        (2048, 713, None, [0, 476, 952, 1335]),
        (2048, 769, 513, [0, 513, 1026, 1279]),
        (1024, 769, 513, [0, 255]),
    ],
)
def test_windows_begin_every_stride_and_end_with_the_image(
    size: int, crop_size: int, stride: int | None, starts: list[int]
) -> None:
    assert window_starts(size, crop_size, stride) == starts


@pytest.mark.parametrize(
    ("height", "width", "scale", "scaled"), [(40, 57, 0.5, (20, 28)), (57, 41, 1.5, (86, 62))]
)
def test_the_longer_side_is_scaled_and_the_other_follows(
    height: int, width: int, scale: float, scaled: tuple[int, int]
) -> None:
    assert scaled_size(height, width, scale) == scaled


def test_predicting_leaves_the_mode_of_the_model_as_it_was(model: PSPNet) -> None:
    for mode in (True, False):
        model.train(mode)
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        predict(model, image_of(33, 33), **HOW)
        assert model.training is mode
        assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    model.eval()


def test_a_read_only_image_can_be_predicted(model: PSPNet) -> None:
    image = image_of(33, 33)
    expected = predict(model, image, **HOW)
    image.flags.writeable = False
    assert np.array_equal(predict(model, image, **HOW), expected)


def test_scales_and_windows_that_cannot_be_are_refused(model: PSPNet) -> None:
    for scales in ((), (0.0,), (1.0, -1.0)):
        with pytest.raises(InputError, match="scales must be one or more positive numbers"):
            predict(model, image_of(9, 9), **HOW, scales=scales)
    with pytest.raises(InputError, match="crop_size must be positive, but got -3"):
        predict(model, image_of(9, 9), **HOW, crop_size=-3)
    refused: list[dict[str, Any]] = [
        {"stride": 3},
        {"crop_size": 9, "stride": 10},
        {"crop_size": 9, "stride": 0},
    ]
    for how in refused:
        with pytest.raises(InputError, match="stride must be 1 to crop_size"):
            predict(model, image_of(9, 9), **HOW, flip=True, **how)

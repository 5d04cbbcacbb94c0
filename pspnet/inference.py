"""Predictions for images of any size: whole or by sliding window, one scale or several, with or without flip.

Axes: n images, c classes, h w pixels of the image, fh fw cells of the logits.
"""

# ruff: noqa: F722
import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from pspnet.errors import InputError
from pspnet.loss import cells_per_strip
from pspnet.model import PSPNet, upsampled
from pspnet.sizes import Size, notation, sides
from pspnet.transforms import normalise

Precision = Literal["fp32", "bf16", "fp16"]
Average = Literal["probabilities", "logits"]


def predict(
    model: PSPNet,
    image: UInt8[np.ndarray, "h w 3"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    crop_size: Size | None = None,
    stride: Size | None = None,
    average: Average = "probabilities",
    precision: Precision = "fp32",
) -> UInt8[np.ndarray, "h w"]:
    """Return the train id of each pixel; the options are those of `predict_logits`, whose argmax this is."""
    assert model.num_classes <= 255, "train ids are stored as uint8 and 255 means ignored"
    if flip or tuple(scales) != (1.0,) or crop_size is not None:
        logits = predict_logits(
            model,
            image,
            mean=mean,
            std=std,
            device=device,
            flip=flip,
            scales=scales,
            crop_size=crop_size,
            stride=stride,
            average=average,
            precision=precision,
        )
        return logits.argmax(0).to(torch.uint8).cpu().numpy()
    return predict_batch(model, image[None], mean=mean, std=std, device=device, precision=precision)[0]


def predict_batch(
    model: PSPNet,
    images: UInt8[np.ndarray, "n h w 3"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    precision: Precision = "fp32",
) -> UInt8[np.ndarray, "n h w"]:
    """Return the train id of each pixel of whole images of one size, in one pass of the network."""
    with _evaluating(model):
        with autocast(device, precision):
            output = model(normalised(images, mean, std, device), upsample=False)
        return argmax_by_strips(output.logits, output.output_stride, *images.shape[1:3]).cpu().numpy()


def predict_logits(
    model: PSPNet,
    image: UInt8[np.ndarray, "h w 3"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    crop_size: Size | None = None,
    stride: Size | None = None,
    average: Average = "probabilities",
    precision: Precision = "fp32",
) -> Float[Tensor, "c h w"]:
    """Return logits whose softmax is the mean of the softmax of all views of the image.

    A view is the image resized by one of `scales`, and its mirror image with `flip`, seen whole or, with
    `crop_size`, by windows of that size, one every `stride` pixels (two thirds of each side unless said) and the
    last flush with the end. Where windows overlap, or a view is resized to the image, `average` says what is averaged:

    probabilities: as semseg's tool/test.py does. Each window, and its own mirror image, is seen and its softmax
    averaged; an image smaller than a window is continued with the mean colour on all sides; the probabilities
    of a scale are resized to the image, bilinearly.
    logits: as mmsegmentation's `slide_inference` and `whole_inference` do. The mirror image of the whole is seen by
    itself, windows are no larger than the image, their logits are averaged and resized to the image before the softmax.
    """
    if not scales or any(scale <= 0 for scale in scales):
        raise InputError(f"scales must be one or more positive numbers, but got {tuple(scales)}. Usual: 1.")
    if crop_size is not None and min(sides(crop_size)) < 1:
        raise InputError(f"crop_size must be positive, but got {crop_size}. Take that of the training.")
    if stride is not None and (
        crop_size is None
        or not all(1 <= step <= side for step, side in zip(sides(stride), sides(crop_size), strict=True))
    ):
        raise InputError(f"stride must be 1 to crop_size, which is {crop_size}, but got {stride}.")
    height, width = image.shape[:2]
    with _evaluating(model):
        images = normalised(image[None], mean, std, device)
        if not flip and tuple(scales) == (1.0,) and crop_size is None:
            with autocast(device, precision):
                return model(images).logits[0]
        total = torch.zeros(model.num_classes, height, width, device=device)
        for scale in scales:
            scaled = _resized(images, *scaled_size(height, width, scale))
            with autocast(device, precision):
                if average == "logits":
                    seen = _softmax_of_logits(model, scaled, crop_size, stride, (height, width), flip=flip)
                elif crop_size is None:
                    seen = _probabilities(model, scaled, flip=flip)
                else:
                    seen = _windows_of_probabilities(model, scaled, crop_size, stride, flip=flip)
            total += _resized(seen, height, width)[0]
        return total.div_(len(scales)).clamp_(min=torch.finfo(total.dtype).tiny).log_()


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Return height and width at `scale`: the longer side is rounded first, the other follows it, as in semseg."""
    longest = max(1, round(scale * max(height, width)))
    if height > width:
        return longest, max(1, round(longest / float(height) * width))
    return max(1, round(longest / float(width) * height)), longest


def normalised(
    images: UInt8[np.ndarray, "n h w 3"],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
) -> Float[Tensor, "n 3 h w"]:
    """Return images as the network wants them."""
    # torch.tensor copies: the store's pixels are read-only, which from_numpy warns of.
    pixels = torch.tensor(images, device=device).permute(0, 3, 1, 2)
    return normalise(pixels, mean, std).contiguous(memory_format=torch.channels_last)


def autocast(device: torch.device | str, precision: Precision) -> torch.autocast:
    """Return the context of a forward pass in `precision`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=precision != "fp32")


def argmax_by_strips(
    logits: Float[Tensor, "n c fh fw"], output_stride: int, height: int, width: int
) -> UInt8[Tensor, "n {height} {width}"]:
    """Return the argmax of the upsampled logits' first `height` x `width` pixels, row by row."""
    num_rows, step = logits.shape[2], cells_per_strip(logits, output_stride)
    prediction = torch.empty(len(logits), height, width, dtype=torch.uint8, device=logits.device)
    for first in range(0, max(1, num_rows - 1), step):
        pixels = upsampled(logits[:, :, first : first + step + 1], output_stride)
        rows = prediction[:, first * output_stride : first * output_stride + pixels.shape[2]]
        rows.copy_(pixels[:, :, : rows.shape[1], :width].argmax(1))
    return prediction


def default_stride(crop_size: Size) -> int | str:
    """Return two thirds of the window's sides, rounded up, as semseg moves it."""
    height, width = (math.ceil(side * 2 / 3) for side in sides(crop_size))
    return notation((height, width))


def window_starts(size: int, side: int, stride: int | None = None) -> list[int]:
    """Return where windows of `side` begin on a side of `size`: every `stride` pixels, the last flush with the end."""
    stride = stride or math.ceil(side * 2 / 3)
    num_windows = math.ceil(max(0, size - side) / stride) + 1
    return [max(0, min(index * stride, size - side)) for index in range(num_windows)]


def _probabilities(model: PSPNet, images: Tensor, *, flip: bool) -> Tensor:
    """Return the softmax, averaged with that of the mirror image where `flip` asks for it."""
    # Softmax over channels that lie side by side in memory takes three times as long.
    seen = model(images).logits.contiguous().softmax(1)
    if flip:
        seen += model(images.flip(3)).logits.contiguous().softmax(1).flip(3)
        seen /= 2
    return seen


def _windows_of_probabilities(
    model: PSPNet, images: Tensor, crop_size: Size, stride: Size | None, *, flip: bool
) -> Tensor:
    """Return the probabilities averaged over windows and their mirror images, as semseg computes them."""
    height, width = images.shape[2:]
    rows, columns = (
        max(0, side - size) for side, size in zip(sides(crop_size), (height, width), strict=True)
    )
    top, left = rows // 2, columns // 2
    # Zeros are the mean colour.
    continued = functional.pad(images, (left, columns - left, top, rows - top))
    seen = _slid(partial(_probabilities, model, flip=flip), continued, crop_size, stride, model.num_classes)
    return seen[:, :, top : top + height, left : left + width]


def _softmax_of_logits(
    model: PSPNet,
    images: Tensor,
    crop_size: Size | None,
    stride: Size | None,
    size: tuple[int, int],
    *,
    flip: bool,
) -> Tensor:
    """Return the softmax of the logits, averaged over windows if any, at `size`, as mmsegmentation computes it."""

    def logits_of(view: Tensor) -> Tensor:
        logits: Tensor = model(view).logits
        return logits

    def seen(view: Tensor) -> Tensor:
        logits = (
            logits_of(view)
            if crop_size is None
            else _slid(logits_of, view, crop_size, stride, model.num_classes)
        )
        return _resized(logits, *size).softmax(1)

    return (seen(images) + seen(images.flip(3)).flip(3)) / 2 if flip else seen(images)


def _slid(
    see: Callable[[Tensor], Tensor], images: Tensor, crop_size: Size, stride: Size | None, num_classes: int
) -> Tensor:
    """Return the average over the windows of what `see` returns for each; none is larger than the images."""
    total = torch.zeros(len(images), num_classes, *images.shape[2:], device=images.device)
    num_windows = images.new_zeros(images.shape[2:])
    height, width = sides(crop_size)
    strides = (None, None) if stride is None else sides(stride)
    for top, left in itertools.product(
        window_starts(images.shape[2], height, strides[0]), window_starts(images.shape[3], width, strides[1])
    ):
        window = (..., slice(top, top + height), slice(left, left + width))
        total[window] += see(images[window])
        num_windows[window] += 1
    return total.div_(num_windows)


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[2:] == (height, width):
        return images
    return functional.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)


@contextlib.contextmanager
def _evaluating(model: PSPNet) -> Iterator[None]:
    """Put the model in evaluation mode, without gradients, for this block."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)

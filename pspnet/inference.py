"""Predictions for images of any size: whole or by sliding window, one scale or several, with or without flip.

Axes: n images, c classes, h w pixels of the image, fh fw cells of the logits.
"""

# ruff: noqa: F722
import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from pspnet.errors import InputError
from pspnet.loss import CELLS_PER_STRIP
from pspnet.model import PSPNet, upsampled
from pspnet.transforms import normalise

Precision = Literal["fp32", "bf16", "fp16"]


def predict(
    model: PSPNet,
    image: UInt8[np.ndarray, "h w 3"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    crop_size: int | None = None,
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
            precision=precision,
        )
        return logits.argmax(0).to(torch.uint8).cpu().numpy()
    with _evaluating(model):
        images = normalised(image, mean, std, device)
        with autocast(device, precision):
            output = model(images, upsample=False)
        return argmax_by_strips(output.logits, output.output_stride, *image.shape[:2])[0].cpu().numpy()


def predict_logits(
    model: PSPNet,
    image: UInt8[np.ndarray, "h w 3"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    crop_size: int | None = None,
    precision: Precision = "fp32",
) -> Float[Tensor, "c h w"]:
    """Return logits whose softmax is the mean of the softmax of all views of the image.

    A view is the image resized by one of `scales`, and its mirror image with `flip`, seen whole or, with
    `crop_size`, by windows of that side, a third of which overlaps; there their softmax is averaged.
    """
    if not scales or any(scale <= 0 for scale in scales):
        raise InputError(f"scales must be one or more positive numbers, but got {tuple(scales)}. Usual: 1.")
    if crop_size is not None and crop_size < 1:
        raise InputError(f"crop_size must be positive, but got {crop_size}. Take that of the training.")
    height, width = image.shape[:2]
    with _evaluating(model):
        images = normalised(image, mean, std, device)
        if not flip and tuple(scales) == (1.0,) and crop_size is None:
            with autocast(device, precision):
                return model(images).logits[0]
        total = torch.zeros(model.num_classes, height, width, device=device)
        for scale in scales:
            scaled = _resized(images, max(1, round(height * scale)), max(1, round(width * scale)))
            views = [scaled, scaled.flip(3)] if flip else [scaled]
            with autocast(device, precision):
                seen = [_probabilities(model, view, crop_size) for view in views]
            mean_of_views = (seen[0] + seen[1].flip(3)) / 2 if flip else seen[0]
            total += _resized(mean_of_views, height, width)[0]
        return (total / len(scales)).clamp(min=torch.finfo(total.dtype).tiny).log()


def normalised(
    image: UInt8[np.ndarray, "h w 3"], mean: Sequence[float], std: Sequence[float], device: torch.device | str
) -> Float[Tensor, "1 3 h w"]:
    """Return the image as the network wants it."""
    # torch.tensor copies: the store's pixels are read-only, which from_numpy warns of.
    pixels = torch.tensor(image, device=device).permute(2, 0, 1)[None]
    return normalise(pixels, mean, std).contiguous(memory_format=torch.channels_last)


def autocast(device: torch.device | str, precision: Precision) -> torch.autocast:
    """Return the context of a forward pass in `precision`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=precision != "fp32")


def argmax_by_strips(
    logits: Float[Tensor, "n c fh fw"], output_stride: int, height: int, width: int
) -> UInt8[Tensor, "n {height} {width}"]:
    """Return the argmax of the upsampled logits' first `height` x `width` pixels, row by row."""
    num_rows = logits.shape[2]
    prediction = torch.empty(len(logits), height, width, dtype=torch.uint8, device=logits.device)
    for first in range(0, max(1, num_rows - 1), CELLS_PER_STRIP):
        pixels = upsampled(logits[:, :, first : first + CELLS_PER_STRIP + 1], output_stride)
        rows = prediction[:, first * output_stride : first * output_stride + pixels.shape[2]]
        rows.copy_(pixels[:, :, : rows.shape[1], :width].argmax(1))
    return prediction


def window_starts(size: int, crop_size: int) -> list[int]:
    """Return where windows begin on a side of `size`: every two thirds, the last flush with the end."""
    stride = math.ceil(crop_size * 2 / 3)
    num_windows = math.ceil(max(0, size - crop_size) / stride) + 1
    return [max(0, min(index * stride, size - crop_size)) for index in range(num_windows)]


def _probabilities(model: PSPNet, images: Tensor, crop_size: int | None) -> Tensor:
    if crop_size is None:
        return model(images).logits.softmax(1)
    height, width = images.shape[2:]
    # Zeros are the mean colour.
    padded = functional.pad(images, (0, max(0, crop_size - width), 0, max(0, crop_size - height)))
    total = padded.new_zeros(len(images), model.num_classes, *padded.shape[2:])
    num_windows = padded.new_zeros(padded.shape[2:])
    for top in window_starts(height, crop_size):
        for left in window_starts(width, crop_size):
            window = (..., slice(top, top + crop_size), slice(left, left + crop_size))
            total[window] += model(padded[window]).logits.softmax(1)
            num_windows[window] += 1
    return (total / num_windows)[:, :, :height, :width]


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

"""What follows a convolution of a prediction on a CPU, in one pass over memory; for 1x1 ones with the convolution.

Axes: n images, h w cells, c channels in, o channels out.
"""

# ruff: noqa: F722
import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_PIXELS = 4096
"""Whose product with a weight is taken at a time."""


def add_and_rectify(
    x: Float[Tensor, "n c h w"], shift: Float[Tensor, " c"], shortcut: Tensor | None = None
) -> None:
    """Make relu(x + shift + shortcut) of `x`, which is in channels_last; in bfloat16 it is rounded once."""
    pixels = x.detach().permute(0, 2, 3, 1).flatten(0, 2)
    others = pixels[:0] if shortcut is None else shortcut.detach().permute(0, 2, 3, 1).flatten(0, 2)
    others = others.contiguous()
    assert pixels.data_ptr() == x.data_ptr()
    if x.dtype == torch.bfloat16:
        bits = [each.view(torch.int16).numpy().view(np.uint16) for each in (pixels, others)]
        _add_and_rectify_bfloat16(bits[0], shift.detach().float().numpy(), bits[1])
    else:
        _add_and_rectify(pixels.numpy(), shift.detach().numpy(), others.numpy())


def pointwise_prediction(
    x: Float[Tensor, "n c h w"],
    weight: Float[Tensor, "o c 1 1"],
    shift: Float[Tensor, " o"],
    shortcut: Float[Tensor, "n o h w"] | None = None,
    *,
    rectify: bool,
) -> Float[Tensor, "n o h w"]:
    """Return conv2d(x, weight, shift) + shortcut, or relu of it, in channels_last; float32 or float64, no gradients.

    Where the shortcut is in channels_last, its memory becomes the result's.
    """
    pixels = x.detach().permute(0, 2, 3, 1)
    if shortcut is None:
        results = pixels.new_empty(*pixels.shape[:3], len(weight))
    else:
        results = shortcut.detach().permute(0, 2, 3, 1).contiguous()
    factor, shift = weight.detach().flatten(1).T, shift.detach()
    nothing = np.empty((0, len(shift)), shift.numpy().dtype)
    for some, result in zip(
        pixels.flatten(0, 2).split(_PIXELS), results.flatten(0, 2).split(_PIXELS), strict=True
    ):
        if shortcut is None:
            torch.mm(some, factor, out=result)
        else:
            result.addmm_(some, factor)
        if rectify:
            _add_and_rectify(result.numpy(), shift.numpy(), nothing)
        else:
            result.add_(shift)
    return results.permute(0, 3, 1, 2)


@numba.njit(cache=True, nogil=True)
def _add_and_rectify(pixels, shift, others):  # type: ignore[no-untyped-def]
    for pixel in range(len(pixels)):
        values = pixels[pixel]
        if len(others):
            other = others[pixel]
            for channel in range(len(values)):
                value = values[channel] + shift[channel] + other[channel]
                values[channel] = 0 if value < 0 else value  # not a number stays that
        else:
            for channel in range(len(values)):
                value = values[channel] + shift[channel]
                values[channel] = 0 if value < 0 else value


@numba.njit(cache=True, nogil=True)
def _add_and_rectify_bfloat16(pixels, shift, others):  # type: ignore[no-untyped-def]
    for pixel in range(len(pixels)):
        values = pixels[pixel]
        if len(others):
            other = others[pixel]
            for channel in range(len(values)):
                values[channel] = _rectified(
                    _value(values[channel]) + shift[channel] + _value(other[channel])
                )
        else:
            for channel in range(len(values)):
                values[channel] = _rectified(_value(values[channel]) + shift[channel])


@numba.njit(cache=True, nogil=True, inline="always")
def _value(bits):  # type: ignore[no-untyped-def]
    """Of a bfloat16: the first half of a float32."""
    return np.uint32(np.uint32(bits) << 16).view(np.float32)


@numba.njit(cache=True, nogil=True, inline="always")
def _rectified(value):  # type: ignore[no-untyped-def]
    """Return the bfloat16 nearest to relu(value), the even one of two; not a number stays that."""
    bits = np.float32(0 if value < 0 else value).view(np.uint32)
    rounded = np.uint32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.uint16(rounded if value == value else 0x7FC0)

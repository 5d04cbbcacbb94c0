"""Cross-entropy of upsampled logits and its gradient on a CPU, one row of pixels at a time, which stays in the cache.

Bilinear upsampling is one interpolation along the rows and one across them. The first is a product of matrices, before
and after the loop over the rows of pixels; the second is in it, so that logits, softmax and gradient of a pixel exist
only while its row is computed.

Axes: n images, c classes, h w pixels, fh fw cells of logits that are not upsampled yet.
"""

# ruff: noqa: F722
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numba
import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pspnet.labels import IGNORE_INDEX

_CONTRACT = {"contract"}
"""A product and a sum may be rounded once, together; nothing else is left to the compiler."""


def summed_loss_and_gradient(
    logits: Float[Tensor, "n c fh fw"],
    target: Int64[Tensor, "n h w"],
    stride: int,
    class_weights: Float[Tensor, " c"] | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n c fh fw"]]:
    """Return torch's cross_entropy, summed, of float32 logits of which cell (i, j) is pixel (stride i, stride j).

    The second is its gradient of `logits`. Pixels whose target is IGNORE_INDEX count nothing; any other
    that is no class is an IndexError. The sum is in float64. Images are spread over torch's threads. A logit that is
    not finite makes the sum nan, also where only ignored pixels see it.
    """
    num_classes, num_rows, num_columns = logits.shape[1:]
    weights = torch.ones(num_classes) if class_weights is None else class_weights.float()
    right = (weights * (1 - label_smoothing)).numpy()
    spread = (weights * (label_smoothing / num_classes)).numpy()
    height, width = target.shape[1:]
    assert height <= (num_rows - 1) * stride + 1
    assert width <= (num_columns - 1) * stride + 1
    along = _interpolation(num_columns, stride, width)
    gradient = torch.empty_like(logits)

    @torch.inference_mode(torch.is_inference_mode_enabled())  # a thread begins in a mode of its own
    def loss_of(image: Tensor, wanted: Tensor, result: Tensor) -> float:
        rows = image @ along
        of_rows = torch.zeros_like(rows)
        sums, factors = torch.empty(2, height, width)
        linear: float = _image(
            rows.numpy(),
            wanted.contiguous().numpy(),
            of_rows.numpy(),
            sums.numpy(),
            factors.numpy(),
            stride,
            right,
            spread,
        )
        result.copy_(of_rows @ along.T)
        return linear + (sums.log_() * factors).sum(dtype=torch.float64).item()

    num_threads = min(torch.get_num_threads(), len(logits))
    with ThreadPoolExecutor(num_threads) if num_threads > 1 else nullcontext() as pool:
        losses = (pool.map if pool else map)(loss_of, logits.detach(), target, gradient)
        return torch.tensor(sum(losses), dtype=torch.float64), gradient


def _interpolation(num_cells: int, stride: int, num_pixels: int) -> Float[Tensor, "cells pixels"]:
    """Return the matrix by which cells are multiplied to become pixels: cell i is pixel stride * i."""
    position = torch.arange(num_pixels, dtype=torch.float64) / stride
    cell = torch.arange(num_cells, dtype=torch.float64)[:, None]
    return (1 - (position - cell).abs()).clamp(min=0).float()


@numba.njit(cache=True, nogil=True, fastmath=_CONTRACT)
def _image(rows, target, gradient, sums, factors, stride, right, spread):  # type: ignore[no-untyped-def]
    """Add up the gradient of rows (c, fh, w), and return the loss without factors * log(sums), which are written."""
    num_classes, num_rows, width = rows.shape
    pixels = np.empty((num_classes, width), np.float32)
    largest = np.empty(width, np.float32)
    scale = np.empty(width, np.float32)
    spread_weight, total = spread.sum(), 0.0
    num_spread = num_classes if spread_weight > 0 else 0
    for y in range(len(target)):
        upper = y // stride
        lower = min(upper + 1, num_rows - 1)
        part = np.float32(y % stride) / np.float32(stride)
        wanted, row_sums, row_factors = target[y], sums[y], factors[y]

        largest[:] = -np.inf
        for label in range(num_classes):
            row, above, below = pixels[label], rows[label, upper], rows[label, lower]
            for x in range(width):
                value = above[x] + part * (below[x] - above[x])
                row[x] = value
                largest[x] = value if value > largest[x] else largest[x]

        for x in range(width):
            label, row_factors[x] = wanted[x], 0
            if label != IGNORE_INDEX:
                if label < 0 or label >= num_classes:
                    raise IndexError("A target is the number of no class of the logits.")
                row_factors[x] = right[label] + spread_weight
                total -= right[label] * (pixels[label, x] - largest[x])
                for other in range(num_spread):
                    total -= spread[other] * (pixels[other, x] - largest[x])

        row_sums[:] = 0
        for label in range(num_classes):
            row = pixels[label]
            for x in range(width):
                row[x] = _exp(row[x] - largest[x])
                row_sums[x] += row[x]

        for x in range(width):
            scale[x] = row_factors[x] / row_sums[x]
        for label in range(num_classes):
            row = pixels[label]
            for x in range(width):
                row[x] *= scale[x]
        for x in range(width):
            label = wanted[x]
            if label != IGNORE_INDEX:
                pixels[label, x] -= right[label]
                for other in range(num_spread):
                    pixels[other, x] -= spread[other]

        # One array a loop: with two the compiler computes pixel by pixel.
        for label in range(num_classes):
            row, above, below = pixels[label], gradient[label, upper], gradient[label, lower]
            for x in range(width):
                above[x] += (1 - part) * row[x]
            for x in range(width):
                below[x] += part * row[x]
    return total


@numba.njit(cache=True, nogil=True, inline="always", fastmath=_CONTRACT)
def _exp(x):  # type: ignore[no-untyped-def]
    """Return e**x in float32 for x <= 0, within 1.2e-7 of it, as Cephes' expf; below -87 it is e**-87."""
    x = np.float32(-87) if x < np.float32(-87) else x
    power = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    x = x - power * np.float32(0.693359375)
    x = x + power * np.float32(2.12194440e-4)
    value = np.float32(1.9875691500e-4)
    value = value * x + np.float32(1.3981999507e-3)
    value = value * x + np.float32(8.3334519073e-3)
    value = value * x + np.float32(4.1665795894e-2)
    value = value * x + np.float32(1.6666665459e-1)
    value = value * x + np.float32(5.0000001201e-1)
    value = value * x * x + x + np.float32(1)
    return value * np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)

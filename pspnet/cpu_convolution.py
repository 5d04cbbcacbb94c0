"""3x3 convolutions on a CPU with a third of the multiplications.

It is F(4x2, 3x3) of Lavin and Gray, CVPR 2016: the 4x2 outputs of a tile of 6x4 inputs d are AᵀMA, where M is
(G g Gᵀ) ⊙ (Bᵀ d B); for all tiles at once the sum over the channels is 24 matrix products. A, B and G of the six rows
belong to the points 0, 1, -1, 2, -1/2 and infinity, which round little (Barabasz et al., ACM TOMS 46.4, 2020), those of
the four columns to 0, 1, -1 and infinity. A dilated convolution is one on each of the interleaved grids that do not
see each other: the cells of its tiles lie `dilation` apart.

Axes: n images, h w cells, c channels in, o channels out, p tiles of a block, t = 24 places of a tile.
"""

# ruff: noqa: F722
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS_TO_KERNEL = np.array(
    [[60, 0, 0], [-10, -10, -10], [10, -10, 10], [2, 4, 8], [-64, 32, -16], [0, 0, 60]]
) / 15  # fmt: skip
"""G of the rows; a row of Bᵀ is divided by what makes its entries as small as those of a sum."""
_COLUMNS_TO_KERNEL = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2
"""G of the columns."""
_PLACES = 24
_LANES = 64
"""Channels of a tile that are transformed at a time, in the innermost cache."""
_ROW = 4 * _LANES
_TILES = 576
"""That are taken at a time: few enough to stay in a cache, many enough for a matrix product."""
_CHANNELS = 512
"""Of the inputs, that are taken at a time."""


def winograd_convolution(
    images: Float[Tensor, "n c h w"], weight: Float[Tensor, "o c 3 3"], dilation: int = 1
) -> Float[Tensor, "n o h w"]:
    """Return conv2d(images, weight, padding=dilation, dilation=dilation), in channels_last; float32 or float64.

    It agrees up to rounding, and rounds about as torch's does. Of its working memory nothing is kept for the gradients.
    """
    result: Tensor = _Convolution.apply(images, weight, dilation)
    return result


def winograd_kernels(weight: Float[Tensor, "o c 3 3"]) -> Float[Tensor, "t o c"]:
    """Return G g Gᵀ for each pair of channels, rounded once: all that `winograd_prediction` needs of a weight."""
    parts = [
        _kernels(part.double(), _ROWS_TO_KERNEL, _COLUMNS_TO_KERNEL).to(weight.dtype)
        for part in weight.detach().split(_LANES)
    ]
    return torch.cat(parts, 1)


def winograd_prediction(
    images: Float[Tensor, "n c h w"],
    kernels: Float[Tensor, "t o c"],
    dilation: int = 1,
    shift: Float[Tensor, " o"] | None = None,
) -> Float[Tensor, "n o h w"]:
    """Return the convolution without gradients; with `shift` it is relu(convolution + shift)."""
    return _convolved(images, kernels, dilation, shift)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.dilation = dilation
        return _convolved(images, _kernels(weight, _ROWS_TO_KERNEL, _COLUMNS_TO_KERNEL), dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        images, weight = ctx.saved_tensors
        of_images = of_weight = None
        if ctx.needs_input_grad[0]:
            turned_about = _kernels(weight, _ROWS_TO_KERNEL[:, ::-1], _COLUMNS_TO_KERNEL[:, ::-1])
            of_images = _convolved(gradient, turned_about.transpose(1, 2), ctx.dilation)
        if ctx.needs_input_grad[1]:
            of_weight = _gradient_of_weight(images, gradient, ctx.dilation)
        return of_images, of_weight, None


def _convolved(
    images: Tensor, kernels: Float[Tensor, "t o c"], dilation: int, shift: Tensor | None = None
) -> Float[Tensor, "n o h w"]:
    images = images.detach().permute(0, 2, 3, 1).contiguous()
    shift = images.new_empty(0) if shift is None else shift.detach()
    result = images.new_empty(*images.shape[:3], kernels.shape[1])
    for block in _blocks(images, kernels.shape[1], dilation):
        for first in range(0, images.shape[3], _CHANNELS):
            of_them = kernels[..., first : first + _CHANNELS].transpose(1, 2)
            tiles = block.read(images, first, of_them.shape[1])
            if first == 0:
                torch.bmm(tiles, of_them, out=block.products)
            else:
                block.products.baddbmm_(tiles, of_them)
        _write_results(block.products.flatten(1).numpy(), *block.places, shift.numpy(), result.numpy())
    return result.permute(0, 3, 1, 2)


def _gradient_of_weight(images: Tensor, gradient: Tensor, dilation: int) -> Float[Tensor, "o c 3 3"]:
    images = images.detach().permute(0, 2, 3, 1).contiguous()
    gradient = gradient.detach().permute(0, 2, 3, 1).contiguous()
    of_kernels = images.new_zeros(_PLACES, gradient.shape[3], images.shape[3])
    for block in _blocks(images, gradient.shape[3], dilation):
        _read_gradients(gradient.numpy(), *block.places, block.products.flatten(1).numpy())
        factors = block.products.transpose(1, 2)
        for first in range(0, images.shape[3], _CHANNELS):
            some = of_kernels[..., first : first + _CHANNELS]
            some.baddbmm_(factors, block.read(images, first, some.shape[2]))
    both_sides = images.new_tensor(np.kron(_ROWS_TO_KERNEL, _COLUMNS_TO_KERNEL))
    return (
        (both_sides.T @ of_kernels.flatten(1))
        .unflatten(0, (3, 3))
        .unflatten(2, of_kernels.shape[1:])
        .permute(2, 3, 0, 1)
    )


def _kernels(
    weight: Float[Tensor, "o c 3 3"], rows_to_kernel: np.ndarray, columns_to_kernel: np.ndarray
) -> Float[Tensor, "t o c"]:
    both_sides = weight.new_tensor(np.kron(rows_to_kernel, columns_to_kernel))
    return (both_sides @ weight.detach().permute(0, 2, 3, 1).flatten(1, 2)).transpose(0, 1)


class _Block(NamedTuple):
    """Some rows of tiles, and memory for what is computed of them."""

    places: tuple[np.ndarray, np.ndarray, int]
    """Image and first row of each row of tiles, (k, 2), first column of each tile in it, and the dilation."""
    memory: Float[Tensor, " values"]
    """For tiles."""
    products: Float[Tensor, "t p o"]

    def read(self, images: Float[Tensor, "n h w c"], first: int, num_channels: int) -> Float[Tensor, "t p d"]:
        """Return the tiles of these channels of the images."""
        rows, lefts, _ = self.places
        size = (_PLACES, len(rows) * len(lefts), num_channels)
        tiles = self.memory[: math.prod(size)].view(size)
        _read_tiles(images.numpy(), first, num_channels, *self.places, tiles.flatten(1).numpy())
        return tiles


def _blocks(images: Float[Tensor, "n h w c"], num_outputs: int, dilation: int) -> Iterator[_Block]:
    num_images, height, width, channels = images.shape
    rows = np.array([(image, top) for image in range(num_images) for top in _starts(height, dilation, 4)])
    lefts = np.array(_starts(width, dilation, 2))
    num_blocks = math.ceil(len(rows) * len(lefts) / _TILES)
    rows_at_a_time = math.ceil(len(rows) / num_blocks)
    most = rows_at_a_time * len(lefts)
    tiles = images.new_empty(_PLACES * most * min(channels, _CHANNELS))
    products = images.new_empty(_PLACES * most * num_outputs)
    for first in range(0, len(rows), rows_at_a_time):
        some = rows[first : first + rows_at_a_time]
        size = (_PLACES, len(some) * len(lefts), num_outputs)
        yield _Block((some, lefts, dilation), tiles, products[: math.prod(size)].view(size))


def _starts(num_cells: int, dilation: int, side: int) -> list[int]:
    """Return the first cell of each tile of `side` outputs, which for those at the border lies in the padding."""
    return [
        first - dilation
        for start in range(min(dilation, num_cells))
        for first in range(start, num_cells, side * dilation)
    ]


@numba.njit(cache=True, nogil=True)
def _read_tiles(images, first, num_channels, rows, lefts, dilation, tiles):  # type: ignore[no-untyped-def]
    """Write Bᵀ d B of each tile d of these channels; outside the images are zeros."""
    of = images.dtype.type
    quarter, three_eighths, half, five_quarters = of(0.25), of(0.375), of(0.5), of(1.25)
    cells, halfway = np.empty(6 * _ROW, images.dtype), np.empty(6 * _ROW, images.dtype)
    tile = 0
    for image, top in rows:
        for left in lefts:
            for channel in range(0, num_channels, _LANES):
                end = min(channel + _LANES, num_channels)
                part = (first + channel, first + end)
                _load_cells(images, image, top, left, dilation, 6, 4, part, cells)
                for at in range(_ROW):
                    a, b, c = cells[at], cells[at + _ROW], cells[at + 2 * _ROW]
                    d, e, f = cells[at + 3 * _ROW], cells[at + 4 * _ROW], cells[at + 5 * _ROW]
                    halfway[at] = quarter * (a + e) + three_eighths * (b - d) - half * c
                    halfway[at + _ROW] = half * (e - b) - five_quarters * c - quarter * d
                    halfway[at + 2 * _ROW] = half * (b + e) + quarter * c - five_quarters * d
                    halfway[at + 3 * _ROW] = half * (e - c) + quarter * (d - b)
                    halfway[at + 4 * _ROW] = half * (b - d) + quarter * (e - c)
                    halfway[at + 5 * _ROW] = quarter * (b + f) + three_eighths * (c - e) - half * d
                for start in range(0, 6 * _ROW, _ROW):
                    for at in range(start, start + _LANES):
                        a, b = halfway[at], halfway[at + _LANES]
                        c, d = halfway[at + 2 * _LANES], halfway[at + 3 * _LANES]
                        cells[at] = a - c
                        cells[at + _LANES] = b + c
                        cells[at + 2 * _LANES] = c - b
                        cells[at + 3 * _LANES] = b - d
                _store(cells, tiles, tile * num_channels + channel, end - channel)
            tile += 1


@numba.njit(cache=True, nogil=True)
def _read_gradients(gradients, rows, lefts, dilation, products):  # type: ignore[no-untyped-def]
    """Write A y Aᵀ of the gradients y of each tile's eight results; outside are zeros."""
    of = gradients.dtype.type
    eighth, quarter, half, two, four, eight = of(0.125), of(0.25), of(0.5), of(2), of(4), of(8)
    cells, halfway = np.empty(6 * _ROW, gradients.dtype), np.empty(6 * _ROW, gradients.dtype)
    num_channels = gradients.shape[3]
    tile = 0
    for image, top in rows:
        for left in lefts:
            for channel in range(0, num_channels, _LANES):
                end = min(channel + _LANES, num_channels)
                y, x = top + dilation, left + dilation
                _load_cells(gradients, image, y, x, dilation, 4, 2, (channel, end), cells)
                for at in range(2 * _LANES):
                    a, b = cells[at], cells[at + _ROW]
                    c, d = cells[at + 2 * _ROW], cells[at + 3 * _ROW]
                    halfway[at] = a
                    halfway[at + _ROW] = a + b + c + d
                    halfway[at + 2 * _ROW] = a - b + c - d
                    halfway[at + 3 * _ROW] = a + two * b + four * c + eight * d
                    halfway[at + 4 * _ROW] = a - half * b + quarter * c - eighth * d
                    halfway[at + 5 * _ROW] = d
                for start in range(0, 6 * _ROW, _ROW):
                    for at in range(start, start + _LANES):
                        a, b = halfway[at], halfway[at + _LANES]
                        cells[at] = a
                        cells[at + _LANES] = a + b
                        cells[at + 2 * _LANES] = a - b
                        cells[at + 3 * _LANES] = -b
                _store(cells, products, tile * num_channels + channel, end - channel)
            tile += 1


@numba.njit(cache=True, nogil=True)
def _write_results(products, rows, lefts, dilation, shift, results):  # type: ignore[no-untyped-def]
    """Write the eight results Aᵀ M A of each tile M, those that lie in the image; with a shift, shifted, rectified."""
    of = results.dtype.type
    eighth, quarter, half, two, four, eight = of(0.125), of(0.25), of(0.5), of(2), of(4), of(8)
    halfway = np.empty(4 * _ROW, results.dtype)
    _, height, width, num_channels = results.shape
    tile = 0
    for image, top in rows:
        for left in lefts:
            for channel in range(0, num_channels, _LANES):
                size = min(_LANES, num_channels - channel)
                start = tile * num_channels + channel
                for j in range(4):
                    r0, r1 = products[j, start : start + size], products[j + 4, start : start + size]
                    r2, r3 = products[j + 8, start : start + size], products[j + 12, start : start + size]
                    r4, r5 = products[j + 16, start : start + size], products[j + 20, start : start + size]
                    for lane in range(size):
                        a, b, c, d, e, f = r0[lane], r1[lane], r2[lane], r3[lane], r4[lane], r5[lane]
                        at = j * _LANES + lane
                        halfway[at] = a + b + c + d + e
                        halfway[at + _ROW] = b - c + two * d - half * e
                        halfway[at + 2 * _ROW] = b + c + four * d + quarter * e
                        halfway[at + 3 * _ROW] = b - c + eight * d - eighth * e + f
                for i in range(4):
                    y, x = top + (i + 1) * dilation, left + dilation
                    for j in range(2):
                        if y < height and x + j * dilation < width:
                            target = results[image, y, x + j * dilation, channel : channel + size]
                            _finish(halfway, i * _ROW, j, shift[channel : channel + size], target)
            tile += 1


@numba.njit(cache=True, nogil=True)
def _finish(halfway, start, j, shift, target):  # type: ignore[no-untyped-def]
    """Write result `j` of the two of a row."""
    for lane in range(len(target)):
        a, b = halfway[start + lane], halfway[start + _LANES + lane]
        c, d = halfway[start + 2 * _LANES + lane], halfway[start + 3 * _LANES + lane]
        target[lane] = a + b + c if j == 0 else b - c - d
    if len(shift):
        for lane in range(len(target)):
            value = target[lane] + shift[lane]
            target[lane] = 0 if value < 0 else value  # not a number stays that


@numba.njit(cache=True, nogil=True)
def _load_cells(images, image, top, left, dilation, height, width, part, cells):  # type: ignore[no-untyped-def]
    """Read a part of the channels of height x width cells of an image; those outside are 0."""
    for i in range(height):
        for j in range(width):
            y, x = top + i * dilation, left + j * dilation
            at = i * _ROW + j * _LANES
            if 0 <= y < images.shape[1] and 0 <= x < images.shape[2]:
                source = images[image, y, x, part[0] : part[1]]
                for lane in range(len(source)):
                    cells[at + lane] = source[lane]
            else:
                cells[at : at + _LANES] = 0


@numba.njit(cache=True, nogil=True)
def _store(cells, matrices, start, size):  # type: ignore[no-untyped-def]
    for place in range(_PLACES):
        target = matrices[place, start : start + size]
        for lane in range(len(target)):
            target[lane] = cells[place * _LANES + lane]

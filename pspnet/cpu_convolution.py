"""3x3 convolutions on a CPU with 2.25 times fewer multiplications; what follows a convolution, in one pass.

It is F(2x2, 3x3) of Lavin and Gray, CVPR 2016: the four outputs of a tile of 4x4 inputs d are AᵀMA, where M is
(G g Gᵀ) ⊙ (Bᵀ d B); for all tiles at once the sum over the channels is 16 matrix products. A dilated convolution is
one on each of the interleaved grids that do not see each other: the cells of its tiles lie `dilation` apart.

Axes: n images, h w cells, c channels in, o channels out, p tiles of a block.
"""

# ruff: noqa: F722
from collections.abc import Iterator
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_TO_KERNEL = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2
"""G."""
_LANES = 64
"""Channels of a tile that are transformed at a time, in the innermost cache."""
_ROW = 4 * _LANES
_TILES = 512
"""That are taken at a time: few enough to stay in a cache, many enough for a matrix product."""


def winograd_convolution(
    images: Float[Tensor, "n c h w"], weight: Float[Tensor, "o c 3 3"], dilation: int = 1
) -> Float[Tensor, "n o h w"]:
    """Return conv2d(images, weight, padding=dilation, dilation=dilation), in channels_last; float32 or float64.

    It agrees up to rounding, and rounds no worse. Of its working memory nothing is kept for the gradients.
    """
    result: Tensor = _Convolution.apply(images, weight, dilation)
    return result


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


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.dilation = dilation
        return _convolved(images, _kernels(weight, _TO_KERNEL), dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        images, weight = ctx.saved_tensors
        of_images = of_weight = None
        if ctx.needs_input_grad[0]:
            turned_about = _kernels(weight, _TO_KERNEL[:, ::-1])
            of_images = _convolved(gradient, turned_about.transpose(1, 2), ctx.dilation)
        if ctx.needs_input_grad[1]:
            of_weight = _gradient_of_weight(images, gradient, ctx.dilation)
        return of_images, of_weight, None


def _convolved(images: Tensor, kernels: Float[Tensor, "16 o c"], dilation: int) -> Float[Tensor, "n o h w"]:
    images = images.detach().permute(0, 2, 3, 1).contiguous()
    result = images.new_empty(*images.shape[:3], kernels.shape[1])
    for block in _blocks(images, kernels.shape[1], dilation):
        _read_tiles(images.numpy(), *block.places, block.tiles.numpy())
        torch.bmm(block.tiles, kernels.transpose(1, 2), out=block.products)
        _write_results(block.products.numpy(), *block.places, result.numpy())
    return result.permute(0, 3, 1, 2)


def _gradient_of_weight(images: Tensor, gradient: Tensor, dilation: int) -> Float[Tensor, "o c 3 3"]:
    images = images.detach().permute(0, 2, 3, 1).contiguous()
    gradient = gradient.detach().permute(0, 2, 3, 1).contiguous()
    of_kernels = images.new_zeros(16, gradient.shape[3], images.shape[3])
    for block in _blocks(images, gradient.shape[3], dilation):
        _read_tiles(images.numpy(), *block.places, block.tiles.numpy())
        _read_gradients(gradient.numpy(), *block.places, block.products.numpy())
        of_kernels.baddbmm_(block.products.transpose(1, 2), block.tiles)
    both_sides = images.new_tensor(np.kron(_TO_KERNEL, _TO_KERNEL))
    return (
        (both_sides.T @ of_kernels.flatten(1))
        .unflatten(0, (3, 3))
        .unflatten(2, of_kernels.shape[1:])
        .permute(2, 3, 0, 1)
    )


def _kernels(weight: Float[Tensor, "o c 3 3"], to_kernel: np.ndarray) -> Float[Tensor, "16 o c"]:
    """Return G g Gᵀ for each pair of channels."""
    both_sides = weight.new_tensor(np.kron(to_kernel, to_kernel))
    return (both_sides @ weight.detach().permute(0, 2, 3, 1).flatten(1, 2)).transpose(0, 1)


class _Block(NamedTuple):
    """Some rows of tiles, and memory for what is computed of them."""

    places: tuple[np.ndarray, np.ndarray, int]
    """Image and first row of each row of tiles, (k, 2), first column of each tile in it, and the dilation."""
    tiles: Float[Tensor, "16 p c"]
    products: Float[Tensor, "16 p o"]


def _blocks(images: Float[Tensor, "n h w c"], num_outputs: int, dilation: int) -> Iterator[_Block]:
    num_images, height, width, channels = images.shape
    rows = np.array([(image, top) for image in range(num_images) for top in _starts(height, dilation)])
    lefts = np.array(_starts(width, dilation))
    rows_at_a_time = min(len(rows), max(1, _TILES // len(lefts)))
    tiles = images.new_empty(16 * rows_at_a_time * len(lefts) * channels)
    products = images.new_empty(16 * rows_at_a_time * len(lefts) * num_outputs)
    for first in range(0, len(rows), rows_at_a_time):
        some = rows[first : first + rows_at_a_time]
        num_tiles = len(some) * len(lefts)
        yield _Block(
            (some, lefts, dilation),
            tiles[: 16 * num_tiles * channels].view(16, num_tiles, channels),
            products[: 16 * num_tiles * num_outputs].view(16, num_tiles, num_outputs),
        )


def _starts(num_cells: int, dilation: int) -> list[int]:
    """Return the first cell of each tile, which for those at the border lies in the padding."""
    return [
        first - dilation
        for start in range(min(dilation, num_cells))
        for first in range(start, num_cells, 2 * dilation)
    ]


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


@numba.njit(cache=True, nogil=True)
def _read_tiles(images, rows, lefts, dilation, tiles):  # type: ignore[no-untyped-def]
    """Write Bᵀ d B of each tile d; outside the images are zeros."""
    cells, halfway = np.empty(4 * _ROW, images.dtype), np.empty(4 * _ROW, images.dtype)
    tile = 0
    for row in range(len(rows)):
        for left in lefts:
            for channel in range(0, images.shape[3], _LANES):
                _load_cells(images, rows[row, 0], rows[row, 1], left, dilation, 4, channel, cells)
                for at in range(_ROW):
                    a, b, c, d = cells[at], cells[at + _ROW], cells[at + 2 * _ROW], cells[at + 3 * _ROW]
                    halfway[at] = a - c
                    halfway[at + _ROW] = b + c
                    halfway[at + 2 * _ROW] = c - b
                    halfway[at + 3 * _ROW] = b - d
                for start in range(0, 4 * _ROW, _ROW):
                    for at in range(start, start + _LANES):
                        a, b = halfway[at], halfway[at + _LANES]
                        c, d = halfway[at + 2 * _LANES], halfway[at + 3 * _LANES]
                        cells[at] = a - c
                        cells[at + _LANES] = b + c
                        cells[at + 2 * _LANES] = c - b
                        cells[at + 3 * _LANES] = b - d
                _store(cells, tiles, tile, channel)
            tile += 1


@numba.njit(cache=True, nogil=True)
def _read_gradients(gradients, rows, lefts, dilation, products):  # type: ignore[no-untyped-def]
    """Write A y Aᵀ of the gradients y of each tile's four results; outside are zeros."""
    cells, halfway = np.empty(4 * _ROW, gradients.dtype), np.empty(4 * _ROW, gradients.dtype)
    tile = 0
    for row in range(len(rows)):
        for left in lefts:
            for channel in range(0, gradients.shape[3], _LANES):
                top, first = rows[row, 1] + dilation, left + dilation
                _load_cells(gradients, rows[row, 0], top, first, dilation, 2, channel, cells)
                for at in range(2 * _LANES):
                    a, b = cells[at], cells[at + _ROW]
                    halfway[at] = a
                    halfway[at + _ROW] = a + b
                    halfway[at + 2 * _ROW] = a - b
                    halfway[at + 3 * _ROW] = -b
                for start in range(0, 4 * _ROW, _ROW):
                    for at in range(start, start + _LANES):
                        a, b = halfway[at], halfway[at + _LANES]
                        cells[at] = a
                        cells[at + _LANES] = a + b
                        cells[at + 2 * _LANES] = a - b
                        cells[at + 3 * _LANES] = -b
                _store(cells, products, tile, channel)
            tile += 1


@numba.njit(cache=True, nogil=True)
def _write_results(products, rows, lefts, dilation, results):  # type: ignore[no-untyped-def]
    """Write the four results Aᵀ M A of each tile M, those that lie in the image."""
    cells, halfway = np.empty(4 * _ROW, results.dtype), np.empty(2 * _ROW, results.dtype)
    tile = 0
    for row in range(len(rows)):
        for left in lefts:
            for channel in range(0, results.shape[3], _LANES):
                _load(products, tile, channel, cells)
                for at in range(_ROW):
                    a, b, c, d = cells[at], cells[at + _ROW], cells[at + 2 * _ROW], cells[at + 3 * _ROW]
                    halfway[at] = a + b + c
                    halfway[at + _ROW] = b - c - d
                for start in range(0, 2 * _ROW, _ROW):
                    for at in range(start, start + _LANES):
                        a, b = halfway[at], halfway[at + _LANES]
                        c, d = halfway[at + 2 * _LANES], halfway[at + 3 * _LANES]
                        cells[at] = a + b + c
                        cells[at + _LANES] = b - c - d
                for i in range(2):
                    for j in range(2):
                        y, x = rows[row, 1] + (i + 1) * dilation, left + (j + 1) * dilation
                        if y < results.shape[1] and x < results.shape[2]:
                            target = results[rows[row, 0], y, x, channel : channel + _LANES]
                            for lane in range(len(target)):
                                target[lane] = cells[i * _ROW + j * _LANES + lane]
            tile += 1


@numba.njit(cache=True, nogil=True)
def _load_cells(images, image, top, left, dilation, side, channel, cells):  # type: ignore[no-untyped-def]
    """Read side x side cells of an image; those outside are 0."""
    for i in range(side):
        for j in range(side):
            y, x = top + i * dilation, left + j * dilation
            at = i * _ROW + j * _LANES
            if 0 <= y < images.shape[1] and 0 <= x < images.shape[2]:
                source = images[image, y, x, channel : channel + _LANES]
                for lane in range(len(source)):
                    cells[at + lane] = source[lane]
            else:
                cells[at : at + _LANES] = 0


@numba.njit(cache=True, nogil=True)
def _load(matrices, tile, channel, cells):  # type: ignore[no-untyped-def]
    for place in range(16):
        source = matrices[place, tile, channel : channel + _LANES]
        for lane in range(len(source)):
            cells[place * _LANES + lane] = source[lane]


@numba.njit(cache=True, nogil=True)
def _store(cells, matrices, tile, channel):  # type: ignore[no-untyped-def]
    for place in range(16):
        target = matrices[place, tile, channel : channel + _LANES]
        for lane in range(len(target)):
            target[lane] = cells[place * _LANES + lane]

"""3x3 convolutions on a CPU with a quarter of the multiplications.

It is F(4x4, 3x3) of Lavin and Gray, CVPR 2016: the 4x4 outputs of a tile of 6x6 inputs d are AᵀMA, where M is
(G g Gᵀ) ⊙ (Bᵀ d B); for all tiles at once the sum over the channels is 36 matrix products. A, B and G belong to the
points 0, a, -a, b, -b and infinity; how much is rounded depends on them (Barabasz et al., ACM TOMS 46.4, 2020), and
least for a = 5/8 and b = 3/2 of all pairs of small fractions that were tried. A dilated convolution is one on each of
the interleaved grids that do not see each other: the cells of its tiles lie `dilation` apart.

Axes: n images, h w cells, c channels in, o channels out, p tiles of a block, t = 36 places of a tile.
"""

# ruff: noqa: F722
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

_A, _B = 5 / 8, 3 / 2
_POINTS = (0, _A, -_A, _B, -_B)
_TO_KERNEL = np.array(
    [
        np.array([1, point, point**2]) / math.prod(point - other for other in _POINTS if other != point)
        for point in _POINTS
    ]
    + [[0, 0, 1]]
)
"""G."""
_PLACES = 36
_LANES = 64
"""Channels of a tile that are transformed at a time, in the innermost cache."""
_ROW = 6 * _LANES
_TILES = 288
"""That are taken at a time: few enough to stay in a cache, many enough for a matrix product."""
_CHANNELS = 512
"""Of the inputs, that are taken at a time."""


def winograd_convolution(
    images: Float[Tensor, "n c h w"], weight: Float[Tensor, "o c 3 3"], dilation: int = 1
) -> Float[Tensor, "n o h w"]:
    """Return conv2d(images, weight, padding=dilation, dilation=dilation), in channels_last; float32 or float64.

    It agrees up to rounding, of which it has one to two times torch's, and a weight's gradient five to six times
    (docs/numerics.md). Of its working memory nothing is kept for the gradients.
    """
    result: Tensor = _Convolution.apply(images, weight, dilation)
    return result


def winograd_kernels(weight: Float[Tensor, "o c 3 3"]) -> Float[Tensor, "t o c"]:
    """Return G g Gᵀ for each pair of channels, rounded once: all that `winograd_prediction` needs of a weight."""
    parts = [_kernels(part.double(), _TO_KERNEL).to(weight.dtype) for part in weight.detach().split(_LANES)]
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
        _run(_write_results, block.products.flatten(1), *block.places, shift, result)
    return result.permute(0, 3, 1, 2)


def _gradient_of_weight(images: Tensor, gradient: Tensor, dilation: int) -> Float[Tensor, "o c 3 3"]:
    images = images.detach().permute(0, 2, 3, 1).contiguous()
    gradient = gradient.detach().permute(0, 2, 3, 1).contiguous()
    of_kernels = images.new_empty(_PLACES, gradient.shape[3], images.shape[3])
    for number, block in enumerate(_blocks(images, gradient.shape[3], dilation)):
        _run(_read_gradients, gradient, *block.places, block.products.flatten(1))
        factors = block.products.transpose(1, 2)
        for first in range(0, images.shape[3], _CHANNELS):
            some = of_kernels[..., first : first + _CHANNELS]
            some.baddbmm_(factors, block.read(images, first, some.shape[2]), beta=min(number, 1))
    both_sides = images.new_tensor(np.kron(_TO_KERNEL, _TO_KERNEL))
    return (
        (both_sides.T @ of_kernels.flatten(1))
        .unflatten(0, (3, 3))
        .unflatten(2, of_kernels.shape[1:])
        .permute(2, 3, 0, 1)
    )


def _kernels(weight: Float[Tensor, "o c 3 3"], to_kernel: np.ndarray) -> Float[Tensor, "t o c"]:
    both_sides = weight.new_tensor(np.kron(to_kernel, to_kernel))
    return (both_sides @ weight.detach().permute(0, 2, 3, 1).flatten(1, 2)).transpose(0, 1)


def _run(loop: Callable[..., None], *values: Any) -> None:
    """Run a compiled loop on what the tensors hold; those of sizes alone (`pspnet.memory`) hold nothing."""
    if not any(isinstance(value, FakeTensor) for value in values):
        loop(*(value.numpy() if isinstance(value, Tensor) else value for value in values))


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
        _run(_read_tiles, images, first, num_channels, *self.places, tiles.flatten(1))
        return tiles


def _blocks(images: Float[Tensor, "n h w c"], num_outputs: int, dilation: int) -> Iterator[_Block]:
    num_images, height, width, channels = images.shape
    rows = np.array([(image, top) for image in range(num_images) for top in _starts(height, dilation)])
    lefts = np.array(_starts(width, dilation))
    num_blocks = math.ceil(len(rows) * len(lefts) / _TILES)
    rows_at_a_time = math.ceil(len(rows) / num_blocks)
    most = rows_at_a_time * len(lefts)
    tiles = images.new_empty(_PLACES * most * min(channels, _CHANNELS))
    products = images.new_empty(_PLACES * most * num_outputs)
    for first in range(0, len(rows), rows_at_a_time):
        some = rows[first : first + rows_at_a_time]
        size = (_PLACES, len(some) * len(lefts), num_outputs)
        yield _Block((some, lefts, dilation), tiles, products[: math.prod(size)].view(size))


def _starts(num_cells: int, dilation: int) -> list[int]:
    """Return the first cell of each tile, which for those at the border lies in the padding."""
    return [
        first - dilation
        for start in range(min(dilation, num_cells))
        for first in range(start, num_cells, 4 * dilation)
    ]


@numba.njit(cache=True, nogil=True)
def _read_tiles(images, first, num_channels, rows, lefts, dilation, tiles):  # type: ignore[no-untyped-def]
    """Write Bᵀ d B of each tile d of these channels; outside the images are zeros."""
    cells, halfway = np.empty(6 * _ROW, images.dtype), np.empty(6 * _ROW, images.dtype)
    tile = 0
    for image, top in rows:
        for left in lefts:
            for channel in range(0, num_channels, _LANES):
                end = min(channel + _LANES, num_channels)
                part = (first + channel, first + end)
                _load_cells(images, image, top, left, dilation, 6, part, cells)
                _of_inputs(cells, 0, _ROW, _ROW, halfway)
                for start in range(0, 6 * _ROW, _ROW):
                    _of_inputs(halfway, start, _LANES, _LANES, cells)
                _store(cells, tiles, tile * num_channels + channel, end - channel)
            tile += 1


@numba.njit(cache=True, nogil=True)
def _of_inputs(d, start, step, size, result):  # type: ignore[no-untyped-def]
    """Write Bᵀ d of six rows of `size` values, that begin `step` apart."""
    a, b = d.dtype.type(_A), d.dtype.type(_B)
    for at in range(start, start + size):
        d1, d2, d3, d4 = d[at + step], d[at + 2 * step], d[at + 3 * step], d[at + 4 * step]
        even_a, odd_a = d4 - b * b * d2, a * (d3 - b * b * d1)
        even_b, odd_b = d4 - a * a * d2, b * (d3 - a * a * d1)
        result[at] = a * a * (b * b * d[at] - d2) + even_a
        result[at + step] = even_a + odd_a
        result[at + 2 * step] = even_a - odd_a
        result[at + 3 * step] = even_b + odd_b
        result[at + 4 * step] = even_b - odd_b
        result[at + 5 * step] = d[at + 5 * step] - (a * a + b * b) * d3 + a * a * b * b * d1


@numba.njit(cache=True, nogil=True)
def _read_gradients(gradients, rows, lefts, dilation, products):  # type: ignore[no-untyped-def]
    """Write A y Aᵀ of the gradients y of each tile's results; outside are zeros."""
    cells, halfway = np.empty(6 * _ROW, gradients.dtype), np.empty(6 * _ROW, gradients.dtype)
    num_channels = gradients.shape[3]
    tile = 0
    for image, top in rows:
        for left in lefts:
            for channel in range(0, num_channels, _LANES):
                end = min(channel + _LANES, num_channels)
                y, x = top + dilation, left + dilation
                _load_cells(gradients, image, y, x, dilation, 4, (channel, end), cells)
                _of_gradients(cells, 0, _ROW, 4 * _LANES, halfway)
                for start in range(0, 6 * _ROW, _ROW):
                    _of_gradients(halfway, start, _LANES, _LANES, cells)
                _store(cells, products, tile * num_channels + channel, end - channel)
            tile += 1


@numba.njit(cache=True, nogil=True)
def _of_gradients(y, start, step, size, result):  # type: ignore[no-untyped-def]
    """Write A y of four rows of `size` values, that begin `step` apart."""
    a, b = y.dtype.type(_A), y.dtype.type(_B)
    for at in range(start, start + size):
        y0, y1, y2, y3 = y[at], y[at + step], y[at + 2 * step], y[at + 3 * step]
        even_a, odd_a = y0 + a * a * y2, a * (y1 + a * a * y3)
        even_b, odd_b = y0 + b * b * y2, b * (y1 + b * b * y3)
        result[at] = y0
        result[at + step] = even_a + odd_a
        result[at + 2 * step] = even_a - odd_a
        result[at + 3 * step] = even_b + odd_b
        result[at + 4 * step] = even_b - odd_b
        result[at + 5 * step] = y3


@numba.njit(cache=True, nogil=True)
def _write_results(products, rows, lefts, dilation, shift, results):  # type: ignore[no-untyped-def]
    """Write the results AᵀMA of each tile M, those that lie in the image; with a shift, shifted and rectified."""
    cells, halfway = np.empty(6 * _ROW, results.dtype), np.empty(4 * _ROW, results.dtype)
    _, height, width, num_channels = results.shape
    tile = 0
    for image, top in rows:
        for left in lefts:
            for channel in range(0, num_channels, _LANES):
                end = min(channel + _LANES, num_channels)
                _load_products(products, tile * num_channels + channel, end - channel, cells)
                _of_products(cells, 0, _ROW, _ROW, halfway)
                for start in range(0, 4 * _ROW, _ROW):
                    _of_products(halfway, start, _LANES, _LANES, cells)
                for i in range(4):
                    for j in range(4):
                        y, x = top + (i + 1) * dilation, left + (j + 1) * dilation
                        if y < height and x < width:
                            target = results[image, y, x, channel:end]
                            _finish(cells, i * _ROW + j * _LANES, shift[channel:end], target)
            tile += 1


@numba.njit(cache=True, nogil=True)
def _of_products(m, start, step, size, result):  # type: ignore[no-untyped-def]
    """Write Aᵀ m of six rows of `size` values, that begin `step` apart."""
    a, b = m.dtype.type(_A), m.dtype.type(_B)
    for at in range(start, start + size):
        even_a, odd_a = m[at + step] + m[at + 2 * step], a * (m[at + step] - m[at + 2 * step])
        even_b, odd_b = m[at + 3 * step] + m[at + 4 * step], b * (m[at + 3 * step] - m[at + 4 * step])
        result[at] = m[at] + even_a + even_b
        result[at + step] = odd_a + odd_b
        result[at + 2 * step] = a * a * even_a + b * b * even_b
        result[at + 3 * step] = a * a * odd_a + b * b * odd_b + m[at + 5 * step]


@numba.njit(cache=True, nogil=True)
def _finish(cells, start, shift, target):  # type: ignore[no-untyped-def]
    """Write one result of a tile; with a shift, shifted and rectified."""
    if len(shift):
        for lane in range(len(target)):
            value = cells[start + lane] + shift[lane]
            target[lane] = 0 if value < 0 else value  # not a number stays that
    else:
        for lane in range(len(target)):
            target[lane] = cells[start + lane]


@numba.njit(cache=True, nogil=True)
def _load_cells(images, image, top, left, dilation, side, part, cells):  # type: ignore[no-untyped-def]
    """Read a part of the channels of side x side cells of an image; those outside are 0."""
    for i in range(side):
        for j in range(side):
            y, x = top + i * dilation, left + j * dilation
            at = i * _ROW + j * _LANES
            if 0 <= y < images.shape[1] and 0 <= x < images.shape[2]:
                source = images[image, y, x, part[0] : part[1]]
                for lane in range(len(source)):
                    cells[at + lane] = source[lane]
            else:
                cells[at : at + _LANES] = 0


@numba.njit(cache=True, nogil=True)
def _load_products(products, start, size, cells):  # type: ignore[no-untyped-def]
    for place in range(_PLACES):
        source = products[place, start : start + size]
        for lane in range(size):
            cells[place * _LANES + lane] = source[lane]


@numba.njit(cache=True, nogil=True)
def _store(cells, matrices, start, size):  # type: ignore[no-untyped-def]
    for place in range(_PLACES):
        target = matrices[place, start : start + size]
        for lane in range(len(target)):
            target[lane] = cells[place * _LANES + lane]

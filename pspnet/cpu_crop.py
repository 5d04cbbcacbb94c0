"""The crops of `transforms.crop`, normalised, on a CPU: as few passes over as little memory as torch's kernels allow.

Resize, blur, padding, flip and division by the standard deviation are linear and separable, so that an upright crop
is rows @ (window - mean) @ columns. Both matrices are bands: each block of eight rows (or columns) of the crop needs
but the few source rows below it, which a small dense product reads while they are in the cache. Photometric distortion
is not linear: it comes after, a few rows at a time.

Axes: h w pixels of the window, s pixels of the crop's side, colours interleaved (h, 3 * w) throughout.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pspnet.labels import IGNORE_INDEX
from pspnet.photometric import Photometric, distort
from pspnet.transforms import Axis, Sample, gaussian_taps, source_window

_BLOCK = 8
_BLUR_ROWS = 64
"""Rows that are blurred together: they stay in the cache."""
_DISTORT_ROWS = 128
_FRACTION_BITS = 16
"""Of the fixed-point coordinates by which turned labels are read: windows of up to 32 767 pixels a side."""


def crop_into(
    image: Tensor,
    label: Tensor,
    window: Tensor,
    target: Tensor,
    sample: Sample,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write a sample's normalised crop to `image`, float32 (s, s, 3), and its train ids to `label`, int64 (s, s).

    `window`, uint8 (3, h, w) in the memory order (h, w, 3), and `target`, uint8 (h, w), are the sample's source
    window.
    """
    read = _read_rotated if sample.angle else _read_upright
    scale = 1 / np.asarray(std, dtype=np.float32)
    if sample.photometric is None:
        read(image, label, window, target, sample, mean=mean, scale=scale)
        return
    outside = read(image, label, window, target, sample, mean=mean, scale=np.ones_like(scale))
    _distort(image, outside, sample.photometric, mean=mean, scale=scale)


def _distort(
    image: Tensor,
    outside: Tensor | None,
    photometric: Photometric,
    *,
    mean: Sequence[float],
    scale: np.ndarray,
) -> None:
    """Distort and normalise what lies in the image, and but normalise its padding; `image` is grey levels - mean."""
    offset = torch.tensor(mean, dtype=torch.float32)[:, None, None]
    factor = torch.from_numpy(scale)[:, None, None]
    for begin in range(0, len(image), _DISTORT_ROWS):
        rows = image[begin : begin + _DISTORT_ROWS].permute(2, 0, 1)
        levels = rows.contiguous().add_(offset)
        distorted = distort(levels, photometric)
        if outside is not None:
            distorted = torch.where(outside[begin : begin + _DISTORT_ROWS], levels, distorted)
        torch.mul(distorted.sub_(offset), factor, out=rows)


def _read_upright(
    image: Tensor,
    label: Tensor,
    window: Tensor,
    target: Tensor,
    sample: Sample,
    *,
    mean: Sequence[float],
    scale: np.ndarray,
) -> Tensor | None:
    """Write the crop, normalised but not distorted; return where it is padded, bool (s, s), or None."""
    area = source_window(sample, len(label))
    down = Axis(sample.top, len(label), sample.size[0], sample.scaled_size[0], area.top)
    across = Axis(sample.left, len(label), sample.size[1], sample.scaled_size[1], area.left)
    if sample.flip:
        across = across.reversed()
    rows = _band(down, area.height, sample.blur_sigma)
    columns = _band(across, area.width, sample.blur_sigma).interleaved(scale)
    pixels = window.permute(1, 2, 0).reshape(area.height, -1)
    _apply(rows, columns, pixels, image, offset=torch.tensor(mean, dtype=torch.float32).repeat(area.width))
    train_ids = target.numpy().take(down.nearest, axis=0).take(across.nearest, axis=1)
    outside = None
    if down.is_padded or across.is_padded:
        outside = ~(down.is_inside[:, None] & across.is_inside[None, :])
        train_ids[outside] = IGNORE_INDEX
    label.copy_(torch.from_numpy(train_ids))
    return None if outside is None else torch.from_numpy(outside)


@dataclass(frozen=True)
class _Band:
    """A matrix with few entries a row, all near the diagonal, as one dense block for every eight rows."""

    starts: list[int]
    """First column of each block."""
    blocks: np.ndarray
    """float32 (number of blocks, rows in a block, columns in a block)."""

    def interleaved(self, scale: np.ndarray) -> "_Band":
        """Return the transpose that acts on interleaved colours, each scaled."""
        count, rows, columns = self.blocks.shape
        spread = np.zeros((count, columns, len(scale), rows, len(scale)), dtype=np.float32)
        for colour, factor in enumerate(scale):
            spread[:, :, colour, :, colour] = self.blocks.transpose(0, 2, 1) * factor
        return _Band(
            [start * len(scale) for start in self.starts], spread.reshape(count, columns * len(scale), -1)
        )


def _band(axis: Axis, extent: int, blur_sigma: float) -> _Band:
    """Return the matrix (s, extent) that interpolates, then blurs, and is zero where the crop is padded."""
    size = len(axis.low)
    order, factors = np.arange(size)[None], np.ones((1, 1))
    if blur_sigma:
        factors = gaussian_taps(blur_sigma)[:, None]
        order = np.abs(order + np.arange(-2, 3)[:, None])
        order = np.where(order < size, order, 2 * (size - 1) - order)
    high = np.minimum(axis.high, extent - 1)
    places = np.concatenate([axis.low[order], high[order]])
    weights = np.concatenate([(1 - axis.weight[order]) * factors, axis.weight[order] * factors])
    weights *= np.tile(axis.is_inside[order], (2, 1))

    missing = -size % _BLOCK
    places = np.pad(places, ((0, 0), (0, missing)), mode="edge").reshape(len(places), -1, _BLOCK)
    weights = np.pad(weights, ((0, 0), (0, missing))).reshape(places.shape)
    starts = places.min(axis=(0, 2))
    width = int((places.max(axis=(0, 2)) - starts).max()) + 1
    starts = np.minimum(starts, extent - width)
    blocks = np.zeros((len(starts), _BLOCK, width), dtype=np.float32)
    number, row = np.arange(len(starts))[:, None], np.arange(_BLOCK)[None, :]
    for place, weight in zip(places, weights, strict=True):
        blocks[number, row, place - starts[:, None]] += weight
    return _Band(starts.tolist(), blocks)


def _apply(rows: _Band, columns: _Band, pixels: Tensor, image: Tensor, *, offset: Tensor) -> None:
    """Write rows @ (pixels - offset) @ columns to `image`."""
    result = image.view(len(image), -1)
    between = torch.empty(len(image), pixels.shape[1])
    height = rows.blocks.shape[2]
    for start, block, out in zip(
        rows.starts, torch.from_numpy(rows.blocks).unbind(), between.split(_BLOCK), strict=True
    ):
        source = pixels[start : start + height].float()
        source -= offset
        torch.mm(block[: len(out)], source, out=out)
    width = columns.blocks.shape[1]
    for start, block, out in zip(
        columns.starts,
        torch.from_numpy(columns.blocks).unbind(),
        result.split(3 * _BLOCK, dim=1),
        strict=True,
    ):
        torch.mm(between[:, start : start + width], block[:, : out.shape[1]], out=out)


def _read_rotated(
    image: Tensor,
    label: Tensor,
    window: Tensor,
    target: Tensor,
    sample: Sample,
    *,
    mean: Sequence[float],
    scale: np.ndarray,
) -> Tensor | None:
    """Write the turned crop, normalised but not distorted; return where it is padded, bool (s, s), or None."""
    if not sample.blur_sigma:
        return _rotated_into(image, label, window, target, sample, mean=mean, scale=scale)
    bordered = torch.empty(len(label) + 4, len(label) + 4, 3)
    outside = _rotated_into(bordered[2:-2, 2:-2], label, window, target, sample, mean=mean, scale=scale)
    _blur_into(image, bordered, sample.blur_sigma)
    return outside


def _rotated_into(
    image: Tensor,
    label: Tensor,
    window: Tensor,
    target: Tensor,
    sample: Sample,
    *,
    mean: Sequence[float],
    scale: np.ndarray,
) -> Tensor | None:
    """Write the turned and flipped crop, normalised but not blurred; planes of colour are read twice as fast here."""
    size = len(label)
    area = source_window(sample, size)
    centre = (size - 1) / 2
    cosine, sine = math.cos(math.radians(sample.angle)), math.sin(math.radians(sample.angle))
    y = np.arange(size) - centre
    x = -y if sample.flip else y
    # Each coordinate is a sum of a term of the row and a term of the column.
    scaled = ((cosine * y + centre + sample.top, -sine * x), (sine * y + centre + sample.left, cosine * x))
    source = [
        ((of_row + 0.5) * (extent / scaled_extent) - 0.5 - begin, of_column * (extent / scaled_extent))
        for (of_row, of_column), extent, scaled_extent, begin in zip(
            scaled, sample.size, sample.scaled_size, (area.top, area.left), strict=True
        )
    ]
    grid = torch.empty(1, size, size, 2)
    for channel, (of_row, of_column), extent in zip((1, 0), source, target.shape, strict=True):
        factor = 2 / max(1, extent - 1)
        column = torch.from_numpy((of_row * factor - 1).astype(np.float32))[:, None]
        row = torch.from_numpy((of_column * factor).astype(np.float32))[None, :]
        torch.add(column, row, out=grid[0, ..., channel])
    planes = functional.grid_sample(
        window.to(torch.float32, memory_format=torch.contiguous_format)[None],
        grid,
        mode="bilinear",
        padding_mode="border",
        align_corners=True,
    )[0]
    train_ids = _nearest(target, source)
    outside = _outside(scaled, sample.scaled_size)
    if outside is not None:
        train_ids.masked_fill_(outside, IGNORE_INDEX)
        for plane, value in zip(planes, mean, strict=True):
            plane.masked_fill_(outside, value)
    label.copy_(train_ids)
    for plane, value, factor, out in zip(planes, mean, scale.tolist(), image.unbind(-1), strict=True):
        torch.add(torch.tensor(-value * factor), plane, alpha=factor, out=out)
    return outside


def _blur_into(image: Tensor, bordered: Tensor, sigma: float) -> None:
    """Write the blur of `bordered`, (s + 4, s + 4, 3), to `image`; its border of two pixels becomes the reflection."""
    for border, inner in ((0, 4), (1, 3), (-1, -5), (-2, -4)):
        bordered[border] = bordered[inner]
    for border, inner in ((0, 4), (1, 3), (-1, -5), (-2, -4)):
        bordered[:, border] = bordered[:, inner]
    rows, result = bordered.view(len(bordered), -1), image.view(len(image), -1)
    far, near, centre = gaussian_taps(sigma)[:3].tolist()

    def weighted(shifted: Sequence[Tensor], out: Tensor) -> None:
        torch.add(shifted[1], shifted[3], out=out).mul_(near)
        out.add_(shifted[2], alpha=centre).add_(shifted[0], alpha=far).add_(shifted[4], alpha=far)

    for begin in range(0, len(image), _BLUR_ROWS):
        end = min(begin + _BLUR_ROWS, len(image))
        between = torch.empty(end - begin, rows.shape[1])
        weighted([rows[begin + shift : end + shift] for shift in range(5)], between)
        weighted(
            [between[:, 3 * shift : 3 * shift + result.shape[1]] for shift in range(5)], result[begin:end]
        )


_Terms = Sequence[tuple[np.ndarray, np.ndarray]]
"""Rows' and columns' terms, of the vertical and of the horizontal coordinate."""


def _outside(scaled: _Terms, scaled_size: Sequence[int]) -> Tensor | None:
    """Return which pixels do not lie in the scaled image, bool (s, s), or None where all do."""
    found = []
    for (of_row, of_column), extent in zip(scaled, scaled_size, strict=True):
        low, high = of_row.min() + of_column.min(), of_row.max() + of_column.max()
        if low <= -0.5 or high >= extent - 0.5:
            place = torch.from_numpy(of_row)[:, None] + torch.from_numpy(of_column)[None, :]
            found.append((place <= -0.5) | (place >= extent - 0.5))
    return functools.reduce(torch.logical_or, found) if found else None


def _nearest(target: Tensor, source: _Terms) -> Tensor:
    """Return the train ids at the pixels nearest to the coordinates, in fixed point."""
    parts = []
    for (of_row, of_column), extent in zip(source, target.shape, strict=True):
        column, row = (
            torch.from_numpy(np.rint(values * (1 << _FRACTION_BITS)).astype(np.int32))
            for values in (of_row + 0.5, of_column)
        )
        place = column[:, None] + row[None, :]
        parts.append(place.bitwise_right_shift_(_FRACTION_BITS).clamp_(0, extent - 1))
    flat = parts[0].mul_(target.shape[1]).add_(parts[1])
    return target.reshape(-1).index_select(0, flat.view(-1)).view(flat.shape)

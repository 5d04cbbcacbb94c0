"""The crops of `transforms.crop`, normalised, on a CPU: each pixel is read and written once, by compiled loops.

Numba compiles the loops when they are first called and keeps the result beside this file, or in the user's cache.

Axes: h w pixels of the window, ch cw pixels of the crop; colours interleaved throughout.
"""

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from torch import Tensor

from pspnet.cpu_photometric import OUTSIDE, distort_into
from pspnet.labels import IGNORE_INDEX
from pspnet.transforms import BLUR_TAPS, Axis, Sample, source_window

_BITS = 32
"""Of the fraction of a fixed-point coordinate."""
_ONE, _HALF, _FRACTION, _UNIT = 1 << _BITS, 1 << (_BITS - 1), (1 << _BITS) - 1, 1 / (1 << _BITS)
_STEP = np.uint32(1)


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
    """Write a sample's normalised crop to `image`, float32 (ch, cw, 3), and its train ids to `label`, int64
    (ch, cw).

    `window`, uint8 (3, h, w) in the memory order (h, w, 3), and `target`, uint8 (h, w), are the sample's source
    window.
    """
    out, out_ids = image.numpy(), label.numpy()
    pixels, ids = window.permute(1, 2, 0).numpy(), target.numpy()
    final_std, outside = std, np.int64(IGNORE_INDEX)
    if sample.photometric is not None:
        std, outside = (1.0,) * len(std), np.int64(OUTSIDE)
    scale = (1 / np.asarray(std, dtype=np.float64)).astype(np.float32)
    offset = (np.asarray(mean, dtype=np.float64) / std).astype(np.float32)
    height, width = out_ids.shape
    crop = np.empty_like(out) if sample.is_blurred else out
    if sample.angle:
        vertical, horizontal = _turn(sample, height, width)
        _turned(crop, out_ids, pixels, ids, vertical, horizontal, scale, offset, outside)
    else:
        area = source_window(sample, (height, width))
        down = Axis(sample.top, height, sample.size[0], sample.scaled_size[0], area.top)
        across = Axis(sample.left, width, sample.size[1], sample.scaled_size[1], area.left)
        if sample.flip:
            across = across.reversed()
        _upright(
            crop,
            out_ids,
            pixels,
            ids,
            _tables(down, area.height),
            _tables(across, area.width),
            scale,
            offset,
            outside,
        )
    if sample.is_blurred:
        _blur(out, crop, BLUR_TAPS)
    if sample.photometric is not None:
        distort_into(out, out_ids, sample.photometric, mean=mean, std=final_std)


def _tables(axis: Axis, extent: int) -> tuple[np.ndarray, ...]:
    """Return what the loops look up, no index beyond the window's `extent`: they check none."""
    places = (np.clip(place, 0, extent - 1) for place in (axis.low, axis.high, axis.nearest))
    return (axis.is_inside, axis.weight, *places)


def _turn(sample: Sample, height: int, width: int) -> tuple[Any, ...]:
    """Return what a turned crop is read by, rows of the source before its columns, in fixed point.

    The place of row y and column x of the crop in the window is the first number, and y times the second, and x times
    the third; it lies in the image from minus the fourth up to the fifth.
    """
    area = source_window(sample, (height, width))
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    cosine, sine = math.cos(math.radians(sample.angle)), math.sin(math.radians(sample.angle))
    found = []
    for down, across, centre, place, extent, scaled, begin in (
        (cosine, -sine, centre_y, sample.top, sample.size[0], sample.scaled_size[0], area.top),
        (sine, cosine, centre_x, sample.left, sample.size[1], sample.scaled_size[1], area.left),
    ):
        ratio = extent / scaled
        along = -across if sample.flip else across
        to_corner = 1 - down * (centre_y / centre) - along * (centre_x / centre)
        start = (centre * to_corner + place + 0.5) * ratio - begin
        found.append(
            tuple(
                round(value * _ONE) for value in (start, down * ratio, along * ratio, begin, extent - begin)
            )
        )
    return tuple(found)


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def _upright(out, out_ids, pixels, ids, down, across, scale, offset, outside):  # type: ignore[no-untyped-def]
    """Resize rows, then columns, each as a weighted sum of two neighbours."""
    num_rows, num_columns = out_ids.shape
    width = pixels.shape[1]
    is_row, row_weight, low, high, nearest_row = down
    is_column, column_weight, left, right, nearest_column = across
    line = np.empty((width, 3), dtype=np.float32)
    for y in range(num_rows):
        if not is_row[y]:
            for x in range(num_columns):
                for channel in range(3):
                    out[y, x, channel] = 0
                out_ids[y, x] = outside
            continue
        above, below, weight = pixels[low[y]], pixels[high[y]], row_weight[y]
        for x in range(width):
            for channel in range(3):
                value = np.float32(above[x, channel])
                value += weight * (np.float32(below[x, channel]) - value)
                line[x, channel] = value * scale[channel] - offset[channel]
        row = ids[nearest_row[y]]
        for x in range(num_columns):
            if is_column[x]:
                weight = column_weight[x]
                for channel in range(3):
                    value = line[left[x], channel]
                    out[y, x, channel] = value + weight * (line[right[x], channel] - value)
                out_ids[y, x] = row[nearest_column[x]]
            else:
                for channel in range(3):
                    out[y, x, channel] = 0
                out_ids[y, x] = outside


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def _turned(out, out_ids, pixels, ids, vertical, horizontal, scale, offset, outside):  # type: ignore[no-untyped-def]
    """Turn the crop about its centre: every pixel is read where it comes from."""
    num_rows, num_columns = out_ids.shape
    start_y, down_y, across_y, before_y, after_y = vertical
    start_x, down_x, across_x, before_x, after_x = horizontal
    last_y, last_x = ids.shape[0] - 1, ids.shape[1] - 1
    for row in range(num_rows):
        place_y, place_x = start_y + row * down_y, start_x + row * down_x
        for column in range(num_columns):
            y, x = place_y + column * across_y, place_x + column * across_x
            if not (-before_y < y < after_y and -before_x < x < after_x):
                for channel in range(3):
                    out[row, column, channel] = 0
                out_ids[row, column] = outside
                continue
            nearest_y = np.uint32(min(max(y >> _BITS, 0), last_y))
            nearest_x = np.uint32(min(max(x >> _BITS, 0), last_x))
            out_ids[row, column] = ids[nearest_y, nearest_x]
            y, x = min(max(y - _HALF, 0), last_y << _BITS), min(max(x - _HALF, 0), last_x << _BITS)
            top, left = np.uint32(y >> _BITS), np.uint32(x >> _BITS)
            bottom, right = min(top + _STEP, np.uint32(last_y)), min(left + _STEP, np.uint32(last_x))
            down = np.float32((y & _FRACTION) * _UNIT)
            across = np.float32((x & _FRACTION) * _UNIT)
            for channel in range(3):
                above, below = (
                    np.float32(pixels[top, left, channel]),
                    np.float32(pixels[bottom, left, channel]),
                )
                above += across * (np.float32(pixels[top, right, channel]) - above)
                below += across * (np.float32(pixels[bottom, right, channel]) - below)
                out[row, column, channel] = (above + down * (below - above)) * scale[channel] - offset[
                    channel
                ]


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def _blur(out, image, taps):  # type: ignore[no-untyped-def]
    """Blur along columns, then along rows, reflected at the border."""
    size, length = image.shape[0], 3 * image.shape[1]
    pixels, result = image.reshape(size, length), out.reshape(size, length)
    line = np.empty(length + 12, dtype=np.float32)
    for y in range(size):
        far_above, above = pixels[abs(y - 2)], pixels[abs(y - 1)]
        row = pixels[y]
        below = pixels[size - 1 - abs(size - 2 - y)]
        far_below = pixels[size - 1 - abs(size - 3 - y)]
        for x in range(length):
            line[x + 6] = (
                taps[2] * row[x] + taps[1] * (above[x] + below[x]) + taps[0] * (far_above[x] + far_below[x])
            )
        for channel in range(3):
            line[channel], line[3 + channel] = line[12 + channel], line[9 + channel]
            line[length + 6 + channel] = line[length + channel]
            line[length + 9 + channel] = line[length - 3 + channel]
        for x in range(length):
            result[y, x] = (
                taps[2] * line[x + 6]
                + taps[1] * (line[x + 3] + line[x + 9])
                + taps[0] * (line[x] + line[x + 12])
            )

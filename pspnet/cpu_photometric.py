"""`photometric.distort` and the normalisation of a crop on a CPU: the same numbers, by a compiled loop.

Axes: h w pixels of the crop; colours interleaved.
"""

from collections.abc import Sequence

import numba
import numpy as np

from pspnet.labels import IGNORE_INDEX
from pspnet.photometric import Photometric

OUTSIDE = -1
"""Train id, until the crop is distorted, of the pixels that do not lie in the image."""

_IGNORE = np.int64(IGNORE_INDEX)
_ZERO, _HALF, _ONE, _TWO, _THREE, _FOUR, _MOST, _HUES = (
    np.float32(value) for value in (0, 0.5, 1, 2, 3, 4, 255, 180)
)
_TO_SECTOR, _TO_UNIT, _SHIFT = np.float32(6 / 180), np.float32(1 / 255), np.float32(1 / 4096)
_FIXED_255, _FIXED_30 = np.float32(255 * 4096), np.float32(30 * 4096)


def distort_into(
    image: np.ndarray,
    train_ids: np.ndarray,
    steps: Photometric,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Distort and normalise a crop in place.

    `image`, float32 (h, w, 3), is grey levels - mean; where `train_ids`, int64 (h, w), is OUTSIDE it is but normalised,
    and the id becomes IGNORE_INDEX.
    """
    contrast = np.float32(1 if steps.contrast is None else steps.contrast)
    _distort(
        image,
        train_ids,
        np.tile(np.asarray(mean, dtype=np.float32), image.shape[1]),
        np.tile((1 / np.asarray(std, dtype=np.float64)).astype(np.float32), image.shape[1]),
        np.float32(steps.brightness or 0),
        contrast if steps.is_contrast_first else _ONE,
        steps.saturation is not None,
        np.float32(1 if steps.saturation is None else steps.saturation),
        steps.hue is not None,
        np.float32(steps.hue or 0),
        _ONE if steps.is_contrast_first else contrast,
    )


@numba.njit(cache=True, nogil=True)
def _distort(  # type: ignore[no-untyped-def]
    image,
    train_ids,
    mean,
    scale,
    brightness,
    first_contrast,
    has_saturation,
    saturation,
    has_hue,
    hue,
    last_contrast,
):
    """Go row by row, without a branch for a pixel of the image, so that the loops become vector code."""
    size = image.shape[1]
    length = 3 * size
    rows = image.reshape(len(image), length)
    levels = np.empty(length, np.float32)
    red, green, blue = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    for y in range(len(image)):
        row, ids = rows[y], train_ids[y]
        for x in range(length):
            levels[x] = _cut(_cut(_cut(row[x] + mean[x] + _HALF) + brightness) * first_contrast)
        if has_saturation or has_hue:
            for x in range(size):
                red[x], green[x], blue[x] = levels[3 * x], levels[3 * x + 1], levels[3 * x + 2]
            if has_saturation:
                _recolour(red, green, blue, saturation, _ZERO)
            if has_hue:
                _recolour(red, green, blue, _ONE, hue)
            for x in range(size):
                levels[3 * x], levels[3 * x + 1], levels[3 * x + 2] = red[x], green[x], blue[x]
        for x in range(length):
            levels[x] = (_cut(levels[x] * last_contrast) - mean[x]) * scale[x]
        for x in range(size):
            if ids[x] == OUTSIDE:
                ids[x] = _IGNORE
                for place in range(3 * x, 3 * x + 3):
                    levels[place] = row[place] * scale[place]
        row[:] = levels


@numba.njit(cache=True, nogil=True)
def _cut(level):  # type: ignore[no-untyped-def]
    """Clip and cut to a whole level."""
    return np.float32(np.int32(min(max(level, _ZERO), _MOST)))


@numba.njit(cache=True, nogil=True)
def _recolour(reds, greens, blues, factor, turn):  # type: ignore[no-untyped-def]
    """Turn a row into hue, saturation and value, change the first two, and turn it back."""
    for x in range(len(reds)):
        red, green, blue = reds[x], greens[x], blues[x]
        value = max(red, green, blue)
        spread = value - min(red, green, blue)
        per_value = np.float32(np.int32(_FIXED_255 / max(value, _ONE) + _HALF))
        saturation = np.float32(np.int32(per_value * spread * _SHIFT + _HALF))
        of_green = blue - red + (spread + spread)
        of_blue = red - green + (spread + spread) + (spread + spread)
        hue = green - blue if value == red else (of_green if value == green else of_blue)
        per_spread = np.float32(np.int32(_FIXED_30 / max(spread, _ONE) + _HALF))
        hue = np.float32(np.int32(hue * per_spread * _SHIFT + (_HUES + _HALF)))
        hue = hue - _HUES if hue >= _HUES else hue
        hue = hue + turn
        hue = hue + _HUES if hue < _ZERO else hue
        hue = hue - _HUES if hue >= _HUES else hue
        share, unit, sector = -_cut(saturation * factor) * _TO_UNIT, value * _TO_UNIT, hue * _TO_SECTOR
        reds[x] = _colour(_TWO - abs(sector - _THREE), share, unit)
        greens[x] = _colour(abs(sector - _TWO) - _ONE, share, unit)
        blues[x] = _colour(abs(sector - _FOUR) - _ONE, share, unit)


@numba.njit(cache=True, nogil=True)
def _colour(weight, share, unit):  # type: ignore[no-untyped-def]
    return np.float32(np.int32((min(max(weight, _ZERO), _ONE) * share + _ONE) * unit * _MOST))

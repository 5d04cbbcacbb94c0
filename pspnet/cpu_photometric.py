"""`photometric.distort` and the normalisation of a crop on a CPU: the same numbers, by a compiled loop.

Axes: s pixels of the crop's side; colours interleaved.
"""

from collections.abc import Sequence

import numba
import numpy as np

from pspnet.labels import IGNORE_INDEX
from pspnet.photometric import Photometric

OUTSIDE = -1
"""Train id, until the crop is distorted, of the pixels that do not lie in the image."""

_IGNORE = np.int64(IGNORE_INDEX)
_ZERO, _ONE, _MOST, _HALF = (np.float32(value) for value in (0, 1, 255, 0.5))
_TO_SECTOR, _TO_UNIT, _SHIFT = np.float32(6 / 180), np.float32(1 / 255), np.float32(1 / 4096)
_HUES = np.float32(180)
_DIVISORS = np.maximum(np.arange(256), 1)
_PER_VALUE = np.rint(255 * 4096 / _DIVISORS).astype(np.float32)
_PER_SPREAD = np.rint(30 * 4096 / _DIVISORS).astype(np.float32)


def distort_into(
    image: np.ndarray,
    train_ids: np.ndarray,
    steps: Photometric,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Distort and normalise a crop in place.

    `image`, float32 (s, s, 3), is grey levels - mean; where `train_ids`, int64 (s, s), is OUTSIDE it is but normalised,
    and the id becomes IGNORE_INDEX.
    """
    contrast = np.float32(1 if steps.contrast is None else steps.contrast)
    _distort(
        image,
        train_ids,
        np.asarray(mean, dtype=np.float32),
        (1 / np.asarray(std, dtype=np.float64)).astype(np.float32),
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
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            pixel = image[y, x]
            if train_ids[y, x] == OUTSIDE:
                train_ids[y, x] = _IGNORE
                for channel in range(3):
                    pixel[channel] *= scale[channel]
                continue
            for channel in range(3):
                level = min(max(np.rint(pixel[channel] + mean[channel]), _ZERO), _MOST)
                pixel[channel] = _cut(_cut(level + brightness) * first_contrast)
            if has_saturation:
                _recolour(pixel, saturation, _ZERO)
            if has_hue:
                _recolour(pixel, _ONE, hue)
            for channel in range(3):
                pixel[channel] = (_cut(pixel[channel] * last_contrast) - mean[channel]) * scale[channel]


@numba.njit(cache=True, nogil=True)
def _cut(level):  # type: ignore[no-untyped-def]
    """Clip and cut to a whole level."""
    return np.floor(min(max(level, _ZERO), _MOST))


@numba.njit(cache=True, nogil=True)
def _recolour(pixel, factor, turn):  # type: ignore[no-untyped-def]
    """Turn a pixel into hue, saturation and value, change the first two, and turn it back."""
    red, green, blue = pixel[0], pixel[1], pixel[2]
    value = max(red, green, blue)
    spread = value - min(red, green, blue)
    saturation = np.floor((_PER_VALUE[np.uint8(value)] * spread) * _SHIFT + _HALF)
    if value == red:
        hue = green - blue
    elif value == green:
        hue = blue - red + (spread + spread)
    else:
        hue = red - green + (spread + spread) * np.float32(2)
    hue = np.floor((hue * _PER_SPREAD[np.uint8(spread)]) * _SHIFT + _HALF)
    if hue < _ZERO:
        hue += _HUES
    hue += turn
    if hue < _ZERO:
        hue += _HUES
    elif hue >= _HUES:
        hue -= _HUES
    share, unit, sector = -_cut(saturation * factor) * _TO_UNIT, value * _TO_UNIT, hue * _TO_SECTOR
    pixel[0] = _colour(np.float32(2) - abs(sector - np.float32(3)), share, unit)
    pixel[1] = _colour(abs(sector - np.float32(2)) - _ONE, share, unit)
    pixel[2] = _colour(abs(sector - np.float32(4)) - _ONE, share, unit)


@numba.njit(cache=True, nogil=True)
def _colour(weight, share, unit):  # type: ignore[no-untyped-def]
    return np.floor((min(max(weight, _ZERO), _ONE) * share + _ONE) * unit * _MOST)

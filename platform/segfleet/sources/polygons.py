"""Outlines and run lengths as pixels.

Coordinates are continuous: the pixel in row 0, column 0 covers (0, 0) to (1, 1). A pixel belongs to a polygon if its
centre lies inside, so polygons that share an edge share no pixel and leave none out. (Pillow's polygons have whole
coordinates and hold their border: each grows by half a pixel on every side.)
"""

import math
from collections.abc import Sequence

import numpy as np

from pspnet.json_values import shown


def polygon_mask(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return bool (h, w): the pixels whose centres lie inside the polygon of points (n, 2), each x, y (even-odd)."""
    height, width = shape
    corners = np.asarray(points, dtype=np.float64)
    left, top = np.clip(np.ceil(corners.min(axis=0) - 0.5), 0, (width, height)).astype(int).tolist()
    right, bottom = np.clip(np.ceil(corners.max(axis=0) - 0.5), 0, (width, height)).astype(int).tolist()
    crossings = np.zeros((bottom - top, right - left + 1), dtype=np.int32)
    for start, end in zip(corners.tolist(), np.roll(corners, -1, axis=0).tolist(), strict=True):
        # always downwards, so that an edge of two polygons is rounded alike in both
        (x0, y0), (x1, y1) = (start, end) if start[1] <= end[1] else (end, start)
        rows = np.arange(max(top, math.ceil(y0 - 0.5)), min(bottom, math.ceil(y1 - 0.5)))
        if len(rows):
            x = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
            crossings[rows - top, np.clip(np.ceil(x - 0.5), left, right).astype(int) - left] += 1
    mask = np.zeros(shape, dtype=bool)
    mask[top:bottom, left:right] = np.cumsum(crossings[:, :-1], axis=1) % 2 == 1
    return mask


def circle_points(centre: Sequence[float], on_circle: Sequence[float]) -> np.ndarray:
    """Return a polygon (n, 2) that follows a circle to a tenth of a pixel."""
    x, y = centre
    radius = float(np.hypot(on_circle[0] - x, on_circle[1] - y))
    count = min(10_000, max(16, math.ceil(math.pi / math.acos(1 - 0.1 / max(radius, 1.0)))))
    angles = np.arange(count) * (2 * np.pi / count)
    return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)


def run_length_mask(counts: Sequence[int] | str | bytes, shape: tuple[int, int]) -> np.ndarray:
    """Return bool (h, w) of COCO's run lengths, column by column from background; ValueError where they do not fit.

    A text is the compressed form of pycocotools: five bits a character from "0" on, the sixth says that more follow,
    and from the fourth run on it is the difference to the run before the last.
    """
    runs = _unpacked(counts) if isinstance(counts, str | bytes) else [int(count) for count in counts]
    height, width = shape
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(f"the runs must add up to {height} x {width} pixels, but are {shown(sum(runs))}")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def _unpacked(text: str | bytes) -> list[int]:
    runs: list[int] = []
    value = shift = 0
    for character in text.encode() if isinstance(text, str) else text:
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError(f"the character {chr(character)!r} is none of compressed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            if shift > 60:
                raise ValueError("a number of the compressed run lengths does not end")
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("the compressed run lengths end within a number")
    return runs

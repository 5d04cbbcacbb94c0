"""Pairs of bytes counted on a CPU by a compiled loop that reads each of them once."""

import numba
import numpy as np

_NUM_TABLES = 8
"""Neighbours are mostly equal, and a counter cannot be raised again before it is written: they take turns."""


def pair_counts(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return int64 (256, 256): how often each prediction (column) meets each target (row), 255 included.

    Both are uint8 of one shape, which must have fewer than 2**32 pixels.
    """
    assert prediction.shape == target.shape
    assert prediction.size < 2**32
    tables = np.zeros((_NUM_TABLES, 256 * 256), dtype=np.uint32)
    _count(np.ascontiguousarray(prediction).reshape(-1), np.ascontiguousarray(target).reshape(-1), tables)
    return tables.sum(0, dtype=np.int64).reshape(256, 256)


@numba.njit(cache=True, nogil=True)
def _count(prediction, target, tables):  # type: ignore[no-untyped-def]
    num_pixels = len(target)
    num_even = num_pixels // 8 * 8
    for first in range(0, num_even, 8):
        for turn in range(8):
            pair = (np.uint32(target[first + turn]) << np.uint32(8)) | np.uint32(prediction[first + turn])
            tables[turn, pair] += np.uint32(1)
    for pixel in range(num_even, num_pixels):
        pair = (np.uint32(target[pixel]) << np.uint32(8)) | np.uint32(prediction[pixel])
        tables[0, pair] += np.uint32(1)

"""Pictures as lossless tiles of 128 x 128 pixels, of which a window decodes only those that it touches.

A picture is the offsets of its tiles, uint32 (number of tiles + 1), and then the tiles, row by row, each a zstd frame
of its own. Tiles of colour hold, for each pixel, red - green, green and blue - green, of those the difference to the
pixel above, and of that the difference to the pixel on its left, all modulo 256: what is left has no repetitions,
only frequent and rare values, so that zstd is kept from looking for the former. Labels are stored as they are.

Axes: h w pixels, c channels (3 for colour, none for labels).
"""

import math
import threading

import numba
import numpy as np
import zstandard

from pspnet.errors import InputError

TILE_SIZE = 128
_COLOUR = zstandard.ZstdCompressionParameters(strategy=1, min_match=7, hash_log=6, window_log=16)
"""Next to no matches: smaller by a tenth than at zstd's first level, and read twice as fast."""
_LABEL = zstandard.ZstdCompressionParameters.from_level(9)
_local = threading.local()


def encode(pixels: np.ndarray) -> bytes:
    """Return the tiles of a picture, uint8 (h, w, 3), or of a label, uint8 (h, w)."""
    is_colour = pixels.ndim == 3
    compressor = zstandard.ZstdCompressor(compression_params=_COLOUR if is_colour else _LABEL)
    height, width = pixels.shape[:2]
    tiles = [
        compressor.compress(np.ascontiguousarray(_differences(tile) if is_colour else tile).data)
        for top in range(0, height, TILE_SIZE)
        for left in range(0, width, TILE_SIZE)
        for tile in (pixels[top : top + TILE_SIZE, left : left + TILE_SIZE],)
    ]
    offsets = np.cumsum([4 * (len(tiles) + 1), *map(len, tiles)])
    if offsets[-1] >= 2**32:
        raise InputError(
            f"A picture must take less than 4 GiB as tiles, but one of {width} x {height} takes {offsets[-1]} bytes. "
            "Cut it into parts."
        )
    return b"".join([offsets.astype("<u4").tobytes(), *tiles])


def decode_into(
    out: np.ndarray, data: np.ndarray, *, size: tuple[int, int], top: int, left: int, what: str
) -> None:
    """Write the window of `out`'s size from row `top` and column `left` on to `out`, uint8 (h, w, 3) or (h, w).

    `data`, uint8 (bytes,), holds the tiles of a picture of `size`, (height, width); the window lies in it. InputError
    with the name `what` where they are damaged.
    """
    if not has_every_tile(data, size):
        raise _damaged(what)
    columns = -(-size[1] // TILE_SIZE)
    offsets = data[: _table_bytes(size)].view("<u4").tolist()
    bottom, right = top + out.shape[0], left + out.shape[1]
    for row in range(top // TILE_SIZE, -(-bottom // TILE_SIZE)):
        for column in range(left // TILE_SIZE, -(-right // TILE_SIZE)):
            number, y, x = row * columns + column, row * TILE_SIZE, column * TILE_SIZE
            shape = (min(TILE_SIZE, size[0] - y), min(TILE_SIZE, size[1] - x), *out.shape[2:])
            tile = _decompressed(data[offsets[number] : offsets[number + 1]], shape, what)
            begin = (max(top - y, 0), max(left - x, 0))
            end = (min(bottom - y, shape[0]), min(right - x, shape[1]))
            part = out[y + begin[0] - top : y + end[0] - top, x + begin[1] - left : x + end[1] - left]
            if out.ndim == 3:
                _sum_up(part, tile, begin[0], begin[1])
            else:
                part[...] = tile[begin[0] : end[0], begin[1] : end[1]]


def has_every_tile(data: np.ndarray, size: tuple[int, int]) -> bool:
    """Whether `data` may hold a picture of `size`, (height, width): where its tiles begin fits into it.

    Ask before memory is taken for the picture.
    """
    return data.size >= _table_bytes(size)


def _table_bytes(size: tuple[int, int]) -> int:
    height, width = size
    return 4 * (-(-height // TILE_SIZE) * -(-width // TILE_SIZE) + 1)


def _decompressed(frame: np.ndarray, shape: tuple[int, ...], what: str) -> np.ndarray:
    num_bytes = math.prod(shape)
    try:
        # Asked first: a frame may declare, and be given, any amount of memory.
        if zstandard.frame_content_size(frame.data) == num_bytes:
            content = _decompressor().decompress(frame.data)
            if len(content) == num_bytes:
                return np.frombuffer(content, dtype=np.uint8).reshape(shape)
    except zstandard.ZstdError:
        pass
    raise _damaged(what)


def _decompressor() -> zstandard.ZstdDecompressor:
    """Return this thread's own: one cannot be shared, and to make one takes as long as to read a tile."""
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    return _local.decompressor


def _damaged(what: str) -> InputError:
    return InputError(
        f"A store must hold its pictures as they were written, but the tiles of {what} are damaged. Ingest the data "
        "again, or copy the store again."
    )


def _differences(tile: np.ndarray) -> np.ndarray:
    """Return what is stored of a tile of colour, (h, w, 3)."""
    values = tile.copy()
    values[..., 0] -= tile[..., 1]
    values[..., 2] -= tile[..., 1]
    values[1:] -= values[:-1].copy()
    values[:, 1:] -= values[:, :-1].copy()
    return values


@numba.njit(cache=True, nogil=True)
def _sum_up(out, tile, top, left):  # type: ignore[no-untyped-def]
    """Undo `_differences` from row `top` and column `left` on, for as many as `out` has."""
    height, width = out.shape[:2]
    line = np.zeros((left + width, 3), dtype=np.uint8)
    for y in range(top + height):
        red = green = blue = np.uint8(0)
        for x in range(left + width):
            red = np.uint8(red + tile[y, x, 0])
            green = np.uint8(green + tile[y, x, 1])
            blue = np.uint8(blue + tile[y, x, 2])
            line[x, 0] += red
            line[x, 1] += green
            line[x, 2] += blue
        if y >= top:
            for x in range(width):
                value = line[left + x, 1]
                out[y - top, x, 0] = line[left + x, 0] + value
                out[y - top, x, 1] = value
                out[y - top, x, 2] = line[left + x, 2] + value

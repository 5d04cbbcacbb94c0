"""Usual PNG files, decoded several times as fast as by Pillow; all others are left to it, and so is every fault.

The format: PNG Specification, Third Edition (W3C, 2025), sections 5 (chunks), 9 (filtering) and 11.2 (chunks by name).
Inflating by isal, which uses a processor's vector instructions; the filters are undone in a compiled loop.
"""

import zlib
from typing import Any

import numpy as np
from isal import isal_zlib
from numba import njit

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_IsalError: Any = isal_zlib.IsalError
_CHANNELS_OF_COLOUR_TYPE = {0: 1, 2: 3}
_PLAIN_CHUNKS = (b"IHDR", b"IDAT", b"IEND")
_HARMLESS_CHUNKS = (
    b"pHYs",
    b"tIME",
    b"tEXt",
    b"zTXt",
    b"iTXt",
    b"gAMA",
    b"cHRM",
    b"sRGB",
    b"iCCP",
    b"sBIT",
    b"bKGD",
)
"""Which change no pixel, and which Pillow does not apply either. EXIF turns pictures: eXIf is not among them."""

_NUM_SLANTED = 16
"""Rows whose filter is undone at once."""
_NUM_LANES = _NUM_SLANTED * 3


def decode(content: bytes, *, max_pixels: int) -> np.ndarray | None:
    """Return the pixels, uint8 (h, w, 3) or (h, w), of a PNG of 8-bit RGB or grey without anything unusual.

    None for every other file: of another kind, interlaced, with transparency, a palette or a turned orientation, with
    a wrong checksum, without its end, or larger than `max_pixels`. Whoever asks then reads it slowly, and learns why.
    """
    found = _chunks(content)
    if found is None:
        return None
    header, compressed = found
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    depth, colour_type, *methods = header[8:]
    channels = _CHANNELS_OF_COLOUR_TYPE.get(colour_type, 0)
    if depth != 8 or not channels or any(methods) or not 0 < width * height <= max_pixels:
        return None
    stride = width * channels + 1
    inflater = isal_zlib.decompressobj()
    try:
        raw = inflater.decompress(compressed, stride * height)
    except _IsalError:
        return None
    if len(raw) != stride * height or not _ends(inflater):
        return None
    pixels = np.empty((height, width * channels), dtype=np.uint8)
    if not _unfiltered(np.frombuffer(raw, dtype=np.uint8).reshape(height, stride), pixels, channels):
        return None
    return pixels.reshape(height, width, 3) if channels == 3 else pixels


def _chunks(content: bytes) -> tuple[bytes, bytes] | None:
    """Return the header and the compressed pixels; None where a chunk is damaged or means more than plain pixels."""
    if content[:8] != SIGNATURE:
        return None
    place, header, parts = 8, b"", []
    view = memoryview(content)
    while place + 12 <= len(content):
        size, kind = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        end = place + 12 + size
        if end > len(content) or kind not in (*_PLAIN_CHUNKS, *_HARMLESS_CHUNKS):
            return None
        if zlib.crc32(view[place + 4 : end - 4]) != int.from_bytes(content[end - 4 : end], "big"):
            return None
        if kind == b"IHDR":
            if header or size != 13:
                return None
            header = content[place + 8 : end - 4]
        elif kind == b"IDAT":
            parts.append(view[place + 8 : end - 4])
        elif kind == b"IEND":
            return (header, b"".join(parts)) if header and parts else None
        place = end
    return None


def _ends(inflater: "isal_zlib.Decompress") -> bool:
    """Whether the compressed pixels end, checksum and all, where the last row does."""
    try:
        return not inflater.decompress(inflater.unconsumed_tail, 1) and inflater.eof
    except _IsalError:
        return False


@njit(cache=True, nogil=True, inline="always")
def _paeth(left: Any, up: Any, corner: Any) -> Any:
    """Return the neighbour that is nearest to left + up - corner (section 9.4)."""
    to_left, to_up = abs(up - corner), abs(left - corner)
    to_corner = abs(left + up - corner - corner)
    best = up if to_up <= to_corner else corner
    return left if to_left <= to_up and to_left <= to_corner else best


@njit(cache=True, nogil=True)
def _add_paeth(line: np.ndarray, above: np.ndarray, out: np.ndarray, channels: int) -> None:
    """Undo the filter that most photographs have, in one row."""
    for column in range(len(line)):
        up = np.int32(above[column])
        left = np.int32(out[column - channels]) if column >= channels else np.int32(0)
        corner = np.int32(above[column - channels]) if column >= channels else np.int32(0)
        out[column] = np.uint8((np.int32(line[column]) + _paeth(left, up, corner)) & 255)


@njit(cache=True, nogil=True)
def _add_paeth_to_rows(rows: np.ndarray, above: np.ndarray, out: np.ndarray, slanted: np.ndarray) -> None:
    """Undo that filter in up to `_NUM_SLANTED` rows of three colours at once, each a pixel behind the one above it.

    A pixel waits for its left neighbour, so that a row cannot be computed in parallel; a slanted line of pixels can.
    `slanted` is room of (width + _NUM_SLANTED, lanes), a lane for each row and colour.
    """
    num_rows, width = len(rows), rows.shape[1] // 3
    slanted[:] = 0  # before its first pixel a row computes with zeros, and gets zeros
    for row in range(num_rows):
        for column in range(width):
            for colour in range(3):
                slanted[column + row, row * 3 + colour] = rows[row, column * 3 + colour]
    # of the step before: what lies above the first row, then a lane for each row and colour
    before, now = np.zeros(_NUM_LANES + 3, np.int16), np.zeros(_NUM_LANES + 3, np.int16)
    corners = np.zeros(_NUM_LANES, np.int16)
    for step in range(width + num_rows - 1):
        if step < width:
            for colour in range(3):
                before[colour] = above[step * 3 + colour]
        line = slanted[step]
        for lane in range(_NUM_LANES):  # compiled to vector instructions: no branches, 16 bits
            up, left, corner = before[lane], before[lane + 3], corners[lane]
            to_left, to_up = abs(np.int16(up - corner)), abs(np.int16(left - corner))
            to_corner = abs(np.int16(left + up - corner - corner))
            nearest = up if to_up <= to_corner else corner
            nearest = left if (to_left <= to_up) & (to_left <= to_corner) else nearest
            value = np.int16((np.int16(line[lane]) + nearest) & 255)
            now[lane + 3] = value
            corners[lane] = up
            line[lane] = np.uint8(value)
        before, now = now, before
    for row in range(num_rows):
        for column in range(width):
            for colour in range(3):
                out[row, column * 3 + colour] = slanted[column + row, row * 3 + colour]


@njit(cache=True, nogil=True)
def _unfiltered(raw: np.ndarray, pixels: np.ndarray, channels: int) -> bool:
    """Undo the filter of each row; False for a filter that there is not."""
    height, length = pixels.shape
    slanted = np.empty((length // 3 + _NUM_SLANTED, _NUM_LANES) if channels == 3 else (0, 0), np.uint8)
    done = 0
    for row in range(height):
        if row < done:
            continue
        kind, line = raw[row, 0], raw[row, 1:]
        out = pixels[row]
        if kind == 0:
            out[:] = line
        elif kind == 1:
            out[:channels] = line[:channels]
            for column in range(channels, length):
                out[column] = line[column] + out[column - channels]
        elif kind == 2:
            if row == 0:
                out[:] = line
            else:
                above = pixels[row - 1]
                for column in range(length):
                    out[column] = line[column] + above[column]
        elif kind == 3:
            for column in range(length):
                left = np.int32(out[column - channels]) if column >= channels else np.int32(0)
                up = np.int32(pixels[row - 1, column]) if row else np.int32(0)
                out[column] = line[column] + np.uint8((left + up) >> 1)
        elif kind == 4:
            if row == 0:  # the predictor is what lies to the left
                out[:channels] = line[:channels]
                for column in range(channels, length):
                    out[column] = line[column] + out[column - channels]
            elif channels == 3:
                done = row + 1
                while done < min(height, row + _NUM_SLANTED) and raw[done, 0] == 4:
                    done += 1
                _add_paeth_to_rows(raw[row:done, 1:], pixels[row - 1], pixels[row:done], slanted)
            else:
                _add_paeth(line, pixels[row - 1], out, channels)
        else:
            return False
    return True

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

_NUM_LANES = 48
"""Values that are computed at once: 16 rows of three colours, or 48 of grey."""


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


def _unfilter_rows(channels: int) -> Any:
    """Return the function that undoes filters for so many channels: known to the compiler, it is five times as fast."""

    @njit(cache=True, nogil=True)
    def unfilter_rows(raw: np.ndarray, above: np.ndarray, out: np.ndarray, slanted: np.ndarray) -> None:
        """Undo the filters of some rows at once (section 9.2), each a pixel behind the one above it.

        A pixel waits for its left neighbour, so that a row cannot be computed in parallel; a slanted line of pixels
        can, a lane for each row and colour. `slanted` is room for them.
        """
        num_rows, width = len(raw), out.shape[1] // channels
        is_sub, is_up = np.zeros(_NUM_LANES, np.int16), np.zeros(_NUM_LANES, np.int16)
        is_average, is_paeth = np.zeros(_NUM_LANES, np.int16), np.zeros(_NUM_LANES, np.int16)
        slanted[:] = 0  # before its first pixel a row computes with zeros, and gets zeros
        for row in range(num_rows):
            kind, lanes = raw[row, 0], slice(row * channels, (row + 1) * channels)
            is_sub[lanes], is_up[lanes] = -(kind == 1), -(kind == 2)
            is_average[lanes], is_paeth[lanes] = -(kind == 3), -(kind == 4)
            for column in range(width):
                for colour in range(channels):
                    slanted[column + row, row * channels + colour] = raw[row, 1 + column * channels + colour]
        # of the step before: what lies above the first row, then the lanes
        before, now = np.zeros(_NUM_LANES + channels, np.int16), np.zeros(_NUM_LANES + channels, np.int16)
        corners = np.zeros(_NUM_LANES, np.int16)
        for step in range(width + num_rows - 1):
            for colour in range(channels):
                before[colour] = above[step * channels + colour] if step < width else 0
            line = slanted[step]
            for lane in range(_NUM_LANES):  # compiled to vector instructions: 16 bits, no branches
                up, left, corner = before[lane], before[lane + channels], corners[lane]
                to_left, to_up = abs(np.int16(up - corner)), abs(np.int16(left - corner))
                to_corner = abs(np.int16(left + up - corner - corner))
                nearest = up if to_up <= to_corner else corner
                nearest = left if (to_left <= to_up) & (to_left <= to_corner) else nearest
                average = np.int16(left + up) >> 1
                predicted = (
                    (left & is_sub[lane])
                    | (up & is_up[lane])
                    | (average & is_average[lane])
                    | (nearest & is_paeth[lane])
                )
                value = np.int16((np.int16(line[lane]) + np.int16(predicted)) & 255)
                now[lane + channels] = value
                corners[lane] = up
                line[lane] = np.uint8(value)
            before, now = now, before
        for row in range(num_rows):
            for column in range(width):
                for colour in range(channels):
                    out[row, column * channels + colour] = slanted[column + row, row * channels + colour]

    return unfilter_rows


_unfilter_grey, _unfilter_colour = _unfilter_rows(1), _unfilter_rows(3)


@njit(cache=True, nogil=True)
def _unfiltered(raw: np.ndarray, pixels: np.ndarray, channels: int) -> bool:
    """Undo the filter of each row; False for a filter that there is not."""
    height, length = pixels.shape
    at_once = _NUM_LANES // channels
    slanted = np.empty((length // channels + at_once, _NUM_LANES), np.uint8)
    above = np.zeros(length, np.uint8)
    for row in range(height):
        if raw[row, 0] > 4:
            return False
    for start in range(0, height, at_once):
        end = min(height, start + at_once)
        if channels == 3:
            _unfilter_colour(raw[start:end], above, pixels[start:end], slanted)
        else:
            _unfilter_grey(raw[start:end], above, pixels[start:end], slanted)
        above = pixels[end - 1]
    return True

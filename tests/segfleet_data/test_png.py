"""The fast decoder gives what Pillow gives, or leaves the file to it: whatever the filters, whatever the damage."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segfleet.sources import png

MANY = 10**6


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk with its size and checksum (PNG Specification, section 5.3)."""
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def encoded(
    rows: list[bytes],
    width: int,
    *,
    colour_type: int = 2,
    depth: int = 8,
    interlace: int = 0,
    before: bytes = b"",
    num_parts: int = 1,
) -> bytes:
    """Return a PNG of rows that are filtered already, each with its filter's number before it."""
    header = (
        width.to_bytes(4, "big") + len(rows).to_bytes(4, "big") + bytes([depth, colour_type, 0, 0, interlace])
    )
    compressed = zlib.compress(b"".join(rows))
    size = -(-len(compressed) // num_parts)
    parts = [compressed[start : start + size] for start in range(0, len(compressed), size)]
    middle = b"".join(chunk(b"IDAT", part) for part in parts)
    return png.SIGNATURE + chunk(b"IHDR", header) + before + middle + chunk(b"IEND", b"")


def by_pillow(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture)


@settings(max_examples=60)
@given(data=st.data(), width=st.integers(1, 40), height=st.integers(1, 50), is_colour=st.booleans())
def test_every_filter_is_undone_as_by_pillow(
    data: st.DataObject, width: int, height: int, is_colour: bool
) -> None:
    channels = 3 if is_colour else 1
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    filters = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, *[4] * 40]), min_size=height, max_size=height))
    rows = [
        bytes([kind]) + rng.integers(0, 256, width * channels, dtype=np.uint8).tobytes() for kind in filters
    ]
    content = encoded(rows, width, colour_type=2 if is_colour else 0, num_parts=data.draw(st.integers(1, 4)))
    found = png.decode(content, max_pixels=MANY)
    assert found is not None
    np.testing.assert_array_equal(found, by_pillow(content))


ROWS = [bytes([4]) + bytes(range(30)), bytes([2]) + bytes(range(30, 60))]
GREY = [bytes([1]) + bytes(range(10)), bytes([3]) + bytes(range(10, 20))]


@pytest.mark.parametrize(
    "unusual",
    [
        encoded(ROWS, 10, interlace=1),
        encoded([bytes([0, *range(20)])], 10, depth=16, colour_type=0),
        encoded(GREY, 10, colour_type=3, before=chunk(b"PLTE", bytes(range(60)))),
        encoded(ROWS, 10, before=chunk(b"tRNS", bytes(6))),
        encoded(ROWS, 10, before=chunk(b"eXIf", b"MM\0*")),
        encoded(ROWS, 10, before=chunk(b"acTL", bytes(8))),
        encoded([bytes([5]) + ROWS[0][1:]], 10),
        encoded(ROWS, 11),
        encoded(ROWS, 9),
        encoded(ROWS, 10)[:-1],
        encoded(ROWS, 10)[:-12],
        b"GIF89a",
        b"",
    ],
)
def test_what_is_unusual_or_broken_is_left_to_pillow(unusual: bytes) -> None:
    assert png.decode(unusual, max_pixels=MANY) is None


def test_a_bomb_is_not_inflated() -> None:
    assert png.decode(encoded(ROWS, 10), max_pixels=20) is not None
    assert png.decode(encoded(ROWS, 10), max_pixels=19) is None


def test_a_flipped_bit_anywhere_is_never_decoded_to_something_else() -> None:
    content = encoded(ROWS, 10, before=chunk(b"pHYs", bytes(9)), num_parts=2)
    expected = by_pillow(content)
    num_refused = 0
    for place in range(len(content)):
        for bit in (0, 7):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            found = png.decode(bytes(damaged), max_pixels=MANY)
            num_refused += found is None
            assert found is None or np.array_equal(found, expected)
    assert num_refused == 2 * len(content)

"""Sizes of crops and windows: a side, or height and width."""

import re

from pspnet.errors import InputError
from pspnet.json_values import shown

Size = int | str | tuple[int, int]
"""The side of a square, or height and width: 713, "512x1024", (512, 1024)."""


def sides(size: Size) -> tuple[int, int]:
    """Return height and width in pixels; InputError where text is not written HEIGHTxWIDTH."""
    if isinstance(size, tuple):
        return size
    if isinstance(size, int):
        return size, size
    written = re.fullmatch(r"([0-9]{1,6})(?:x([0-9]{1,6}))?", size)
    if written is None:
        raise InputError(
            f"A size must be a side or HEIGHTxWIDTH in pixels, such as 713 or 512x1024, but got {shown(size)}."
        )
    return int(written[1]), int(written[2] or written[1])


def notation(size: Size) -> int | str:
    """Return the one way in which a size is stored: the side of a square, else "HEIGHTxWIDTH"."""
    height, width = sides(size)
    return height if height == width else f"{height}x{width}"

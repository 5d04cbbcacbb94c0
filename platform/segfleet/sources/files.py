"""Pictures and label maps in files, read whole and checked: what cannot be used is refused by name."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pspnet.errors import InputError
from segfleet.sources.zips import read_bytes

MAX_PIXELS = 200_000_000
"""A picture that declares more is refused before it is decoded."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


def read_image(path: str | Path) -> np.ndarray:
    """Return a picture as uint8 (h, w, 3), turned as its EXIF orientation says; grey becomes three equal channels.

    Raises InputError for a file that cannot be decoded to its last byte, is too large, or has no 8-bit colour.
    """
    picture = _decoded(path)
    if picture.mode in ("L", "RGB", "P", "1"):
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    if picture.mode in ("RGBA", "LA"):
        alpha = np.asarray(picture.getchannel("A"))
        if alpha.min() == 255:
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    raise InputError(
        f"An image must be 8-bit grey or RGB without transparency, but {path} is {picture.mode}. Convert it to RGB."
    )


def read_ids(path: str | Path) -> np.ndarray:
    """Return a label map as uint8, uint16 or int32 (h, w): the grey values, or the indices of a palette.

    Raises InputError for a file that does not hold one id per pixel, or whose format does not keep ids exactly.
    """
    picture = _decoded_label(path)
    if picture.mode in ("L", "P", "I;16", "I"):
        return np.asarray(picture)
    if picture.mode == "1":
        return np.asarray(picture).astype(np.uint8)
    if picture.mode == "I;16B":
        return np.asarray(picture).astype(np.uint16)
    if picture.format == "WEBP":  # which knows no grey: equal channels are what was grey
        pixels = np.asarray(picture.convert("RGB"))
        if (pixels == pixels[..., :1]).all():
            return np.ascontiguousarray(pixels[..., 0])
    raise InputError(
        f"A label must hold one id per pixel (grey or palette), but {path} is {picture.mode}. "
        "Save ids, or read colours by the class table's (--labels colours)."
    )


def read_colours(path: str | Path) -> np.ndarray:
    """Return a label map painted in class colours as uint8 (h, w, 3), refused where its format changes colours."""
    picture = _decoded_label(path)
    if picture.mode in ("RGB", "RGBA", "P"):
        return np.asarray(picture.convert("RGB"))
    raise InputError(
        f"A label painted in class colours must be RGB, but {path} is {picture.mode}. "
        "Read it as ids instead (--labels ids)."
    )


def _decoded_label(path: str | Path) -> Image.Image:
    """Return a label map that is one picture in a format that keeps every pixel."""
    picture = _decoded(path, one_page=True)
    compression = str(picture.info.get("compression", ""))
    if picture.format == "WEBP":
        kind = "" if b"VP8 " not in _webp_chunks(read_bytes(path)) else "lossy WebP"
    elif picture.format == "TIFF":
        kind = f"TIFF with {compression} in it" if "jpeg" in compression or "webp" in compression else ""
    else:
        kind = "" if picture.format in ("PNG", "BMP") else str(picture.format)
    if kind:
        raise InputError(
            f"A label must be PNG, TIFF, BMP or lossless WebP, which keep every id, but {path} is {kind}. "
            "Export the labels again as PNG; a lossy picture that is converted keeps its wrong ids."
        )
    return picture


def _webp_chunks(content: bytes) -> list[bytes]:
    """Return the names of the chunks of a WebP file: "VP8 " holds lossy pixels, "VP8L" lossless ones."""
    names, place = [], 12
    while place + 8 <= len(content):
        names.append(content[place : place + 4])
        size = int.from_bytes(content[place + 4 : place + 8], "little")
        place += 8 + size + size % 2
    return names


def _decoded(path: str | Path, *, one_page: bool = False) -> Image.Image:
    try:
        with io.BytesIO(read_bytes(path)) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(file)
            if picture.width * picture.height > MAX_PIXELS:
                raise InputError(
                    f"A picture must have at most {MAX_PIXELS} pixels, but {path} declares {picture.width} x "
                    f"{picture.height}. Cut it into parts."
                )
            num_pages = getattr(picture, "n_frames", 1) if one_page else 1
            if num_pages > 1:
                raise InputError(
                    f"A label must be one picture, but {path} has {num_pages} pages. Save one page with all ids."
                )
            picture.load()
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = (
            "is of no known picture format"
            if isinstance(error, UnidentifiedImageError)
            else f"fails: {error}"
        )
        raise InputError(
            f"A picture must decode to its last byte, but {path} {reason}. Replace it or remove the pair."
        ) from error
    return picture

"""Pictures and label maps in files, read whole and checked: what cannot be used is refused by name."""

import io
import re
import warnings
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from pspnet.errors import InputError
from pspnet.json_values import shown
from segfleet.sources import png
from segfleet.sources.zips import read_bytes

MAX_PIXELS = 200_000_000
"""A picture that declares more is refused before it is decoded."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns of more, and refuses twice as many
_BIT_DEPTH = "segfleet bit depth"
_TIFF_BITS_PER_SAMPLE = 258


def read_image(path: str | Path) -> np.ndarray:
    """Return a picture as uint8 (h, w, 3), turned as its EXIF orientation says; grey becomes three equal channels.

    Raises InputError for a file that cannot be decoded to its last byte, is too large, or has no 8-bit colour.
    """
    pixels = png.decode(read_bytes(path), max_pixels=MAX_PIXELS)
    if pixels is not None:
        return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    picture = _decoded(path)
    depth = _bits_per_channel(picture)
    if depth > 8:
        raise InputError(
            f"An image must have 8 bits a channel, but {path} has {depth} ({picture.mode}). Convert it to 8-bit RGB: "
            "which brightness becomes 255 is for you to say."
        )
    if picture.mode not in ("L", "RGB", "P", "1", "RGBA", "LA", "PA"):
        raise InputError(
            f"An image must be 8-bit grey or RGB, but {path} is {picture.mode}. Convert it to RGB."
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if np.asarray(picture.getchannel("A")).min() < 255:
            raise InputError(
                f"An image must have no transparent pixels, but {path} is {picture.mode} and has some. "
                "Paint it on a background and save it as RGB."
            )
    if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def read_ids(path: str | Path) -> np.ndarray:
    """Return a label map as uint8, uint16 or int32 (h, w): the grey values, or the indices of a palette.

    Raises InputError for a file that does not hold one id per pixel, or whose format does not keep ids exactly.
    """
    pixels = png.decode(read_bytes(path), max_pixels=MAX_PIXELS)
    if pixels is not None and pixels.ndim == 2:
        return pixels
    picture = _decoded_label(path)
    if picture.mode == "1":
        return np.asarray(picture).astype(np.uint8)
    if picture.mode == "L" and picture.format == "PNG":
        # Pillow spreads 2 and 4 bits over 0 to 255; the ids are what the file says.
        return np.asarray(picture) // {2: 85, 4: 17}.get(_bits_per_channel(picture), 1)
    if picture.mode == "I;16B":
        return np.asarray(picture).astype(np.uint16)
    if picture.mode in ("L", "P", "I;16", "I"):
        return np.asarray(picture)
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
    if picture.mode in ("RGB", "RGBA", "P") and _bits_per_channel(picture) <= 8:
        return np.asarray(picture.convert("RGB"))
    raise InputError(
        f"A label painted in class colours must be 8-bit RGB, but {path} is {picture.mode} with "
        f"{_bits_per_channel(picture)} bits a channel. Save it as RGB, or read it as ids (--labels ids)."
    )


def _decoded_label(path: str | Path) -> Image.Image:
    """Return a label map that is one picture in a format that keeps every pixel."""
    picture = _decoded(path)
    _refuse_turned(picture, path)
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


def refuse_undecodable(path: str | Path) -> None:
    """Raise InputError where a file cannot be decoded to its last byte, whatever its kind of pixels."""
    _decoded(path)


def preview(path: str | Path) -> np.ndarray | None:
    """Return a picture that was refused, roughly and unchecked, for a person to look at; None where nothing shows."""
    try:
        with io.BytesIO(read_bytes(path)) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's: what cannot be decoded is an error as well
            picture = Image.open(file)
            if picture.width * picture.height > MAX_PIXELS:
                return None
            if picture.mode.startswith("I"):
                return np.asarray(Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB"))
            return np.asarray(picture.convert("RGB"))
    except Exception:  # as in `_decoded`
        return None


def _decoded(path: str | Path) -> Image.Image:
    try:
        with io.BytesIO(read_bytes(path)) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's: what cannot be decoded is an error as well
            picture = Image.open(file)
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{picture.width * picture.height} pixels")
            _refuse_several(picture, path)
            _refuse_uncovered(picture)
            picture.load()
            _read_to_the_end(picture, file)
            picture.getexif().get(ExifTags.Base.Orientation)
    except Image.DecompressionBombError as error:  # Pillow's own limit, or ours
        declared = re.search(r"\d+", str(error))
        raise InputError(
            f"A picture must have at most {MAX_PIXELS} pixels, but {path} declares "
            f"{declared[0] if declared else 'more'} and was not decoded. Cut it into parts."
        ) from error
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise of every kind: TypeError, KeyError, struct.error, …
        reason = (
            "is of no known picture format"
            if isinstance(error, UnidentifiedImageError)
            else f"fails: {shown(error)}"
        )
        raise InputError(
            f"A picture must decode to its last byte, but {path} {reason}. Replace it or remove the pair."
        ) from error
    return picture


def _refuse_several(picture: Image.Image, path: str | Path) -> None:
    """Refuse an animation or a file of many pages; a camera's MPO shows its first picture everywhere."""
    num_frames = getattr(picture, "n_frames", 1)
    if num_frames > 1 and picture.format != "MPO":
        raise InputError(
            f"A file must hold one picture, but {path} holds {num_frames}. Save the one that is meant."
        )


def _refuse_uncovered(picture: Image.Image) -> None:
    """OSError where the strips or tiles of a TIFF leave pixels out, which Pillow would make black."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        areas = {tile[1] or (0, 0, 0, 0) for tile in picture.tile}  # planes lie in the same places
        num_covered = sum(
            max(0, min(right, picture.width) - left) * max(0, min(bottom, picture.height) - top)
            for left, top, right, bottom in areas
        )
        if num_covered < picture.width * picture.height:
            raise OSError(f"its parts hold {num_covered} pixels of {picture.width * picture.height}")


def _refuse_turned(picture: Image.Image, path: str | Path) -> None:
    orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation != 1:
        raise InputError(
            f"A label must lie as it is stored, but {path} has the EXIF orientation {orientation}, which viewers obey "
            "and label tools do not. Turn its pixels and save it without EXIF."
        )


def _read_to_the_end(picture: Image.Image, file: IO[bytes]) -> None:
    """Note a PNG's bit depth; OSError where its end is missing or a checksum wrong: Pillow stops at the last pixel."""
    if picture.format != "PNG":
        return
    file.seek(len(PNG_SIGNATURE))
    kind = b""
    while kind != b"IEND":
        head = file.read(8)
        if len(head) < 8:
            raise OSError("its end is missing")
        size, kind = int.from_bytes(head[:4], "big"), head[4:]
        content, checksum = file.read(size), file.read(4)
        if len(content) < size or len(checksum) < 4:
            raise OSError("its end is missing")
        if zlib.crc32(kind + content) != int.from_bytes(checksum, "big"):
            raise OSError(f"the checksum of a chunk {kind.decode('latin-1')} is wrong")
        if kind == b"IHDR":
            picture.info[_BIT_DEPTH] = content[8]


def _bits_per_channel(picture: Image.Image) -> int:
    """Return how many bits a channel has in the file; Pillow shows 16-bit RGB as if it were 8-bit."""
    if picture.mode.startswith("I;16"):
        return 16
    if picture.mode in ("I", "F"):
        return 32
    if picture.format == "PNG":
        return int(picture.info.get(_BIT_DEPTH, 8))
    bits = getattr(picture, "tag_v2", {}).get(_TIFF_BITS_PER_SAMPLE, 8)
    return max(bits) if isinstance(bits, tuple) else int(bits)

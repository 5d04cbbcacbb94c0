"""Pictures that people judge a model by: overlays, panels, legends, confusion matrices. Pillow and numpy only.

Axes: h w pixels, c classes.
"""

# ruff: noqa: F722
import bisect
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

from pspnet.labels import IGNORE_INDEX, ClassTable

Row = tuple[np.ndarray, np.ndarray | None, np.ndarray]
"""Image (h, w, 3), label or None, and prediction (h, w), both as train ids."""
Colour = tuple[int, int, int]

COLUMNS = ("image", "label", "prediction", "error")
PAPER: Colour = (255, 255, 255)
INK: Colour = (32, 33, 36)
FAINT_INK: Colour = (110, 113, 118)
RULE: Colour = (218, 220, 224)
WRONG: Colour = (230, 25, 45)
IGNORED: Colour = (208, 208, 208)

MARGIN = 28
GAP = 12


def panel(
    rows: Sequence[Row], class_table: ClassTable, titles: Sequence[str] = (), *, cell_width: int = 480
) -> Image.Image:
    """Return a table of pictures, image | label | prediction | error, one row each, with a legend of the classes.

    The error column shows the image dimmed, wrong pixels red and ignored pixels light grey. `titles`, one for each row,
    stand above the rows (file names), beside the share of valid pixels that are right.
    """
    if not rows:
        raise ValueError("A panel must have at least one row, but got none.")
    if titles and len(titles) != len(rows):
        raise ValueError(f"A panel must have one title for each row, but got {len(titles)} for {len(rows)}.")
    heights = [max(1, round(cell_width * image.shape[0] / image.shape[1])) for image, _, _ in rows]
    width = 2 * MARGIN + len(COLUMNS) * cell_width + (len(COLUMNS) - 1) * GAP
    entries = _legend_entries(
        [ids for _, label, prediction in rows for ids in (label, prediction)], class_table
    )
    entries += [("wrong", WRONG)] if any(label is not None for _, label, _ in rows) else []
    legend_height = _legend_height(entries, width - 2 * MARGIN)
    row_heights = [_TITLE_HEIGHT + height + GAP for height in heights]
    page = Image.new(
        "RGB", (width, MARGIN + _HEADER_HEIGHT + sum(row_heights) + legend_height + MARGIN), PAPER
    )
    draw = ImageDraw.Draw(page)

    lefts = [MARGIN + column * (cell_width + GAP) for column in range(len(COLUMNS))]
    for left, name in zip(lefts, COLUMNS, strict=True):
        draw.text((left, MARGIN), name, fill=INK, font=_font(22))
    top = MARGIN + _HEADER_HEIGHT
    for index, ((image, label, prediction), height) in enumerate(zip(rows, heights, strict=True)):
        caption = " · ".join(
            part for part in (titles[index] if titles else "", _score(label, prediction)) if part
        )
        draw.text((MARGIN, top), _shortened(caption, 16, width - 2 * MARGIN), fill=FAINT_INK, font=_font(16))
        top += _TITLE_HEIGHT
        for left, cell in zip(lefts, _cells(image, label, prediction, class_table), strict=True):
            _paste(page, cell, (left, top, cell_width, height), smooth=cell is image)
        top += height + GAP
    _draw_legend(page, entries, MARGIN, top, width - 2 * MARGIN)
    return page


def overlay(
    image: UInt8[np.ndarray, "h w 3"],
    train_ids: Integer[np.ndarray, "h w"],
    class_table: ClassTable,
    alpha: float = 0.5,
) -> UInt8[np.ndarray, "h w 3"]:
    """Return the image with the colours of its classes over it; ignored pixels stay as they are."""
    colours = colourise(train_ids, class_table).astype(np.float32)
    weight = np.where(train_ids == IGNORE_INDEX, 0.0, alpha).astype(np.float32)[..., None]
    return np.rint(image + (colours - image) * weight).astype(np.uint8)


def colourise(train_ids: Integer[np.ndarray, "h w"], class_table: ClassTable) -> UInt8[np.ndarray, "h w 3"]:
    """Return the colour of each pixel's class; ignored pixels are light grey."""
    lookup = np.full((256, 3), IGNORED, dtype=np.uint8)
    lookup[: class_table.num_classes] = class_table.colours
    return lookup[train_ids]


def error_picture(
    image: UInt8[np.ndarray, "h w 3"],
    label: Integer[np.ndarray, "h w"],
    prediction: Integer[np.ndarray, "h w"],
) -> UInt8[np.ndarray, "h w 3"]:
    """Return the image dimmed to dark grey, wrong pixels red, pixels that count nowhere light grey."""
    brightness = 30 + 0.5 * image.astype(np.float32).mean(axis=2)
    picture = np.repeat(np.rint(brightness).astype(np.uint8)[..., None], 3, axis=2)
    picture[label != prediction] = WRONG
    picture[label == IGNORE_INDEX] = IGNORED
    return picture


def legend(
    picture: UInt8[np.ndarray, "h w 3"], train_ids: Integer[np.ndarray, "h w"], class_table: ClassTable
) -> Image.Image:
    """Return the picture, pixel by pixel, above the names and colours of the classes that occur in it.

    A narrow picture gets a wider page, so that every name can be read.
    """
    height, width = picture.shape[:2]
    entries = _legend_entries([train_ids], class_table)
    inner = max(width, _widest(entries)) - 2 * GAP
    page_width = max(width, inner + 2 * GAP)
    page = Image.new("RGB", (page_width, height + GAP + _legend_height(entries, inner) + GAP), PAPER)
    page.paste(Image.fromarray(picture), ((page_width - width) // 2, 0))
    _draw_legend(page, entries, GAP, height + GAP, inner)
    return page


def confusion_matrix_picture(
    counts: Integer[np.ndarray, "c c"] | object, class_names: Sequence[str]
) -> Image.Image:
    """Return the confusion counts as a table: each row is a target class, shared out over the predictions in per cent.

    `counts` are an array or a tensor; a class without pixels has an empty row. The column beside the names is the
    share of the class in all valid pixels.
    """
    table = np.asarray(counts).astype(np.float64)
    if table.shape != (len(class_names), len(class_names)):
        raise ValueError(f"Counts of {len(class_names)} classes must be square, but got {table.shape}.")
    num_classes = len(class_names)
    totals = table.sum(axis=1)
    shares = table / np.maximum(totals, 1)[:, None]
    font, side = _font(15), 46
    names_width = max(_text_width(name, 15) for name in class_names)
    left = MARGIN + names_width + 14 + 64
    top = MARGIN + 40 + names_width + 10
    size = (max(left + num_classes * side, 420) + MARGIN, top + num_classes * side + MARGIN)
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), "rows: label, columns: prediction, in % of the row", fill=INK, font=_font(18))
    draw.text((left - 14, top - 8), "pixels %", fill=FAINT_INK, font=font, anchor="rs")
    for index, name in enumerate(class_names):
        middle = top + index * side + side // 2
        draw.text((MARGIN + names_width, middle), name, fill=INK, font=font, anchor="rm")
        if totals[index]:
            draw.text(
                (left - 14, middle),
                _percent(totals[index] / table.sum()),
                fill=FAINT_INK,
                font=font,
                anchor="rm",
            )
        _write_upwards(page, name, left + index * side + side // 2, top - 10)
        for column in range(num_classes):
            box = (left + column * side, top + index * side)
            _draw_share(draw, box, side - 2, shares[index, column], bool(totals[index]), index == column)
    return page


_HEADER_HEIGHT = 36
_TITLE_HEIGHT = 24
_LEGEND_SIZE = 18
_LEGEND_LINE = 30
_SWATCH = 20


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _text_width(text: str, size: int) -> int:
    return math.ceil(_font(size).getlength(text))


def _shortened(text: str, size: int, width: int) -> str:
    """Return `text`, with a middle part left out where it is wider than `width` pixels."""
    if _text_width(text, size) <= width:
        return text

    def shortened_to(kept: int) -> str:
        return text[: (kept + 1) // 2] + "…" + text[len(text) - kept // 2 :]

    too_long = bisect.bisect(range(len(text)), width, key=lambda kept: _text_width(shortened_to(kept), size))
    return shortened_to(max(0, too_long - 1))


def _score(label: np.ndarray | None, prediction: np.ndarray) -> str:
    if label is None:
        return "no label"
    valid = label != IGNORE_INDEX
    if not valid.any():
        return "all pixels ignored"
    return f"{_percent(float((label == prediction)[valid].mean()))} % of the valid pixels right"


def _percent(share: float) -> str:
    """Return per cent with one decimal, never 100.0 or 0.0 for what is a little less or more."""
    percent = 100 * share
    if 0 < percent < 0.05:
        return "<0.1"
    if 99.95 <= percent < 100:
        return ">99.9"
    return f"{percent:.1f}"


def _cells(
    image: np.ndarray, label: np.ndarray | None, prediction: np.ndarray, class_table: ClassTable
) -> list[np.ndarray]:
    predicted = colourise(prediction, class_table)
    if label is None:
        blank = np.full_like(image, 245)
        return [image, blank, predicted, blank]
    return [image, colourise(label, class_table), predicted, error_picture(image, label, prediction)]


def _paste(page: Image.Image, cell: np.ndarray, box: tuple[int, int, int, int], *, smooth: bool) -> None:
    """Draw a cell into (left, top, width, height); colours that mean a class are not mixed."""
    left, top, width, height = box
    filter_ = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    page.paste(Image.fromarray(cell).resize((width, height), filter_), (left, top))


def _legend_entries(
    label_maps: Sequence[np.ndarray | None], class_table: ClassTable
) -> list[tuple[str, Colour]]:
    """Return name and colour of every class that occurs, by train id, and of ignored pixels where there are any."""
    present = {int(value) for ids in label_maps if ids is not None for value in np.unique(ids)}
    entries: list[tuple[str, Colour]] = []
    for train_id, (name, colour) in enumerate(zip(class_table.class_names, class_table.colours, strict=True)):
        if train_id in present:
            red, green, blue = (int(value) for value in colour)
            entries.append((name, (red, green, blue)))
    if IGNORE_INDEX in present:
        entries.append(("ignored", IGNORED))
    return entries


def _widest(entries: Sequence[tuple[str, Colour]]) -> int:
    return max((_text_width(name, _LEGEND_SIZE) for name, _ in entries), default=0) + _SWATCH + 8 + 2 * GAP


def _legend_columns(entries: Sequence[tuple[str, Colour]], width: int) -> tuple[int, int]:
    """Return how many entries stand on a line, and how wide one is."""
    entry_width = _widest(entries)
    num_columns = max(1, min(len(entries), width // entry_width))
    return num_columns, entry_width


def _legend_height(entries: Sequence[tuple[str, Colour]], width: int) -> int:
    num_columns, _ = _legend_columns(entries, width)
    return math.ceil(len(entries) / num_columns) * _LEGEND_LINE + GAP


def _draw_legend(
    page: Image.Image, entries: Sequence[tuple[str, Colour]], left: int, top: int, width: int
) -> None:
    draw = ImageDraw.Draw(page)
    num_columns, entry_width = _legend_columns(entries, width)
    for index, (name, colour) in enumerate(entries):
        line, column = divmod(index, num_columns)
        x, y = left + column * entry_width, top + GAP + line * _LEGEND_LINE
        draw.rounded_rectangle((x, y, x + _SWATCH, y + _SWATCH), radius=4, fill=colour, outline=RULE)
        draw.text((x + _SWATCH + 8, y + _SWATCH // 2), name, fill=INK, font=_font(_LEGEND_SIZE), anchor="lm")


def _write_upwards(page: Image.Image, text: str, middle: int, bottom: int) -> None:
    """Write `text` from bottom to top, its line centred on `middle`."""
    strip = Image.new("RGB", (_text_width(text, 15) + 2, 20), PAPER)
    ImageDraw.Draw(strip).text((0, 10), text, fill=INK, font=_font(15), anchor="lm")
    turned = strip.rotate(90, expand=True)
    page.paste(turned, (middle - turned.width // 2, bottom - turned.height))


def _draw_share(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int],
    side: int,
    share: float,
    has_pixels: bool,
    is_right: bool,
) -> None:
    """Draw one cell: blue on the diagonal, red elsewhere, the stronger the larger the share."""
    left, top = box
    strong: Colour = (26, 95, 180) if is_right else WRONG
    # The square root lets a few per cent of confusion be seen.
    strength = math.sqrt(share)
    red, green, blue = (round(246 + (channel - 246) * strength) for channel in strong)
    draw.rectangle((left, top, left + side, top + side), fill=(red, green, blue))
    if has_pixels and share > 0:
        text = "<1" if share < 0.01 else f"{math.floor(100 * share + 0.5):d}"
        colour = PAPER if strength > 0.6 else INK
        draw.text((left + side // 2, top + side // 2), text, fill=colour, font=_font(14), anchor="mm")

"""LabelMe's annotations: one JSON file an image, shapes with a class name each, later ones over earlier ones."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pspnet.errors import InputError
from pspnet.json_values import shown
from pspnet.labels import ClassTable
from segfleet.sources.annotations import ids_by_name, listed, points_of, read_json, unknown_names
from segfleet.sources.polygons import circle_points, polygon_mask

SHAPE_TYPES = ("polygon", "rectangle", "circle", "mask")


def read_labelme(
    path: str | Path, *, shape: tuple[int, int], class_table: ClassTable, unlabelled_id: int
) -> np.ndarray:
    """Return the ids, int32 (h, w), of the annotated image of that shape; InputError lists all that is wrong."""
    path = Path(path)
    content = read_json(path)
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list) or not all(isinstance(item, dict) for item in shapes):
        raise InputError(f"A LabelMe file must have a list of shapes, but {path} has none. Export it again.")
    height, width = shape
    declared = (content.get("imageHeight") or height, content.get("imageWidth") or width)
    if declared != shape:
        raise InputError(
            f"A LabelMe file must belong to its image, but {path} says {shown(declared[1])} x {shown(declared[0])} and "
            f"the image is {width} x {height} (width x height). Replace one or remove the pair."
        )
    unknown = unknown_names((str(item.get("label")) for item in shapes), class_table, path)
    ids = np.full(shape, unlabelled_id, dtype=np.int32)
    known = ids_by_name(class_table)
    problems: list[str] = []
    for number, item in enumerate(shapes, start=1):
        name = str(item.get("label"))
        try:
            mask = _mask_of(item, shape)
        except ValueError as error:
            problems.append(f"shape {number} ({name}): {error}")
            continue
        if name in known:
            ids[mask] = known[name]
    messages = [unknown] if unknown else []
    if problems:
        messages.append(
            f"The shapes of a LabelMe file must be areas, but in {path} {listed(problems)}. "
            "Draw them again or remove them."
        )
    if messages:
        raise InputError(" ".join(messages))
    return ids


def _mask_of(item: Mapping[str, Any], shape: tuple[int, int]) -> np.ndarray:
    """Return bool (h, w) of a shape; ValueError says what is wrong with it."""
    kind = item.get("shape_type") or "polygon"
    if kind not in SHAPE_TYPES:
        raise ValueError(f"a {kind} has no area (known: {', '.join(SHAPE_TYPES)})")
    points = points_of(item.get("points"))
    if kind == "polygon":
        if len(points) < 3:
            raise ValueError(f"a polygon needs three points, not {len(points)}")
        return polygon_mask(points, shape)
    if len(points) != 2:
        raise ValueError(f"a {kind} needs two points, not {len(points)}")
    if kind == "circle":
        return polygon_mask(circle_points(points[0], points[1]), shape)
    (x0, y0), (x1, y1) = points
    if kind == "rectangle":
        return polygon_mask(np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]), shape)
    return _pasted(item.get("mask"), left=int(x0), top=int(y0), shape=shape)


def _pasted(encoded: Any, *, left: int, top: int, shape: tuple[int, int]) -> np.ndarray:
    """Return bool (h, w) with a mask, a PNG in base64, whose corner lies at (left, top)."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=["PNG"]) as picture:
            if picture.width > shape[1] or picture.height > shape[0]:
                raise ValueError(f"{picture.width} x {picture.height}")
            part = np.asarray(picture.convert("L")) > 0
    except Exception as error:  # Pillow's readers raise of every kind
        raise ValueError(f"its mask is no PNG of at most the image's size ({shown(error)})") from error
    mask = np.zeros(shape, dtype=bool)
    rows, columns = np.nonzero(part)
    rows, columns = rows + top, columns + left
    inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
    mask[rows[inside], columns[inside]] = True
    return mask

"""What LabelMe and COCO files have in common: JSON of any origin, class names, pixels that nobody annotated."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pspnet.errors import InputError
from pspnet.json_values import parse_json
from pspnet.labels import IGNORE_INDEX, MAX_ID, ClassInfo, ClassTable

MAX_JSON_BYTES = 2_000_000_000
MAX_NAMED = 20
MAX_NAMED_LENGTH = 200
MAX_COORDINATE = 1e9
"""Pixels; more than any picture has, and few enough that sums of them are exact."""


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; InputError where it is none."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(
                f"Annotations must be a JSON file of at most {MAX_JSON_BYTES} bytes, but {path} is larger. Divide it."
            )
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"Annotations must be a JSON file that can be read, but {path} cannot ({error.strerror}). Export it again."
        ) from error
    try:
        return parse_json(content, "Annotations", allow_nan=True)  # as Python writes some area or score
    except InputError as error:
        raise InputError(f"{str(error).removesuffix('.')}, in {path}. Export it again.") from error


def ids_by_name(table: ClassTable) -> dict[str, int]:
    """Return the id that each class name is painted with."""
    return {info.name: info.id for info in table.classes if info.id >= 0}


def unknown_names(names: Iterable[str], table: ClassTable, path: Path) -> str:
    """Return the message for annotated names that are no class, with all classes; "" where there are none."""
    known = ids_by_name(table)
    unknown = sorted(set(names) - known.keys())
    if not unknown:
        return ""
    return (
        f"Annotated names must be classes, but {path} has {listed(map(repr, unknown))}, and the classes of "
        f"{table.name!r} are {', '.join(known)}. Add them to the class table (train_id 255 ignores them), or rename "
        "them."
    )


def with_unlabelled(table: ClassTable, background: str) -> tuple[ClassTable, int]:
    """Return the table, and the id of pixels that nobody annotated: that of the class `background`, or an ignored one.

    A table without an ignored class gets one, named unlabelled.
    """
    if background:
        known = ids_by_name(table)
        if background not in known:
            raise InputError(
                f"--background must be a class, but got {background!r}, and the classes of {table.name!r} are "
                f"{', '.join(known)}."
            )
        return table, known[background]
    ignored = [info.id for info in table.classes if info.train_id == IGNORE_INDEX and info.id >= 0]
    if ignored:
        return table, ignored[0]
    unlabelled = ClassInfo("unlabelled", free_id(table.classes, first=255), IGNORE_INDEX, (0, 0, 0))
    return replace(table, classes=(*table.classes, unlabelled)), unlabelled.id


def free_id(classes: Iterable[ClassInfo], *, first: int) -> int:
    """Return `first` where no class has that id, else the lowest id that none has."""
    taken = {info.id for info in classes}
    return next(value for value in (first, *range(MAX_ID + 1)) if value not in taken)


def points_of(values: Any) -> np.ndarray:
    """Return points (n, 2) of pairs or of a flat list x, y, x, y; ValueError where they are not such numbers."""
    try:
        points = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("its points are not pairs of numbers") from error
    if points.ndim == 1 and points.size % 2 == 0:
        points = points.reshape(-1, 2)
    if points.ndim != 2 or points.shape[1] != 2 or not (np.abs(points) <= MAX_COORDINATE).all():
        raise ValueError(f"its points are not pairs of numbers of at most {MAX_COORDINATE:.0e}")
    return points


def listed(items: Iterable[str]) -> str:
    """Return items for a message, at most MAX_NAMED of them, each of at most MAX_NAMED_LENGTH characters."""
    found = [item if len(item) <= MAX_NAMED_LENGTH else f"{item[:MAX_NAMED_LENGTH]}…" for item in items]
    more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return ", ".join(found[:MAX_NAMED]) + more

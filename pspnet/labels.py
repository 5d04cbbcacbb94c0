"""Class tables: which id of a stored label is which class, its contiguous train id and its colour."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pspnet.errors import InputError
from pspnet.json_values import shown

IGNORE_INDEX = 255
"""Train id of pixels that are in no loss and no metric."""

MAX_ID = 65535
MAX_CSV_BYTES = 1_000_000


@dataclass(frozen=True)
class ClassInfo:
    """One class of a data set."""

    name: str
    id: int
    """Value in the stored labels; -1 for a class that no label map holds (Cityscapes' licence plate)."""
    train_id: int
    """Index into the logits, or IGNORE_INDEX."""
    colour: tuple[int, int, int]
    """Red, green, blue, 0 to 255."""
    category: str = ""


@dataclass(frozen=True)
class ClassTable:
    """The classes of a data set; refuses ids or train ids that are not what a label map can hold."""

    name: str
    classes: tuple[ClassInfo, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InputError(f"The name of a class table must be text, but got {shown(self.name)}.")
        for info in self.classes:
            _check_class(info, self.name)
        ids = [info.id for info in self.classes if info.id >= 0]
        twice = sorted({id_ for id_ in ids if ids.count(id_) > 1})
        if twice:
            raise InputError(
                f"Each id of class table {self.name!r} must be one class, but {twice[0]} is several."
            )
        train_ids = sorted({info.train_id for info in self.classes} - {IGNORE_INDEX})
        if not train_ids or train_ids != list(range(len(train_ids))):
            raise InputError(
                f"The train ids of class table {self.name!r} must be 0, 1, 2, ... without a gap (255: ignored), "
                f"but got {shown(train_ids)}."
            )

    @cached_property
    def num_classes(self) -> int:
        """Number of classes with a train id."""
        return len({info.train_id for info in self.classes} - {IGNORE_INDEX})

    @cached_property
    def trained(self) -> tuple[ClassInfo, ...]:
        """The first class of each train id, by train id."""
        first = {info.train_id: info for info in reversed(self.classes)}
        return tuple(first[train_id] for train_id in range(self.num_classes))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by train id."""
        return tuple(info.name for info in self.trained)

    @property
    def colours(self) -> np.ndarray:
        """Colours by train id, uint8 (num_classes, 3)."""
        return np.array([info.colour for info in self.trained], dtype=np.uint8)

    def train_id_of(self, ids: np.ndarray, *, where: str) -> np.ndarray:
        """Return the train ids, uint8 (h, w), of a label map of ids (h, w).

        Raises InputError that names the ids outside the table with their pixel counts, and `where` they are.
        """
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"A label map must be integers (h, w), but {where} is {ids.dtype} {ids.shape}.")
        is_known, lookup = self._lookup
        if ids.dtype == np.uint8 and ids.size:
            occurs = np.array(Image.fromarray(np.ascontiguousarray(ids)).histogram(), dtype=bool)
            if is_known[:256][occurs].all():  # as nearly always: by a table of bytes, five times as fast
                found = bytearray(ids.tobytes()).translate(lookup[:256].tobytes())
                return np.frombuffer(found, dtype=np.uint8).reshape(ids.shape)
        outside = (ids < 0) | (ids > MAX_ID)
        clipped = np.where(outside, MAX_ID, ids) if outside.any() else ids
        unknown = outside | ~is_known[clipped]
        if unknown.any():
            values, counts = np.unique(ids[unknown], return_counts=True)
            listed = ", ".join(
                f"{value} ({count} pixels)" for value, count in zip(values[:8], counts[:8], strict=True)
            )
            raise InputError(
                f"Ids of a label must be in class table {self.name!r}, but {where} has {listed}"
                f"{' and others' if len(values) > 8 else ''}. Add them to the table (train_id 255 ignores them) "
                "or mend the label."
            )
        return lookup[clipped]

    def id_of(self, train_ids: np.ndarray) -> np.ndarray:
        """Return the ids, uint8 or uint16 (h, w), of train ids; IGNORE_INDEX becomes the first ignored id, or 0."""
        ignored = next(
            (info.id for info in self.classes if info.train_id == IGNORE_INDEX and info.id >= 0), 0
        )
        ids = [info.id for info in self.trained]
        lookup = np.full(256, ignored, dtype=np.uint8 if max([ignored, *ids]) < 256 else np.uint16)
        lookup[: self.num_classes] = ids
        return lookup[train_ids]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON values; `from_dict` reads them back."""
        return {
            "name": self.name,
            "classes": [asdict(info) | {"colour": list(info.colour)} for info in self.classes],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ClassTable":
        """Return the table that `to_dict` wrote, checked."""
        try:
            classes = tuple(
                ClassInfo(
                    name=item["name"],
                    id=item["id"],
                    train_id=item["train_id"],
                    colour=tuple(item["colour"]),
                    category=item.get("category", ""),
                )
                for item in values["classes"]
            )
            return cls(values["name"], classes)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"A class table must have a name and classes, but this has not: {shown(error)}."
            ) from error

    @cached_property
    def digest_text(self) -> str:
        """Return a text that is equal for equal tables."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @cached_property
    def _lookup(self) -> tuple[np.ndarray, np.ndarray]:
        is_known = np.zeros(MAX_ID + 1, dtype=bool)
        lookup = np.full(MAX_ID + 1, IGNORE_INDEX, dtype=np.uint8)
        for info in self.classes:
            if info.id >= 0:
                is_known[info.id], lookup[info.id] = True, info.train_id
        return is_known, lookup


def read_class_table(path: str | Path) -> ClassTable:
    """Return the class table in a CSV file with the columns id, name, r, g, b, and optionally train_id, category.

    Without train_id, classes named void, unlabelled, unlabeled, ignore or background-void are ignored and the
    others numbered in the order of the file. `trainId` and `ignoreInEval` of Cityscapes' table are understood.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_CSV_BYTES:
            raise InputError(
                f"A class table must be a CSV file of at most {MAX_CSV_BYTES} bytes, but {path} is larger."
            )
        rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"A class table must be a readable CSV file, but {path} is not: {error}.") from error
    missing = sorted({"id", "name", "r", "g", "b"} - set(rows[0] if rows else {}))
    if missing:
        raise InputError(
            f"A class table must have the columns id, name, r, g, b, but {path} lacks {', '.join(missing)}."
        )
    classes: list[ClassInfo] = []
    next_train_id = 0
    for line, row in enumerate(rows, start=2):
        try:
            given = row.get("train_id") or row.get("trainId")
            name = (row["name"] or "").strip()
            if given is not None:
                train_id = int(given)
            else:
                train_id = IGNORE_INDEX if name.lower() in IGNORED_NAMES else next_train_id
            next_train_id += train_id != IGNORE_INDEX
            classes.append(
                ClassInfo(
                    name=name,
                    id=int(row["id"]),
                    train_id=IGNORE_INDEX if train_id == -1 else train_id,
                    colour=(int(row["r"]), int(row["g"]), int(row["b"])),
                    category=(row.get("category") or "").strip(),
                )
            )
        except (TypeError, ValueError) as error:
            raise InputError(
                f"Line {line} of class table {path} must hold whole numbers, but: {shown(error)}."
            ) from error
    return ClassTable(path.stem if path.stem != "classes" else path.parent.name, tuple(classes))


IGNORED_NAMES = {"void", "unlabelled", "unlabeled", "ignore", "ignored"}
"""Names, in small letters, of classes that are ignored where no train id is given."""


def _check_class(info: ClassInfo, table: str) -> None:
    def require(ok: bool, rule: str, value: Any) -> None:
        if not ok:
            raise InputError(
                f"In class table {shown(table)}, {rule}, but class {shown(info.name)} has {shown(value)}."
            )

    name: Any = info.name
    require(isinstance(name, str) and name != "", "names must be text that is not empty", name)
    require(isinstance(info.category, str), "categories must be text", info.category)
    require(type(info.id) is int and -1 <= info.id <= MAX_ID, f"ids must be whole, -1 to {MAX_ID}", info.id)
    require(
        type(info.train_id) is int and 0 <= info.train_id <= IGNORE_INDEX,
        "train ids must be 0 to 254, or 255 (ignored)",
        info.train_id,
    )
    require(
        [type(part) is int and 0 <= part <= 255 for part in info.colour] == [True] * 3,
        "colours must be three whole numbers from 0 to 255",
        info.colour,
    )


def _table(name: str, rows: Sequence[tuple[str, int, int, tuple[int, int, int], str]]) -> ClassTable:
    return ClassTable(name, tuple(ClassInfo(*row) for row in rows))


CITYSCAPES = _table(
    "cityscapes",
    [
        ("unlabeled", 0, 255, (0, 0, 0), "void"),
        ("ego vehicle", 1, 255, (0, 0, 0), "void"),
        ("rectification border", 2, 255, (0, 0, 0), "void"),
        ("out of roi", 3, 255, (0, 0, 0), "void"),
        ("static", 4, 255, (0, 0, 0), "void"),
        ("dynamic", 5, 255, (111, 74, 0), "void"),
        ("ground", 6, 255, (81, 0, 81), "void"),
        ("road", 7, 0, (128, 64, 128), "flat"),
        ("sidewalk", 8, 1, (244, 35, 232), "flat"),
        ("parking", 9, 255, (250, 170, 160), "flat"),
        ("rail track", 10, 255, (230, 150, 140), "flat"),
        ("building", 11, 2, (70, 70, 70), "construction"),
        ("wall", 12, 3, (102, 102, 156), "construction"),
        ("fence", 13, 4, (190, 153, 153), "construction"),
        ("guard rail", 14, 255, (180, 165, 180), "construction"),
        ("bridge", 15, 255, (150, 100, 100), "construction"),
        ("tunnel", 16, 255, (150, 120, 90), "construction"),
        ("pole", 17, 5, (153, 153, 153), "object"),
        ("polegroup", 18, 255, (153, 153, 153), "object"),
        ("traffic light", 19, 6, (250, 170, 30), "object"),
        ("traffic sign", 20, 7, (220, 220, 0), "object"),
        ("vegetation", 21, 8, (107, 142, 35), "nature"),
        ("terrain", 22, 9, (152, 251, 152), "nature"),
        ("sky", 23, 10, (70, 130, 180), "sky"),
        ("person", 24, 11, (220, 20, 60), "human"),
        ("rider", 25, 12, (255, 0, 0), "human"),
        ("car", 26, 13, (0, 0, 142), "vehicle"),
        ("truck", 27, 14, (0, 0, 70), "vehicle"),
        ("bus", 28, 15, (0, 60, 100), "vehicle"),
        ("caravan", 29, 255, (0, 0, 90), "vehicle"),
        ("trailer", 30, 255, (0, 0, 110), "vehicle"),
        ("train", 31, 16, (0, 80, 100), "vehicle"),
        ("motorcycle", 32, 17, (0, 0, 230), "vehicle"),
        ("bicycle", 33, 18, (119, 11, 32), "vehicle"),
        ("license plate", -1, 255, (0, 0, 142), "vehicle"),
    ],
)
"""The official table of Cityscapes (cityscapesscripts/helpers/labels.py): 35 classes, 19 of them trained."""


def varied_colours(count: int) -> list[tuple[int, int, int]]:
    """Return colours that differ, as PASCAL VOC's devkit numbers them (bits of the index spread over r, g, b)."""
    colours = []
    for index in range(1, count + 1):
        colour = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                colour[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        colours.append((colour[0], colour[1], colour[2]))
    return colours


def _indoor(name: str, names: str) -> ClassTable:
    listed = names.split(", ")
    colours = varied_colours(len(listed))
    classes = [ClassInfo("void", 0, IGNORE_INDEX, (0, 0, 0))]
    classes += [ClassInfo(item, index + 1, index, colours[index]) for index, item in enumerate(listed)]
    return ClassTable(name, tuple(classes))


NYUV2_40 = _indoor(
    "nyuv2_40",
    "wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf, picture, counter, blinds, desk, shelves, "
    "curtain, dresser, pillow, mirror, floor mat, clothes, ceiling, books, refridgerator, television, paper, towel, "
    "shower curtain, box, whiteboard, person, night stand, toilet, sink, lamp, bathtub, bag, otherstructure, "
    "otherfurniture, otherprop",
)
"""The 40 classes of Gupta et al., CVPR 2013, on NYU Depth V2; id 0 is void. "refridgerator" is as published."""

NYUV2_13 = _indoor(
    "nyuv2_13",
    "bed, books, ceiling, chair, floor, furniture, objects, picture, sofa, table, tv, wall, window",
)
"""The 13 classes of Couprie et al., ICLR 2013, on NYU Depth V2; id 0 is void."""

"""What is checked of every pair, and of all pairs together.

A problem keeps a pair out of the store: a file that cannot be used, sizes that differ, ids outside the class table, a
label without a valid pixel, a picture that is also in the data it is measured against, one picture with two labels.
A warning does not: equal pictures with equal labels in one split, pictures that look alike (frames of one drive).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from pspnet.errors import InputError
from pspnet.labels import IGNORE_INDEX
from pspnet.store import pixel_digest
from segfleet.sources import Pair, Source
from segfleet.sources.files import refuse_undecodable

Kind = Literal["file", "size", "ids", "void", "duplicate", "near duplicate"]

NEAR_DISTANCE = 3
"""Two pictures look alike where at most so many of the 64 bits of their hashes differ."""
NEAR_GREY_LEVELS = 6.0
"""… and their 9 x 8 thumbnails differ by at most so many grey levels on average."""
_THUMBNAIL = (9, 8)
_FLAT = 3
"""A thumbnail whose grey levels span less shows nothing to compare."""
_BLOCK = 512


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that is wrong, or worth a look, with one pair."""

    split: str
    name: str
    kind: Kind
    file: str
    """The file to look at, or the image's index in a file of many."""
    text: str
    """The rule, what was found, the remedy."""
    other: tuple[str, str] | None = None
    """Split and name of the pair that this one is like."""


@dataclass(frozen=True)
class PairFacts:
    """What is kept of a pair that can be used, to compare it with the others."""

    split: str
    name: str
    image: str
    label: str | None
    image_digest: str
    """sha256 of size and decoded pixels: the same for one picture in two formats."""
    label_digest: str
    thumbnail: str
    """Grey levels of the picture at 9 x 8, as hexadecimal digits."""
    class_counts: list[int]
    """Pixels of each train id; the last entry counts the ignored ones."""


def check_pair(
    source: Source, pair: Pair
) -> tuple[tuple[np.ndarray, np.ndarray | None, PairFacts] | None, list[Finding]]:
    """Return image, train ids and facts of a pair that can be used, or None and all that is wrong with it."""
    try:
        image, ids = source.read(pair)
    except InputError as error:
        # A source reads the image first: its fault must not hide one of the label.
        return None, [_finding(pair, "file", str(error)), *_fault_of_label(pair, str(error))]
    train_ids = None
    if ids is not None:
        if ids.shape != image.shape[:2]:
            sideways = ids.shape == (image.shape[1], image.shape[0])
            text = (
                f"An image and its label must have one size, but {pair.image} is {_size(image)} and {pair.label} is "
                f"{_size(ids)} (width x height). "
                + ("Turn one (the image as its EXIF orientation says), " if sideways else "Replace one, ")
                + "or remove the pair."
            )
            return None, [_finding(pair, "size", text)]
        try:
            train_ids = source.class_table.train_id_of(ids, where=str(pair.label))
        except InputError as error:
            return None, [_finding(pair, "ids", str(error))]
        if (train_ids == IGNORE_INDEX).all():
            text = (
                f"A label must have a pixel of a trained class, but all {ids.size} of {pair.label} are ignored "
                f"(id {_listed(ids)}). Label the image or remove the pair."
            )
            return None, [_finding(pair, "void", text)]
    counts = np.array([0] * 256 if train_ids is None else Image.fromarray(train_ids).histogram())
    facts = PairFacts(
        split=pair.split,
        name=pair.name,
        image=pair.image,
        label=pair.label,
        image_digest=pixel_digest(image),
        label_digest=pixel_digest(train_ids),
        thumbnail=_thumbnail(image),
        class_counts=[*counts[: source.class_table.num_classes].tolist(), int(counts[IGNORE_INDEX])],
    )
    return (image, train_ids, facts), []


def compare_pairs(facts: Sequence[PairFacts]) -> tuple[list[Finding], list[Finding]]:
    """Return the problems and the warnings that show only where all pairs are seen together."""
    problems, warnings = _equal_pictures(facts)
    return problems, warnings + _similar_pictures(facts)


def to_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Return findings as JSON values."""
    return [asdict(finding) for finding in findings]


def from_json(values: Iterable[dict[str, Any]]) -> list[Finding]:
    """Return the findings that `to_json` wrote."""
    return [
        Finding(**value | {"other": tuple(value["other"]) if value["other"] else None}) for value in values
    ]


def _finding(pair: Pair, kind: Kind, text: str) -> Finding:
    is_label = pair.label is not None and pair.label in text and not (kind == "size" or pair.image in text)
    return Finding(pair.split, pair.name, kind, str(pair.label) if is_label else pair.image, text)


def _fault_of_label(pair: Pair, text: str) -> list[Finding]:
    """Return what is wrong with the label's file where the fault that was found is the image's."""
    if pair.label is None or pair.label in text or not Path(pair.label).is_file():
        return []
    try:
        refuse_undecodable(pair.label)
    except InputError as error:
        return [_finding(pair, "file", str(error))]
    return []


def _equal_pictures(facts: Sequence[PairFacts]) -> tuple[list[Finding], list[Finding]]:
    groups: dict[str, list[PairFacts]] = defaultdict(list)
    for item in facts:
        groups[item.image_digest].append(item)
    problems: list[Finding] = []
    warnings: list[Finding] = []
    for group in groups.values():
        by_split: dict[str, list[PairFacts]] = defaultdict(list)
        for item in sorted(group, key=lambda item: (item.split, item.name)):
            by_split[item.split].append(item)
        # What is measured stays; what is learnt from goes.
        kept_split = max(by_split, key=lambda split: (split == "test", split == "val", split))
        for split, items in by_split.items():
            first, *copies = items
            if split != kept_split:
                problems += [
                    _likeness(
                        item,
                        by_split[kept_split][0],
                        "duplicate",
                        f"A picture must be in one split, but {{here}} of {split} is also {{there}} of {kept_split}. "
                        f"Remove it from {split}.",
                    )
                    for item in items
                ]
            elif len({item.label_digest for item in items}) > 1:
                problems += [
                    _likeness(
                        item,
                        copies[0] if item is first else first,
                        "duplicate",
                        "A picture must have one label, but {here} is the picture {there} and their labels differ. "
                        "Keep the pair whose label is right.",
                    )
                    for item in items
                ]
            else:
                warnings += [
                    _likeness(
                        item, first, "duplicate", "{here} is the picture {there} again. Remove one of them."
                    )
                    for item in copies
                ]
    return sorted(problems), sorted(warnings)


def _similar_pictures(facts: Sequence[PairFacts]) -> list[Finding]:
    """Return a warning for each group of pictures in one split, and for each picture that is like one in another."""
    items = sorted(facts, key=lambda item: (item.split, item.name))
    thumbnails = np.array([list(bytes.fromhex(item.thumbnail)) for item in items], dtype=np.int16)
    shows = [index for index, values in enumerate(thumbnails) if np.ptp(values) >= _FLAT]
    items, thumbnails = [items[index] for index in shows], thumbnails[shows]
    parent = list(range(len(items)))
    nearest: dict[int, tuple[int, int]] = {}
    for first, second, distance in _near_pairs(thumbnails):
        one, other = items[first], items[second]
        if one.split == other.split:
            parent[_root(parent, second)] = _root(parent, first)
        elif one.image_digest != other.image_digest:
            # The warning stands at the picture that scores are measured on.
            measured, learnt = (first, second) if one.split in ("val", "test") else (second, first)
            nearest[measured] = min(nearest.get(measured, (65, 0)), (distance, learnt))
    warnings = [
        _likeness(
            items[index],
            items[like],
            "near duplicate",
            f"{{here}} of {items[index].split} looks like {{there}} of {items[like].split} ({distance} of 64 bits "
            "differ): scores on it are optimistic. Split by drive, clip or place, not by frame.",
        )
        for index, (distance, like) in nearest.items()
    ]
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(items)):
        groups[_root(parent, index)].append(index)
    for members in groups.values():
        if len({items[index].image_digest for index in members}) < 2:
            continue
        begin, end = items[members[0]], items[members[-1]]
        warnings.append(
            _likeness(
                begin,
                end,
                "near duplicate",
                f"{len(members)} pictures of {begin.split} look alike, from {{here}} to {{there}}. "
                "They count as few: keep them in one split, or thin them out.",
            )
        )
    return sorted(warnings)


def _near_pairs(thumbnails: np.ndarray) -> Iterable[tuple[int, int, int]]:
    """Yield (first, second, differing bits) of all pictures that look alike, first < second."""
    if len(thumbnails) == 0:
        return
    grids = thumbnails.reshape(-1, _THUMBNAIL[1], _THUMBNAIL[0])
    bits = (grids[:, :, 1:] > grids[:, :, :-1]).reshape(len(grids), 64)
    hashes = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
    for start in range(0, len(hashes), _BLOCK):
        distances = np.bitwise_count(hashes[start : start + _BLOCK, None] ^ hashes[None, start:])
        rows, columns = np.nonzero(distances <= NEAR_DISTANCE)
        later = columns > rows
        rows, columns = rows[later], columns[later]
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            difference = np.abs(thumbnails[start + row] - thumbnails[start + column]).mean()
            if difference <= NEAR_GREY_LEVELS:
                yield start + row, start + column, int(distances[row, column])


def _root(parent: list[int], index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return index


def _likeness(item: PairFacts, other: PairFacts, kind: Kind, text: str) -> Finding:
    """Return a finding whose text names both images, as files or, inside a file of many, by name."""
    here, there = (x.image if Path(x.image).suffix else f"image {x.name}" for x in (item, other))
    return Finding(
        item.split,
        item.name,
        kind,
        item.image,
        text.replace("{here}", here).replace("{there}", there),
        (other.split, other.name),
    )


def _thumbnail(image: np.ndarray) -> str:
    grey = Image.fromarray(image).convert("L").resize(_THUMBNAIL, Image.Resampling.BOX)
    return np.asarray(grey).tobytes().hex()


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"


def _listed(ids: np.ndarray) -> str:
    return ", ".join(map(str, np.unique(ids)[:8].tolist()))

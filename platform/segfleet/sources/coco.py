"""COCO's annotations: one JSON file a split, polygons or run lengths, later annotations over earlier ones.

A JSON file is read once, where the source is made: to the cluster's workers goes just what it says of their images.
Read, it takes ten times its size in memory.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pspnet.errors import InputError
from pspnet.json_values import shown
from pspnet.labels import IGNORE_INDEX, IGNORED_NAMES, ClassInfo, ClassTable, varied_colours
from segfleet.sources import Listing, Pair
from segfleet.sources.annotations import free_id, ids_by_name, listed, points_of, read_json, unknown_names
from segfleet.sources.files import IMAGE_SUFFIXES, read_image
from segfleet.sources.polygons import polygon_mask, run_length_mask
from segfleet.sources.splits import SplitRule
from segfleet.sources.zips import stamps


@dataclass(frozen=True)
class CocoSource:
    """Images in folders, and a file of annotations for each of them."""

    root: Path
    class_table: ClassTable
    unlabelled_id: int
    """Id of the pixels that nobody annotated."""
    folders: dict[str, tuple[Path, Path]] = field(default_factory=dict)
    """Split to (folder of images, JSON file)."""
    rule: SplitRule = field(default_factory=SplitRule)

    @property
    def name(self) -> str:
        """Name of the data set: that of the folder."""
        return self.root.name

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of the source."""
        folders = {split: [str(folder) for folder in pair] for split, pair in self.folders.items()}
        return {
            "kind": "coco",
            "root": str(self.root),
            "folders": folders,
            "annotations": stamps(file for _, file in self.folders.values()),
            "unlabelled_id": self.unlabelled_id,
            "split": self.rule.describe(),
        }

    def listing(self) -> Listing:
        """Return the pairs of each split; images without annotations are noted, and kept if there is a background."""
        pairs: list[Pair] = []
        notes: list[str] = []
        problems: list[str] = []
        is_ignored = {info.id: info.train_id == IGNORE_INDEX for info in self.class_table.classes}
        for split, (image_dir, file) in self.folders.items():
            coco = read_coco(file)
            problem = unknown_names(coco.used_names, self.class_table, file)
            problems += [problem] if problem else []
            for image_id, image in coco.images.items():
                path = image_dir / image.file_name
                if not path.is_file():
                    notes.append(f"no image for label {path} of {file}")
                elif not image.annotated_names and is_ignored[self.unlabelled_id]:
                    notes.append(f"no label for image {path}")
                else:
                    label = f"{file}#{image_id}"
                    pairs.append(Pair(split, image.name, str(path), label, image.annotation))
            files = {image_dir / image.file_name for image in coco.images.values()}
            alone = {path for path in image_dir.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES} - files
            notes += [f"no label for image {path}" for path in sorted(alone)]
        if problems:
            raise InputError("\n".join(problems))
        if not pairs:
            raise InputError(
                f"--root must hold images and their annotations, but none of the images that the files name is in its "
                f"folder: {', '.join(str(folder) for folder, _ in self.folders.values())}. Name the folder that the "
                "file_name of an image is relative to by --images."
            )
        divided = self.rule.divided(pairs)
        return Listing(divided.pairs, divided.notes + notes)

    def read(self, pair: Pair) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the image and its ids."""
        image = read_image(pair.image)
        return image, self._ids(json.loads(pair.annotation), image.shape[:2], pair)

    def _ids(self, annotated: dict[str, Any], shape: tuple[int, int], pair: Pair) -> np.ndarray:
        if annotated["shape"] != list(shape):
            height, width = annotated["shape"]
            raise InputError(
                f"Annotations must belong to their image, but {pair.label} says {shown(width)} x {shown(height)} and "
                f"{pair.image} is {shape[1]} x {shape[0]} (width x height). Replace one or remove the pair."
            )
        known = ids_by_name(self.class_table)
        ids = np.full(shape, self.unlabelled_id, dtype=np.int32)
        problems: list[str] = []
        for number, name, segmentation in annotated["annotations"]:
            try:
                ids[_mask_of(segmentation, shape)] = known[name]
            except ValueError as error:
                problems.append(f"annotation {number} ({name}): {error}")
        if problems:
            raise InputError(
                f"COCO annotations must have a segmentation of polygons or run lengths, but in {pair.label} "
                f"{listed(problems)}. Export them again with segmentation, or remove them."
            )
        return ids


@dataclass(frozen=True)
class CocoImage:
    """An image as a COCO file names it."""

    file_name: str
    annotated_names: frozenset[str]
    """Categories of its annotations."""
    annotation: str
    """JSON of its shape and its annotations (id, category, segmentation), in the order of the file."""

    @property
    def name(self) -> str:
        """Its name in the store: the file's, without ending."""
        return _name_of(self.file_name)


@dataclass(frozen=True)
class CocoCategory:
    """A category of a COCO file."""

    name: str
    supercategory: str


@dataclass(frozen=True)
class CocoFile:
    """A COCO file, by the ids of its images as text."""

    images: Mapping[str, CocoImage]
    categories: Mapping[int, CocoCategory]

    @property
    def used_names(self) -> set[str]:
        """The names of the categories that have annotations."""
        return set().union(*(image.annotated_names for image in self.images.values()))


def read_coco(path: Path) -> CocoFile:
    """Return a COCO file, read once a process; InputError lists what in it does not fit together."""
    if not path.is_file():
        raise InputError(f"Annotations must be a COCO JSON file, but there is no {path}.")
    status = path.stat()
    return _parsed(path, status.st_size, status.st_mtime_ns)


def coco_class_table(files: Mapping[str, Path], *, name: str, background: str) -> ClassTable:
    """Return the class table of the categories of all splits, which must be the same; `background` is added to it."""
    first_path, *other_paths = files.values()
    categories = read_coco(first_path).categories
    name_of = {key: category.name for key, category in categories.items()}
    for path in other_paths:
        others = {key: category.name for key, category in read_coco(path).categories.items()}
        different = sorted(key for key, _ in name_of.items() ^ others.items())
        if different:
            key = different[0]
            raise InputError(
                f"All splits must have the same categories, but id {key} is {name_of.get(key)!r} in {first_path} and "
                f"{others.get(key)!r} in {path}. Give a class table by --classes."
            )
    names = list(name_of.values())
    twice = sorted({item for item in names if names.count(item) > 1})
    if twice:
        raise InputError(
            f"Names of categories must differ, but {first_path} has {listed(twice)} several times. Rename them."
        )
    rows = [(key, category.name, category.supercategory) for key, category in categories.items()]
    if background and background not in names:
        rows.append(
            (free_id([ClassInfo("", key, 0, (0, 0, 0)) for key in categories], first=0), background, "")
        )
    colours = varied_colours(len(rows))
    classes: list[ClassInfo] = []
    next_train_id = 0
    for (key, class_name, category), colour in zip(sorted(rows), colours, strict=True):
        is_ignored = class_name.lower() in IGNORED_NAMES
        train_id = IGNORE_INDEX if is_ignored else next_train_id
        next_train_id += not is_ignored
        classes.append(ClassInfo(class_name, key, train_id, colour, category))
    return ClassTable(name, tuple(classes))


def _mask_of(segmentation: Any, shape: tuple[int, int]) -> np.ndarray:
    """Return bool (h, w) of one annotation; ValueError says what is wrong with it."""
    if isinstance(segmentation, dict):
        if segmentation.get("size") != list(shape):
            raise ValueError(
                f"its run lengths are of size {shown(segmentation.get('size'))}, not {list(shape)}"
            )
        counts = segmentation.get("counts")
        if isinstance(counts, list) and all(type(count) is int for count in counts):
            return run_length_mask(counts, shape)
        if isinstance(counts, str):
            return run_length_mask(counts, shape)
        raise ValueError("its run lengths are neither a list of whole numbers nor a text")
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("it has no segmentation")
    mask = np.zeros(shape, dtype=bool)
    for polygon in segmentation:
        points = points_of(polygon)
        if len(points) < 3:
            raise ValueError(f"a polygon needs three points, not {len(points)}")
        mask |= polygon_mask(points, shape)
    return mask


@functools.lru_cache(maxsize=4)
def _parsed(path: Path, _size: int, _changed_ns: int) -> CocoFile:
    content = read_json(path)
    problems: list[str] = []
    categories: dict[int, CocoCategory] = {}
    for item in _section(content, "categories", path):
        if type(item.get("id")) is not int or not isinstance(item.get("name"), str):
            problems.append(f"the category {item.get('name')!r} has no whole id and name")
        elif item["id"] in categories:
            problems.append(f"category id {item['id']} is there twice")
        else:
            categories[item["id"]] = CocoCategory(item["name"], str(item.get("supercategory") or ""))
    images: dict[str, tuple[str, list[Any]]] = {}
    names: set[str] = set()
    for item in _section(content, "images", path):
        image_id, file_name = str(item.get("id")), item.get("file_name")
        shape = [item.get("height"), item.get("width")]
        if not isinstance(file_name, str) or not all(type(side) is int for side in shape):
            problems.append(f"image {image_id} has no file_name, height and width")
            continue
        file = PurePosixPath(file_name)
        if file.is_absolute() or ".." in file.parts or not file.name:
            problems.append(f"image {image_id} lies outside of its folder ({file_name})")
            continue
        if image_id in images or _name_of(file_name) in names:
            problems.append(f"image {image_id} ({file_name}) is there twice, by its id or its name")
        images[image_id] = (file_name, shape)
        names.add(_name_of(file_name))
    annotations: dict[str, list[tuple[Any, str, Any]]] = {image_id: [] for image_id in images}
    for item in _section(content, "annotations", path):
        image_id, key = str(item.get("image_id")), item.get("category_id")
        category = categories.get(key) if type(key) is int else None
        if image_id not in images:
            problems.append(f"annotation {item.get('id')} is of image {image_id}, which is not there")
        if category is None:
            problems.append(f"annotation {item.get('id')} is of category {key}, which is not there")
        if category is not None and image_id in images:
            annotations[image_id].append((item.get("id"), category.name, item.get("segmentation")))
    if problems:
        raise InputError(f"A COCO file must fit together, but in {path} {listed(problems)}. Export it again.")
    found = {
        image_id: CocoImage(
            file_name,
            frozenset(name for _, name, _ in annotations[image_id]),
            json.dumps({"shape": shape, "annotations": annotations[image_id]}),
        )
        for image_id, (file_name, shape) in images.items()
    }
    return CocoFile(found, categories)


def _name_of(file_name: str) -> str:
    return PurePosixPath(file_name).with_suffix("").as_posix()


def _section(content: Any, name: str, path: Path) -> list[dict[str, Any]]:
    section = content.get(name) if isinstance(content, dict) else None
    if not isinstance(section, list) or not all(isinstance(item, dict) for item in section):
        raise InputError(
            f"A COCO file must have the lists images, categories and annotations, but {path} has no {name}. "
            "Export it again as COCO (segmentation)."
        )
    return section

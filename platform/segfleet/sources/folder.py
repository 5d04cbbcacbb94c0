"""A person's own folder of images and labels, paired by file name.

Either ROOT/<split>/*.jpg beside ROOT/<split>annot/*.png (CamVid's layout), or ROOT/images/<split>/ beside
ROOT/labels/<split>/, or ROOT/images/ beside ROOT/labels/ without splits, or folders named by flags. LabelMe's files
may also lie beside the images; of COCO's there is one for each folder of images.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pspnet.errors import InputError
from pspnet.labels import ClassTable, read_class_table
from segfleet.sources import Listing, Pair
from segfleet.sources.annotations import listed, with_unlabelled
from segfleet.sources.coco import CocoSource, coco_class_table
from segfleet.sources.files import IMAGE_SUFFIXES, read_colours, read_ids, read_image
from segfleet.sources.labelme import read_labelme
from segfleet.sources.splits import SplitRule

LabelKind = Literal["ids", "colours", "labelme", "coco"]
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".webp")
LOSSY_SUFFIXES = (".jpg", ".jpeg", ".jfif")

_PICTURES = [("{split}", "{split}annot"), ("images/{split}", "labels/{split}"), ("images", "labels")]
LAYOUTS: dict[LabelKind, list[tuple[str, str]]] = {
    "ids": _PICTURES,
    "colours": _PICTURES,
    "labelme": [*_PICTURES, ("{split}", "{split}"), ("images/{split}", "images/{split}"), (".", ".")],
    "coco": [
        *(
            (images, f"annotations/{file}")
            for images in ("{split}", "images/{split}")
            for file in ("{split}.json", "instances_{split}.json")
        ),
        ("{split}", "{split}/_annotations.coco.json"),
        ("images", "annotations.json"),
    ],
}
"""Where images and labels are looked for, the first that is there."""


@dataclass(frozen=True)
class FolderSource:
    """Images and labels of equal names below a root folder."""

    root: Path
    class_table: ClassTable
    folders: dict[str, tuple[Path, Path]] = field(default_factory=dict)
    """Split to (folder of images, folder of labels)."""
    label_kind: LabelKind = "ids"
    unlabelled_id: int = 0
    """Id of the pixels that nobody annotated (labelme)."""
    rule: SplitRule = field(default_factory=SplitRule)
    """Divides a folder without splits."""

    @property
    def name(self) -> str:
        """Name of the data set: that of the folder."""
        return self.root.name

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of the source."""
        folders = {split: [str(folder) for folder in pair] for split, pair in self.folders.items()}
        described = {
            "kind": "folder",
            "root": str(self.root),
            "folders": folders,
            "labels": self.label_kind,
            "val_share": self.rule.val_share,
        }
        if self.label_kind == "labelme":
            described["unlabelled_id"] = self.unlabelled_id
        return described | {key: value for key, value in self.rule.describe().items() if key != "val_share"}

    def listing(self) -> Listing:
        """Return the pairs of each split; images without label and labels without image are noted."""
        pairs: list[Pair] = []
        notes: list[str] = []
        problems: list[str] = []
        suffixes = (".json",) if self.label_kind == "labelme" else LABEL_SUFFIXES
        for split, (image_dir, label_dir) in self.folders.items():
            images, labels = (
                _by_stem(image_dir, IMAGE_SUFFIXES, problems),
                _by_stem(label_dir, suffixes, problems),
            )
            if label_dir != image_dir and self.label_kind != "labelme":
                lossy = _by_stem(label_dir, LOSSY_SUFFIXES, problems)
                problems += [f"{lossy[stem]} is JPEG" for stem in sorted(lossy.keys() - labels.keys())]
            notes += [f"no label for image {images[stem]}" for stem in sorted(images.keys() - labels.keys())]
            notes += [f"no image for label {labels[stem]}" for stem in sorted(labels.keys() - images.keys())]
            pairs += [
                Pair(split, stem, str(images[stem]), str(labels[stem]))
                for stem in sorted(images.keys() & labels.keys())
            ]
        if problems:
            raise InputError(
                "Labels must be lossless (PNG, TIFF, BMP or lossless WebP) and files of one folder must differ in "
                f"their names without ending, but {listed(problems)}. Export labels again as PNG (a JPEG "
                "that is converted keeps its wrong ids); remove one of two files of a name."
            )
        if not pairs:
            raise InputError(
                f"--root must hold images and labels of equal names, but there is no pair in {self.root}. "
                f"An image street1.jpg needs a label street1{suffixes[0]} in the folder of labels."
            )
        divided = self.rule.divided(pairs)
        return Listing(divided.pairs, divided.notes + notes)

    def read(self, pair: Pair) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the image and its ids."""
        assert pair.label is not None
        image = read_image(pair.image)
        if self.label_kind == "ids":
            return image, read_ids(pair.label)
        if self.label_kind == "colours":
            return image, self._ids_of_colours(read_colours(pair.label), pair.label)
        return image, read_labelme(
            pair.label,
            shape=image.shape[:2],
            class_table=self.class_table,
            unlabelled_id=self.unlabelled_id,
        )

    @cached_property
    def _code_to_id(self) -> tuple[np.ndarray, np.ndarray]:
        by_code = {
            (info.colour[0] << 16) + (info.colour[1] << 8) + info.colour[2]: info.id
            for info in reversed(self.class_table.classes)
        }
        codes = np.array(sorted(by_code), dtype=np.int64)
        return codes, np.array([by_code[code] for code in codes.tolist()], dtype=np.int32)

    def _ids_of_colours(self, colours: np.ndarray, path: str) -> np.ndarray:
        codes, ids = self._code_to_id
        wide = colours.astype(np.int64)
        painted = (wide[..., 0] << 16) + (wide[..., 1] << 8) + wide[..., 2]
        place = np.clip(np.searchsorted(codes, painted), 0, len(codes) - 1)
        unknown = codes[place] != painted
        if unknown.any():
            values, counts = np.unique(painted[unknown], return_counts=True)
            listed = ", ".join(
                f"({value >> 16}, {value >> 8 & 255}, {value & 255}) {count} pixels"
                for value, count in zip(values[:8].tolist(), counts[:8].tolist(), strict=True)
            )
            raise InputError(
                f"Colours of a label must be in class table {self.class_table.name!r}, but {path} has {listed}. "
                "Add them to the table, and save labels without smoothing or JPEG."
            )
        return ids[place]


def folder_source(
    root: str | Path,
    *,
    classes: str | Path = "",
    images: str = "",
    labels: str = "",
    label_kind: LabelKind = "ids",
    background: str = "",
    val_share: float = 0.0,
    train_list: str = "",
    val_list: str = "",
    val_fraction: float = 0.0,
    group_pattern: str = "",
    seed: int = 0,
) -> FolderSource | CocoSource:
    """Return the source below `root`; without `images` and `labels` its layout is recognised.

    `classes` is the CSV of the class table, ROOT/classes.csv where it is not given; COCO's files need none. In
    `images` and `labels`, {split} stands for train and val. `background` is the class of pixels that nobody annotated
    in LabelMe's or COCO's files; without it they are ignored. The others are settings of a `SplitRule`.
    """
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise InputError(f"--root must be a folder of images and labels, but {root} is none.")
    if bool(images) != bool(labels):
        raise InputError("--images and --labels-dir must be given together, but only one of them was.")
    if background and label_kind not in ("labelme", "coco"):
        raise InputError(
            f"--background is for pixels that nobody annotated, but got {background!r} with --labels {label_kind}, "
            "where each pixel has a value. Name that value in the class table."
        )
    rule = SplitRule(
        train_list=train_list,
        val_list=val_list,
        val_share=val_share,
        val_fraction=val_fraction,
        group_pattern=group_pattern,
        seed=seed,
    )
    table_path = Path(classes).expanduser() if classes else root / "classes.csv"
    has_table = table_path.is_file()
    if not has_table and (classes or label_kind != "coco"):
        raise InputError(
            f"A folder needs a class table, but there is no {table_path}. Write a CSV file with the columns id, name, "
            "r, g, b (and train_id, if ids are not to be numbered in the order of the file) and give it as --classes."
        )
    folders = _recognised(root, [(images, labels)] if images else LAYOUTS[label_kind], label_kind)
    if "val" not in folders and not rule:
        raise InputError(
            f"A model is measured on images that it was not trained on, but {root} has no split val. "
            "Give --val-share 0.1 to hold a tenth out, --val-fraction 0.1 with --group-pattern for frames of drives, "
            "--train-list and --val-list, or make a folder val."
        )
    if "val" in folders and rule:
        raise InputError(
            f"Either the folders or a rule must say what val is, but {root} has the split val and got "
            f"{rule.describe()}. Leave the flags out, or name one folder by --images and --labels-dir."
        )
    if label_kind == "coco":
        files = {split: file for split, (_, file) in folders.items()}
        table = (
            read_class_table(table_path)
            if has_table
            else coco_class_table(files, name=root.name, background=background)
        )
        table, unlabelled_id = with_unlabelled(table, background)
        return CocoSource(root, table, unlabelled_id, folders, rule)
    table = read_class_table(table_path)
    if label_kind == "labelme":
        table, unlabelled_id = with_unlabelled(table, background)
        return FolderSource(root, table, folders, label_kind, unlabelled_id, rule)
    return FolderSource(root, table, folders, label_kind, rule=rule)


def _recognised(
    root: Path, layouts: list[tuple[str, str]], label_kind: LabelKind
) -> dict[str, tuple[Path, Path]]:
    """Return the folders of images and of labels (COCO: the file) by split, of the first layout that is there."""
    for image, label in layouts:
        splits = ("train", "val", "test") if "{split}" in image + label else ("train",)
        folders = {
            split: (root / image.replace("{split}", split), root / label.replace("{split}", split))
            for split in splits
        }
        found = {
            split: (images, labels)
            for split, (images, labels) in folders.items()
            if images.is_dir() and (labels.is_file() if label_kind == "coco" else labels.is_dir())
        }
        if found:
            return found
    tried = " or ".join(f"{root / image} with {root / label}" for image, label in layouts)
    raise InputError(
        f"--root must hold folders of images and of labels, but there is no {tried}. "
        "Name them by --images and --labels-dir, with {split} for train and val."
    )


def _by_stem(folder: Path, suffixes: tuple[str, ...], problems: list[str]) -> dict[str, Path]:
    """Return the files by name without ending; a name of several files is added to the problems."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in found:
                problems.append(f"there are {found[path.stem]} and {path.name}")
            found[path.stem] = path
    return found

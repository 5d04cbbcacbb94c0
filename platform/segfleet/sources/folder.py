"""A person's own folder of images and labels, paired by file name.

Either ROOT/<split>/*.jpg beside ROOT/<split>annot/*.png (CamVid's layout), or ROOT/images/<split>/ beside
ROOT/labels/<split>/, or ROOT/images/ beside ROOT/labels/ without splits, or folders named by flags.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pspnet.errors import InputError
from pspnet.labels import ClassTable, read_class_table
from segfleet.sources import Listing, Pair
from segfleet.sources.files import IMAGE_SUFFIXES, read_colours, read_ids, read_image

LabelKind = Literal["ids", "colours"]
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".webp")


@dataclass(frozen=True)
class FolderSource:
    """Images and labels of equal names below a root folder."""

    root: Path
    class_table: ClassTable
    folders: dict[str, tuple[Path, Path]] = field(default_factory=dict)
    """Split to (folder of images, folder of labels)."""
    label_kind: LabelKind = "ids"
    val_share: float = 0.0
    """Share of the pairs of a folder without splits that become val, by a hash of the name."""

    @property
    def name(self) -> str:
        """Name of the data set: that of the folder."""
        return self.root.name

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of the source."""
        folders = {split: [str(folder) for folder in pair] for split, pair in self.folders.items()}
        return {
            "kind": "folder",
            "root": str(self.root),
            "folders": folders,
            "labels": self.label_kind,
            "val_share": self.val_share,
        }

    def listing(self) -> Listing:
        """Return the pairs of each split; images without label and labels without image are noted."""
        pairs: list[Pair] = []
        notes: list[str] = []
        for split, (image_dir, label_dir) in self.folders.items():
            images, labels = _by_stem(image_dir, IMAGE_SUFFIXES), _by_stem(label_dir, LABEL_SUFFIXES)
            notes += [f"no label for image {images[stem]}" for stem in sorted(images.keys() - labels.keys())]
            notes += [f"no image for label {labels[stem]}" for stem in sorted(labels.keys() - images.keys())]
            pairs += [
                Pair(self._split_of(split, stem), stem, str(images[stem]), str(labels[stem]))
                for stem in sorted(images.keys() & labels.keys())
            ]
        if not pairs:
            raise InputError(
                f"--root must hold images and labels of equal names, but there is no pair in {self.root}. "
                "An image street1.jpg needs a label street1.png in the folder of labels."
            )
        return Listing(sorted(pairs), notes)

    def read(self, pair: Pair) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the image and its ids."""
        assert pair.label is not None
        if self.label_kind == "ids":
            return read_image(pair.image), read_ids(pair.label)
        return read_image(pair.image), self._ids_of_colours(read_colours(pair.label), pair.label)

    def _split_of(self, split: str, stem: str) -> str:
        if not self.val_share or split != "train":
            return split
        chance = int.from_bytes(hashlib.sha256(stem.encode()).digest()[:8], "big") / 2**64
        return "val" if chance < self.val_share else "train"

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
    val_share: float = 0.0,
) -> FolderSource:
    """Return the source below `root`; without `images` and `labels` its layout is recognised.

    `classes` is the CSV of the class table, ROOT/classes.csv where it is not given. In `images` and `labels`,
    {split} stands for train and val.
    """
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise InputError(f"--root must be a folder of images and labels, but {root} is none.")
    table_path = Path(classes).expanduser() if classes else root / "classes.csv"
    if not table_path.is_file():
        raise InputError(
            f"A folder needs a class table, but there is no {table_path}. Write a CSV file with the columns id, name, "
            "r, g, b (and train_id, if ids are not to be numbered in the order of the file) and give it as --classes."
        )
    if not 0 <= val_share < 1:
        raise InputError(f"--val-share must be in [0, 1), but got {val_share}. A tenth is usual: 0.1.")
    if bool(images) != bool(labels):
        raise InputError("--images and --labels-dir must be given together, but only one of them was.")
    layouts = (
        [(images, labels)] if images else [("{split}", "{split}annot"), ("images/{split}", "labels/{split}")]
    )
    folders = _recognised(root, layouts)
    if not folders and not images and (root / "images").is_dir() and (root / "labels").is_dir():
        folders = {"train": (root / "images", root / "labels")}
    if not folders:
        tried = " or ".join(
            f"{root / image} with {root / label}" for image, label in [*layouts, ("images", "labels")]
        )
        raise InputError(
            f"--root must hold folders of images and of labels, but there is no {tried}. "
            "Name them by --images and --labels-dir, with {split} for train and val."
        )
    if "val" not in folders and not val_share:
        raise InputError(
            f"A model is measured on images that it was not trained on, but {root} has no split val. "
            "Give --val-share 0.1 to hold a tenth out, or make a folder val."
        )
    return FolderSource(
        root, read_class_table(table_path), folders, label_kind, 0.0 if "val" in folders else val_share
    )


def _recognised(root: Path, layouts: list[tuple[str, str]]) -> dict[str, tuple[Path, Path]]:
    for image, label in layouts:
        splits = ("train", "val", "test") if "{split}" in image else ("train",)
        folders = {
            split: (root / image.replace("{split}", split), root / label.replace("{split}", split))
            for split in splits
        }
        found = {split: pair for split, pair in folders.items() if pair[0].is_dir() and pair[1].is_dir()}
        if found:
            return found
    return {}


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in found:
                raise InputError(
                    f"Files of one folder must differ in their names without ending, but there are {found[path.stem]} "
                    f"and {path.name}. Remove one of them."
                )
            found[path.stem] = path
    return found

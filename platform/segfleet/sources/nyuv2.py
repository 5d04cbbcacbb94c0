"""NYU Depth V2 (Silberman et al., ECCV 2012), 40 or 13 classes: the official .mat file, or exported pictures.

The .mat file is HDF5 written column by column, so h5py sees reversed axes: images (n, 3, w, h), labels (n, w, h).
Transposing them gives the picture; turning them (numpy.rot90) gives its mirror image.
"""

import csv
import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import scipy.io

from pspnet.errors import InputError
from pspnet.labels import NYUV2_13, NYUV2_40, ClassTable
from segfleet.sources import Listing, Pair
from segfleet.sources.files import read_ids, read_image

NumClasses = Literal[40, 13]
NUM_RAW_CLASSES = 894

_13_OF_40 = (
    *(0, 12, 5, 6, 1, 4, 9, 10, 12, 13, 6, 8, 6, 13, 10, 6, 13, 6, 7, 7, 5),
    *(7, 3, 2, 6, 11, 7, 7, 7, 7, 7, 7, 6, 7, 7, 7, 7, 7, 7, 6, 7),
)
"""Class of the 13 for each of void and the 40 (Couprie et al., ICLR 2013)."""


@dataclass(frozen=True)
class NyuMatSource:
    """nyu_depth_v2_labeled.mat, splits.mat, and the table that maps its 894 classes to 40."""

    mat_path: Path
    splits_path: Path
    mapping_path: Path
    num_classes: NumClasses = 40

    @property
    def name(self) -> str:
        """Name of the data set."""
        return f"nyuv2_{self.num_classes}"

    @property
    def class_table(self) -> ClassTable:
        """The 40 or 13 classes; id 0 is void."""
        return _table_of(self.num_classes)

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of the source."""
        return {
            "kind": "nyuv2-mat",
            "mat": str(self.mat_path),
            "splits": str(self.splits_path),
            "mapping": str(self.mapping_path),
            "num_classes": self.num_classes,
        }

    def listing(self) -> Listing:
        """Return the official split: train, and the test part as val; names are the official ids, from 1."""
        num_images = int(_dataset(self.mat_path, "images").shape[0])
        self._classes_of_raw()
        try:
            splits = scipy.io.loadmat(str(self.splits_path))
            numbers = {"train": splits["trainNdxs"].ravel(), "val": splits["testNdxs"].ravel()}
        except Exception as error:  # scipy raises what it likes on a damaged file
            raise InputError(
                f"--splits must be splits.mat with trainNdxs and testNdxs, but {self.splits_path} cannot be read as it "
                f"({error!r}). Download it again."
            ) from error
        pairs = [
            Pair(split, f"{number:04d}", str(number - 1), str(number - 1), group=run)
            for split, found in numbers.items()
            for number, run in runs_of(map(int, found)).items()
        ]
        outside = [pair.name for pair in pairs if not 0 <= int(pair.image) < num_images]
        if outside:
            raise InputError(
                f"--splits must number the images of --mat from 1, but {self.splits_path} names image {outside[0]} "
                f"and {self.mat_path} has {num_images}. Give the two files that belong together."
            )
        return Listing(sorted(pairs), [])

    def read(self, pair: Pair) -> tuple[np.ndarray, np.ndarray | None]:
        """Read one image and its label, no other, from the file."""
        index = int(pair.image)
        image = _dataset(self.mat_path, "images")[index].transpose(2, 1, 0)
        raw = _dataset(self.mat_path, "labels")[index].T
        if raw.max() > NUM_RAW_CLASSES:
            raise InputError(
                f"Labels of {self.mat_path} must be 0 to {NUM_RAW_CLASSES}, but image {pair.name} has {raw.max()}."
            )
        classes = self._classes_of_raw()[raw]
        return np.ascontiguousarray(image), _reduced(classes, self.num_classes)

    def _classes_of_raw(self) -> np.ndarray:
        return _read_mapping(self.mapping_path)


@dataclass(frozen=True)
class NyuFolderSource:
    """Exported pictures: ROOT/images/0003.jpg with ROOT/labels40/0003.png, and ROOT/nyuv2_splits.json."""

    root: Path
    num_classes: NumClasses = 40

    @property
    def name(self) -> str:
        """Name of the data set."""
        return f"nyuv2_{self.num_classes}"

    @property
    def class_table(self) -> ClassTable:
        """The 40 or 13 classes; id 0 is void."""
        return _table_of(self.num_classes)

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of the source."""
        return {"kind": "nyuv2-folder", "root": str(self.root), "num_classes": self.num_classes}

    def listing(self) -> Listing:
        """Return the official split; without test images the last tenth of the training ids, in whole runs, is val."""
        try:
            split_of = {
                int(number): {"train": "train", "test": "val"}[split]
                for split, numbers in json.loads((self.root / "nyuv2_splits.json").read_text()).items()
                for number in numbers
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"--root must hold nyuv2_splits.json with the lists train and test, but {self.root} does not "
                f"({error!r})."
            ) from error
        images = {path.stem: path for path in (self.root / "images").glob("*.jpg")}
        labels = {path.stem: path for path in (self.root / "labels40").glob("*.png")}
        numbered = (name for name in images.keys() & labels.keys() if re.fullmatch("[0-9]+", name))
        names = sorted((name for name in numbered if int(name) in split_of), key=int)
        if not names:
            raise InputError(
                "--root must hold images/*.jpg and labels40/*.png of equal names, which are official ids, but "
                f"{self.root} has none."
            )
        notes = [f"no label for image {images[name]}" for name in sorted(images.keys() - labels.keys())]
        notes += [f"no image for label {labels[name]}" for name in sorted(labels.keys() - images.keys())]
        splits = {name: split_of[int(name)] for name in names}
        runs = {
            number: run
            for split in ("train", "val")
            for number, run in runs_of(number for number, of in split_of.items() if of == split).items()
        }
        if "val" not in splits.values():
            held_out = _last_tenth(names, runs)
            splits |= dict.fromkeys(held_out, "val")
            notes.append(
                f"no test images: val is the last {len(held_out)} of the training ids, {held_out[0]} to {held_out[-1]}"
            )
        pairs = [
            Pair(splits[name], name, str(images[name]), str(labels[name]), group=runs[int(name)])
            for name in names
        ]
        return Listing(sorted(pairs), notes)

    def read(self, pair: Pair) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the image and its classes."""
        assert pair.label is not None
        classes = read_ids(pair.label)
        if classes.max() > 40:
            raise InputError(f"Labels must be 0 (void) to 40, but {pair.label} has {classes.max()}.")
        return read_image(pair.image), _reduced(classes, self.num_classes)


def nyuv2_source(
    *,
    mat: str | Path = "",
    splits: str | Path = "",
    mapping: str | Path = "",
    root: str | Path = "",
    num_classes: NumClasses = 40,
) -> NyuMatSource | NyuFolderSource:
    """Return the source of the .mat file, or that of the folder of exported pictures."""
    if bool(mat) == bool(root):
        raise InputError("Give either --mat nyu_depth_v2_labeled.mat or --root FOLDER of exported pictures.")
    if root:
        return NyuFolderSource(Path(root).expanduser().resolve(), num_classes)
    mat_path = Path(mat).expanduser().absolute()
    paths = {
        "--mat": mat_path,
        "--splits": Path(splits).expanduser().absolute() if splits else mat_path.parent / "splits.mat",
        "--mapping": Path(mapping).expanduser().absolute()
        if mapping
        else mat_path.parent / "classMapping40.mat",
    }
    for flag, path in paths.items():
        if not path.is_file():
            raise InputError(
                f"{flag} must be a file, but there is no {path}. splits.mat is published beside the data set, "
                "classMapping40.mat (or a CSV with raw_id and class40_id) with Gupta et al., CVPR 2013."
            )
    return NyuMatSource(paths["--mat"], paths["--splits"], paths["--mapping"], num_classes)


def runs_of(numbers: Iterable[int]) -> dict[int, str]:
    """Return, for each id of a part of the official split, the first id of the run of successive ids that it is in.

    A scene's images have successive ids and are all in one part, so that a run is of whole scenes, whose names only
    the .mat file has.
    """
    runs: dict[int, str] = {}
    for number in sorted(numbers):
        runs[number] = runs.get(number - 1, f"{number:04d}")
    return runs


def _last_tenth(names: list[str], runs: Mapping[int, str]) -> list[str]:
    """Return the last tenth of the names in whole runs, or cut through one that is half of them or more."""
    tenth = names[-max(1, len(names) // 10) :]
    first = names.index(next(name for name in names if runs[int(name)] == runs[int(tenth[0])]))
    return names[first:] if first > len(names) / 2 else tenth


def _table_of(num_classes: int) -> ClassTable:
    return NYUV2_40 if num_classes == 40 else NYUV2_13


def _reduced(classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Return classes 0 to 40 as they are, or as 0 to 13; void stays void."""
    return classes if num_classes == 40 else np.array(_13_OF_40, dtype=np.uint8)[classes]


@functools.lru_cache(maxsize=4)
def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(
            f"--mat must be nyu_depth_v2_labeled.mat (HDF5), but {path} cannot be read as it: {error}. "
            "Download it again."
        ) from error


def _dataset(path: Path, name: str) -> Any:
    file = _open(path)
    if name not in file:
        raise InputError(
            f"--mat must hold {name}, but {path} holds {', '.join(file)}. Give nyu_depth_v2_labeled.mat."
        )
    return file[name]


@functools.lru_cache(maxsize=4)
def _read_mapping(path: Path) -> np.ndarray:
    """Return the class, 0 to 40, of each raw id, 0 to 894, as uint8 (895,)."""
    try:
        if path.suffix == ".csv":
            rows = list(csv.DictReader(path.read_text().splitlines()))
            found = {int(row["raw_id"]): int(row["class40_id"]) for row in rows}
            classes = [found[raw] for raw in range(1, NUM_RAW_CLASSES + 1)]
        else:
            classes = scipy.io.loadmat(str(path))["mapClass"].ravel().tolist()
    except Exception as error:  # scipy raises what it likes on a damaged file
        raise InputError(
            f"--mapping must be classMapping40.mat, or a CSV with raw_id and class40_id, but {path} cannot be read as "
            f"one ({error!r})."
        ) from error
    if len(classes) != NUM_RAW_CLASSES or not all(0 <= item <= 40 for item in classes):
        raise InputError(f"--mapping must give {NUM_RAW_CLASSES} classes from 0 to 40, but {path} does not.")
    return np.array([0, *classes], dtype=np.uint8)

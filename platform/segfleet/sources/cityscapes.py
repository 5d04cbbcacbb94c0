"""Cityscapes (Cordts et al., CVPR 2016) in its official folders or zip archives; the demo's are laid out alike.

ROOT/leftImg8bit/<split>/<city>/<city>_<seq>_<frame>_leftImg8bit.png
ROOT/gtFine/<split>/<city>/<city>_<seq>_<frame>_gtFine_labelIds.png
ROOT/gtCoarse/<split>/<city>/<city>_<seq>_<frame>_gtCoarse_labelIds.png

Instead of a folder, or beside it, ROOT may hold the archive that it comes in; nothing is unpacked.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pspnet.errors import InputError
from pspnet.labels import CITYSCAPES, ClassTable
from segfleet.sources import Listing, Pair
from segfleet.sources.files import read_ids, read_image
from segfleet.sources.zips import member_names, stamps

TrainLabels = Literal["fine", "coarse"]
Key = tuple[str, str]
"""Split, and the common part of the names of an image and its label."""

ARCHIVES = {
    "leftImg8bit": ("leftImg8bit_trainvaltest.zip", "leftImg8bit_trainextra.zip"),
    "gtFine": ("gtFine_trainvaltest.zip",),
    "gtCoarse": ("gtCoarse.zip",),
}
ENDINGS = {
    "leftImg8bit": "_leftImg8bit.png",
    "gtFine": "_gtFine_labelIds.png",
    "gtCoarse": "_gtCoarse_labelIds.png",
}


@dataclass(frozen=True)
class CityscapesSource:
    """The folder that holds leftImg8bit and gtFine, as folders or as the official archives."""

    root: Path
    train_labels: TrainLabels = "fine"
    """fine: gtFine's. coarse: gtCoarse's, of train and train_extra together. val is measured on gtFine either way."""

    @property
    def name(self) -> str:
        """Name of the data set."""
        return "cityscapes" if self.train_labels == "fine" else "cityscapes_coarse"

    @property
    def class_table(self) -> ClassTable:
        """The official 35 classes, 19 of them trained."""
        return CITYSCAPES

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of the source."""
        described: dict[str, Any] = {"kind": "cityscapes", "root": str(self.root)}
        if self.train_labels != "fine":
            described["train_labels"] = self.train_labels
        archives = [path for part in self._parts for path in self._archives(part)]
        return described | ({"archives": stamps(archives)} if archives else {})

    def listing(self) -> Listing:
        """Return the pairs of train and val, and the images of test without labels.

        The official label maps of test are blank: they are not read.
        """
        missing = [
            f"{part} (nor {' or '.join(ARCHIVES[part])})"
            for part in self._parts
            if not (self.root / part).is_dir() and not self._archives(part)
        ]
        if missing:
            raise InputError(
                f"--root must be the Cityscapes folder with {' and '.join(self._parts)} in it, as folders or as the "
                f"official archives, but {self.root} has no {', no '.join(missing)}. Download them there; there is "
                "no need to unpack them."
            )
        images = self._found("leftImg8bit")
        labels = {key: path for key, path in self._found("gtFine").items() if key[0] != "test"}
        if self.train_labels == "coarse":
            images = _as_train(images)
            coarse = _as_train(self._found("gtCoarse"))
            labels = {key: path for key, path in labels.items() if key[0] != "train"} | {
                key: path for key, path in coarse.items() if key[0] == "train"
            }
        else:
            images = {key: path for key, path in images.items() if key[0] != "train_extra"}
        is_test = {key for key in images if key[0] == "test"}
        pairs = [
            Pair(split, name, images[split, name], labels.get((split, name)))
            for split, name in sorted((images.keys() & labels.keys()) | is_test)
        ]
        notes = [
            f"no label for image {images[key]}" for key in sorted(images.keys() - labels.keys() - is_test)
        ]
        notes += [f"no image for label {labels[key]}" for key in sorted(labels.keys() - images.keys())]
        if not any(pair.label for pair in pairs):
            endings = " and ".join(ENDINGS[part] for part in self._parts)
            raise InputError(
                f"--root must hold images with labels, but of {len(images)} images and {len(labels)} label maps in "
                f"{self.root} no two belong together. Their names must begin alike, up to {endings}."
            )
        return Listing(pairs, notes)

    def read(self, pair: Pair) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the image and its official ids."""
        return read_image(pair.image), None if pair.label is None else read_ids(pair.label)

    @property
    def _parts(self) -> tuple[str, ...]:
        return ("leftImg8bit", "gtFine") + (("gtCoarse",) if self.train_labels == "coarse" else ())

    def _archives(self, part: str) -> list[Path]:
        return [self.root / name for name in ARCHIVES[part] if (self.root / name).is_file()]

    def _found(self, part: str) -> dict[Key, str]:
        """Return the files of a part; what is in a folder stands before the same in an archive."""
        ending = ENDINGS[part]
        found: dict[Key, str] = {}
        for archive in self._archives(part):
            members = (name for name in member_names(archive) if name.startswith(f"{part}/"))
            found |= {key: f"{archive}!{name}" for key, name in _keys(members, ending)}
        folder = self.root / part
        files = (path.relative_to(self.root).as_posix() for path in folder.glob(f"*/*/*{ending}"))
        return found | {key: str(self.root / name) for key, name in _keys(files, ending)}


def cityscapes_source(root: str | Path, *, train_labels: TrainLabels = "fine") -> CityscapesSource:
    """Return the source in the folder `root`."""
    return CityscapesSource(Path(root).expanduser().resolve(), train_labels)


def _keys(names: Iterable[str], ending: str) -> Iterator[tuple[Key, str]]:
    """Yield the key of each name `part/split/city/file` with that ending, and the name."""
    for name in names:
        parts = name.split("/")
        if len(parts) == 4 and name.endswith(ending):
            yield (parts[1], parts[3].removesuffix(ending)), name


def _as_train(found: dict[Key, str]) -> dict[Key, str]:
    """Return the files with those of train_extra counted to train."""
    return {
        ("train" if split == "train_extra" else split, name): path for (split, name), path in found.items()
    }

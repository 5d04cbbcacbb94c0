"""Cityscapes (Cordts et al., CVPR 2016) in its official folders; the demo's drawn scenes have the same layout.

ROOT/leftImg8bit/<split>/<city>/<city>_<seq>_<frame>_leftImg8bit.png
ROOT/gtFine/<split>/<city>/<city>_<seq>_<frame>_gtFine_labelIds.png
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pspnet.errors import InputError
from pspnet.labels import CITYSCAPES, ClassTable
from segfleet.sources import Listing, Pair
from segfleet.sources.files import read_ids, read_image

IMAGE_ENDING = "_leftImg8bit.png"
LABEL_ENDING = "_gtFine_labelIds.png"


@dataclass(frozen=True)
class CityscapesSource:
    """The folder that holds leftImg8bit and gtFine."""

    root: Path

    @property
    def name(self) -> str:
        """Name of the data set."""
        return "cityscapes"

    @property
    def class_table(self) -> ClassTable:
        """The official 35 classes, 19 of them trained."""
        return CITYSCAPES

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of the source."""
        return {"kind": "cityscapes", "root": str(self.root)}

    def listing(self) -> Listing:
        """Return the pairs of train and val, and the images of test without labels."""
        for folder in ("leftImg8bit", "gtFine"):
            if not (self.root / folder).is_dir():
                raise InputError(
                    f"--root must be the Cityscapes folder with leftImg8bit and gtFine in it, but {self.root} has no "
                    f"{folder}. Unpack the official archives there."
                )
        images = _found(self.root / "leftImg8bit", IMAGE_ENDING)
        labels = _found(self.root / "gtFine", LABEL_ENDING)
        is_test = {key for key in images if key[0] == "test"}
        pairs = [
            Pair(
                split,
                name,
                str(images[split, name]),
                str(labels[split, name]) if (split, name) in labels else None,
            )
            for split, name in sorted((images.keys() & labels.keys()) | is_test)
        ]
        notes = [
            f"no label for image {images[key]}" for key in sorted(images.keys() - labels.keys() - is_test)
        ]
        notes += [f"no image for label {labels[key]}" for key in sorted(labels.keys() - images.keys())]
        if not any(pair.label for pair in pairs):
            raise InputError(
                f"--root must hold images with labels, but of {len(images)} images and {len(labels)} label maps in "
                f"{self.root} no two belong together. Their names must begin alike, up to {IMAGE_ENDING} and "
                f"{LABEL_ENDING}."
            )
        return Listing(pairs, notes)

    def read(self, pair: Pair) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the image and its official ids."""
        return read_image(pair.image), None if pair.label is None else read_ids(pair.label)


def cityscapes_source(root: str | Path) -> CityscapesSource:
    """Return the source in the folder `root`."""
    return CityscapesSource(Path(root).expanduser().resolve())


def _found(folder: Path, ending: str) -> dict[tuple[str, str], Path]:
    """Return the files by (split, common part of the name)."""
    return {
        (path.parent.parent.name, path.name.removesuffix(ending)): path
        for path in folder.glob(f"*/*/*{ending}")
    }

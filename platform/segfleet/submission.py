"""Predictions as the Cityscapes benchmark server takes them: a PNG of ids for each image, and all of them zipped.

The server, and evalPixelLevelSemanticLabeling.py of cityscapesScripts, look for <city>_<sequence>_<frame>*.png with
the data set's ids (not train ids), uint8, of the size of the picture, which is that of its label.
"""

import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pspnet.errors import InputError
from pspnet.labels import CITYSCAPES, ClassTable
from pspnet.store import Split, Store
from segfleet.evaluation import check_classes
from segfleet.folders import writable_folder
from segfleet.package import SegmentationModel
from segfleet.progress import tracked
from segfleet.protocol import Protocol
from segfleet.too_large import predict_or_refuse

ENDING = "_pred_labelIds.png"
ZIP_FILE = "submission.zip"
NUM_IMAGES, SIZE = 1525, (1024, 2048)
"""Of the split test, which is what the server scores."""
_NAME = re.compile(r"[^_]+_\d{6}_\d{6}")


def write_submission(
    model: SegmentationModel, store: Store, protocol: Protocol, out_dir: str | Path
) -> list[Path]:
    """Write the prediction of every image of the protocol's split, labelled or not; return the PNGs and the zip.

    Images that are not those that the server scores are a rehearsal, which is said. InputError where the classes are
    not Cityscapes', or an image's name is not of its kind.
    """
    check_classes(model, store)
    _check_table(store.class_table)
    split, out_dir = store.split(protocol.split), Path(out_dir)
    names = _file_names(split)
    writable_folder(out_dir, "--submission")
    _note_rehearsal(split, protocol.split)
    paths = []
    indices = range(len(split))
    for index in tracked(indices, f"segmenting {protocol.split} with {model.source}"):
        ids = CITYSCAPES.id_of(predict_or_refuse(model, split.image(index), protocol, name=split.name(index)))
        assert ids.dtype == np.uint8
        paths.append(out_dir / names[index])
        Image.fromarray(ids).save(paths[-1])
    # Made aside, so that there is no zip with some of the images.
    aside = out_dir / f".{ZIP_FILE}"
    with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
        for path in paths:
            archive.write(path, path.name)
    os.replace(aside, out_dir / ZIP_FILE)
    return [*paths, out_dir / ZIP_FILE]


def _note_rehearsal(split: Split, name: str) -> None:
    """Say what the server would miss."""
    others = sum(split.size(index) != SIZE for index in range(len(split)))
    if name == "test" and len(split) == NUM_IMAGES and not others:
        return
    height, width = SIZE
    print(
        f"note: the Cityscapes server wants all {NUM_IMAGES} images of 'test', each {height} x {width}, and "
        f"will refuse this: {len(split)} of {name!r}, {others} of another size",
        flush=True,
    )


def _check_table(class_table: ClassTable) -> None:
    """Raise InputError unless each train id stands for the id that it has in Cityscapes."""
    if _ids(class_table) != _ids(CITYSCAPES):
        raise InputError(
            "A submission to the Cityscapes server must be of a store with Cityscapes' 19 classes, but this "
            f"one's are those of {class_table.name!r}. Leave --submission out; the other modes take any store."
        )


def _ids(class_table: ClassTable) -> Sequence[tuple[str, int]]:
    return [(info.name, info.id) for info in class_table.trained]


def _file_names(split: Split) -> list[str]:
    names = [split.name(index) for index in range(len(split))]
    foreign = [name for name in names if not _NAME.fullmatch(name)]
    if not names or foreign:
        raise InputError(
            "A submission must be of images with Cityscapes' names, <city>_<sequence>_<frame> of six digits "
            f"each, but {f'one is {foreign[0]!r}' if foreign else 'the split is empty'}. Ingest them with "
            "jobs/ingest_cityscapes.py."
        )
    return [name + ENDING for name in names]

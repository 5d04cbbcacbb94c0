"""A PSPNet checkpoint of semseg or mmsegmentation becomes a model package, as evaluation and prediction take it."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from pspnet.errors import InputError
from pspnet.labels import CITYSCAPES, NYUV2_13, NYUV2_40, ClassTable, read_class_table
from pspnet.published import IMAGENET_MEAN, IMAGENET_STD, read_published
from segfleet.config import DataConfig, ModelConfig, TrainingConfig
from segfleet.package import write_package

CLASS_TABLES = {"cityscapes": CITYSCAPES, "nyuv2_40": NYUV2_40, "nyuv2_13": NYUV2_13}


def class_table_of(name_or_path: str) -> ClassTable:
    """Return the class table of that name, or the one in a classes.csv."""
    return CLASS_TABLES.get(name_or_path) or read_class_table(name_or_path)


def import_checkpoint(
    checkpoint: str | Path,
    out_dir: str | Path,
    *,
    class_table: ClassTable,
    crop_size: int | str | None = None,
    bin_sizes: Sequence[int] = (1, 2, 3, 6),
    align_corners: bool | None = None,
) -> Path:
    """Write the package of `checkpoint` to `out_dir`, whole or not at all, and return that folder.

    The order of its classes is not in the file: it must be that of `class_table`'s train ids. `crop_size` is that
    of the crops it was trained on, where `read_published` does not know it; the other arguments are those of that.
    It carries no scores.
    """
    checkpoint = Path(checkpoint)
    published = read_published(
        checkpoint, bin_sizes=bin_sizes, align_corners=align_corners, field="The checkpoint"
    )
    architecture = published.architecture
    if align_corners not in (None, architecture["align_corners"]):
        raise InputError(
            f"The checkpoint must be read with the align_corners it was trained with, but {checkpoint} is of "
            f"{published.origin} with {architecture['align_corners']}, and {align_corners} is asked for. "
            "Leave it to the file."
        )
    if architecture["num_classes"] != class_table.num_classes:
        raise InputError(
            f"The class table must have the {architecture['num_classes']} classes of {checkpoint}, but "
            f"{class_table.name} has {class_table.num_classes}. Give the table of the data it was trained on."
        )
    if crop_size is None:
        crop_size = published.crop_size
    if crop_size is None:
        raise InputError(
            f"The checkpoint must be given with the size of the crops that it was trained on, because {checkpoint} "
            "does not say it. Give --crop-size 769 or 512x1024, as its name has it, or semseg's train_h (473 for "
            "ADE20K and VOC): protocols depend on it."
        )
    model = {field.name for field in dataclasses.fields(ModelConfig)} & architecture.keys() - {"norm"}
    config = TrainingConfig(
        data=DataConfig(crop_size=crop_size),
        model=ModelConfig(
            **{name: architecture[name] for name in model} | {"bin_sizes": tuple(architecture["bin_sizes"])}
        ),
    )
    return write_package(
        out_dir,
        published.weights,
        {
            "architecture": architecture,
            "class_table": class_table.to_dict(),
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "scores": None,
            "store_digest": "",
            "run_id": "",
            "epoch": 0,
            "config": dataclasses.asdict(config),
            "origin": {
                "of": published.origin,
                "file": checkpoint.name,
                "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
            },
        },
    )

"""A model on a split of a store: exact scores under a stated protocol, its worst and its best images."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from pspnet.errors import InputError
from pspnet.labels import ClassTable
from pspnet.metrics import ConfusionMatrix
from pspnet.pictures import confusion_matrix_picture, panel
from pspnet.store import Split, Store
from segfleet.boundary import boundary_counts, boundary_f
from segfleet.checkpoint import finite
from segfleet.folders import writable_folder
from segfleet.package import SegmentationModel
from segfleet.progress import tracked
from segfleet.protocol import Protocol
from segfleet.scores import Scores

SCORES_FILE, COUNTS_FILE = "scores.json", "image_counts.npz"


@dataclass(frozen=True)
class ImageCounts:
    """What is counted of one image: whole numbers, from which all scores follow."""

    confusion: ConfusionMatrix
    boundary: np.ndarray | None = None
    """`boundary_counts` of the image, where they were asked for."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_model` found."""

    scores: Scores
    confusion: Tensor
    """int64 (classes, classes): pixels of each target by prediction."""
    images: dict[int, ImageCounts]
    """The counts of each image by its index in the split: what a paired comparison of two models needs."""

    @property
    def image_miou(self) -> dict[int, float]:
        """mIoU of each image by itself, by its index; images without a valid pixel are left out."""
        return {
            index: image.confusion.miou for index, image in self.images.items() if image.confusion.num_pixels
        }


def evaluate_model(
    model: SegmentationModel, store: Store, protocol: Protocol, *, has_boundaries: bool = False
) -> Evaluation:
    """Score `model` on every labelled image of the protocol's split, one image after another.

    With `has_boundaries` also by the boundary F-score, which costs about a tenth of a second an image of Cityscapes.
    """
    check_classes(model, store)
    indices = tracked(labelled_images(store, protocol), f"evaluating {model.source} on {protocol.split}")
    images = count_images(model, store, protocol, indices, has_boundaries=has_boundaries)
    return evaluation_of(images, store.class_table, protocol)


def labelled_images(store: Store, protocol: Protocol) -> list[int]:
    """Return the indices of the protocol's images; InputError where none has a label."""
    split = store.split(protocol.split)
    labelled = split.labelled()
    if not labelled:
        raise InputError(
            f"A split must have labels to be evaluated on, but none of the {len(split)} images of "
            f"{protocol.split!r} has one. Give another split; jobs/predict.py works without labels."
        )
    return labelled


def count_images(
    model: SegmentationModel,
    store: Store,
    protocol: Protocol,
    indices: Iterable[int],
    *,
    has_boundaries: bool,
) -> dict[int, ImageCounts]:
    """Return what is counted of these labelled images of the protocol's split, each by itself."""
    split = store.split(protocol.split)
    num_classes = model.class_table.num_classes
    images = {}
    for index in indices:
        prediction, label = model.predict_as(split.image(index), protocol), split.label(index)
        assert label is not None
        confusion = ConfusionMatrix(num_classes)
        confusion.update(torch.from_numpy(prediction), torch.tensor(label))
        boundary = boundary_counts(prediction, label, num_classes) if has_boundaries else None
        images[index] = ImageCounts(confusion, boundary)
    return images


def evaluation_of(
    images: Mapping[int, ImageCounts], class_table: ClassTable, protocol: Protocol
) -> Evaluation:
    """Return the scores that follow from the images' counts, in whatever order they come."""
    in_order = dict(sorted(images.items()))
    total = ConfusionMatrix(class_table.num_classes)
    for image in in_order.values():
        total.add(image.confusion)
    scores = scores_of(total, class_table, protocol)
    boundaries = [image.boundary for image in in_order.values() if image.boundary is not None]
    if boundaries:
        of_classes = dict(zip(class_table.class_names, boundary_f(boundaries).tolist(), strict=True))
        scores = replace(scores, boundary_f=finite(of_classes))
    return Evaluation(scores, total.counts, in_order)


def scores_of(confusion: ConfusionMatrix, class_table: ClassTable, protocol: Protocol) -> Scores:
    """Return the scores that follow from confusion counts; InputError where no pixel was counted."""
    if not confusion.num_pixels:
        raise InputError(
            f"A split must have labelled pixels, but all of {protocol.split!r} are ignored. Give another "
            "split."
        )
    class_iou = dict(zip(class_table.class_names, confusion.class_iou.tolist(), strict=True))
    return Scores(
        miou=confusion.miou,
        mean_accuracy=confusion.mean_accuracy,
        pixel_accuracy=confusion.pixel_accuracy,
        class_iou=finite(class_iou),
        category_iou=finite(confusion.category_iou(class_table)),
        protocol=protocol,
    )


def check_output(out_dir: str | Path, num_examples: int, *, compared_with: Path | None = None) -> None:
    """Raise InputError where `write_evaluation` could not write, before hours are spent on what it is to write.

    Nor may it replace the scores that the new ones are compared with.
    """
    if num_examples < 1:
        raise InputError(f"--num-examples must be 1 or more, but got {num_examples}. 4 fit on a screen.")
    if compared_with is not None and compared_with.resolve() == (Path(out_dir) / SCORES_FILE).resolve():
        raise InputError(
            f"--output must be another folder than that of --compare-with, whose {SCORES_FILE} would be replaced, but "
            f"both are {out_dir}. Give another --output."
        )
    writable_folder(out_dir, "--output")


def write_evaluation(
    evaluation: Evaluation, model: SegmentationModel, store: Store, out_dir: str | Path, *, num_examples: int
) -> list[Path]:
    """Write scores and counts, the confusion matrix and panels of the worst and best images; return their paths.

    scores.json holds the scores with their protocol. image_counts.npz holds, for a paired comparison, the images'
    names and int64 counts: confusion (images, classes, classes), rows are targets, and boundary where it was scored.
    """
    out_dir = writable_folder(out_dir, "--output")
    scores, split = evaluation.scores, store.split(evaluation.scores.protocol.split)
    image_miou = evaluation.image_miou
    ranked = sorted(image_miou, key=lambda index: (image_miou[index], index))
    record = {
        "model": model.source,
        "scores": scores.to_dict(),
        "protocol": str(scores.protocol),
        "protocol_digest": scores.protocol.digest,
        "images": {split.name(index): image_miou[index] for index in ranked},
        "confusion": evaluation.confusion.tolist(),
    }
    names = (SCORES_FILE, "confusion_matrix.png", "worst.png", "best.png", COUNTS_FILE)
    paths = [out_dir / name for name in names]
    paths[0].write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    confusion_matrix_picture(evaluation.confusion.numpy(), list(store.class_table.class_names)).save(paths[1])
    for path, chosen in ((paths[2], ranked[:num_examples]), (paths[3], ranked[::-1][:num_examples])):
        _panel(model, split, chosen, evaluation).save(path)
    boundaries = [image.boundary for image in evaluation.images.values() if image.boundary is not None]
    arrays: dict[str, Any] = {"boundary": np.stack(boundaries)} if boundaries else {}
    np.savez_compressed(
        paths[4],
        names=np.array([split.name(index) for index in evaluation.images]),
        confusion=torch.stack([image.confusion.counts for image in evaluation.images.values()]).numpy(),
        protocol=np.array(scores.protocol.digest),
        **arrays,
    )
    return paths


def scores_table(scores: Scores) -> str:
    """Return the scores as lines of text, the classes first and the protocol last."""
    names = [*scores.class_iou, *scores.category_iou]
    width = max([len("boundary F-score, mean"), *map(len, names)])
    lines = [
        f"{name:<{width}}  {_shown(iou)}{_boundary(scores, name)}" for name, iou in scores.class_iou.items()
    ]
    if scores.boundary_f:
        lines.insert(0, f"{'':<{width}}  {'IoU':<{len('does not occur')}}  boundary F-score")
    if scores.category_iou:
        lines += ["", *(f"{name:<{width}}  {_shown(iou)}" for name, iou in scores.category_iou.items())]
    means = {
        "mIoU": scores.miou,
        "mIoU of categories": scores.category_miou,
        "mean accuracy": scores.mean_accuracy,
        "pixel accuracy": scores.pixel_accuracy,
        "boundary F-score, mean": scores.mean_boundary_f,
    }
    lines += ["", *(f"{name:<{width}}  {value:.4f}" for name, value in means.items() if value is not None)]
    lines.append(f"{'protocol':<{width}}  {scores.protocol.digest}: {scores.protocol}")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "does not occur" if value is None else f"{value:.4f}"


def _boundary(scores: Scores, name: str) -> str:
    if name not in scores.boundary_f:
        return ""
    blanks = " " * (len("does not occur") + 2 - len(_shown(scores.class_iou[name])))
    return blanks + _shown(scores.boundary_f[name])


def check_classes(model: SegmentationModel, store: Store) -> None:
    """Raise InputError where the model's classes are not the store's: its scores would mean nothing."""
    ours, theirs = model.class_table.class_names, store.class_table.class_names
    if ours == theirs:
        return
    different = [f"{a} and {b}" for a, b in zip(ours, theirs, strict=False) if a != b][:3]
    raise InputError(
        f"A model must have the classes of the store it is scored on, but {model.source} has {len(ours)} "
        "classes "
        f"and {store.location.text} has {len(theirs)}"
        + (f", among others {', '.join(different)}" if different else "")
        + ". Give a store that was ingested with the model's classes."
    )


def _panel(model: SegmentationModel, split: Split, indices: Sequence[int], evaluation: Evaluation) -> Image:
    protocol = evaluation.scores.protocol
    rows = [(split.image(i), split.label(i), model.predict_as(split.image(i), protocol)) for i in indices]
    titles = [f"{split.name(i)}  mIoU {evaluation.images[i].confusion.miou:.3f}" for i in indices]
    return panel(rows, model.class_table, titles)

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
from segfleet.too_large import predict_or_refuse

SCORES_FILE, COUNTS_FILE = "scores.json", "image_counts.npz"


@dataclass(frozen=True)
class ImageCounts:
    """What is counted of one image: whole numbers, from which all scores follow."""

    confusion: ConfusionMatrix
    boundary: np.ndarray | None = None
    """`boundary_counts` of the image, where they were asked for."""
    prediction: np.ndarray | None = None
    """Train ids (h, w) that were counted, of the images that are shown as examples."""


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

    def worst(self, number: int) -> list[int]:
        """Return the indices of the images with the lowest mIoU, the lowest first; of equals the first."""
        return _ranked(self.image_miou)[:number]

    def best(self, number: int) -> list[int]:
        """Return the indices of the images with the highest mIoU, the highest first; of equals the last."""
        return _ranked(self.image_miou)[::-1][:number]


def evaluate_model(
    model: SegmentationModel,
    store: Store,
    protocol: Protocol,
    *,
    has_boundaries: bool = False,
    num_examples: int = 0,
) -> Evaluation:
    """Score `model` on every labelled image of the protocol's split, one image after another.

    With `has_boundaries` also by the boundary F-score, which costs about a tenth of a second an image of Cityscapes.
    The predictions of the `num_examples` worst and as many best images are kept.
    """
    check_classes(model, store)
    indices = tracked(labelled_images(store, protocol), f"evaluating {model.source} on {protocol.split}")
    images = count_images(
        model, store, protocol, indices, has_boundaries=has_boundaries, num_examples=num_examples
    )
    return evaluation_of(images, store.class_table, protocol)


def labelled_images(store: Store, protocol: Protocol) -> list[int]:
    """Return the indices of the protocol's images with a label; InputError where no pixel of the split has one."""
    split = store.split(protocol.split)
    labelled = split.labelled()
    if not labelled:
        raise InputError(
            f"A split must have labels to be evaluated on, but none of the {len(split)} images of "
            f"{protocol.split!r} has one. Give another split; jobs/predict.py works without labels."
        )
    if not any(store.manifest.class_counts(protocol.split)[:-1]):
        raise InputError(
            f"A split must have labelled pixels, but all of {protocol.split!r} are ignored. Give another split."
        )
    return labelled


def count_images(
    model: SegmentationModel,
    store: Store,
    protocol: Protocol,
    indices: Iterable[int],
    *,
    has_boundaries: bool,
    num_examples: int = 0,
) -> dict[int, ImageCounts]:
    """Return what is counted of these labelled images of the protocol's split, each by itself."""
    split = store.split(protocol.split)
    num_classes = model.class_table.num_classes
    images: dict[int, ImageCounts] = {}
    for index in indices:
        prediction = predict_or_refuse(model, split.image(index), protocol, name=split.name(index))
        label = split.label(index)
        assert label is not None
        confusion = ConfusionMatrix(num_classes)
        confusion.update(torch.from_numpy(prediction), torch.tensor(label))
        boundary = boundary_counts(prediction, label, num_classes) if has_boundaries else None
        images[index] = ImageCounts(confusion, boundary, prediction)
        keep_examples(images, num_examples)
    return images


def keep_examples(images: dict[int, ImageCounts], num_examples: int) -> None:
    """Drop the predictions of all images but the worst and the best: no more than those are held at a time."""
    held = {index: image.confusion for index, image in images.items() if image.prediction is not None}
    ranked = _ranked({index: confusion.miou for index, confusion in held.items() if confusion.num_pixels})
    kept = {*ranked[:num_examples], *ranked[::-1][:num_examples]}
    for index in held.keys() - kept:
        images[index] = replace(images[index], prediction=None)


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
    """Return the scores that follow from confusion counts."""
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
    Of examples there may be as many as were kept by the evaluation.
    """
    out_dir = writable_folder(out_dir, "--output")
    scores, split = evaluation.scores, store.split(evaluation.scores.protocol.split)
    image_miou = evaluation.image_miou
    record = {
        "model": model.source,
        "scores": scores.to_dict(),
        "protocol": str(scores.protocol),
        "protocol_digest": scores.protocol.digest,
        "images": {split.name(index): image_miou[index] for index in _ranked(image_miou)},
        "confusion": evaluation.confusion.tolist(),
    }
    names = (SCORES_FILE, "confusion_matrix.png", "worst.png", "best.png", COUNTS_FILE)
    paths = [out_dir / name for name in names]
    paths[0].write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    confusion_matrix_picture(evaluation.confusion.numpy(), list(store.class_table.class_names)).save(paths[1])
    _panel(evaluation, evaluation.worst(num_examples), split, model.class_table).save(paths[2])
    _panel(evaluation, evaluation.best(num_examples), split, model.class_table).save(paths[3])
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


def _ranked(image_miou: Mapping[int, float]) -> list[int]:
    """Return the indices from the lowest mIoU to the highest, equals in their order."""
    return sorted(image_miou, key=lambda index: (image_miou[index], index))


def _panel(evaluation: Evaluation, indices: Sequence[int], split: Split, class_table: ClassTable) -> Image:
    rows = []
    for index in indices:
        prediction = evaluation.images[index].prediction
        assert prediction is not None, "evaluated for fewer examples"
        rows.append((split.image(index), split.label(index), prediction))
    titles = [f"{split.name(i)}  mIoU {evaluation.images[i].confusion.miou:.3f}" for i in indices]
    return panel(rows, class_table, titles)

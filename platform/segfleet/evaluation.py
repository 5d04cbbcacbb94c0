"""A model on a split of a store: exact scores under a stated protocol, its worst and its best images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from pspnet.errors import InputError
from pspnet.labels import ClassTable
from pspnet.metrics import ConfusionMatrix
from pspnet.pictures import confusion_matrix_picture, panel
from pspnet.store import Split, Store
from segfleet.checkpoint import finite
from segfleet.progress import tracked
from segfleet.protocol import Protocol
from segfleet.registry import SegmentationModel
from segfleet.scores import Scores

SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_model` found."""

    scores: Scores
    confusion: Tensor
    """int64 (classes, classes): pixels of each target by prediction."""
    image_miou: dict[int, float]
    """mIoU of each image by itself, by its index in the split; images without a valid pixel are left out."""


def evaluate_model(model: SegmentationModel, store: Store, protocol: Protocol) -> Evaluation:
    """Score `model` on every labelled image of the protocol's split, one image after another."""
    check_classes(model, store)
    split = store.split(protocol.split)
    labelled = split.labelled()
    if not labelled:
        raise InputError(
            f"A split must have labels to be evaluated on, but none of the {len(split)} images of "
            f"{protocol.split!r} has one. Give another split; jobs/predict.py works without labels."
        )
    total = ConfusionMatrix(store.class_table.num_classes)
    image_miou = {}
    for index in tracked(labelled, f"evaluating {model.source} on {protocol.split}"):
        of_image = confusion_of(model, split, protocol, [index])
        if of_image.counts.any():
            image_miou[index] = of_image.miou
        total.counts += of_image.counts
    return Evaluation(scores_of(total, store.class_table, protocol), total.counts, image_miou)


def confusion_of(
    model: SegmentationModel, split: Split, protocol: Protocol, indices: Sequence[int]
) -> ConfusionMatrix:
    """Return the confusion counts of these labelled images of the protocol's split, which is `split`."""
    total = ConfusionMatrix(model.class_table.num_classes)
    for index in indices:
        prediction = torch.from_numpy(model.predict_as(split.image(index), protocol))
        total.update(prediction, torch.tensor(split.label(index)))
    return total


def scores_of(confusion: ConfusionMatrix, class_table: ClassTable, protocol: Protocol) -> Scores:
    """Return the scores that follow from confusion counts; InputError where no pixel was counted."""
    if not confusion.counts.any():
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
        protocol=protocol,
    )


def write_evaluation(
    evaluation: Evaluation, model: SegmentationModel, store: Store, out_dir: str | Path, *, num_examples: int
) -> list[Path]:
    """Write scores.json, the confusion matrix and panels of the worst and best images; return their paths."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    scores, split = evaluation.scores, store.split(evaluation.scores.protocol.split)
    ranked = sorted(evaluation.image_miou, key=lambda index: (evaluation.image_miou[index], index))
    record = {
        "model": model.source,
        "scores": scores.to_dict(),
        "protocol": str(scores.protocol),
        "protocol_digest": scores.protocol.digest,
        "images": {split.name(index): evaluation.image_miou[index] for index in ranked},
        "confusion": evaluation.confusion.tolist(),
    }
    paths = [out_dir / name for name in (SCORES_FILE, "confusion_matrix.png", "worst.png", "best.png")]
    paths[0].write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    confusion_matrix_picture(evaluation.confusion.numpy(), list(store.class_table.class_names)).save(paths[1])
    for path, chosen in ((paths[2], ranked[:num_examples]), (paths[3], ranked[::-1][:num_examples])):
        _panel(model, split, chosen, evaluation).save(path)
    return paths


def scores_table(scores: Scores) -> str:
    """Return the scores as lines of text, the classes first and the protocol last."""
    width = max([len("mean accuracy"), *map(len, scores.class_iou)])
    lines = [
        f"{name:<{width}}  {'does not occur' if iou is None else f'{iou:.4f}'}"
        for name, iou in scores.class_iou.items()
    ]
    lines += [
        "",
        f"{'mIoU':<{width}}  {scores.miou:.4f}",
        f"{'mean accuracy':<{width}}  {scores.mean_accuracy:.4f}",
        f"{'pixel accuracy':<{width}}  {scores.pixel_accuracy:.4f}",
        f"{'protocol':<{width}}  {scores.protocol.digest}: {scores.protocol}",
    ]
    return "\n".join(lines)


def check_classes(model: SegmentationModel, store: Store) -> None:
    """Raise InputError where the model's classes are not the store's: its scores would mean nothing."""
    ours, theirs = model.class_table.class_names, store.class_table.class_names
    if ours == theirs:
        return
    different = [f"{a} and {b}" for a, b in zip(ours, theirs, strict=False) if a != b][:3]
    raise InputError(
        f"A model must have the classes of the store it is scored on, but {model.source} has {len(ours)} "
        "classes "
        f"and {store.path} has {len(theirs)}"
        + (f", among others {', '.join(different)}" if different else "")
        + ". Give a store that was ingested with the model's classes."
    )


def _panel(model: SegmentationModel, split: Split, indices: Sequence[int], evaluation: Evaluation) -> Image:
    protocol = evaluation.scores.protocol
    rows = [(split.image(i), split.label(i), model.predict_as(split.image(i), protocol)) for i in indices]
    titles = [f"{split.name(i)}  mIoU {evaluation.image_miou[i]:.3f}" for i in indices]
    return panel(rows, model.class_table, titles)

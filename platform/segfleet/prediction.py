"""One's own pictures of any sizes, segmented: label PNGs, overlays with a legend, the area of each class."""

import contextlib
import csv
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from pspnet.errors import InputError
from pspnet.labels import ClassTable
from pspnet.pictures import legend, overlay
from segfleet.folders import writable_folder
from segfleet.frames import LABEL_ENDING, OVERLAY_ENDING, Frame, find_inputs
from segfleet.package import SegmentationModel
from segfleet.progress import tracked
from segfleet.protocol import Views
from segfleet.too_large import predict_if_it_fits, smaller

AREAS_FILE = "class_areas.csv"


@dataclass
class PredictionReport:
    """What `predict_pictures` wrote, and what it could not read."""

    label_paths: list[Path] = field(default_factory=list)
    areas_path: Path | None = None
    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Pixels of each class in all pictures together, int64 (classes,)."""


def predict_pictures(
    model: SegmentationModel,
    asked: str | Path,
    output_dir: str | Path,
    *,
    views: Views | None = None,
    batch_size: int = 1,
    every: int = 1,
) -> PredictionReport:
    """Segment a folder, a pattern, a picture or a video's frames (see frames.py), and write what was found.

    For each picture: <stem>_label.png with the data set's class ids, <stem>_overlay.png for people, and its
    rows in class_areas.csv. Of `batch_size` pictures, those of one size are seen at once. Pictures that cannot be read,
    or are too large for the memory, are reported and skipped; InputError where all are.
    """
    output_dir, views = Path(output_dir), views or Views()
    if batch_size < 1:
        raise InputError(f"--batch-size must be 1 or more, but got {batch_size}. 8 suits most GPUs.")
    inputs = find_inputs(asked, output_dir, every=every)
    writable_folder(output_dir, "--output")
    report = PredictionReport(pixels=np.zeros(model.class_table.num_classes, dtype=np.int64))
    areas: list[tuple[str, str, int, float]] = []
    frames = tracked(inputs, f"segmenting with {model.source}", num_items=inputs.num_frames)
    for batch in _batches(frames, batch_size):
        for frame, train_ids in zip(batch, _segmented(model, batch, views), strict=True):
            if isinstance(train_ids, str):
                report.unreadable.append((frame.source, train_ids))
                continue
            report.label_paths.append(_write(output_dir, frame, train_ids, model.class_table))
            of_picture = class_areas(train_ids, model.class_table)
            areas += [(str(frame.name), *row) for row in of_picture]
            report.pixels += [pixels for _, pixels, _ in of_picture]
    if not report.label_paths:
        with contextlib.suppress(OSError):
            output_dir.rmdir()  # unless it holds what was there before
        first, reason = report.unreadable[0]
        raise InputError(
            f"At least one picture must be readable, but none of the {len(report.unreadable)} in {asked} is; "
            f"{first.name}: {reason}. Give PNG, JPEG or WebP files, or a video."
        )
    report.areas_path = output_dir / AREAS_FILE
    with report.areas_path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("picture", "class", "pixels", "share"))
        writer.writerows((name, label, pixels, f"{share:.6f}") for name, label, pixels, share in areas)
    return report


def area_table(report: PredictionReport, class_table: ClassTable) -> str:
    """Return the classes that were found, with their share of all pixels, the largest first."""
    shares = report.pixels / max(1, report.pixels.sum())
    order = [index for index in np.argsort(-shares, kind="stable") if shares[index] > 0]
    names = [class_table.class_names[index] for index in order]
    width = max(map(len, names), default=0)
    return "\n".join(
        f"  {name:<{width}}  {shares[index]:7.2%}" for name, index in zip(names, order, strict=True)
    )


def _batches(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    iterator = iter(frames)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _segmented(model: SegmentationModel, batch: list[Frame], views: Views) -> Iterator[np.ndarray | str]:
    """Yield the train ids of each frame, or why there are none."""
    found = predict_if_it_fits(model, [frame.image for frame in batch if frame.image is not None], views)
    if found is None and len(batch) > 1:  # one by one they may fit
        for frame in batch:
            yield from _segmented(model, [frame], views)
        return
    if found is None:
        yield f"the memory of {model.device} does not suffice; {smaller(views)} takes less"
        return
    segmented = iter(found)
    for frame in batch:
        yield frame.fault if frame.image is None else next(segmented)


def _write(output_dir: Path, frame: Frame, train_ids: np.ndarray, class_table: ClassTable) -> Path:
    """Write label and overlay of a picture and return the label's path."""
    assert frame.image is not None
    target = output_dir / frame.name
    target.parent.mkdir(parents=True, exist_ok=True)
    label_path = target.with_name(target.name + LABEL_ENDING)
    Image.fromarray(class_table.id_of(train_ids)).save(label_path)
    overlay_with_legend(frame.image, train_ids, class_table).save(
        target.with_name(target.name + OVERLAY_ENDING)
    )
    return label_path


def overlay_with_legend(image: np.ndarray, train_ids: np.ndarray, class_table: ClassTable) -> Image.Image:
    """Return the picture in the colours of its classes, with a legend of those that occur below it."""
    blended = overlay(image, train_ids, class_table)
    return legend(blended, train_ids, class_table)


def class_areas(train_ids: np.ndarray, class_table: ClassTable) -> list[tuple[str, int, float]]:
    """Return name, pixels and share of the picture of each class."""
    counts = np.bincount(train_ids.ravel(), minlength=class_table.num_classes)[: class_table.num_classes]
    return [
        (name, int(count), float(count) / train_ids.size)
        for name, count in zip(class_table.class_names, counts, strict=True)
    ]

"""A folder of one's own pictures of any sizes: label PNGs, overlays with a legend, the area of each class."""

import csv
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pspnet.errors import InputError
from pspnet.labels import ClassTable
from pspnet.pictures import legend, overlay
from segfleet.progress import tracked
from segfleet.protocol import Views
from segfleet.registry import SegmentationModel

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LABEL_ENDING, OVERLAY_ENDING = "_label.png", "_overlay.png"
AREAS_FILE = "class_areas.csv"


@dataclass
class PredictionReport:
    """What `predict_folder` wrote, and what it could not read."""

    label_paths: list[Path] = field(default_factory=list)
    areas_path: Path | None = None
    unreadable: list[tuple[Path, str]] = field(default_factory=list)


def predict_folder(
    model: SegmentationModel,
    input_path: str | Path,
    output_dir: str | Path,
    *,
    views: Views | None = None,
) -> PredictionReport:
    """Segment every picture in a folder, subfolders included, or one picture, and write what was found.

    For each picture: <stem>_label.png with the data set's class ids, <stem>_overlay.png for people, and its
    rows in class_areas.csv. Pictures that cannot be read are reported and skipped; InputError where none can.
    """
    input_path, output_dir, views = Path(input_path), Path(output_dir), views or Views()
    pictures = find_pictures(input_path, output_dir)
    names = output_names(pictures, input_path)
    report = PredictionReport()
    areas: list[tuple[str, str, int, float]] = []
    for picture in tracked(pictures, f"segmenting with {model.source}"):
        try:
            image = read_picture(picture)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            report.unreadable.append((picture, str(error).splitlines()[0] or type(error).__name__))
            continue
        train_ids = model.predict_as(image, views)
        target = output_dir / names[picture]
        target.parent.mkdir(parents=True, exist_ok=True)
        label_path = target.with_name(target.name + LABEL_ENDING)
        Image.fromarray(model.class_table.id_of(train_ids)).save(label_path)
        overlay_with_legend(image, train_ids, model.class_table).save(
            target.with_name(target.name + OVERLAY_ENDING)
        )
        areas += [(str(names[picture]), *row) for row in class_areas(train_ids, model.class_table)]
        report.label_paths.append(label_path)
    if not report.label_paths:
        first, reason = report.unreadable[0]
        raise InputError(
            f"At least one picture must be readable, but none of the {len(pictures)} in {input_path} is; "
            f"{first.name}: "
            f"{reason}. Give PNG, JPEG or WebP files."
        )
    report.areas_path = output_dir / AREAS_FILE
    with report.areas_path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("picture", "class", "pixels", "share"))
        writer.writerows((name, label, pixels, f"{share:.6f}") for name, label, pixels, share in areas)
    return report


def find_pictures(input_path: Path, output_dir: Path) -> list[Path]:
    """Return the pictures of a folder and its subfolders, or the one picture; never our own results."""
    if not input_path.exists():
        raise InputError(
            f"--input must be a folder of pictures or a picture, but there is nothing at {input_path}."
        )
    if input_path.is_file():
        return [input_path]
    output_dir = output_dir.resolve()
    if output_dir == input_path.resolve():
        raise InputError(
            f"--output must be another folder than --input, but both are {input_path}. Results would be read "
            "as "
            "pictures the next time."
        )
    pictures = [
        path
        for path in sorted(input_path.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file() and output_dir not in path.resolve().parents
    ]
    if not pictures:
        raise InputError(
            f"--input must hold pictures ({', '.join(SUFFIXES)}), but {input_path} has none, nor have its "
            "subfolders."
        )
    return pictures


def output_names(pictures: Sequence[Path], input_path: Path) -> dict[Path, Path]:
    """Return where each picture's results go in the output folder; of equal stems each keeps its suffix."""
    root = input_path if input_path.is_dir() else input_path.parent
    relative = {picture: picture.relative_to(root) for picture in pictures}
    stems = [path.with_suffix("") for path in relative.values()]
    return {
        picture: path if stems.count(path.with_suffix("")) > 1 else path.with_suffix("")
        for picture, path in relative.items()
    }


def read_picture(path: str | Path) -> np.ndarray:
    """Return a picture as uint8 RGB (h, w, 3), upright as its camera says; 16-bit grey becomes 8-bit."""
    with warnings.catch_warnings(), Image.open(path) as picture:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        picture.load()
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I"):
            values = np.asarray(upright).astype(np.float64)
            upright = Image.fromarray((values / 257 if values.max() > 255 else values).astype(np.uint8))
        return np.array(upright.convert("RGB"))


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

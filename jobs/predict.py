"""Segment pictures of any sizes, or a video, with a registered model: label PNGs, overlays, class areas."""

import sys
from dataclasses import dataclass
from pathlib import Path

from segfleet.cli import parse_options, run_job
from segfleet.prediction import area_table, predict_pictures
from segfleet.protocol import ViewOptions
from segfleet.registry import fetch


@dataclass(frozen=True, kw_only=True)
class Options(ViewOptions):
    """Which model, which pictures, and where the results go."""

    model: str
    """models:/name@champion, models:/name/3, or the folder of a model package."""

    input: str
    """Folder of pictures (PNG, JPEG, WebP, BMP, TIFF) and videos, subfolders included; one of them; or a quoted
    pattern such as 'drive/*/left_*.png'. Videos need the extra `video`."""

    output: Path
    """Folder for <name>_label.png (class ids), <name>_overlay.png and class_areas.csv."""

    batch_size: int = 1
    """Pictures that are read at once; those of one size are segmented at once. 8 suits most GPUs."""

    every: int = 1
    """Of a video, each so many frames one is segmented."""

    tracking_uri: str = ""
    """MLflow server or database of the registry; empty takes MLFLOW_TRACKING_URI, else runs/mlflow.db."""


def main() -> None:
    """Segment the pictures; those that cannot be read are named and skipped."""
    options = parse_options(Options, description=__doc__ or "")
    model = fetch(options.model, tracking_uri=options.tracking_uri)
    report = predict_pictures(
        model,
        options.input,
        options.output,
        views=options.views(model.crop_size),
        batch_size=options.batch_size,
        every=options.every,
    )
    for path, reason in report.unreadable:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    print(f"{len(report.label_paths)} pictures segmented by {model.source} into {options.output}", end="")
    print(f", {len(report.unreadable)} skipped" if report.unreadable else "")
    print(f"areas of all pictures together, picture by picture in {report.areas_path}:")
    print(area_table(report, model.class_table))


if __name__ == "__main__":
    run_job(main, goes_on=False)

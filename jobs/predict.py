"""Segment a folder of pictures of any sizes with a registered model: label PNGs, overlays, class areas."""

import sys
from dataclasses import dataclass
from pathlib import Path

from segfleet.cli import parse_options, run_job
from segfleet.prediction import predict_folder
from segfleet.protocol import ViewOptions
from segfleet.registry import fetch


@dataclass(frozen=True, kw_only=True)
class Options(ViewOptions):
    """Which model, which pictures, and where the results go."""

    model: str
    """models:/name@champion, models:/name/3, or the folder of a model package."""

    input: Path
    """Folder of pictures (PNG, JPEG, WebP, BMP, TIFF), subfolders included, or one picture."""

    output: Path
    """Folder for <name>_label.png (class ids), <name>_overlay.png and class_areas.csv."""

    tracking_uri: str = ""
    """MLflow server or database of the registry; empty takes MLFLOW_TRACKING_URI, else runs/mlflow.db."""


def main() -> None:
    """Segment the pictures; those that cannot be read are named and skipped."""
    options = parse_options(Options, description=__doc__ or "")
    model = fetch(options.model, tracking_uri=options.tracking_uri)
    report = predict_folder(
        model,
        options.input,
        options.output,
        views=options.views(model.crop_size),
    )
    for path, reason in report.unreadable:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    print(f"{len(report.label_paths)} pictures segmented by {model.source} into {options.output}", end="")
    print(f", {len(report.unreadable)} skipped" if report.unreadable else "")


if __name__ == "__main__":
    run_job(main)

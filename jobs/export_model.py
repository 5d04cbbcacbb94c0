"""Write a registered model as one file for other programs, ONNX or PyTorch's exported program, and check it."""

from dataclasses import dataclass
from pathlib import Path

from segfleet.cli import parse_options, run_job
from segfleet.export import CHECKED_SIZES, export_model
from segfleet.registry import fetch


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which model, and where it goes."""

    model: str
    """models:/name@champion, models:/name/3, or the folder of a model package."""

    output: Path
    """File that ends with .onnx (needs the extra `onnx`) or .pt2."""

    tracking_uri: str = ""
    """MLflow server or database of the registry; empty takes MLFLOW_TRACKING_URI, else runs/mlflow.db."""


def main() -> None:
    """Export the model and say how equal the file is."""
    options = parse_options(Options, description=__doc__ or "")
    model = fetch(options.model, tracking_uri=options.tracking_uri, device="cpu")
    exported = export_model(model, options.output)
    sizes = ", ".join(f"{number}x{height}x{width}" for number, height, width in CHECKED_SIZES)
    print(
        f"{model.source} is in {exported.path}: uint8 images (n, h, w, 3) to train ids (n, h, w); run beside the model "
        f"on {sizes}, {exported.disagreement:.1e} of the pixels have another class"
    )


if __name__ == "__main__":
    run_job(main, goes_on=False)

"""What a run shows in MLflow and in its folder: curves, pictures of predictions, a table of IoUs."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pspnet.inference import predict
from pspnet.metrics import ConfusionMatrix
from pspnet.model import PSPNet
from pspnet.pictures import confusion_matrix_picture, panel
from pspnet.store import Split, Store

if TYPE_CHECKING:
    from segfleet.run_writer import RunWriter

NUM_PANEL_IMAGES = 6
CLASS_TABLE = "class_iou.json"
TABLE_TAG = {"mlflow.loggedArtifacts": json.dumps([{"path": CLASS_TABLE, "type": "table"}])}
"""By this tag MLflow's page shows the artifact as a table."""
PANEL_FILE = "panel.png"
CONFUSION_FILE = "confusion_matrix.png"


def track(writer: "RunWriter", metrics: Mapping[str, Any]) -> None:
    """Send the curves of one epoch; the step is the number of epochs done."""
    points = {f"train/{name}": metrics[name] for name in ("loss", "main_loss", "aux_loss")}
    points |= {name: metrics[name] for name in ("lr", "images_per_s", "data_wait_s")}
    # Checkpoints of earlier versions lack these; there is no mfu without a peak, and no wait before the first report.
    points |= {
        name: metrics[name]
        for name in ("gradient_norm", "tflops_per_s", "mfu", "report_wait_s")
        if metrics.get(name) is not None
    }
    points |= metrics.get("system", {})
    points |= {f"step/{part}_s": seconds for part, seconds in metrics.get("step_s", {}).items()}
    if "miou" in metrics:
        points |= {f"val/{name}": metrics[name] for name in ("miou", "pixel_accuracy", "mean_accuracy")}
        points |= {f"class_iou/{name}": iou for name, iou in metrics["class_iou"].items() if iou is not None}
    writer.log_metrics(points, step=metrics["epoch"])


def draw(
    run_dir: Path,
    model: PSPNet,
    store: Store,
    split: Split,
    confusion: ConfusionMatrix,
    metrics: Mapping[str, Any],
    *,
    device: torch.device,
    writer: "RunWriter | None",
) -> None:
    """Write the panel of a few images of the split, always the same ones, the confusion matrix and a table of IoUs.

    The run keeps the panel of each evaluation, as a smaller JPEG.
    """
    rows, titles = [], []
    for index in _spread(len(split), NUM_PANEL_IMAGES):
        image, label = split.image(index), split.label(index)
        if label is not None:
            rows.append((image, label, predict(model, image, mean=store.mean, std=store.std, device=device)))
            titles.append(split.name(index))
    names = list(store.class_table.class_names)
    pictures = {CONFUSION_FILE: confusion_matrix_picture(confusion.counts.cpu(), names)}
    if rows:
        pictures[PANEL_FILE] = panel(rows, store.class_table, titles)
    for name, picture in pictures.items():
        path = run_dir / name
        aside = path.with_name(f".{name}")
        picture.save(aside, format="PNG")
        os.replace(aside, path)
        if writer is not None:
            writer.log_artifact(path, "pictures")
    if writer is None:
        return
    table = {"columns": ["class", "IoU"], "data": [list(item) for item in metrics["class_iou"].items()]}
    writer.log_text(json.dumps(table), CLASS_TABLE)
    if rows:
        path = run_dir / f"epoch_{metrics['epoch']:04d}.jpg"
        pictures[PANEL_FILE].convert("RGB").save(path, quality=80)
        writer.log_artifact(path, "pictures/panels")
        path.unlink()


def _spread(num_images: int, num_wanted: int) -> list[int]:
    """Return up to `num_wanted` indices, evenly spread from the first image on."""
    return sorted({index * num_images // num_wanted for index in range(num_wanted)} & set(range(num_images)))

"""One training on the cluster: from a configuration to a result with a reason, a run and a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ray.train import UserCallback
from ray.train.torch import TorchTrainer

from segfleet.config import TrainingConfig

Reason = Literal["complete", "diverged", "oom", "refused", "failed", "lost"]


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended and what it left."""

    reason: Reason
    """complete; diverged (loss not finite); oom; refused (input cannot be used); failed (a defect); lost (workers
    died more often than workers.max_failures)."""

    message: str
    """One line on the reason, empty for complete."""

    run_id: str
    """MLflow run, "" where none was asked for."""

    epochs: int
    """Epochs trained, as of the newest checkpoint."""

    miou: float | None
    """Validation mIoU after the last evaluated epoch, whole image, single-scale; None where none was reached."""

    class_iou: dict[str, float]
    """IoU of each class that occurs."""

    checkpoint_path: Path | None
    """Newest checkpoint."""

    best_checkpoint_path: Path | None
    """Checkpoint with the highest validation mIoU."""

    panel_path: Path | None
    """Picture: image | label | prediction | error for fixed validation images."""


def run_training(config: TrainingConfig) -> TrainingResult:
    """Train `config` on the cluster at RAY_ADDRESS or a local one, under one MLflow run per run name.

    The same command goes on after any interruption. Raises InputError for what a person can mend.
    """
    raise NotImplementedError


def build_trainer(
    config: TrainingConfig, *, name: str, run_id: str, callbacks: Sequence[UserCallback] = ()
) -> TorchTrainer:
    """Return the trainer of `config` whose checkpoints lie in <storage_dir>/<name>; `fit` runs it.

    `run_id` is the MLflow run to write to ("" for none). Under Tune give `callbacks=[TuneReportCallback()]`: each
    evaluated epoch reports epoch, miou, loss, checkpoint_path, images_per_s, pixels_seen, is_last.
    """
    raise NotImplementedError


def fit(trainer: TorchTrainer) -> TrainingResult:
    """Run the trainer to its end and say how it ended; never raises for what happens in the workers."""
    raise NotImplementedError

"""Train one configuration on an ingested data set and print what came of it."""

import sys

from segfleet.cli import parse_training, run_job
from segfleet.cluster import joined
from segfleet.presets import training_preset


def main() -> int:
    """Train, or go on training, what the flags name."""
    config = parse_training(
        training_preset,
        "cityscapes_semseg_r50",
        description="Train PSPNet on an ingested data set (Cityscapes or any other: see jobs/ingest_*.py), evaluate "
        "it after every epoch and keep its checkpoints, curves and pictures. Interrupted, the same command goes on "
        "from the last checkpoint. Runs on the Ray cluster at RAY_ADDRESS, else on this machine.",
    )
    # After the flags and what the cluster lacks: neither need wait for torch and MLflow.
    with joined(config):
        from segfleet.trainer import run_training, summary

        result = run_training(config)
    print(summary(result), file=sys.stdout if result.reason == "complete" else sys.stderr)
    return 0 if result.reason == "complete" else 1


if __name__ == "__main__":
    run_job(main)

"""The demo's model has learned something: it beats the most frequent class, predicted everywhere, by far."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def run(job: str, *flags: str | Path) -> str:
    """Run a job without a cluster or a server around it and return what it printed."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))
    }
    command = [sys.executable, f"jobs/{job}.py", *map(str, flags)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.long
def test_five_epochs_score_three_times_the_majority_class(tmp_path: Path) -> None:
    run("draw_demo", "--root", tmp_path / "images")
    run("ingest_cityscapes", "--root", tmp_path / "images", "--store", tmp_path / "store")
    printed = run(
        "train_cityscapes",
        *("--preset", "demo", "--data.store", tmp_path / "store", "--schedule.num-epochs", "5"),
        *("--tracking.storage-dir", tmp_path / "runs", "--tracking.registered-model-name", ""),
    )
    scores = re.search(r"mIoU (\S+) on the validation split .*; road everywhere: (\S+)\)", printed)
    assert scores, printed[-3000:]
    miou, majority = map(float, scores.groups())
    assert 0.01 < majority < 0.03  # about a third of the pixels, one of 19 classes
    assert miou > 3 * majority

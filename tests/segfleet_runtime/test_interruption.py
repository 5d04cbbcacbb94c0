"""A job that is told to end says so, leaves nothing behind, and goes on when the same command comes again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from segfleet import tracking_server
from segfleet.config import TrackingConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's with SQLAlchemy 2.1
]
ROOT = Path(__file__).parents[2]
SAID = "interrupted; the same command goes on from here"
JOBS = {
    "train_cityscapes": ["--schedule.num-epochs", "3", "--schedule.evaluate-every-epochs", "1"],
    "tune_cityscapes": [
        *("--schedule.num-epochs", "2", "--num-trials", "3", "--space.crop-sizes", "33"),
        *("--max-concurrent-trials", "1", "--tracking.registered-model-name", "interrupted"),
    ],
}


class Job:
    """A job in a process of its own, on a local cluster."""

    def __init__(self, name: str, store_path: Path, folder: Path) -> None:
        self._command = [
            *(sys.executable, str(ROOT / "jobs" / f"{name}.py"), "--preset", "tiny", *JOBS[name]),
            *("--data.store", str(store_path), "--data.crop-size", "33", "--workers.num-workers", "1"),
            *("--schedule.global-batch-size", "2", "--tracking.storage-dir", str(folder / "runs")),
        ]
        self._log = folder / "log"

    def start(self) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with self._log.open("wb") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, env=environment, cwd=ROOT)

    def said(self) -> str:
        return self._log.read_text()


def statuses(client: MlflowClient) -> list[str]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run.info.status for run in client.search_runs(experiments)]


@pytest.mark.parametrize(
    ("job", "number", "code"),
    [("train_cityscapes", signal.SIGTERM, 143), ("tune_cityscapes", signal.SIGINT, 130)],
)
def test_a_job_that_is_told_to_end_goes_on_later(
    job: str, number: signal.Signals, code: int, store_path: Path, tmp_path: Path
) -> None:
    begun = Job(job, store_path, tmp_path)
    process = begun.start()
    ended = "trial 0 complete" if job == "tune_cityscapes" else "epoch 1/3 done"
    while ended not in begun.said():
        assert process.poll() is None, begun.said()
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(120) == code, begun.said()
    assert begun.said().splitlines()[-1] == SAID
    assert "***" not in begun.said()
    assert "Traceback" not in begun.said()
    _, left = psutil.wait_procs(started, timeout=30)
    assert left == []
    client = tracking_server.client(
        tracking_server.resolve_uri(TrackingConfig(storage_dir=str(tmp_path / "runs")))
    )
    assert not client.search_registered_models()
    assert "RUNNING" not in statuses(client)
    assert "KILLED" in statuses(client)

    assert begun.start().wait(600) == 0, begun.said()
    if job == "tune_cityscapes":
        assert "2 of 3 trials to train" in begun.said()
        assert "trial 0 " not in begun.said().split("Leaderboard")[0]
        assert [model.name for model in client.search_registered_models()] == ["interrupted"]
    else:
        assert "epoch 1/3" not in begun.said()
        assert "epoch 3/3 done" in begun.said()
    assert set(statuses(client)) == {"FINISHED"}

"""A job that is told to end says so, leaves nothing behind, and goes on when the same command comes again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from mlflow import MlflowClient

from segfleet import tracking_server
from segfleet.config import TrackingConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("heeds_ctrl_c"),
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

    def start(self, fault: str = "") -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment["SEGFLEET_FAULT"] = fault
        with self._log.open("wb") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, env=environment, cwd=ROOT)

    def said(self) -> str:
        return self._log.read_text()


def statuses(client: MlflowClient) -> list[str]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run.info.status for run in client.search_runs(experiments)]


class Ended(NamedTuple):
    """When a job is told to end: at a named place of the program, or by a signal once it has said something."""

    code: int
    fault: str = ""
    number: signal.Signals = signal.SIGTERM
    said: str = ""


@pytest.mark.parametrize(
    ("job", "endings"),
    [
        pytest.param(
            "train_cityscapes",
            [Ended(143, said="epoch 1/3 done"), Ended(143, fault="run.trained:terminate")],
            marks=pytest.mark.long,
        ),
        (
            "tune_cityscapes",
            [
                Ended(130, number=signal.SIGINT, said="trial 0 complete"),
                Ended(143, fault="search.packaged:terminate"),
            ],
        ),
        pytest.param(
            "tune_cityscapes",
            [
                Ended(143, fault="trial.opened:terminate"),
                Ended(130, number=signal.SIGINT, said="trial 0 complete"),
                Ended(130, number=signal.SIGUSR1, said="trial 2 starts"),
                Ended(143, fault="search.packaged:terminate"),
            ],
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_job_that_is_told_to_end_goes_on_later(
    job: str, endings: list[Ended], store_path: Path, tmp_path: Path
) -> None:
    begun = Job(job, store_path, tmp_path)
    client = tracking_server.client(
        tracking_server.resolve_uri(TrackingConfig(storage_dir=str(tmp_path / "runs")))
    )
    for number, ending in enumerate(endings):
        _end(begun, ending)
        assert not [it.said for it in endings[:number] if it.said and it.said in begun.said()]
        assert not client.search_registered_models()
        assert "RUNNING" not in statuses(client)
        assert "KILLED" in statuses(client)

    assert begun.start().wait(600) == 0, begun.said()
    if job == "tune_cityscapes":
        assert "all 3 trials are finished" in begun.said()
        assert [model.name for model in client.search_registered_models()] == ["interrupted"]
    else:
        assert "/3 done" not in begun.said()
    assert set(statuses(client)) == {"FINISHED"}


def _end(begun: Job, ending: Ended) -> None:
    process = begun.start(ending.fault)
    started: set[psutil.Process] = set()
    while process.poll() is None and (not ending.said or ending.said not in begun.said()):
        time.sleep(0.2)  # looking for children takes a tenth of a core at 0.05
        with contextlib.suppress(psutil.NoSuchProcess):
            started |= set(psutil.Process(process.pid).children(recursive=True))
    if ending.said:
        process.send_signal(ending.number)
    assert process.wait(120) == ending.code, begun.said()
    assert begun.said().splitlines()[-1] == SAID
    assert "***" not in begun.said()
    assert "Traceback" not in begun.said()
    assert started
    _, left = psutil.wait_procs(started, timeout=30)
    assert left == []

"""Rows A1 and A3: a worker that dies or halts costs steps, never weights or points."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from segfleet import cluster, tracking, tracking_server
from segfleet.config import TrainingConfig
from segfleet.faults import VARIABLE
from segfleet.override import override
from segfleet.trainer import TrainingResult, build_trainer, fit
from tests.faults.oracles import History, assert_nothing_left, history, training_processes, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's with SQLAlchemy 2.1
]
LONG = pytest.mark.faults_long
STEPS_PER_EPOCH = 2

Recorded = Callable[[str, object], None]


@dataclass
class Run:
    """What a training of two workers left."""

    run_dir: Path
    result: TrainingResult
    history: History


class Cluster:
    """A local cluster whose processes look into one file for the fault that one of them is to meet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fault_file = folder / "fault"
        self.acted_file = folder / "fault.acted"
        self.clean: Run | None = None

    def train(self, config: TrainingConfig, name: str, *, fault: str = "") -> Run:
        """Train with two workers under `name`; the fault file is left only where nobody came to the fault."""
        config = override(
            config,
            {
                "workers.num_workers": 2,
                "schedule.global_batch_size": 4,
                "tracking.storage_dir": str(self.folder / "runs"),
            },
        )
        run_id = tracking.open_run(
            config.tracking, run_name=name, key=name, parent_run_id=None, tags={}, params={}
        )
        if fault:
            self.fault_file.write_text(fault)
        result = fit(build_trainer(config, name=name, run_id=run_id))
        assert not self.fault_file.exists()
        run_dir = self.folder / "runs" / name
        return Run(run_dir, result, history(tracking_server.resolve_uri(config.tracking), run_id))

    def undisturbed(self, config: TrainingConfig) -> Run:
        """Return the run that met no fault."""
        if self.clean is None:
            self.clean = self.train(config, "clean")
            assert self.clean.result.reason == "complete"
        return self.clean


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two CPUs, and no cluster of the surroundings."""
    here = Cluster(tmp_path_factory.mktemp("deaths"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv(VARIABLE, f"@{here.fault_file}")
        with cluster.connect(here.folder / "runs"):
            yield here


def check_recovered(
    local: Cluster, run: Run, clean: Run, record_property: Recorded, *, num_steps: int
) -> None:
    """W, M and L; the fault was met after the worker's step `num_steps`."""
    (epoch,) = map(int, re.findall(r"resumed after epoch (\d+)", (run.run_dir / "progress.log").read_text()))
    redone = num_steps - epoch * STEPS_PER_EPOCH
    next_checkpoint = run.run_dir / "checkpoints" / f"epoch_{epoch + 1:04d}" / "manifest.json"
    record_property("recovery_s", next_checkpoint.stat().st_mtime - local.acted_file.stat().st_mtime)
    record_property("steps_redone", redone)
    assert 0 <= redone <= STEPS_PER_EPOCH
    assert (run.result.reason, run.result.epochs) == ("complete", 3)
    assert weights(run.run_dir) == weights(clean.run_dir)
    assert run.history == clean.history
    assert_nothing_left(run.run_dir)


@pytest.mark.fault("A1", "SIGKILL of a train worker in mid-epoch")
@pytest.mark.parametrize("num_steps", [3, *(pytest.param(number, marks=LONG) for number in (4, 5))])
def test_a_killed_worker_costs_no_more_than_the_steps_since_the_checkpoint(
    local: Cluster, config: TrainingConfig, record_property: Recorded, num_steps: int
) -> None:
    clean = local.undisturbed(config)
    run = local.train(config, f"killed-{num_steps}", fault=f"training.step:kill:{num_steps}")
    check_recovered(local, run, clean, record_property, num_steps=num_steps)


@pytest.mark.fault("A3", "SIGSTOP of one rank")
@LONG
def test_a_halted_worker_is_taken_for_dead(
    local: Cluster, config: TrainingConfig, record_property: Recorded
) -> None:
    """Ray Train's health check asks each process: it hears nothing for HALT_S. Noticed is what has been ended."""
    clean = local.undisturbed(config)
    with ThreadPoolExecutor(1) as others:
        noticed = others.submit(seconds_until_noticed, local)
        run = local.train(config, "halted", fault="training.step:stop:3")
    record_property("noticed_s", noticed.result())
    assert noticed.result() <= 120
    check_recovered(local, run, clean, record_property, num_steps=3)


def seconds_until_noticed(local: Cluster) -> float:
    """Wait until a process halts and is no more; return the seconds between."""
    while not (halted := [worker for worker in training_processes() if is_halted(worker)]):
        time.sleep(0.2)
    halted[0].wait(timeout=600)
    return time.time() - local.acted_file.stat().st_mtime


def is_halted(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):  # it ended meanwhile
        return process.status() == psutil.STATUS_STOPPED
    return False

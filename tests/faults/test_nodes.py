"""Rows A4 and A5: a node that dies, or is taken back, costs what its workers did since the checkpoint."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from segfleet import cluster, tracking, tracking_server, trainer
from segfleet.config import TrainingConfig
from segfleet.faults import VARIABLE
from segfleet.override import override
from segfleet.spot import drain
from segfleet.trainer import TrainingResult, build_trainer, fit
from tests.faults.oracles import assert_nothing_left, history, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults_long,
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's with SQLAlchemy 2.1
]
STEPS_PER_EPOCH = 2
NUM_SLOW_STEPS = 3
SLOW_STEPS = ",".join(
    f"training.step:sleep=4:{NUM_SLOW_STEPS + number}" for number in range(1, NUM_SLOW_STEPS + 1)
)
"""Those of the second epoch, where no epoch is cut short."""

NOTICE_S = 8.0
NUM_LONG_EPOCHS = 8
SLOW_LATER = ",".join(f"training.step:sleep=1:{number}" for number in range(4, 3 * NUM_LONG_EPOCHS + 1))
"""All steps but those of the first epoch."""

Recorded = Callable[[str, object], None]


@dataclass
class Nodes:
    """A head without workers, and nodes for one worker each."""

    cluster: Cluster
    folder: Path
    of_workers: list[Any] = field(default_factory=list)

    @property
    def fault_file(self) -> Path:
        return self.folder / "fault"

    def add(self) -> None:
        self.of_workers.append(self.cluster.add_node(num_cpus=1))

    def train(
        self,
        config: TrainingConfig,
        name: str,
        *,
        disturb: Callable[[], None] | None,
        max_failures: int = 0,
        lingers: bool = True,
    ) -> Path:
        """Train on two nodes; `disturb` is called once the first epoch is saved.

        A worker that lingers is in the first step of the second epoch then.
        """
        config = override(
            config,
            {
                "workers.num_workers": 2,
                "workers.max_failures": max_failures,
                "schedule.global_batch_size": 4,
                "tracking.storage_dir": str(self.folder / "runs"),
            },
        )
        self.run_id = tracking.open_run(
            config.tracking, run_name=name, key=name, parent_run_id=None, tags={}, params={}
        )
        self.uri = tracking_server.resolve_uri(config.tracking)
        results: list[TrainingResult] = []
        run = build_trainer(config, name=name, run_id=self.run_id)
        if disturb is not None and lingers:
            self.fault_file.write_text("training.step:sleep=20:3")
        thread = threading.Thread(target=lambda: results.append(fit(run)))
        thread.start()
        if disturb is not None:
            saved = self.folder / "runs" / name / "checkpoints" / "epoch_0001"
            while self.fault_file.exists() or not (lingers or saved.exists()):
                time.sleep(0.05)
            disturb()  # here, in the main thread, as ray.cluster_utils wants it
        thread.join()
        assert (results[0].reason, results[0].epochs) == ("complete", config.schedule.num_epochs), results[0]
        return self.folder / "runs" / name


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Nodes]:
    monkeypatch.setenv(VARIABLE, getattr(request, "param", f"@{tmp_path / 'fault'}"))
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    here = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 0})
    nodes = Nodes(here, tmp_path)
    try:
        for _ in range(2):
            nodes.add()
        monkeypatch.setenv("RAY_ADDRESS", here.address)
        with cluster.connect(tmp_path / "runs"):
            yield nodes
    finally:
        here.shutdown()


def kill(nodes: Nodes) -> None:
    nodes.add()
    nodes.cluster.remove_node(nodes.of_workers[0], allow_graceful=False)


def take_back(nodes: Nodes) -> None:
    """As a cloud does: a notice, and the node is gone some seconds later."""
    nodes.add()
    drain(nodes.cluster.address, int(NOTICE_S), node_id=nodes.of_workers[0].node_id)
    time.sleep(NOTICE_S + 1)
    nodes.cluster.remove_node(nodes.of_workers[0], allow_graceful=False)


@pytest.mark.fault("A4", "SIGKILL of a raylet, with a spare node")
def test_a_lost_node_is_replaced_by_a_spare_one(
    config: TrainingConfig, nodes: Nodes, record_property: Recorded
) -> None:
    clean = nodes.train(config, "clean", disturb=None)
    expected = history(nodes.uri, nodes.run_id)
    started: list[float] = []

    def disturb() -> None:
        kill(nodes)
        started.append(time.time())

    run_dir = nodes.train(config, "killed", disturb=disturb, max_failures=1)
    assert "resumed after epoch 1" in (run_dir / "progress.log").read_text()
    next_checkpoint = run_dir / "checkpoints" / "epoch_0002" / "manifest.json"
    record_property("recovery_s", next_checkpoint.stat().st_mtime - started[0])
    record_property("steps_redone", 3 - STEPS_PER_EPOCH)
    assert weights(run_dir) == weights(clean)
    assert history(nodes.uri, nodes.run_id) == expected
    assert_nothing_left(run_dir)


@pytest.mark.fault("A4", "SIGKILL of a raylet, no spare node: goes on smaller, grows back")
@pytest.mark.parametrize("nodes", [SLOW_LATER], indirect=True)
def test_without_a_spare_node_training_goes_on_smaller_and_grows_back(
    config: TrainingConfig, nodes: Nodes, record_property: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows are the same where losses are: GroupNorm, no dropout; another window changes a loss by a tenth."""
    monkeypatch.setattr(trainer, "RESIZE_CHECK_S", 5.0)
    config = override(
        config,
        {
            "schedule.max_iterations_per_epoch": 0,
            "schedule.num_epochs": NUM_LONG_EPOCHS,
            "workers.min_workers": 1,
            "model.norm": "group",
            "model.dropout": 0.0,
        },
    )
    nodes.train(config, "clean", disturb=None)
    expected = history(nodes.uri, nodes.run_id)
    run_dir = nodes.folder / "runs" / "smaller"
    started: list[float] = []
    went_on: list[float] = []

    def disturb() -> None:
        nodes.cluster.remove_node(nodes.of_workers[0], allow_graceful=False)
        started.append(time.time())
        while "with 1 of 2 workers" not in (run_dir / "progress.log").read_text():
            time.sleep(0.2)
        went_on.append(time.time())
        nodes.add()

    assert nodes.train(config, "smaller", disturb=disturb, max_failures=1, lingers=False) == run_dir
    log = (run_dir / "progress.log").read_text()
    assert re.findall(r"with (\d) of 2 workers", log) == ["2", "1", "2"]
    found = history(nodes.uri, nodes.run_id)
    assert found.keys() == expected.keys()
    losses = [point for point in expected if point[0].startswith("train/")]
    assert len(losses) == 3 * NUM_LONG_EPOCHS
    assert [found[point] for point in losses] == pytest.approx(
        [expected[point] for point in losses], rel=0.01
    )
    record_property("recovery_s", went_on[0] - started[0])
    assert_nothing_left(run_dir)


@pytest.mark.fault("A5", "a node taken back, with a notice: saved at once, not counted as a failure")
@pytest.mark.parametrize("nodes", [SLOW_STEPS], indirect=True)
def test_a_node_that_is_taken_back_costs_about_a_step(
    config: TrainingConfig, nodes: Nodes, record_property: Recorded
) -> None:
    config = override(config, {"schedule.max_iterations_per_epoch": 0})
    clean = nodes.train(config, "clean", disturb=None)
    expected = history(nodes.uri, nodes.run_id)
    started: list[float] = []

    def disturb() -> None:
        take_back(nodes)
        started.append(time.time())

    run_dir = nodes.train(config, "taken", disturb=disturb, lingers=False)
    before, _, after = (run_dir / "progress.log").read_text().partition("resumed after epoch 1 and ")
    num_kept = int(after.split()[0])
    # A step that ends less than two seconds after the epoch has no line of its own, and one that is saved says so.
    num_done = max(map(int, re.findall(r"iteration (\d+)(?:/| to )", before))) - NUM_SLOW_STEPS
    assert 0 < num_kept <= num_done
    assert num_done - num_kept <= 1
    record_property("steps_redone", num_done - num_kept)
    next_checkpoint = run_dir / "checkpoints" / "epoch_0002" / "manifest.json"
    record_property("recovery_s", next_checkpoint.stat().st_mtime - started[0])
    assert weights(run_dir) == weights(clean)
    assert history(nodes.uri, nodes.run_id) == expected
    assert_nothing_left(run_dir)

"""Workers that train one trial after another: as good as fresh ones, and whatever dies, the trial goes on."""

import contextlib
import json
import os
import signal
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import ray.util

from pspnet.labels import ClassInfo, ClassTable
from pspnet.store import publish_store, write_shard
from segfleet import cluster, groups, trainer
from segfleet.checkpoint import checkpoint_folders
from segfleet.config import TrainingConfig
from segfleet.outcome import Outcome, read_outcome
from segfleet.override import override
from segfleet.presets import tiny

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingConfig]:
    """Two workers, two epochs, one failure allowed, on a local cluster."""
    folder = tmp_path_factory.mktemp("groups")
    table = ClassTable(
        "halves", tuple(ClassInfo(name, index, index, (0, 99, index)) for index, name in enumerate("ab"))
    )
    label = np.repeat([[0] * 36 + [1] * 36], 70, axis=0).astype(np.uint8)
    (folder / "aside").mkdir()
    splits = {}
    for split, num_images in (("train", 8), ("val", 2)):
        noise = np.random.default_rng(num_images).integers(0, 90, (num_images, 70, 72, 3))
        samples = [
            (f"{split}_{i}", (label[..., None] * 150 + noise[i]).astype(np.uint8), label)
            for i in range(num_images)
        ]
        splits[split] = [write_shard(folder / "aside" / f"{split}.arrow", samples, num_classes=2)]
    publish_store(
        folder / "aside", folder / "store", name="halves", class_table=table, splits=splits, source={}
    )
    changes = {
        "data.store": str(folder / "store"),
        "tracking.storage_dir": str(folder / "runs"),
        "workers.num_workers": 2,
        "workers.max_failures": 1,
        "schedule.global_batch_size": 4,
        "schedule.num_epochs": 2,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with cluster.connect(folder / "runs"):
            yield override(tiny(), changes)


class Driver:
    """What Tune and the search do with a group, by hand."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.name, self.group = groups.start(config, Path(config.tracking.storage_dir) / "groups")
        self.attempts: dict[str, str] = {}
        self.heard = -1

    def begin(self, name: str, changes: dict[str, Any] | None = None) -> None:
        self.attempts[name] = uuid.uuid4().hex[:12]
        config = override(self.config, changes or {})
        task = trainer.new_task(config, name=name, run_id="", attempt=self.attempts[name])
        ray.get(self.group.train.remote(asdict(task)), timeout=120)
        self.heard = -1

    def next(self) -> dict[str, Any]:
        event: Any = ray.get(self.group.next_event.remote(self.heard), timeout=240)
        self.heard = event[0]
        return dict(event[1])

    def rest(self) -> list[dict[str, Any]]:
        events = [self.next()]
        while "done" not in events[-1]:
            events.append(self.next())
        return events

    def stop(self, name: str) -> None:
        trainer.stop(self.config, name=name, attempt=self.attempts[name], message="below the bar")
        ray.get(self.group.stop.remote(self.attempts[name]))

    def outcome(self, name: str) -> Outcome | None:
        return read_outcome(trainer.run_folder(self.config, name), self.attempts[name])


POINT = {"optim.base_lr": 0.05, "data.crop_size": 49}


@pytest.fixture(scope="module")
def fresh(config: TrainingConfig) -> dict[str, str]:
    """The weights of POINT as processes of their own train it."""
    result = trainer.fit(trainer.build_trainer(override(config, POINT), name="fresh", run_id=""))
    assert result.reason == "complete", result
    return weights(config, "fresh")


@pytest.fixture(scope="module")
def driver(config: TrainingConfig, fresh: dict[str, str]) -> Iterator[Driver]:
    """After `fresh`: the cluster has room for one group of workers."""
    driver = Driver(config)
    yield driver
    groups.close(driver.group)


def weights(config: TrainingConfig, name: str) -> dict[str, str]:
    """Return the digest of the weights of each checkpoint that is left."""
    folders = checkpoint_folders(trainer.run_folder(config, name) / "checkpoints")
    return {
        folder.name: json.loads((folder / "manifest.json").read_text())["files"]["model.safetensors"][
            "sha256"
        ]
        for folder in folders
    }


def workers() -> set[int]:
    """Return the process ids of the training workers of this test's cluster."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in "".join(process.cmdline()):
                found.add(process.pid)
    return found


def epochs(events: list[dict[str, Any]]) -> list[int]:
    return [event["epoch"] for event in events if "epoch" in event]


def test_one_trial_after_another_in_the_same_processes_as_good_as_in_fresh_ones(
    config: TrainingConfig, driver: Driver, fresh: dict[str, str]
) -> None:
    driver.begin("first", {"schedule.seed": 3})
    events = driver.rest()
    assert epochs(events) == [1, 2]
    assert events[-1] == {"done": True}
    pids = workers()
    assert len(pids) == 2

    driver.begin("second", POINT)
    assert epochs(driver.rest()) == [1, 2]
    assert driver.outcome("second").reason == "complete"

    driver.begin("given up", POINT)
    assert driver.next()["epoch"] == 1
    driver.stop("given up")
    driver.begin("refused", {"data.val_split": "nowhere"})
    assert "nowhere" in driver.rest()[-1]["detail"]
    assert driver.outcome("refused").reason == "refused"
    assert driver.outcome("given up").reason == "pruned"
    assert list(weights(config, "given up")) == ["epoch_0001"]  # not an epoch was trained after the decision

    driver.begin("third", {"schedule.seed": 3})
    assert epochs(driver.rest()) == [1, 2]
    assert workers() == pids
    assert weights(config, "third") == weights(config, "first")
    assert weights(config, "second") == fresh
    assert weights(config, "given up")["epoch_0001"] == fresh["epoch_0001"]


def test_a_killed_worker_costs_its_epoch_and_a_second_one_the_trial(
    config: TrainingConfig, driver: Driver, fresh: dict[str, str]
) -> None:
    driver.begin("hurt", POINT)
    assert driver.next()["epoch"] == 1
    os.kill(min(workers()), signal.SIGKILL)
    assert set(epochs(driver.rest())) == {1, 2}
    assert driver.outcome("hurt").reason == "complete"
    assert weights(config, "hurt") == fresh

    driver.begin("lost", POINT)
    for _ in range(2):
        assert driver.next()["epoch"] == 1
        os.kill(max(workers()), signal.SIGKILL)
    events = driver.rest()
    assert events[-1]["outcome"] == "lost"
    driver.begin("after", POINT)
    assert epochs(driver.rest()) == [1, 2]
    assert weights(config, "after") == fresh


def test_whoever_asks_anew_hears_the_same_report_again(driver: Driver) -> None:
    driver.begin("asked twice", POINT)
    first = driver.next()
    driver.heard = -1  # as a process of Tune that was started again
    assert driver.next() == first
    assert epochs(driver.rest()) == [2]


def test_a_closed_group_leaves_no_process_and_no_reservation(config: TrainingConfig, driver: Driver) -> None:
    groups.close(driver.group)
    assert workers() == set()
    states = {table["state"] for table in ray.util.placement_group_table().values()}
    assert states <= {"REMOVED"}
    assert not list((Path(config.tracking.storage_dir) / "groups").iterdir())

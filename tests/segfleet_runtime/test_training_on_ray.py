"""Laws of one training through Ray Train: two workers, a killed worker, input that only a worker can refuse."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray._private.state import actors

from pspnet.engine import evaluate
from pspnet.model import PSPNet
from pspnet.store import Store
from segfleet import cluster, ray_train
from segfleet.checkpoint import MODEL_FILE, load_checkpoint
from segfleet.config import TrainingConfig
from segfleet.override import override
from segfleet.ray_train import GroupController
from segfleet.trainer import TrainingResult, build_trainer, fit, run_training
from tests.faults.oracles import processes_of_runs, training_processes
from tests.segfleet_runtime.every_flag import EVERY_FLAG

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")]


@pytest.fixture(scope="module")
def local_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two CPUs, whatever the machine has, and no cluster of the surroundings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with cluster.connect(tmp_path_factory.mktemp("runs")):
            yield


def two_workers(config: TrainingConfig) -> TrainingConfig:
    return override(config, {"workers.num_workers": 2, "schedule.global_batch_size": 4})


def kill_a_worker_after(checkpoint: Path) -> threading.Thread:
    """SIGKILL one training process as soon as that checkpoint is complete."""

    def run() -> None:
        while not checkpoint.exists():
            time.sleep(0.01)
        os.kill(training_processes()[-1].pid, signal.SIGKILL)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def weights(result: TrainingResult) -> bytes:
    assert result.checkpoint_path is not None
    return (result.checkpoint_path / MODEL_FILE).read_bytes()


@pytest.mark.usefixtures("local_cluster")
def test_two_workers_with_every_flag_repeat_and_survive_the_death_of_one(config: TrainingConfig) -> None:
    """Row A1 has them without flags."""
    config = override(two_workers(config), EVERY_FLAG | {"schedule.global_batch_size": 8})
    whole = fit(build_trainer(config, name="whole", run_id=""))
    assert (whole.reason, whole.epochs) == ("complete", 3)
    assert whole.panel_path is not None

    run_dir = Path(config.tracking.storage_dir) / "killed"
    killer = kill_a_worker_after(run_dir / "checkpoints" / "epoch_0001")
    killed = fit(build_trainer(config, name="killed", run_id=""))
    killer.join()
    assert killed.reason == "complete"
    assert "resumed after epoch" in (run_dir / "progress.log").read_text()
    assert weights(killed) == weights(whole)
    assert killed.miou == whole.miou
    _, alive = psutil.wait_procs(training_processes(), timeout=10)
    assert alive == []
    # no process that a training without Ray Data, on one node, under a driver, has no use for
    started = {actor["ActorClassName"] for actor in actors().values()}
    assert started == {"GroupController", "SynchronizationActor", "RayTrainWorker"}

    # the counts of two workers' shards are those of one process that reads the whole split
    assert whole.checkpoint_path is not None
    checkpoint = load_checkpoint(whole.checkpoint_path)
    model = PSPNet.from_architecture(checkpoint.state["architecture"])
    model.load_state_dict(checkpoint.model_state)
    store = Store.open(config.data.store)
    split = store.split("val")
    torch.set_num_threads(1)
    confusion = evaluate(
        model, split, indices=range(len(split)), mean=store.mean, std=store.std, device=torch.device("cpu")
    )
    assert confusion.miou == whole.miou


@pytest.mark.usefixtures("local_cluster")
def test_a_worker_that_dies_for_ever_is_lost(config: TrainingConfig) -> None:
    config = override(two_workers(config), {"workers.max_failures": 0})
    run_dir = Path(config.tracking.storage_dir) / "lost"
    kill_a_worker_after(run_dir / "checkpoints" / "epoch_0001")
    result = fit(build_trainer(config, name="lost", run_id=""))
    assert result.reason == "lost"
    assert result.epochs >= 1
    assert "\n" not in result.message


@pytest.mark.usefixtures("local_cluster")
@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ({"data.val_split": "test"}, "refused", "test"),
        ({"optim.base_lr": 1e30}, "diverged", "not finite"),
        ({"model.head_channels": 10**9}, "oom", "Raise schedule.accumulation_steps"),
    ],
)
def test_what_cannot_get_better_ends_at_once_with_one_line(
    config: TrainingConfig, changes: dict[str, object], reason: str, message: str
) -> None:
    config = override(two_workers(config), changes)
    started = time.monotonic()
    result = fit(build_trainer(config, name="ended", run_id=""))
    assert result.reason == reason
    assert message in result.message
    assert "\n" not in result.message
    assert not list((Path(config.tracking.storage_dir) / "ended" / "ray").iterdir())
    assert ray.is_initialized()
    print(f"{reason} after {time.monotonic() - started:.1f} s")


@pytest.mark.usefixtures("local_cluster")
def test_a_network_that_fits_in_no_memory_is_a_result(config: TrainingConfig) -> None:
    """As a job runs it: the driver, too, builds the network."""
    result = run_training(override(config, {"model.head_channels": 10**9}))
    assert (result.reason, result.epochs) == ("oom", 0)
    assert "Raise schedule.accumulation_steps" in result.message
    assert result.run_id


@pytest.mark.usefixtures("local_cluster")
def test_the_process_of_a_controller_ends_though_rays_destructors_wait_for_ever(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waiting(GroupController):
        """Once Python is done with its process, that waits for ever, as one in ten does in Ray's own destructors."""

        def __init__(self, *values: Any, **named: Any) -> None:
            library = ctypes.CDLL(None)
            assert library["__cxa_atexit"](library.pause, None, None) == 0
            super().__init__(*values, **named)

    monkeypatch.setattr(ray_train, "_remote_controller", lambda: ray.remote(Waiting))
    config = override(config, {"schedule.num_epochs": 1})
    result = fit(build_trainer(config, name="waiting", run_id=""))
    assert result.reason == "complete", result.message
    assert any(actor["ActorClassName"].endswith("Waiting") for actor in actors().values())
    deadline = time.monotonic() + 60
    while (left := processes_of_runs()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == {}

"""What a group's workers are and do: Ray Train runs that train the tasks of its actor, one after another."""

import contextlib
import gc
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle

from segfleet import trainer
from segfleet.config import TrainingConfig
from segfleet.config_json import from_json
from segfleet.outcome import StoppedError, read_outcome, record_outcome
from segfleet.place import Place, here
from segfleet.worker import Task, execute


class Workers:
    """The workers that the actor `group` starts and asks."""

    def __init__(self, config_json: str, storage_path: str, group: str) -> None:
        self._config = from_json(TrainingConfig, config_json)
        self._storage_path, self._group = storage_path, group

    @property
    def max_failures(self) -> int:
        """How often a task is tried again after a worker died."""
        return self._config.workers.max_failures

    def run(self) -> Exception | None:
        """Serve the group until it has no more tasks, or a worker dies; return what was raised."""
        name = uuid.uuid4().hex[:12]
        try:
            trainer.train_run(
                self._config,
                serve,
                {"group": self._group},
                name=name,
                storage_path=self._storage_path,
                max_failures=0,
            ).fit()
        except Exception as error:  # whatever it is, whoever waits for the task must hear of it
            return error
        finally:
            shutil.rmtree(Path(self._storage_path) / name, ignore_errors=True)
        return None

    def result_of(self, task: dict[str, Any]) -> dict[str, Any] | None:
        """Return how the task ended, or None while it has not."""
        outcome = read_outcome(task["run_dir"], task["attempt"])
        if outcome is None:
            return None
        return {} if outcome.reason == "complete" else {"outcome": outcome.reason, "detail": outcome.message}

    def fail(self, task: dict[str, Any], error: Exception | None) -> None:
        """Record that the task ended with its last run."""
        record_outcome(task["run_dir"], trainer.outcome_of(error, Task(**task)))


def serve(settings: dict[str, Any]) -> None:
    """Train the group's tasks until there are no more: what each worker executes."""
    group, place = ray.get_actor(settings["group"]), here()
    while (values := _next_task(group, place)) is not None:
        if not values:
            continue
        task = Task(**values)
        with contextlib.suppress(StoppedError):
            execute(task, place, report=_reporter(group, task, place))
        if place.rank == 0:
            ray.get(group.left.remote(task.attempt))
        gc.collect()
        if place.device.type == "cuda":
            torch.cuda.empty_cache()


def _next_task(group: ActorHandle, place: Place) -> dict[str, Any] | None:
    """Return rank 0's answer of the group on every worker."""
    return _same(lambda: ray.get(group.next_task.remote()), place)


def _reporter(group: ActorHandle, task: Task, place: Place) -> Callable[[dict[str, Any]], None]:
    def report(metrics: dict[str, Any]) -> None:
        if not _same(lambda: ray.get(group.report.remote(task.attempt, metrics)), place):
            raise StoppedError

    return report


def _same(ask: Callable[[], Any], place: Place) -> Any:
    """Return what rank 0 was answered on every worker."""
    answer = [ask() if place.rank == 0 else None]
    if place.world_size > 1:
        dist.broadcast_object_list(answer, src=0)
    return answer[0]

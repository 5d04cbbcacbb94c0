"""Groups of workers that train one trial after another: what starts in seconds is started once.

A group is an actor that holds one task at a time and a Ray Train run whose workers ask it for tasks. A worker that
reports waits for the decision, so that a trial that is given up trains no further. Where a worker dies, the run is
started again and goes on with the task, from its checkpoint.

    Tune's process of a trial        the group's actor                  rank 0 of the workers
    train(task)  ──────────────────▶ holds the task ◀────────────────── next_task()
    next_event(heard) ◀───────────── holds one event ◀───────────────── report(metrics), waits
    next_event(heard again) ───────▶ the trial goes on ───────────────▶ True
    stop(attempt), from the search ▶ it does not ─────────────────────▶ False
"""

import contextlib
import gc
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from segfleet import cluster, trainer
from segfleet.config import TrainingConfig
from segfleet.config_json import from_json, to_json, without_passwords
from segfleet.faults import fault
from segfleet.outcome import StoppedError, read_outcome, record_outcome
from segfleet.place import Place, here
from segfleet.secret import secrets_of
from segfleet.worker import Task, execute

POLL_S = 10.0
CLOSE_TIMEOUT_S = 30.0


class Group:
    """The actor of a group; every method may be called again after its caller died."""

    def __init__(
        self, config_json: str, storage_path: str, own_name: str, secrets: Mapping[str, str] | None = None
    ) -> None:
        os.environ.update(secrets or {})
        self._config = from_json(TrainingConfig, config_json)
        self._storage_path, self._own_name = storage_path, own_name
        self._changed = threading.Condition()
        self._task: Task | None = None
        self._event: tuple[int, dict[str, Any]] | None = None
        self._num_events = 0
        self._goes_on: bool | None = None
        self._num_failures = 0
        self._is_closed = False
        self._runner = threading.Thread(target=self._run, name="train-runs", daemon=True)
        self._runner.start()

    def train(self, task: dict[str, Any]) -> None:
        """Take a task, as soon as the one before has been left."""
        wanted = Task(**task)
        with self._changed:
            if self._task is not None and self._task.attempt == wanted.attempt:
                return
            self._changed.wait_for(lambda: self._task is None or self._is_closed)
            self._task, self._event, self._goes_on, self._num_failures = wanted, None, None, 0
            self._changed.notify_all()

    def next_event(self, heard: int) -> tuple[int, dict[str, Any]]:
        """Return the event that follows number `heard`, which is herewith answered: the trial goes on."""
        with self._changed:
            if self._event is not None and self._event[0] == heard:
                self._event, self._goes_on = None, True
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._event is not None)
            assert self._event is not None
            return self._event

    def stop(self, attempt: str) -> None:
        """Let the workers leave the trial where it waits for a decision, or at its next report."""
        with self._changed:
            if self._task is not None and self._task.attempt == attempt:
                self._goes_on = False
                self._changed.notify_all()

    def close(self) -> None:
        """Let the workers end, and wait until they have."""
        with self._changed:
            self._is_closed = True
            if self._task is not None:
                self._goes_on = False
            self._changed.notify_all()
        self._runner.join(CLOSE_TIMEOUT_S)

    def next_task(self) -> dict[str, Any] | None:
        """Return the task, {} where there is none yet, or None where there will be no more. Asked by rank 0."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._is_to_train(), timeout=POLL_S)
            if self._is_closed:
                return None
            return asdict(self._task) if self._task is not None and self._is_to_train() else {}

    def report(self, attempt: str, metrics: dict[str, Any]) -> bool:
        """Hold an event until it is answered, and return whether the trial goes on. Asked by rank 0."""
        with self._changed:
            if self._task is None or self._task.attempt != attempt:
                return False
            if self._goes_on is not False:
                self._goes_on = None
                self._hold(metrics)
                fault("group.held")
                self._changed.wait_for(lambda: self._goes_on is not None)
            return bool(self._goes_on)

    def left(self, attempt: str) -> None:
        """Note that the workers are through with the task: its outcome is in its folder. Called by rank 0."""
        with self._changed:
            if self._task is not None and self._task.attempt == attempt:
                self._end(self._task)

    def _is_to_train(self) -> bool:
        return self._task is not None and self._goes_on is not False

    def _hold(self, result: dict[str, Any]) -> None:
        self._num_events += 1
        self._event = (self._num_events, result)
        self._changed.notify_all()

    def _end(self, task: Task) -> None:
        """Tell who waits for it how the task ended, and be free for another."""
        outcome = read_outcome(task.run_dir, task.attempt)
        result: dict[str, Any] = {"done": True}
        if outcome is not None and outcome.reason != "complete":
            result |= {"outcome": outcome.reason, "detail": outcome.message}
        self._task = None
        self._hold(result)

    def _run(self) -> None:
        """Keep a Ray Train run going until the group is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._task is not None)
                if self._is_closed:
                    return
                if self._task is not None and self._goes_on is False:  # given up while no worker lived
                    self._end(self._task)
                    continue
            name = uuid.uuid4().hex[:12]
            error: Exception | None = None
            try:
                trainer.train_run(
                    self._config,
                    serve,
                    {"group": self._own_name},
                    name=name,
                    storage_path=self._storage_path,
                    max_failures=0,
                ).fit()
            except Exception as raised:  # whatever it is, whoever waits for the task must hear of it
                error = raised
            shutil.rmtree(Path(self._storage_path) / name, ignore_errors=True)
            with self._changed:
                self._after_run(error)

    def _after_run(self, error: Exception | None) -> None:
        """End the task that the run left behind, or leave it to the next run."""
        task = self._task
        if task is None or self._is_closed:
            return
        if read_outcome(task.run_dir, task.attempt) is None and self._goes_on is not False:
            self._num_failures += 1
            if self._num_failures <= self._config.workers.max_failures:
                self._event = None  # its report comes again
                return
            record_outcome(task.run_dir, trainer.outcome_of(error, task))
        self._end(task)


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


def start(config: TrainingConfig, storage_path: Path) -> tuple[str, ActorHandle]:
    """Start a group for tasks with the workers of `config` and return its name and its actor."""
    name = f"segfleet-group-{uuid.uuid4().hex[:12]}"
    node = ray.get_runtime_context().get_node_id()
    actor: Any = ray.remote(num_cpus=0)(Group)
    options = {
        "name": name,
        "max_concurrency": 16,
        "max_restarts": -1,  # it begins without a task, and whoever waits for the trial gives it again
        "runtime_env": {"env_vars": cluster.worker_environment(config)},
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True),
    }
    secrets = secrets_of(os.environ, config.tracking.tracking_uri)
    config_json = to_json(without_passwords(config))
    return name, actor.options(**options).remote(config_json, str(storage_path), name, secrets)


def close(actor: ActorHandle) -> None:
    """End a group, by force where it does not leave within CLOSE_TIMEOUT_S."""
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(actor.close.remote(), timeout=CLOSE_TIMEOUT_S + 5)
    ray.kill(actor)


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

"""Groups of workers that train one trial after another: what starts in seconds is started once.

A group is an actor that holds one task at a time and a Ray Train run whose workers ask it for tasks. A worker that
reports waits for the decision, so that a trial that is given up trains no further. Where a worker dies, the run is
started again and goes on with the task, from its checkpoint.

    Tune's process of a trial        the group's actor                  rank 0 of the workers
    train(task)  ──────────────────▶ holds the task ◀────────────────── next_task()
    next_event(heard) ◀───────────── holds one event ◀───────────────── report(metrics), waits
    next_event(heard again) ───────▶ the trial goes on ───────────────▶ True
    stop(attempt), from the search ▶ it does not ─────────────────────▶ False

Imports little: whoever asks Ray for an actor by its name, as Tune's process of a trial does, loads its class.
"""

import contextlib
import os
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from segfleet import cluster
from segfleet.config import TrainingConfig
from segfleet.config_json import to_json, without_passwords
from segfleet.faults import fault
from segfleet.secret import secrets_of

POLL_S = 10.0
CLOSE_TIMEOUT_S = 30.0


class Group:
    """The actor of a group; every method may be called again after its caller died."""

    def __init__(
        self, config_json: str, storage_path: str, own_name: str, secrets: Mapping[str, str] | None = None
    ) -> None:
        os.environ.update(secrets or {})
        from segfleet.group_runs import Runs

        self._runs = Runs(config_json, storage_path, own_name)
        self._changed = threading.Condition()
        self._task: dict[str, Any] | None = None
        self._event: tuple[int, dict[str, Any]] | None = None
        self._num_events = 0
        self._goes_on: bool | None = None
        self._num_failures = 0
        self._is_closed = False
        self._runner = threading.Thread(target=self._run, name="train-runs", daemon=True)
        self._runner.start()

    def train(self, task: dict[str, Any]) -> None:
        """Take a task, as soon as the one before has been left."""
        with self._changed:
            if self._is_about(task["attempt"]):
                return
            self._changed.wait_for(lambda: self._task is None or self._is_closed)
            self._task, self._event, self._goes_on, self._num_failures = task, None, None, 0
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
            if self._is_about(attempt):
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
            return self._task if self._task is not None and self._is_to_train() else {}

    def report(self, attempt: str, metrics: dict[str, Any]) -> bool:
        """Hold an event until it is answered, and return whether the trial goes on. Asked by rank 0."""
        with self._changed:
            if not self._is_about(attempt):
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
            if self._task is not None and self._is_about(attempt):
                self._end(self._task)

    def _is_about(self, attempt: str) -> bool:
        return self._task is not None and self._task["attempt"] == attempt

    def _is_to_train(self) -> bool:
        return self._task is not None and self._goes_on is not False

    def _hold(self, result: dict[str, Any]) -> None:
        self._num_events += 1
        self._event = (self._num_events, result)
        self._changed.notify_all()

    def _end(self, task: dict[str, Any]) -> None:
        """Tell who waits for it how the task ended, and be free for another."""
        result = self._runs.result_of(task)
        self._task = None
        self._hold({"done": True} | (result or {}))

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
            error = self._runs.run()
            with self._changed:
                self._after_run(error)

    def _after_run(self, error: Exception | None) -> None:
        """End the task that the run left behind, or leave it to the next run."""
        task = self._task
        if task is None or self._is_closed:
            return
        if self._runs.result_of(task) is None and self._goes_on is not False:
            self._num_failures += 1
            if self._num_failures <= self._runs.max_failures and self._runs.may_pass(task, error):
                self._event = None  # its report comes again
                return
            self._runs.fail(task, error)
        self._end(task)


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

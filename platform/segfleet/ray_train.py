"""Ray Train for groups that use every core: no process that nobody asks, and few questions to workers that only train.

On a machine whose cores are all taken by workers, what Ray's other processes compute is what a step costs more.
"""

import asyncio
import atexit
import contextlib
import functools
import logging
import os
import sys
from typing import Any

import ray
from ray.core.generated.gcs_pb2 import ActorTableData  # type: ignore[attr-defined] # made by protoc
from ray.train.constants import TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus
from ray.train.v2._internal.util import time_monotonic
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from segfleet import cluster
from segfleet.interruption import heard

GROUP_END_S = 5
"""How long the processes of a group may take to leave it before they are ended; a halted one never does. Ray: 30."""
ABORT_S = 5
"""How long workers of a run that is interrupted may take to be ended."""
LONGEST_POLL_S = 1.0
SHARE_OF_SILENCE = 0.1


def poll_interval(silent_s: float, shortest_s: float) -> float:
    """Return after how many seconds to ask workers again that have reported nothing for `silent_s`.

    A tenth of that at most, so that a report waits no longer than a tenth of what it took.
    """
    return max(shortest_s, min(LONGEST_POLL_S, SHARE_OF_SILENCE * silent_s))


class GroupTrainer(TorchTrainer):
    """A TorchTrainer without the processes that serve Ray Data, cluster sizes, or a job that survives its run."""

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        """Run `settings` by our controller; the rest is what the method overridden does."""
        needless: tuple[type, ...] = (DatasetsCallback,)
        if cluster.is_single_node():
            if type(settings["scaling_policy"]) is FixedScalingPolicy:
                settings["scaling_policy"] = UncoordinatedPolicy(self.scaling_config)
            if ray.get_runtime_context().get_actor_id() is None:
                # A driver ends when its run's controller died, and Ray takes what both held. An actor lives on.
                needless += (PlacementGroupCleanerCallback,)
        settings["failure_policy"] = OneTryPolicy(self.run_config.failure_config)
        settings["callbacks"] = [each for each in settings["callbacks"] if not isinstance(each, needless)]
        controller = (
            _remote_controller()
            .options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(
                    ray.get_runtime_context().get_node_id(), soft=False
                ),
                runtime_env={
                    "env_vars": {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"} | get_env_vars_to_propagate()
                },
            )
            .remote(**settings)
        )
        try:
            ray.get(controller.run.remote())
            return ray.get(controller.get_result.remote())
        except KeyboardInterrupt as interruption:
            # Ray's handler, which we do without, would end this process with exit code 0
            heard(interruption)
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(controller.abort.remote(), timeout=ABORT_S)
            raise


class OneTryPolicy(DefaultFailurePolicy):
    """Tries again as Ray does, but not what Ray's memory monitor killed: an OOM is a result."""

    def make_decision(self, training_failed_error: ray.train.TrainingFailedError) -> FailureDecision:
        """Return whether the workers are started again."""
        if is_killed_for_memory(training_failed_error):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


def is_killed_for_memory(error: Exception | None) -> bool:
    """Whether Ray's memory monitor killed a worker, whose message is all that tells."""
    causes = [error, *getattr(error, "worker_failures", {}).values()]
    return any("running low on memory" in str(cause) for cause in causes)


class GroupController(TrainController):
    """Asks its workers as often as news may be expected; that one of them is dead it hears from Ray, unasked."""

    def __init__(self, *values: Any, **named: Any) -> None:
        os.environ.setdefault(TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, str(GROUP_END_S))
        atexit.register(end_before_destructors)
        super().__init__(*values, **named)

    def _start_worker_group(self, *values: Any, **named: Any) -> None:
        super()._start_worker_group(*values, **named)
        self._heard_at = time_monotonic()

    async def _poll_workers(self) -> WorkerGroupPollStatus:
        shortest_s = self._health_check_interval_s
        due = self._latest_poll_time + poll_interval(self._latest_poll_time - self._heard_at, shortest_s)
        while time_monotonic() < due - shortest_s and not self._has_dead_worker():
            await asyncio.sleep(shortest_s)
            if self.get_state().is_terminal():  # aborted meanwhile
                ray.actor.exit_actor()
        status = await super()._poll_workers()
        if any(is_news(each) for each in status.worker_statuses.values()):
            self._heard_at = time_monotonic()
        return status

    def _has_dead_worker(self) -> bool:
        workers = self._worker_group.get_workers()
        return any(worker.actor._get_local_state() == ActorTableData.DEAD for worker in workers)


@functools.cache
def _remote_controller() -> Any:
    """Return the class as Ray starts it, made once: Ray's head keeps each one that is made until the job ends."""
    return ray.remote(GroupController)


def end_before_destructors() -> None:
    """End this process when Python is done with it, before Ray's library takes itself down.

    In Ray 2.60 the owner of other actors can wait for itself there for ever: a message to its subscribers that is still
    queued is destroyed under the lock of the queue, and the answer to them goes into that queue. The process has left
    its cluster by then, so that nobody ends it where the cluster ends first.
    """
    try:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)


class UncoordinatedPolicy(FixedScalingPolicy):
    """As many workers as were asked for, without the actor that would ask an autoscaler for them."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ask nobody for anything."""

    def _maybe_send_resource_request(self) -> None:
        pass


def is_news(status: Any) -> bool:
    """Whether a worker says more than that it goes on."""
    return bool(
        status.training_report
        or status.error is not None
        or status.preemption_info is not None
        or not status.running
    )

"""Laws of how often Ray Train asks its workers: seldom where they only train, at once where one is dead."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions
from ray.core.generated.gcs_pb2 import ActorTableData  # type: ignore[attr-defined] # made by protoc
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from segfleet.ray_train import GroupController, OneTryPolicy, is_news, poll_interval

QUIET = SimpleNamespace(training_report=None, error=None, preemption_info=None, running=True)


@pytest.mark.parametrize(
    ("silent_s", "interval_s"),
    [(float("-inf"), 0.2), (0.0, 0.2), (2.0, 0.2), (5.0, 0.5), (10.0, 1.0), (3600.0, 1.0)],
)
def test_workers_are_asked_again_after_a_tenth_of_their_silence(silent_s: float, interval_s: float) -> None:
    assert poll_interval(silent_s, 0.2) == pytest.approx(interval_s)
    assert poll_interval(silent_s, 2.0) == 2.0  # what a person set


@pytest.mark.parametrize(
    ("said", "news"),
    [
        ({}, False),
        ({"training_report": object()}, True),
        ({"error": RuntimeError()}, True),
        ({"preemption_info": object()}, True),
        ({"running": False}, True),
    ],
)
def test_what_is_news_of_a_worker(said: dict[str, Any], news: bool) -> None:
    assert is_news(SimpleNamespace(**vars(QUIET) | said)) is news


@pytest.mark.parametrize(
    ("silent_s", "dies_after_s", "asked_after_s"), [(0.0, None, 0.0), (3600.0, None, 0.8), (3600.0, 0.1, 0.2)]
)
def test_a_silent_group_is_asked_once_a_second_and_at_once_where_one_died(
    monkeypatch: pytest.MonkeyPatch, silent_s: float, dies_after_s: float | None, asked_after_s: float
) -> None:
    """Ray's own wait of 0.2 s since the last time is left out here: it follows."""
    begun = time.monotonic()
    alive, dead = ActorTableData.ALIVE, ActorTableData.DEAD

    def state() -> int:
        return dead if dies_after_s is not None and time.monotonic() > begun + dies_after_s else alive

    asked: list[float] = []

    async def ask(controller: TrainController) -> Any:
        asked.append(time.monotonic() - begun)
        return SimpleNamespace(worker_statuses={0: QUIET})

    monkeypatch.setattr(TrainController, "_poll_workers", ask)
    controller: Any = GroupController.__new__(GroupController)
    controller._health_check_interval_s, controller._latest_poll_time = 0.2, begun
    controller._heard_at = begun - silent_s
    controller._state = SimpleNamespace(is_terminal=lambda: False)
    worker = SimpleNamespace(actor=SimpleNamespace(_get_local_state=state))
    controller._worker_group = SimpleNamespace(get_workers=lambda: [worker])
    asyncio.run(controller._poll_workers())
    assert asked[0] == pytest.approx(asked_after_s, abs=0.15)


@pytest.mark.parametrize(
    ("death", "num_retries"),
    [
        (ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."), 0),
        (ray.exceptions.WorkerCrashedError(), 2),
    ],
)
def test_a_worker_killed_for_its_memory_ends_the_training_at_once(death: Exception, num_retries: int) -> None:
    """As one of a group does (test_group_ends.py); others die workers.max_failures times."""
    policy = OneTryPolicy(FailureConfig(max_failures=2))
    error = WorkerGroupError(
        "a worker died", {1: WorkerHealthCheckFailedError("a health check failed", death)}
    )
    decisions = [policy.make_decision(error) for _ in range(num_retries + 1)]
    assert decisions == [FailureDecision.RETRY] * num_retries + [FailureDecision.RAISE]

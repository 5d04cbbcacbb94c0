"""What each worker of a group executes: one task of the group's actor after another.

Imports no MLflow, which only the first of the workers needs.
"""

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle

from segfleet.outcome import StoppedError
from segfleet.place import Place, here
from segfleet.worker import Task, execute


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

"""A worker's place in its DDP group, and what all of the group do as one: fail, resume, share statistics."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from segfleet.checkpoint import Checkpoint, load_checkpoint, newest_good, newest_part
from segfleet.cluster import watches_nodes
from segfleet.notice import UNKNOWN
from segfleet.outcome import AgreedError, message_of, reason_of


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process in the DDP group."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    taken_back_at: Callable[[], float | None] | None = None
    """When a node of the group is taken back, in Unix time, asked by all workers at once; None: nobody gives notice."""


def here() -> Place:
    """Return the place of this Ray Train worker."""
    context = ray.train.get_context()
    return Place(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
        taken_back_at=_taken_back_at if watches_nodes() else None,
    )


def _taken_back_at() -> float | None:
    info = ray.train.get_preemption_info()
    if info is None:
        return None
    return UNKNOWN if info.deadline_ms is None else info.deadline_ms / 1000


def is_group_gone(place: Place) -> bool:
    """Whether Ray has taken this worker's group apart, to start another one: what fails here then is no defect."""
    return place.world_size > 1 and not dist.is_initialized()


@contextlib.contextmanager
def agreed(place: Place) -> Iterator[None]:
    """Let all workers fail together where one fails for good in this block, which has no collective call."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if place.world_size == 1:
        if error is not None:
            raise error
        return
    reason = None if error is None else reason_of(error)
    if error is not None and reason is None:
        raise error
    mine = None if error is None else (reason, message_of(error))
    everyones: list[Any] = [None] * place.world_size
    dist.all_gather_object(everyones, mine)
    for theirs in everyones:
        if theirs is not None:
            raise AgreedError(*theirs) from error


def same_checkpoint(checkpoints_dir: Path, place: Place, *, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest good checkpoint of the run, the one that rank 0 chose, on every worker."""
    checkpoint = None
    if place.rank == 0:
        whole = newest_good(checkpoints_dir, say=say)
        checkpoint = newest_part(checkpoints_dir, whole, say=say) or whole
    if place.world_size == 1:
        return checkpoint
    chosen = [None if checkpoint is None else str(checkpoint.path)]
    dist.broadcast_object_list(chosen, src=0)
    if place.rank > 0 and chosen[0] is not None:
        checkpoint = load_checkpoint(chosen[0])
    return checkpoint


def share_buffers(model: torch.nn.Module, place: Place) -> None:
    """Give every worker rank 0's running statistics: DDP itself shares them only before a training step."""
    if place.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)

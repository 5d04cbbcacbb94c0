"""The little that a process asks of its DDP group; alone, it is a group of one."""

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return how many workers the group has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of `tensor` over all workers, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor

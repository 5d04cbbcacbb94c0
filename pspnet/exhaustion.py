"""Which errors mean that a device's memory, or the machine's, does not suffice."""

import re

import torch

_SAYS_SO = re.compile(r"out of memory|can't allocate memory|_ALLOC_FAILED", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: torch's own error, or one of CUDA, cuBLAS, cuDNN, NCCL or the C library."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _SAYS_SO.search(str(error)) is not None

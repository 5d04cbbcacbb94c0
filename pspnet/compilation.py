"""torch.compile, refused where it cannot work."""

import torch

from pspnet.errors import InputError


def require_compiler(device: torch.device | str) -> None:
    """Compile a sum on `device`; InputError with the remedy where that fails."""
    try:
        torch.compile(lambda x: (x + 1).sum())(torch.ones(8, device=device))
    except Exception as error:  # whatever the compiler, its driver or a missing header make it raise
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            "workers.compile needs what torch.compile needs, a C++ compiler (and Triton for GPUs), but on this worker "
            f"it cannot compile a sum ({type(error).__name__}: {reason}). Install g++, or set workers.compile to False."
        ) from error

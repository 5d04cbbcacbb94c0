"""The network in a DDP group, and the little that a process asks of the group; alone, it is a group of one."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pspnet.cpu_depthwise import use_fast_depthwise_gradients
from pspnet.kernels import use_fast_kernels
from pspnet.model import PSPNet
from pspnet.norms import Norm, synchronised


def parallelise(
    model: PSPNet, device: torch.device | str, *, norm: Norm = "auto", compiled: bool = False
) -> nn.Module:
    """Return `model` ready to train: in DDP where torch.distributed has more than one worker, else itself.

    Its convolutions are put in channels_last, on CPUs with one thread also on faster kernels. On CUDA, BatchNorm
    becomes SyncBatchNorm (inside the model given) unless `norm` is "batch"; on CPUs, for which torch has none, each
    worker normalises with the statistics of its own images. GroupNorm knows one image only, and is left as it is.
    With `compiled` its passes in training are compiled at the first one; the model given itself is not. What was
    compiled before in this process is forgotten: of one code Dynamo keeps eight networks, and leaves a ninth eager.
    """
    device = torch.device(device)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device.type == "cpu":
        use_cpu_kernels(model, compiled=compiled)
    if world_size() > 1 and device.type == "cuda" and norm != "batch":
        synchronised(model)
    network: Any = model
    if compiled:
        torch.compiler.reset()
        network = torch.compile(model, dynamic=False)
    if world_size() == 1:
        return network
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=device_ids, gradient_as_bucket_view=True)


def use_cpu_kernels(model: PSPNet, *, compiled: bool = False, num_threads: int = 0) -> None:
    """Let `model` be trained by a CPU's faster kernels, where it has so many threads (0: as torch has here)."""
    if not compiled:  # what numba compiles torch.compile cannot
        use_fast_kernels(model, model.backbone, num_threads=num_threads)
    use_fast_depthwise_gradients(model.backbone)


def unwrapped(model: nn.Module) -> PSPNet:
    """Return the network inside DDP and torch.compile, or the network itself."""
    network = model.module if isinstance(model, DistributedDataParallel) else model
    # The class that has it is torch._dynamo's, which takes seconds to import.
    network = getattr(network, "_orig_mod", network)
    assert isinstance(network, PSPNet)
    return network


def world_size() -> int:
    """Return how many workers the group has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of `tensor` over all workers, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor

"""What a process of the test's group with GroupNorm executes: importable by name, since each is a new Python."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from pspnet.distributed import parallelise
from pspnet.model import PSPNet
from tests.pspnet_model.engine_workers import NUM_CLASSES, batches, train


def new_model() -> PSPNet:
    """Return the network before training, the same in every process."""
    torch.manual_seed(0)
    return PSPNet(NUM_CLASSES, backbone="resnet18", head_channels=8, dropout=0.0, norm="group").double()


def trained(rank: int, world_size: int) -> dict[str, Tensor]:
    """Train three iterations of four images in float64 and return the weights."""
    model = new_model()
    train(parallelise(model, "cpu", norm="group"), batches(rank, world_size))
    return {name: value.detach().contiguous() for name, value in model.state_dict().items()}


def run_worker(rank: int, folder: str, world_size: int) -> None:
    """Train as one of the group and leave the weights in a file."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world_size)
    torch.save(trained(rank, world_size), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def run_group(folder: Path, world_size: int) -> list[dict[str, Tensor]]:
    """Run all workers and return their weights."""
    spawn(run_worker, args=(str(folder), world_size), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]

"""What a process of a test's DDP group executes: importable by name, since each is a new Python."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from pspnet.data import Batch
from pspnet.distributed import parallelise, unwrapped
from pspnet.engine import evaluate, train_one_epoch
from pspnet.freezing import freeze
from pspnet.labels import IGNORE_INDEX
from pspnet.loss import CrossEntropy
from pspnet.model import PSPNet
from pspnet.optim import build_optimizer
from pspnet.store import Split
from pspnet.training_stats import DivergedError, IterationStats, TrainStats
from pspnet.transforms import Window

NUM_CLASSES = 4
GLOBAL_BATCH_SIZE = 4
NUM_ITERATIONS = 3
MEAN, STD = (120.0, 110.0, 100.0), (60.0, 61.0, 62.0)


KIND = CrossEntropy(
    label_smoothing=0.1,
    class_weights=torch.tensor([1.0, 0.5, 2.0, 4.0]),
    ohem_threshold=0.1,
    ohem_min_kept=200,
)
"""Everything that is normalised or chosen over all workers; the number of pixels decides which are hard."""


class Pictures(Split):
    """Random images of different sizes, read-only like a store's."""

    def __init__(self, num_images: int) -> None:
        random = np.random.default_rng(1)
        self._name = "random"
        self.pairs: list[tuple[np.ndarray, np.ndarray | None]] = []
        for index in range(num_images):
            size = (40 + 3 * index, 57 - index)
            image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
            label = random.choice([0, 1, 2, 3, IGNORE_INDEX], size=size).astype(np.uint8)
            image.flags.writeable = label.flags.writeable = False
            self.pairs.append((image, label))

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return f"image{index}"

    def image(self, index: int) -> np.ndarray:
        return self.pairs[index][0]

    def label(self, index: int) -> np.ndarray | None:
        return self.pairs[index][1]


def new_model() -> PSPNet:
    torch.manual_seed(0)
    return PSPNet(NUM_CLASSES, backbone="resnet18", head_channels=8, dropout=0.0)


def batches(rank: int, world_size: int) -> Iterator[Batch]:
    for iteration in range(NUM_ITERATIONS):
        numbers = range(iteration * GLOBAL_BATCH_SIZE, (iteration + 1) * GLOBAL_BATCH_SIZE)
        names = [f"image{number}" for number in numbers[rank::world_size]]
        areas = [Window(0, 0, 1, 1)] * len(names)
        yield Batch(torch.zeros(4 * len(names), dtype=torch.uint8), areas, samples=[], names=names)


def prepare(batch: Batch) -> tuple[Tensor, Tensor]:
    """Make image and target of each name; odd ones are nearly all ignored, so workers' shares differ much."""
    images, targets = [], []
    for name in batch.names:
        number = int(name.removeprefix("image"))
        random = torch.Generator().manual_seed(number)
        images.append(torch.randn(3, 33, 33, generator=random, dtype=torch.float64))
        target = torch.randint(0, NUM_CLASSES, (33, 33), generator=random)
        target[: 30 * (number % 2)] = IGNORE_INDEX
        targets.append(target)
    return torch.stack(images), torch.stack(targets)


def prepare_with_a_nan(batch: Batch) -> tuple[Tensor, Tensor]:
    images, target = prepare(batch)
    if "image5" in batch.names:
        images[batch.names.index("image5")] = torch.nan
    return images, target


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    **changes: Any,
) -> TrainStats:
    """Train one epoch of ten iterations; `changes` are arguments of `train_one_epoch` that differ from the usual."""
    arguments: dict[str, Any] = {
        "prepare": prepare,
        "epoch": 0,
        "start_iteration": 0,
        "max_iterations": 10,
        "power": 0.9,
        "aux_loss_weight": 0.4,
    }
    return train_one_epoch(
        model, optimizer or new_optimizer(unwrapped(model)), batches, **arguments | changes
    )


def new_optimizer(model: PSPNet) -> torch.optim.Optimizer:
    return build_optimizer(model, base_lr=0.02, head_lr_factor=10.0, momentum=0.9, weight_decay=1e-4)


def trained(
    rank: int,
    world_size: int,
    prepare: Callable[[Batch], tuple[Tensor, Tensor]] = prepare,
    *,
    is_overflown: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Train a few iterations in float64 and return everything that workers must agree on.

    `is_overflown` makes a weight infinite after the last step.
    """
    model = new_model().double()
    freeze(model, batch_norm="all")  # it then knows nothing of the other images
    losses: list[float] = []
    error, stats = None, None

    def note(iteration: IterationStats) -> None:
        losses.append(iteration.loss)
        if is_overflown and len(losses) == NUM_ITERATIONS:
            model.state_dict()["head.classifier.bias"][0] = torch.inf

    group_model = parallelise(model, "cpu")
    exchanges: list[int] = []
    if isinstance(group_model, DistributedDataParallel):
        group_model.register_comm_hook(exchanges, _counted_all_reduce)
    try:
        stats = train(
            group_model,
            batches(rank, world_size),
            prepare=prepare,
            start_iteration=2,
            on_iteration=note,
            **changes,
        )
    except DivergedError as diverged:
        error = (diverged.iteration, diverged.names)
    return {
        "weights": {name: value.detach().contiguous() for name, value in model.state_dict().items()},
        "losses": losses,
        "error": error,
        "exchanges": len(exchanges),
        "loss": None if stats is None else stats.loss,
        "lr": None if stats is None else stats.lr,
    }


def _counted_all_reduce(exchanges: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    exchanges.append(bucket.index())
    group = dist.group.WORLD
    assert group is not None
    return allreduce_hook(group, bucket)


def counted(rank: int, world_size: int, num_images: int) -> Tensor:
    """Return the confusion counts of a model after an evaluation by all workers."""
    pictures = Pictures(num_images)
    confusion = evaluate(
        new_model(),
        pictures,
        indices=range(num_images)[rank::world_size],
        mean=MEAN,
        std=STD,
        device="cpu",
    )
    return confusion.counts


def run_worker(rank: int, folder: str) -> None:
    """Evaluate by three workers; then train and evaluate by the first two of them."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for world_size in (3, 2):
        if rank >= world_size:
            return
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/group{world_size}", rank=rank, world_size=world_size
        )
        results: dict[str, Any] = {f"counts{n}": counted(rank, world_size, n) for n in (5, 2)}
        results["trained"] = trained(rank, world_size)
        if world_size == 2:
            results["accumulated"] = trained(rank, world_size, accumulation_steps=2)
            results["hard"] = trained(rank, world_size, cross_entropy=KIND)
            results["diverged"] = trained(rank, world_size, prepare_with_a_nan)
            results["overflown"] = trained(rank, world_size, is_overflown=rank == 1)
        torch.save(results, Path(folder) / f"{world_size}_{rank}.pt")
        dist.destroy_process_group()


def run_group(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """Run all workers and return their results by (world_size, rank)."""
    spawn(run_worker, args=(str(folder),), nprocs=3)
    return {
        (world_size, rank): torch.load(folder / f"{world_size}_{rank}.pt", weights_only=True)
        for world_size in (2, 3)
        for rank in range(world_size)
    }

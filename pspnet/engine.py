"""One epoch of training and one evaluation, in one process or in each process of a DDP group."""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pspnet.data import Batch
from pspnet.inference import Precision, autocast, predict
from pspnet.labels import IGNORE_INDEX
from pspnet.loss import segmentation_loss
from pspnet.metrics import ConfusionMatrix
from pspnet.model import PSPNet, refuse_single_values
from pspnet.norms import Norm, synchronised
from pspnet.optim import poly_factor, set_lr
from pspnet.store import Split


class DivergedError(RuntimeError):
    """The loss of an iteration is not a finite number; every worker raises it, before the weights change."""

    def __init__(self, iteration: int, names: Sequence[str]) -> None:
        listed = ", ".join(names)
        super().__init__(
            f"The loss of iteration {iteration} is not finite, on {listed}. A smaller lr may do."
        )
        self.iteration = iteration
        self.names = list(names)
        """Images of the workers whose own share was not finite."""

    def __reduce__(self) -> tuple[type["DivergedError"], tuple[int, list[str]]]:
        return DivergedError, (self.iteration, self.names)


@dataclass(frozen=True, kw_only=True)
class IterationStats:
    """One optimizer step, over all workers."""

    iteration: int
    """Counted from the beginning of the training."""
    epoch: int
    loss: float
    main_loss: float
    aux_loss: float
    lr: float
    """Of the backbone."""
    images_per_s: float
    """Of all workers together, the wait for data counted in."""
    data_wait_s: float
    """Of this worker."""


@dataclass(frozen=True, kw_only=True)
class TrainStats:
    """One epoch, over all workers."""

    loss: float
    """Mean of the iterations' losses, as the next two."""
    main_loss: float
    aux_loss: float
    lr: float
    """Of the backbone, at the last iteration."""
    images_per_s: float
    data_wait_s: float
    """Time that a worker waited for data in the whole epoch, mean over workers."""
    iterations: int


def train_one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    *,
    prepare: Callable[[Batch], tuple[Tensor, Tensor]],
    epoch: int,
    start_iteration: int,
    max_iterations: int,
    power: float,
    aux_loss_weight: float,
    precision: Precision = "fp32",
    on_iteration: Callable[[IterationStats], None] | None = None,
) -> TrainStats:
    """Take one optimizer step for each of `batches`, the shares of this worker, and return what they came to.

    All workers must have equally many batches. `prepare` makes images and targets of a batch on the model's
    device; `start_iteration` is the number of steps taken before this call, of `max_iterations` in all.
    Raises DivergedError on all workers where the loss of any is not finite.
    """
    model.train()
    device = next(model.parameters()).device
    world_size = _world_size()
    # A new scaler for each epoch (idle but for fp16): a resumed epoch starts as an uninterrupted one.
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    sums = torch.zeros(3, dtype=torch.float64)
    iteration, num_images, data_wait_s, lr = start_iteration, 0, 0.0, 0.0
    started = time.monotonic()
    for batch, wait_s in _timed(batches):
        began = time.monotonic() - wait_s
        if iteration == start_iteration:
            refuse_single_values(model, len(batch.windows))
        images, target = prepare(batch)
        set_lr(optimizer, poly_factor(iteration, max_iterations, power))
        num_valid = _summed((target != IGNORE_INDEX).sum())
        with autocast(device, precision):
            output = model(images, upsample=False)
        loss = segmentation_loss(output, target, num_valid=num_valid, aux_loss_weight=aux_loss_weight)
        shares = torch.stack([term.detach().double() for term in loss])
        losses = _summed(shares.clone()).cpu()
        if not losses.isfinite().all():
            raise DivergedError(iteration, _names_of_diverged(shares, batch.names))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss.total * world_size).backward()
        scaler.step(optimizer)
        scaler.update()

        sums += losses
        num_images += images.shape[0] * world_size
        data_wait_s += wait_s
        lr = float(optimizer.param_groups[0]["lr"])
        if on_iteration is not None:
            total, main, aux = losses.tolist()
            on_iteration(
                IterationStats(
                    iteration=iteration,
                    epoch=epoch,
                    loss=total,
                    main_loss=main,
                    aux_loss=aux,
                    lr=lr,
                    images_per_s=images.shape[0] * world_size / (time.monotonic() - began),
                    data_wait_s=wait_s,
                )
            )
        iteration += 1
    num_iterations = iteration - start_iteration
    assert num_iterations > 0, "an epoch without a batch"
    total, main, aux = (sums / num_iterations).tolist()
    waited = _summed(torch.tensor(data_wait_s, dtype=torch.float64, device=device))
    return TrainStats(
        loss=total,
        main_loss=main,
        aux_loss=aux,
        lr=lr,
        images_per_s=num_images / (time.monotonic() - started),
        data_wait_s=float(waited) / world_size,
        iterations=num_iterations,
    )


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    indices: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    precision: Precision = "fp32",
) -> ConfusionMatrix:
    """Return the counts of all workers' `indices` together: whole images, one scale, no flip, each by itself.

    The same on any number of workers, since every image is predicted alone and counts are integers, as long
    as their networks agree in BatchNorm's running statistics too. Images may differ in size.
    """
    network = unwrapped(model)
    confusion = ConfusionMatrix(network.num_classes, device)
    was_training = network.training
    network.eval()
    for index in indices:
        label = split.label(index)
        if label is None:
            raise ValueError(f"An evaluated image must have a label, but {split.name(index)} has none.")
        prediction = predict(
            network, split.image(index), mean=mean, std=std, device=device, precision=precision
        )
        confusion.update(torch.from_numpy(prediction), torch.tensor(label))
    network.train(was_training)
    confusion.all_reduce()
    return confusion


def parallelise(model: PSPNet, device: torch.device | str, *, norm: Norm = "auto") -> nn.Module:
    """Return `model` ready to train: in DDP where torch.distributed has more than one worker, else itself.

    Its convolutions are put in channels_last. On CUDA, BatchNorm becomes SyncBatchNorm (inside the model
    given) unless `norm` is "batch"; on CPUs, for which torch has none, each worker normalises with the statistics
    of its own images. GroupNorm knows one image only, and is left as it is.
    """
    device = torch.device(device)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if _world_size() == 1:
        return model
    if device.type == "cuda":
        network = model if norm == "batch" else synchronised(model)
        return DistributedDataParallel(network, device_ids=[device], gradient_as_bucket_view=True)
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def unwrapped(model: nn.Module) -> PSPNet:
    """Return the network inside DDP, or the network itself."""
    network = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(network, PSPNet)
    return network


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch, the same on every worker: they must begin with equal weights."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _timed(batches: Iterable[Batch]) -> Iterator[tuple[Batch, float]]:
    """Yield each batch with the seconds that it was waited for."""
    asked = time.monotonic()
    for batch in batches:
        yield batch, time.monotonic() - asked
        asked = time.monotonic()


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _summed(tensor: Tensor) -> Tensor:
    """Return the sum of `tensor` over all workers, in place."""
    if _world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def _names_of_diverged(shares: Tensor, names: Sequence[str]) -> list[str]:
    own = [] if shares.isfinite().all() else list(names)
    if _world_size() == 1:
        return own or list(names)
    everyones: list[list[str]] = [[] for _ in range(_world_size())]
    dist.all_gather_object(everyones, own)
    return [name for theirs in everyones for name in theirs]

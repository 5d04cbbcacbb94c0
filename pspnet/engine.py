"""One epoch of training and one evaluation, in one process or in each process of a DDP group."""

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from pspnet.data import Batch
from pspnet.distributed import summed, unwrapped, world_size
from pspnet.folding import for_prediction
from pspnet.freezing import train_mode
from pspnet.inference import Precision, autocast, predict
from pspnet.loss import PLAIN, CrossEntropy, segmentation_loss, valid_weight
from pspnet.metrics import ConfusionMatrix
from pspnet.model import refuse_single_values
from pspnet.optim import poly_factor, set_lr, warm_up_factor
from pspnet.store import Split
from pspnet.timing import PARTS, StepClock
from pspnet.training_stats import DivergedError, EpochPart, IterationStats, TrainStats


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
    accumulation_steps: int = 1,
    max_gradient_norm: float = 0.0,
    warm_up_iterations: int = 0,
    warm_up_start: float = 0.0,
    cross_entropy: CrossEntropy = PLAIN,
    average: AveragedModel | None = None,
    on_iteration: Callable[[IterationStats], None] | None = None,
    scaler_state: Mapping[str, float | int] | None = None,
    begun: EpochPart | None = None,
    is_called: Callable[[], bool] | None = None,
    on_call: Callable[[EpochPart], None] | None = None,
) -> TrainStats:
    """Take one optimizer step for each of `batches`, the shares of this worker, and return what they came to.

    All workers must have equally many batches; the shares of one batch may differ in size. `prepare` makes images and
    targets of a batch on the model's device; `start_iteration` is the number of steps taken before this call, of
    `max_iterations` in all.

    Each batch goes through the network in `accumulation_steps` parts, as equal as can be, whose gradients sum to those
    of the whole, but for BatchNorm and the choice of hard pixels, which know only their own part. A gradient whose norm
    over all parameters exceeds `max_gradient_norm` (0: no limit) is scaled down to it. `average` is updated after
    each step.

    `scaler_state` is what the epoch before left of its gradient scaler (fp16). An epoch that `begun` came of goes on
    after it, with the batches that follow. `is_called` is asked on each worker before each step; after a step before
    which any worker said yes, all call `on_call` with the epoch so far.
    Raises DivergedError on all workers where the loss of any, or the gradient, is not finite; with fp16 the scaler
    leaves out steps whose gradient is not, and it is raised once that is so without any scaling. It is raised, too,
    where the last step leaves weights or BatchNorm's statistics that are not: no other step would find them.
    """
    train_mode(model)
    device = next(model.parameters()).device
    num_workers = world_size()
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    sums = torch.zeros(3, dtype=torch.float64)
    norms: list[float] = []
    first_iteration, num_images, data_wait_s = start_iteration, 0, 0.0
    lr = float(optimizer.param_groups[0]["lr"])
    started, clock = time.monotonic(), StepClock(model, device)
    if begun is not None:
        scaler_state = begun.scaler
        sums += torch.tensor(begun.sums, dtype=torch.float64)
        norms += begun.norms
        first_iteration += begun.iterations
        num_images += begun.num_images
        started -= begun.seconds
    if scaler_state:  # the training may have begun with another precision
        scaler.load_state_dict(dict(scaler_state))
    iteration = first_iteration
    for batch, wait_s in _timed(batches):
        began = time.monotonic() - wait_s
        clock.mark("data_wait")
        if iteration == first_iteration:
            refuse_single_values(model, len(batch.windows) // accumulation_steps)
        images, target = prepare(batch)
        assert len(images) >= accumulation_steps, f"{len(images)} images in {accumulation_steps} parts"
        clock.mark("prepare")
        factor = poly_factor(iteration, max_iterations, power)
        set_lr(optimizer, factor, warm_up_factor(iteration, warm_up_iterations, warm_up_start))
        num_valid = valid_weight(target, cross_entropy.class_weights)
        calls = num_valid.new_full((), int(is_called is not None and is_called()))
        num_here = num_valid.new_full((), len(images))
        num_valid, calls, num_everywhere = summed(torch.stack([num_valid, calls, num_here]))
        clock.mark("all_reduce")
        shares = torch.zeros(3, dtype=torch.float64, device=device)
        optimizer.zero_grad(set_to_none=True)
        parts = zip(
            images.tensor_split(accumulation_steps), target.tensor_split(accumulation_steps), strict=True
        )
        for number, (part, part_target) in enumerate(parts, start=1):
            is_last = number == accumulation_steps
            with _gradients_shared(model, is_last):
                with autocast(device, precision):
                    output = model(part, upsample=False)
                loss = segmentation_loss(
                    output,
                    part_target,
                    num_valid=num_valid,
                    aux_loss_weight=aux_loss_weight,
                    kind=cross_entropy,
                )
                shares += torch.stack([term.detach().double() for term in loss])
                clock.mark("forward")
                scaler.scale(loss.total * num_workers).backward()
                clock.mark("all_reduce" if is_last and num_workers > 1 else "backward")
        everyones = summed(shares.clone())
        clock.mark("all_reduce")
        scaler.unscale_(optimizer)
        norm = _limit_gradients(model, max_gradient_norm)
        counts = torch.stack([calls, num_everywhere]).double()
        *losses, gradient_norm, num_calls, num_batch = torch.cat(
            [everyones, norm.double()[None], counts]
        ).tolist()
        if not all(map(math.isfinite, losses)):
            raise DivergedError(iteration, _names_of_diverged(shares, batch.names))
        is_finite = math.isfinite(gradient_norm)
        if is_finite or scaler.is_enabled():
            scaler.step(optimizer)  # not with a gradient that is not finite: the scale may be too large
            scaler.update()
        if not is_finite and (not scaler.is_enabled() or scaler.get_scale() < 1):
            raise DivergedError(iteration, _gathered(batch.names), "gradient")
        if average is not None:
            average.update_parameters(unwrapped(model))
        clock.mark("optimizer")
        clock.end_step()

        sums += torch.tensor(losses, dtype=torch.float64)
        norms += [gradient_norm] if is_finite else []
        num_images += int(num_batch)
        data_wait_s += wait_s
        lr = float(optimizer.param_groups[0]["lr"])
        if on_iteration is not None:
            total, main, aux = losses
            on_iteration(
                IterationStats(
                    iteration=iteration,
                    epoch=epoch,
                    loss=total,
                    main_loss=main,
                    aux_loss=aux,
                    gradient_norm=gradient_norm,
                    lr=lr,
                    images_per_s=num_batch / (time.monotonic() - began),
                    data_wait_s=wait_s,
                    parts_s=clock.latest,
                )
            )
        iteration += 1
        if num_calls and on_call is not None:
            total, main, aux = sums.tolist()
            on_call(
                EpochPart(
                    iterations=iteration - start_iteration,
                    num_images=num_images,
                    sums=(total, main, aux),
                    norms=list(norms),
                    scaler=scaler.state_dict(),
                    seconds=time.monotonic() - started,
                )
            )
    num_iterations, num_timed = iteration - start_iteration, iteration - first_iteration
    assert num_iterations > 0, "an epoch without a batch"
    total, main, aux = (sums / num_iterations).tolist()
    seconds = [data_wait_s, *clock.close().values()]
    found = torch.tensor([*seconds, not _has_finite_state(model)], dtype=torch.float64, device=device)
    waited, *parts_s, num_overflown = (summed(found) / num_workers).tolist()
    if num_overflown:
        raise DivergedError(iteration - 1, _gathered(batch.names), "state")
    return TrainStats(
        loss=total,
        main_loss=main,
        aux_loss=aux,
        lr=lr,
        images_per_s=num_images / (time.monotonic() - started),
        data_wait_s=waited,
        parts_s={part: total / max(1, num_timed) for part, total in zip(PARTS, parts_s, strict=True)},
        gradient_norm=sum(norms) / max(1, len(norms)),
        iterations=num_iterations,
        scaler=scaler.state_dict(),
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
    network = for_prediction(unwrapped(model), device)
    confusion = ConfusionMatrix(network.num_classes, device)
    for index in indices:
        label = split.label(index)
        if label is None:
            raise ValueError(f"An evaluated image must have a label, but {split.name(index)} has none.")
        prediction = predict(
            network, split.image(index), mean=mean, std=std, device=device, precision=precision
        )
        confusion.update(torch.from_numpy(prediction), torch.tensor(label))
    confusion.all_reduce()
    return confusion


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


def _gradients_shared(model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[None]:
    """Let DDP sum gradients over workers only in the last backward pass of an optimizer step."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    return contextlib.nullcontext()


def _limit_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Return the norm of all gradients together, and scale them down to `max_norm` where that is not 0."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@torch.no_grad()
def _has_finite_state(model: nn.Module) -> bool:
    """Whether weights and BatchNorm's statistics are finite: their norm is, or else each value is looked at."""
    values = [value for value in model.state_dict().values() if value.is_floating_point()]
    # The norm takes a ninth of the time: 18 ms of one core for a ResNet-50. Squares overflow before values do.
    return math.isfinite(nn.utils.get_total_norm(values)) or all(
        bool(value.isfinite().all()) for value in values
    )


def _names_of_diverged(shares: Tensor, names: Sequence[str]) -> list[str]:
    found = _gathered([] if shares.isfinite().all() else names)
    return found or _gathered(names)


def _gathered(names: Sequence[str]) -> list[str]:
    """Return the names of all workers, in the order of their ranks."""
    if world_size() == 1:
        return list(names)
    everyones: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(everyones, list(names))
    return [name for theirs in everyones for name in theirs]

"""Steps of a preset on given batches, as a training takes them, for comparison with the code of others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pspnet.data import Batch
from pspnet.engine import train_one_epoch
from pspnet.model import PSPNet
from pspnet.optim import build_optimizer
from pspnet.training_stats import IterationStats
from pspnet.transforms import Window
from segfleet.config import OptimConfig


def new_optimizer(model: PSPNet, optim: OptimConfig) -> torch.optim.SGD:
    return build_optimizer(
        model,
        base_lr=optim.base_lr,
        head_lr_factor=optim.head_lr_factor,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        min_lr=optim.min_lr,
    )


def steps_of(
    model: PSPNet, batches: Sequence[tuple[Tensor, Tensor]], optim: OptimConfig, *, max_iterations: int
) -> list[IterationStats]:
    """Train on the batches of images and targets; torch is seeded with the number of each step, for the dropout."""
    steps: list[IterationStats] = []

    def prepare(batch: Batch) -> tuple[Tensor, Tensor]:
        torch.manual_seed(len(steps))
        return batches[len(steps)]

    train_one_epoch(
        model,
        new_optimizer(model, optim),
        [_placeholder(len(images)) for images, _ in batches],
        prepare=prepare,
        epoch=0,
        start_iteration=0,
        max_iterations=max_iterations,
        power=optim.power,
        aux_loss_weight=optim.aux_loss_weight,
        max_gradient_norm=optim.max_gradient_norm,
        warm_up_iterations=optim.warm_up_iterations,
        on_iteration=steps.append,
    )
    return steps


def _placeholder(size: int) -> Batch:
    """Return a batch of so many windows of a pixel; `prepare` gives what is trained on."""
    return Batch(
        torch.zeros(4 * size, dtype=torch.uint8),
        [Window(0, 0, 1, 1)] * size,
        samples=[],
        names=["a"] * size,
    )

"""SGD with momentum, the heads at a multiple of the backbone's rate, and the poly schedule."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pspnet.model import PSPNet


def parameter_groups(
    model: PSPNet, *, base_lr: float, head_lr_factor: float, min_lr: float = 0.0
) -> list[dict[str, Any]]:
    """Return the backbone's parameters at `base_lr` and all others at `base_lr * head_lr_factor`.

    Both fall to `min_lr`, as mmsegmentation's `eta_min` is meant.
    """
    backbone = list(model.backbone.parameters())
    in_backbone = {id(parameter) for parameter in backbone}
    heads = [parameter for parameter in model.parameters() if id(parameter) not in in_backbone]
    head_lr = base_lr * head_lr_factor
    return [
        {"name": "backbone", "params": backbone, "lr": base_lr, "initial_lr": base_lr, "min_lr": min_lr},
        {"name": "heads", "params": heads, "lr": head_lr, "initial_lr": head_lr, "min_lr": min_lr},
    ]


def build_optimizer(
    model: PSPNet,
    *,
    base_lr: float,
    head_lr_factor: float,
    momentum: float,
    weight_decay: float,
    min_lr: float = 0.0,
) -> torch.optim.SGD:
    """Return SGD over `parameter_groups`; `weight_decay` is on all parameters, as in the paper's code."""
    groups = parameter_groups(model, base_lr=base_lr, head_lr_factor=head_lr_factor, min_lr=min_lr)
    return torch.optim.SGD(groups, lr=base_lr, momentum=momentum, weight_decay=weight_decay)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over `optimizer.state_dict()` of a checkpoint, whose tensors lie in memory as safetensors keeps them.

    Momentum gets the strides of its parameter again: where they differ, torch steps one parameter after another
    instead of all in a few kernels.
    """
    optimizer.load_state_dict(dict(state))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            values = optimizer.state.get(parameter, {})
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def poly_factor(iteration: int, max_iterations: int, power: float) -> float:
    """Return (1 - iteration / max_iterations) ** power: 1 at the first iteration, 0 at the end."""
    assert 0 <= iteration <= max_iterations, f"iteration {iteration} of {max_iterations}"
    return float((1 - iteration / max_iterations) ** power)


def warm_up_factor(iteration: int, num_iterations: int, start: float) -> float:
    """Return start + (1 - start) * min(1, iteration / num_iterations), by which the scheduled rate is multiplied.

    That is torch's `LinearLR` chained with the schedule, and mmsegmentation's linear warm-up. 1 without warm-up.
    """
    if iteration >= num_iterations:
        return 1.0
    return start + (1 - start) * iteration / num_iterations


def set_lr(optimizer: torch.optim.Optimizer, factor: float, warm_up: float = 1.0) -> None:
    """Set each group's learning rate so far between its initial one (factor 1) and its least (factor 0).

    The finished rate is multiplied by the factor of the warm-up.
    """
    for group in optimizer.param_groups:
        least = group.get("min_lr", 0.0)
        group["lr"] = ((group["initial_lr"] - least) * factor + least) * warm_up

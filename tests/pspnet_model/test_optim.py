"""Groups, schedule and steps are the formulas, by hand."""

import importlib
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

from pspnet.model import PSPNet
from pspnet.optim import (
    build_optimizer,
    load_optimizer_state,
    parameter_groups,
    poly_factor,
    set_lr,
)


def test_the_backbone_learns_at_base_lr_and_everything_else_at_ten_times_that() -> None:
    model = PSPNet(3, backbone="resnet18", head_channels=8)
    backbone, heads = parameter_groups(model, base_lr=0.01, head_lr_factor=10.0)
    assert (backbone["lr"], heads["lr"]) == (0.01, pytest.approx(0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_backbone = {names[id(parameter)] for parameter in backbone["params"]}
    in_heads = {names[id(parameter)] for parameter in heads["params"]}
    assert in_backbone == {name for name in names.values() if name.startswith("backbone.")}
    assert in_heads == set(names.values()) - in_backbone
    assert any(name.startswith("aux_head.") for name in in_heads)
    assert len(backbone["params"]) + len(heads["params"]) == len(names)


@pytest.mark.parametrize(
    ("iteration", "power", "factor"),
    [(0, 0.9, 1.0), (50, 1.0, 0.5), (75, 2.0, 0.0625), (50, 0.9, 0.5**0.9), (100, 0.9, 0.0)],
)
def test_poly_is_one_minus_progress_to_the_power(iteration: int, power: float, factor: float) -> None:
    assert poly_factor(iteration, 100, power) == pytest.approx(factor)


def test_the_schedule_starts_from_the_initial_rate_whatever_was_set_before() -> None:
    optimizer = build_optimizer(
        PSPNet(3, backbone="resnet18"), base_lr=0.01, head_lr_factor=10.0, momentum=0.9, weight_decay=1e-4
    )
    for factor in (0.5, 0.25):
        set_lr(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [0.01 * factor, 0.1 * factor]
        )


def test_two_steps_of_sgd_by_hand() -> None:
    """d = g + wd * w; v = momentum * v + d; w -= lr * v."""
    model = PSPNet(3, backbone="resnet18", head_channels=8)
    optimizer = build_optimizer(model, base_lr=0.1, head_lr_factor=2.0, momentum=0.9, weight_decay=0.01)
    for weight, lr in ((model.backbone.bn1.weight, 0.1), (model.head.norm.weight, 0.2)):
        with torch.no_grad():
            weight.fill_(1.0)
        for gradient in (0.5, -0.25):
            optimizer.zero_grad()
            weight.grad = torch.full_like(weight, gradient)
            optimizer.step()
        first = 0.5 + 0.01
        after_first = 1 - lr * first
        second = 0.9 * first - 0.25 + 0.01 * after_first
        torch.testing.assert_close(weight[0].item(), after_first - lr * second, rtol=1e-6, atol=0)


def test_loaded_momentum_lies_in_memory_as_its_parameter_does() -> None:
    """As safetensors keeps it, it is contiguous; the network is in channels_last."""
    model = PSPNet(3, backbone="resnet18", head_channels=8).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, base_lr=0.01, head_lr_factor=10.0, momentum=0.9, weight_decay=5e-4)
    weights = list(model.parameters())
    state = optimizer.state_dict()
    stored = [torch.randn(weight.shape) for weight in weights]
    state["state"] = {number: {"momentum_buffer": tensor} for number, tensor in enumerate(stored)}
    load_optimizer_state(optimizer, state)
    order = [weight for group in optimizer.param_groups for weight in group["params"]]
    for weight, before in zip(order, stored, strict=True):
        momentum = optimizer.state[weight]["momentum_buffer"]
        assert momentum.stride() == weight.stride()
        assert torch.equal(momentum, before)


def test_the_rate_falls_to_the_least_one_of_every_group() -> None:
    """mmsegmentation's PolyLR in closed form: (base_lr - eta_min) * factor + eta_min."""
    model = PSPNet(3, backbone="resnet18", head_channels=8)
    optimizer = build_optimizer(
        model, base_lr=0.01, head_lr_factor=10.0, momentum=0.9, weight_decay=5e-4, min_lr=1e-4
    )
    for factor, backbone, heads in ((1.0, 0.01, 0.1), (0.5, 0.00505, 0.05005), (0.0, 1e-4, 1e-4)):
        set_lr(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([backbone, heads])


def test_each_rate_is_mmengines() -> None:
    """SEGFLEET_MMSEG is a folder with mmengine. Its schedule reaches its end one iteration before the training's."""
    folder = os.environ.get("SEGFLEET_MMSEG", "")
    if not (Path(folder) / "mmengine").is_dir():
        pytest.skip("SEGFLEET_MMSEG names no folder with mmengine")
    sys.path.append(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedulers = importlib.import_module("mmengine.optim.scheduler")
    sys.path.remove(folder)
    iterations = 50
    theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    schedule = schedulers.PolyLR(theirs, eta_min=1e-4, power=0.9, begin=0, end=iterations, by_epoch=False)
    ours = build_optimizer(
        PSPNet(3, backbone="resnet18", head_channels=8),
        base_lr=0.01,
        head_lr_factor=1.0,
        momentum=0.9,
        weight_decay=5e-4,
        min_lr=1e-4,
    )
    for iteration in range(iterations):
        set_lr(ours, poly_factor(iteration, iterations - 1, 0.9))
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
        theirs.step()
        schedule.step()

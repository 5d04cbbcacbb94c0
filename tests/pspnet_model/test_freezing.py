"""What is frozen keeps its weights and statistics while the rest is trained."""

import copy
from typing import Any

import pytest
from torch import nn

from pspnet.errors import InputError
from pspnet.freezing import Frozen, freeze, train_mode
from pspnet.model import PSPNet
from tests.pspnet_model import engine_workers

STEM = ("backbone.conv1.", "backbone.bn1.")


def changed(batches: Any = None, **frozen: Any) -> tuple[PSPNet, set[str]]:
    """Train three iterations and return the names of all tensors that changed."""
    model = engine_workers.new_model().double()
    freeze(model, **frozen)
    before = copy.deepcopy(model.state_dict())
    engine_workers.train(model, batches or engine_workers.batches(0, 1))
    return model, {name for name, value in model.state_dict().items() if not value.equal(before[name])}


@pytest.mark.parametrize(
    ("num_stages", "prefixes"),
    [
        (0, ()),
        (1, STEM),
        (3, (*STEM, "backbone.layer1.", "backbone.layer2.")),
        (5, ("backbone.",)),
    ],
)
def test_frozen_stages_keep_weights_and_statistics(num_stages: int, prefixes: tuple[str, ...]) -> None:
    model, names = changed(num_stages=num_stages)
    everything = set(model.state_dict())
    assert names == {name for name in everything if not name.startswith(prefixes or "none")}


@pytest.mark.parametrize(("part", "prefix"), [("none", "nowhere"), ("backbone", "backbone."), ("all", "")])
def test_frozen_batch_norm_keeps_weights_and_statistics(part: Frozen, prefix: str) -> None:
    model, names = changed(batch_norm=part)
    frozen = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and name.startswith(prefix)
        for key in module.state_dict()
    }
    assert names == set(model.state_dict()) - frozen


def test_training_mode_after_an_evaluation_leaves_frozen_statistics_alone() -> None:
    model = engine_workers.new_model()
    freeze(model, num_stages=2, batch_norm="none")
    model.eval()
    model.train()
    train_mode(model)
    is_training = {
        name: module.training for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
    }
    assert {name for name, training in is_training.items() if not training} == {
        name for name in is_training if name.startswith(("backbone.bn1", "backbone.layer1."))
    }
    assert model.training


def test_with_frozen_batch_norm_one_image_at_a_time_will_do() -> None:
    _, names = changed(engine_workers.batches(0, engine_workers.GLOBAL_BATCH_SIZE), batch_norm="all")
    assert names


def test_stages_that_are_not_there_cannot_be_frozen() -> None:
    model = PSPNet(3, backbone="mobilenet_v2", head_channels=8)
    with pytest.raises(
        InputError,
        match=r"but got 2 for mobilenet_v2, which has no layer1, layer2, layer3, layer4\. Set it to 0",
    ):
        freeze(model, num_stages=2)


def test_batch_norm_that_is_not_there_cannot_be_frozen() -> None:
    model = PSPNet(3, backbone="resnet18", head_channels=8)
    model.backbone = PSPNet(3, backbone="resnet18", head_channels=8, norm="group").backbone
    with pytest.raises(
        InputError, match=r"freeze_batch_norm backbone needs .*but resnet18 has none\. Leave it out"
    ):
        freeze(model, batch_norm="backbone")
    freeze(model, batch_norm="all")  # the heads have it

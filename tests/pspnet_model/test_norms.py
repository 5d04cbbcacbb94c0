"""GroupNorm knows one image only; synchronised BatchNorm predicts what BatchNorm does."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pspnet.model import PSPNet, refuse_single_values
from pspnet.norms import num_groups, synchronised, use_group_norm
from tests.pspnet_model import norm_workers


def grouped(backbone: str) -> PSPNet:
    torch.manual_seed(0)
    return PSPNet(3, backbone=backbone, head_channels=8, dropout=0.0, norm="group").double().train()


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(64, 32), (2048, 32), (144, 24), (24, 12), (16, 8), (8, 4), (80, 20), (7, 1), (1, 1)],
)
def test_groups_are_32_or_fewer_that_divide_the_channels_and_hold_two(channels: int, groups: int) -> None:
    assert num_groups(channels) == groups


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "mobilenet_v2"])
def test_with_group_norm_a_training_image_knows_nothing_of_its_neighbours(backbone: str) -> None:
    """Also with one image, whose 1x1 bin BatchNorm refuses."""
    model = grouped(backbone)
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    refuse_single_values(model, 1)
    images = torch.randn(2, 3, 33, 41, dtype=torch.float64)
    together = model(images)
    for index in range(2):
        alone = model(images[index : index + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[index])
        torch.testing.assert_close(alone.aux_logits[0], together.aux_logits[index])


def test_group_norm_is_that_of_the_paper() -> None:
    """Section 3.1: each group's values, over its channels and all pixels, less their mean, by their deviation."""
    norm = nn.BatchNorm2d(6)
    norm.load_state_dict(norm.state_dict() | {"weight": torch.arange(6.0), "bias": torch.full((6,), 0.5)})
    holder = nn.Sequential(norm)
    use_group_norm(holder)
    x = torch.randn(2, 6, 4, 5)
    groups = x.view(2, 3, -1)
    spread = (groups.var(2, correction=0) + 1e-5).sqrt()
    expected = ((groups - groups.mean(2)[:, :, None]) / spread[:, :, None]).view_as(x)
    torch.testing.assert_close(holder(x), expected * torch.arange(6.0)[:, None, None] + 0.5)


@pytest.mark.slow
def test_two_workers_with_group_norm_train_the_weights_of_one(tmp_path: Path) -> None:
    """In training mode, on CPUs: what BatchNorm there cannot."""
    alone = norm_workers.trained(rank=0, world_size=1)
    for theirs in norm_workers.run_group(tmp_path, 2):
        for name, weight in alone.items():
            torch.testing.assert_close(theirs[name], weight, rtol=1e-7, atol=1e-10)
    assert (
        alone["head.classifier.bias"] - norm_workers.new_model().state_dict()["head.classifier.bias"]
    ).abs().max() > 1e-3


def test_synchronised_batchnorm_predicts_what_batchnorm_does() -> None:
    torch.manual_seed(0)
    model = PSPNet(3, backbone="resnet18", head_channels=8).eval()
    same_predictions(model, synchronised(copy.deepcopy(model)))


@pytest.mark.parametrize("name", ["regnety_002", "mobilenetv3_small_050"])
def test_timms_batchnorms_keep_their_activations(name: str) -> None:
    """torch's convert_sync_batchnorm would lose them."""
    pytest.importorskip("timm", reason="the extra `timm` is not installed")
    torch.manual_seed(0)
    model = PSPNet(3, backbone=f"timm:{name}", head_channels=8).eval()
    same_predictions(model, synchronised(copy.deepcopy(model)))
    activated = [module for module in model.backbone.modules() if hasattr(module, "act")]
    assert activated
    with_groups = copy.deepcopy(model)
    use_group_norm(with_groups)
    assert not [module for module in with_groups.modules() if isinstance(module, nn.BatchNorm2d)]
    assert kinds_of_activation(with_groups) == kinds_of_activation(model)


def same_predictions(model: PSPNet, converted: Any) -> None:
    assert [module for module in converted.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert not [module for module in converted.modules() if isinstance(module, nn.BatchNorm2d)]
    images = torch.randn(1, 3, 33, 41)
    with torch.no_grad():
        torch.testing.assert_close(converted.eval()(images).logits, model(images).logits)


def kinds_of_activation(model: nn.Module) -> list[str]:
    kinds = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid)
    return sorted(type(module).__name__ for module in model.modules() if isinstance(module, kinds))


def test_the_statistics_of_a_group_are_never_a_single_value() -> None:
    """The smallest grid of a narrow head: 1x1, 8 channels."""
    model = grouped("resnet18")
    images: Tensor = torch.randn(1, 3, 33, 33, dtype=torch.float64)
    model(images).logits.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.head.branches[0].parameters())

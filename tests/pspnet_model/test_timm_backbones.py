"""timm's networks as backbones equal timm's own; what cannot be had is refused by name."""

import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pspnet.backbones import build_backbone
from pspnet.errors import InputError, MissingPackageError
from pspnet.flops import training_flops
from pspnet.memory import count_step, step_memory
from pspnet.model import PSPNet
from pspnet.weights import load_backbone_weights


@pytest.fixture
def timm() -> Any:
    return pytest.importorskip("timm", reason="the extra `timm` is not installed")


def psp(name: str, **changes: Any) -> PSPNet:
    torch.manual_seed(0)
    return PSPNet(3, backbone=f"timm:{name}", head_channels=8, **changes)


def test_without_timm_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        MissingPackageError, match=r"timm:resnet18' needs the library timm.*pip install 'segfleet\[timm\]'"
    ):
        build_backbone("timm:resnet18")


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [
        ("resnet18", 8),
        ("resnet18", 16),
        ("regnety_002", 8),
        ("regnety_002", 16),
        ("mobilenetv3_small_050", 32),
    ],
)
def test_its_features_are_those_of_timms_whole_network(
    timm: Any, name: str, output_stride: int, tmp_path: Path
) -> None:
    """The weights go through a file under timm's names, classifier and all."""
    # Only its networks by the name of features_only dilate MobileNetV3.
    stride = {} if output_stride == 32 else {"output_stride": output_stride}
    theirs = timm.create_model(name, **stride).eval()
    randomise_statistics(theirs)
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    model = psp(name, output_stride=output_stride).eval()
    load_backbone_weights(model, str(tmp_path / "timm.safetensors"))
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        *_, stage3, stage4 = theirs.forward_intermediates(images, intermediates_only=True, norm=False)
        features = model.backbone(images)
    assert stage4.shape[2:] == (64 // output_stride + 1, 96 // output_stride + 1)
    assert (features.stage3.shape[1], stage4.shape[1]) == (
        model.backbone.stage3_channels,
        model.backbone.stage4_channels,
    )
    assert torch.equal(features.stage3, stage3)
    assert torch.equal(features.stage4, stage4)


def test_a_network_is_rebuilt_from_its_architecture_and_trains(timm: Any) -> None:
    model = psp("resnet18")
    again = PSPNet.from_architecture(model.architecture).eval()
    again.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 33, 41)
    with torch.no_grad():
        assert torch.equal(again(images).logits, model.eval()(images).logits)
    output = model.train()(images)
    (output.logits.sum() + output.aux_logits.sum()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize(("name", "align_corners"), [("regnety_002", True), ("convnext_atto", False)])
def test_a_step_of_a_network_that_asks_for_values_while_it_is_built_is_counted_on_sizes_alone(
    timm: Any, monkeypatch: pytest.MonkeyPatch, name: str, align_corners: bool
) -> None:
    """With the loss that a GPU takes, which test_memory.py tells of."""
    monkeypatch.setattr("pspnet.loss._HAS_NUMBA", False)
    model = psp(name, align_corners=align_corners)
    state = torch.get_rng_state()
    flops = training_flops(model, 65)
    predicted = step_memory(lambda: PSPNet.from_architecture(model.architecture), 65, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert predicted == count_step(model, 65, 2)
    with FlopCounterMode(display=False) as counter:
        count_step(model, 65, 2)
    assert flops == counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18x", r"got 'timm:resnet18x'\. Near are: .*resnet18"),
        ("vgg16", "timm's vgg16 cannot"),
        ("densenet121", "timm's densenet121 cannot .*output_stride"),
        ("vit_tiny_patch16_224", "timm's vit_tiny_patch16_224 cannot"),
    ],
)
def test_a_network_that_is_unknown_or_has_no_output_stride_is_refused_by_name(
    timm: Any, name: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_backbone(f"timm:{name}")


@pytest.mark.parametrize("name", ["botnet26t_256", "halonet26t"])
def test_a_network_that_does_not_take_pictures_of_any_size_is_refused_by_name(timm: Any, name: str) -> None:
    with pytest.raises(InputError, match=rf"any size, but timm's {name} takes those of certain sizes only"):
        build_backbone(f"timm:{name}")


def test_a_network_whose_cells_miss_the_last_pixel_needs_cells_that_are_spread_evenly(timm: Any) -> None:
    with pytest.raises(InputError, match=r"align_corners must be False for timm:convnext_atto"):
        psp("convnext_atto")
    model = psp("convnext_atto", align_corners=False).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 65, 73)).logits.shape == (1, 3, 65, 73)


def test_wrong_keys_of_a_file_are_named(timm: Any, tmp_path: Path) -> None:
    state = timm.create_model("resnet18").state_dict()
    del state["layer3.1.conv2.weight"]
    state["stem.weight"] = torch.zeros(1)
    safetensors.torch.save_file(state, tmp_path / "timm.safetensors")
    with pytest.raises(
        InputError, match=r"1 missing: network\.layer3\.1\.conv2\.weight; 1 unexpected: stem\.weight"
    ):
        load_backbone_weights(psp("resnet18"), str(tmp_path / "timm.safetensors"))


def randomise_statistics(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)

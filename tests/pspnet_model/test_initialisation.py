"""Laws: a network built without draws is that of its shapes, its constants are set, and torch's compiler stays away."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from pspnet.initialisation import WithoutDraws
from pspnet.model import PSPNet


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_loaded_with_a_networks_weights_it_computes_what_the_network_does(backbone: str) -> None:
    torch.manual_seed(0)
    drawn = PSPNet(3, backbone=backbone, head_channels=8).eval()
    state = torch.get_rng_state()
    with WithoutDraws():
        empty = PSPNet(3, backbone=backbone, head_channels=8).eval()
    assert torch.equal(torch.get_rng_state(), state)
    constants = [module for module in empty.modules() if isinstance(module, nn.BatchNorm2d)]
    assert constants
    for norm in constants:
        assert norm.running_var is not None
        assert torch.equal(norm.running_var, torch.ones_like(norm.running_var))
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert torch.equal(norm.bias, torch.zeros_like(norm.bias))
    empty.load_state_dict(drawn.state_dict())
    images = torch.rand(2, 3, 49, 65)
    assert torch.equal(empty(images).logits, drawn(images).logits)


def test_outside_of_it_everything_is_drawn() -> None:
    with WithoutDraws():
        pass
    torch.manual_seed(0)
    first = PSPNet(3, backbone="resnet18", head_channels=8).state_dict()
    torch.manual_seed(1)
    second = PSPNet(3, backbone="resnet18", head_channels=8).state_dict()
    same = {key for key in first if torch.equal(first[key], second[key])}
    assert not [key for key in same if first[key].ndim == 4]


def test_a_network_of_shapes_alone_does_not_load_torchs_compiler() -> None:
    code = """
import sys, torch
from pspnet.initialisation import WithoutDraws
from pspnet.model import PSPNet
with torch.device("meta"), WithoutDraws():
    assert all(value.is_meta for value in PSPNet(19, backbone="resnet50").state_dict().values())
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

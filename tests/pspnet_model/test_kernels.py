"""Law of the kernels: they compute what the plain network does."""

import copy

import pytest
import torch
from torch import Tensor

from pspnet.distributed import parallelise
from pspnet.loss import segmentation_loss
from pspnet.model import PSPNet


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "mobilenet_v2"])
def test_a_step_on_the_kernels_of_one_thread_is_the_plain_step(backbone: str) -> None:
    torch.manual_seed(0)
    plain = PSPNet(3, backbone=backbone, head_channels=8, dropout=0.0).double()
    ours = copy.deepcopy(plain)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        parallelise(ours, "cpu")
    finally:
        torch.set_num_threads(num_threads)
    changed = [part for part in ours.modules() if getattr(part, "dilation", None) == (2, 2)]
    assert any(part.kernel_size == (1, 1) for part in changed)
    images, target = torch.randn(4, 3, 49, 41, dtype=torch.float64), torch.randint(0, 3, (4, 49, 41))
    found: list[list[Tensor]] = []
    for network in (plain.train(), ours.train()):
        loss = segmentation_loss(
            network(images, upsample=False), target, num_valid=target.numel(), aux_loss_weight=0.4
        ).total
        loss.backward()
        found.append([loss.detach(), *(it.grad for it in network.parameters() if it.grad is not None)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)

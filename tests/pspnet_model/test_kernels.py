"""Law of the kernels: they compute what the plain network does."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pspnet.distributed import parallelise
from pspnet.kernels import use_fast_depthwise_gradients
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
    depthwise = [part for part in ours.modules() if getattr(part, "groups", 1) > 1]
    assert any(type(part) is not nn.Conv2d for part in depthwise) == (backbone == "mobilenet_v2")
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


@pytest.mark.parametrize(("stride", "dilation"), [(1, 2), (1, 3), (2, 1)])
@pytest.mark.parametrize(("height", "width"), [(23, 23), (24, 17), (5, 8)])
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_fast_depthwise_gradients_are_the_gradients(
    stride: int, dilation: int, height: int, width: int, precision: str
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 6, 3, stride, dilation, dilation, groups=6, bias=False).double()
    fast = copy.deepcopy(plain)
    if precision == "bf16":
        fast.float()
    use_fast_depthwise_gradients(fast)
    assert type(fast) is not type(plain)
    images = torch.randn(2, 6, height, width, dtype=torch.float64)
    found = []
    for conv in (plain, fast):
        x = images.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=conv is fast and precision == "bf16"):
            output = conv(x)
        (output * torch.arange(output.numel()).view_as(output).sin()).sum().backward()
        found.append([output, x.grad, conv.weight.grad])
    rtol, atol = (0.02, 0.15) if precision == "bf16" else (1e-10, 1e-12)
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, check_dtype=False, rtol=rtol, atol=atol)

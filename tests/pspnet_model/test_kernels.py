"""Law of the kernels: they compute what the plain network does."""

import copy
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from pspnet.cpu_depthwise import use_fast_depthwise_gradients
from pspnet.cpu_large_convolution import large_convolution
from pspnet.distributed import parallelise
from pspnet.kernels import (
    PointwiseConv2d,
    WinogradConv2d,
    convolve3x3,
    use_fast_kernels,
    use_matrix_products,
)
from pspnet.loss import segmentation_loss
from pspnet.model import PSPNet


@pytest.fixture(params=[True, False], ids=["matrix_products", "no_matrix_products"])
def multiplies_fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Torch has one thread, on a processor of either kind."""
    monkeypatch.setattr("pspnet.kernels.multiplies_matrices_fast", lambda: request.param)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """No convolution is too small for the laws."""
    monkeypatch.setattr("pspnet.kernels.MIN_WINOGRAD_VALUES", 0)


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("resnet18", {}),
        ("resnet18", {"dilate_first_only": True, "contract_dilation": True}),
        ("resnet50", {}),
        ("resnet50", {"output_stride": 32, "dilations": (1, 1, 2, 4)}),
        ("mobilenet_v2", {}),
        ("mobilenet_v2", {"dilate_first_only": True, "branch_channels": 64, "aux_channels": 64}),
        ("mobilenet_v2", {"output_stride": 32, "dilations": (1, 1, 1, 2, 2, 4, 4)}),
    ],
)
def test_a_step_on_the_kernels_of_one_thread_is_the_plain_step(
    backbone: str, options: dict[str, Any], multiplies_fast: bool
) -> None:
    torch.manual_seed(0)
    plain = PSPNet(3, backbone=backbone, head_channels=64, dropout=0.0, **options).double()
    ours = copy.deepcopy(plain)
    parallelise(ours, "cpu")
    kinds = {type(part) for part in ours.modules()}
    assert (isinstance(ours.head.conv, WinogradConv2d), PointwiseConv2d in kinds) == (multiplies_fast,) * 2
    pointwise = [part for part in ours.backbone.modules() if getattr(part, "kernel_size", 0) == (1, 1)]
    assert {part.dilation for part in pointwise} == {(1, 1) if multiplies_fast else (2, 2)}
    depthwise = [part for part in ours.modules() if getattr(part, "groups", 1) > 1]
    assert any(type(part) is not nn.Conv2d for part in depthwise) == (backbone == "mobilenet_v2")
    images, target = torch.randn(2, 3, 33, 41, dtype=torch.float64), torch.randint(0, 3, (2, 33, 41))
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


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize(("height", "width"), [(12, 16), (23, 17), (5, 8), (1, 3)])
@pytest.mark.parametrize(("channels", "outputs"), [(64, 128), (130, 66)])
def test_winograds_convolution_and_its_gradients_are_the_convolutions(
    dilation: int, height: int, width: int, channels: int, outputs: int
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, outputs, 3, 1, dilation, dilation).double()
    ours = copy.deepcopy(plain)
    use_matrix_products(ours, nn.Identity())
    assert type(ours) is WinogradConv2d
    images = torch.randn(3, channels, height, width, dtype=torch.float64)
    found: list[list[Tensor | None]] = []
    for conv in (plain, ours):
        x = images.clone().requires_grad_()
        output = conv(x)
        (output * torch.arange(output.numel()).view_as(output).sin()).sum().backward()
        found.append([output.detach(), *(it.grad for it in (x, *conv.parameters()))])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("to_predict", [True, False])
def test_winograds_convolution_takes_more_tiles_and_channels_than_it_computes_at_a_time(
    to_predict: bool,
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(576, 64, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    images = torch.randn(2, 576, 61, 67).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = copy.deepcopy(conv).double()(images.double())
        plain_error = (conv(images) - expected).norm()
        use_matrix_products(conv, nn.Identity(), to_predict=to_predict)
        error = (conv(images) - expected).norm()
    assert 0 < error <= 1.5 * plain_error, "it rounds as the plain one does"


def test_the_gradients_of_winograds_convolution_round_a_few_times_as_much_as_the_plain_ones() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 128, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    use_matrix_products(ours, nn.Identity())
    images, factors = torch.rand(2, 64, 67, 61), torch.randn(2, 128, 67, 61)
    found = []
    for conv in (exact, plain, ours):
        x = images.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        conv(x).backward(factors.to(x.dtype))
        assert x.grad is not None
        assert conv.weight.grad is not None
        found.append([x.grad.double(), conv.weight.grad.double()])
    for most, (expected, of_plain, of_ours) in zip((2.5, 8), zip(*found, strict=True), strict=True):
        assert 0 < (of_ours - expected).norm() <= most * (of_plain - expected).norm()


def test_in_bf16_the_convolution_stays_the_plain_one() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 64, 3, padding=2, dilation=2, bias=False)
    ours = copy.deepcopy(plain)
    use_matrix_products(ours, nn.Identity())
    images = torch.randn(2, 64, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(images), plain(images))


def test_a_convolution_with_little_to_save_stays_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 96, 3, padding=1, bias=False)
    ours = copy.deepcopy(plain)
    use_matrix_products(ours, nn.Identity())
    monkeypatch.setattr("pspnet.kernels.MIN_WINOGRAD_VALUES", 64 * 2 * 9 * 9)
    small, large = torch.randn(2, 64, 9, 8), torch.randn(2, 64, 9, 9)
    assert torch.equal(ours(small), plain(small))
    assert not torch.equal(ours(large), plain(large))


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize(("height", "width"), [(12, 16), (23, 17), (5, 8), (1, 3), (1, 1)])
def test_a_large_convolution_and_its_gradients_are_the_convolutions(
    dilation: int, height: int, width: int
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 7, 3, 3, dtype=torch.float64, requires_grad=True)
    images = torch.randn(3, 7, height, width, dtype=torch.float64, requires_grad=True)
    outputs = [
        conv2d(images, weight, padding=dilation, dilation=dilation),
        large_convolution(images, weight, dilation),
    ]
    upstream = torch.randn_like(outputs[0])
    expected, got = (
        [output.detach(), *torch.autograd.grad(output, (images, weight), upstream)] for output in outputs
    )
    for theirs, ours in zip(expected, got, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("channels", "has_bias"), [(1100, False), (512, False), (512, True), (64, False)])
def test_in_bf16_a_convolution_of_many_channels_rounds_as_the_plain_one(
    channels: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    spy = Mock(wraps=large_convolution)
    monkeypatch.setattr("pspnet.kernels.large_convolution", spy)
    exact = nn.Conv2d(channels, 16, 3, padding=2, dilation=2, bias=has_bias).to(torch.bfloat16).double()
    plain, ours = copy.deepcopy(exact).float(), copy.deepcopy(exact).float()
    values = torch.randn(2, channels, 17, 19).bfloat16()
    found: list[list[Tensor]] = []
    for conv in (exact, plain, ours):
        x = values.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=conv is not exact):
            output = convolve3x3(x, conv.weight, conv.bias, dilation=2) if conv is ours else conv(x)
        output.backward(
            torch.arange(output.numel()).view_as(output).sin().to(torch.bfloat16).to(output.dtype)
        )
        gradients = [it.grad for it in (x, *conv.parameters()) if it.grad is not None]
        found.append([it.detach().double() for it in (output, *gradients)])
    assert spy.called == (channels >= 512 and not has_bias)
    assert len(found[0]) == 3 + has_bias
    for expected, of_plain, of_ours in zip(*found, strict=True):
        assert 0 < (of_ours - expected).norm() <= 1.1 * (of_plain - expected).norm()


def test_without_numba_the_convolutions_of_3x3_stay(
    multiplies_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pspnet.kernels._HAS_NUMBA", False)
    model = PSPNet(3, backbone="resnet18", head_channels=64)
    use_fast_kernels(model, model.backbone)
    kinds = {type(part) for part in model.modules()}
    assert WinogradConv2d not in kinds
    assert (PointwiseConv2d in kinds) == multiplies_fast

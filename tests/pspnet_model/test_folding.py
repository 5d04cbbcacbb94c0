"""The network rewritten for prediction is the network."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pspnet.folding import fold_batch_norm, for_prediction
from pspnet.inference import predict
from pspnet.kernels import (
    PointwiseConv2d,
    WinogradConv2d,
    activated,
    use_fast_kernels,
    use_matrix_products,
)
from pspnet.model import PSPNet, pooled_grids


def trained(backbone: str, **options: Any) -> PSPNet:
    """Weights and statistics as far from those of a new network as training makes them."""
    torch.manual_seed(0)
    model = PSPNet(5, backbone=backbone, head_channels=16, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    return model.eval()


NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("resnet18", {}),
    ("resnet50", {"deep_stem": True}),
    ("resnet50", {"output_stride": 16, "bin_sizes": (1, 4), "has_aux_head": False}),
]


@pytest.mark.parametrize(("backbone", "options"), NETWORKS)
@pytest.mark.parametrize(
    ("num_threads", "multiplies_fast", "dilation"), [(1, False, 2), (1, True, 1), (2, True, 1)]
)
def test_the_rewritten_network_gives_the_same_logits_and_has_no_batch_norm(
    backbone: str,
    options: dict[str, Any],
    num_threads: int,
    multiplies_fast: bool,
    dilation: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pspnet.kernels.multiplies_matrices_fast", lambda: multiplies_fast)
    monkeypatch.setattr("pspnet.kernels.MIN_WINOGRAD_VALUES", 0)
    model = trained(backbone, **options).double()
    before = copy.deepcopy(model.state_dict())
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    rewritten = for_prediction(model, "cpu")
    images = torch.randn(2, 3, 49, 65, dtype=torch.float64)
    with torch.inference_mode():
        expected = model(images).logits
        for network in (fold_batch_norm(model), rewritten):
            assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
            torch.testing.assert_close(
                network(images).logits, expected, rtol=0, atol=1e-10 * float(expected.abs().max())
            )
    torch.set_num_threads(threads_before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    dilations = {
        conv.dilation for conv in rewritten.backbone.modules() if getattr(conv, "kernel_size", 0) == (1, 1)
    }
    assert dilations == {(dilation, dilation)}
    kinds = {type(module) for module in rewritten.modules()}
    assert ({PointwiseConv2d, WinogradConv2d} <= kinds) == (num_threads == 1 and multiplies_fast)


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("resnet50", {"output_stride": 32, "dilations": (1, 1, 2, 4), "contract_dilation": True}),
        ("resnet18", {"dilate_first_only": True, "contract_dilation": True}),
        ("mobilenet_v2", {"dilate_first_only": True, "branch_channels": 16, "aux_channels": 8}),
    ],
)
def test_so_does_a_network_as_mmsegmentation_dilates_it(
    backbone: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pspnet.kernels.multiplies_matrices_fast", lambda: True)
    monkeypatch.setattr("pspnet.kernels.MIN_WINOGRAD_VALUES", 0)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    model = trained(backbone, **options).double()
    rewritten = for_prediction(model, "cpu")
    images = torch.randn(1, 3, 97, 65, dtype=torch.float64)
    with torch.inference_mode():
        expected, logits = model(images).logits, rewritten(images).logits
    torch.set_num_threads(threads_before)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    kinds = {type(module) for module in rewritten.modules()}
    assert PointwiseConv2d in kinds
    assert nn.BatchNorm2d not in kinds


def test_predictions_of_the_rewritten_network_are_the_plain_ones() -> None:
    model = trained("resnet18")
    image = np.random.default_rng(0).integers(0, 256, (129, 161, 3), dtype=np.uint8)
    how: dict[str, Any] = {"mean": (120.0,) * 3, "std": (60.0,) * 3, "device": "cpu"}
    plain = predict(model, image, **how)
    assert len(np.unique(plain)) > 1
    assert (predict(for_prediction(model, "cpu"), image, **how) != plain).mean() <= 1e-4


def test_for_a_gpu_the_network_itself_is_put_in_channels_last() -> None:
    model = trained("resnet18")
    before = copy.deepcopy(model.state_dict())
    kernels = next(weight for weight in model.parameters() if weight.dim() == 4 and weight.shape[2] > 1)
    assert for_prediction(model, "cuda") is model
    assert kernels.is_contiguous(memory_format=torch.channels_last)
    assert not kernels.is_contiguous()
    place = kernels.data_ptr()
    assert for_prediction(model, "cuda") is model
    assert kernels.data_ptr() == place, "the second time nothing is copied"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_batch_norm_whose_convolution_is_used_twice_stays() -> None:
    model = trained("resnet18")
    block = model.backbone.layer1[0]
    block.conv2 = block.conv1
    folded = fold_batch_norm(model)
    images = torch.randn(1, 3, 33, 33)
    with torch.inference_mode():
        torch.testing.assert_close(folded(images).logits, model(images).logits, rtol=1e-3, atol=1e-4)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == 2


def test_grids_averaged_with_channels_side_by_side_are_those_averaged_apart() -> None:
    features = torch.randn(2, 7, 11, 13, dtype=torch.float64)
    apart = pooled_grids(features, (1, 2, 3, 6))
    together = pooled_grids(features.contiguous(memory_format=torch.channels_last), (1, 2, 3, 6))
    for a, b, size in zip(apart, together, (1, 2, 3, 6), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(b, nn.functional.adaptive_avg_pool2d(features, size))


@pytest.mark.parametrize("is_channels_last", [True, False])
@pytest.mark.parametrize("has_shortcut", [True, False])
@pytest.mark.parametrize(
    ("kernel_size", "min_values", "to_predict"),
    [(1, 0, True), (3, 0, True), (3, 0, False), (3, 2**18, True)],
)
def test_a_prediction_adds_and_rectifies_in_one_pass(
    kernel_size: int,
    min_values: int,
    to_predict: bool,
    has_shortcut: bool,
    is_channels_last: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("pspnet.kernels.MIN_WINOGRAD_VALUES", min_values)
    monkeypatch.setattr("pspnet.cpu_activation._PIXELS", 50)
    monkeypatch.setattr("pspnet.cpu_convolution._CHANNELS", 48)
    conv = nn.Conv2d(64, 70, kernel_size, padding=kernel_size // 2).double()
    memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
    x = torch.randn(2, 64, 9, 7).double().contiguous(memory_format=memory_format)
    shortcut = None
    if has_shortcut:
        shortcut = torch.randn(2, 70, 9, 7).double().contiguous(memory_format=memory_format)
    with torch.inference_mode():
        convolved = conv(x)
        expected = torch.relu(convolved + (0 if shortcut is None else shortcut))
        use_matrix_products(conv, conv, to_predict=to_predict)
        torch.testing.assert_close(conv(x), convolved, rtol=1e-10, atol=1e-11)
        for _ in range(2):  # the second time with what was kept
            given = activated(conv, nn.Identity(), x, None if shortcut is None else shortcut.clone())
            torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-11)
        x[0, 0, 0, 0] = float("nan")
        assert activated(conv, nn.Identity(), x, shortcut).isnan().any(), "not a number stays that"


def test_a_network_in_training_predicts_with_the_weights_that_it_has_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pspnet.kernels.multiplies_matrices_fast", lambda: True)
    monkeypatch.setattr("pspnet.kernels.MIN_WINOGRAD_VALUES", 0)
    model = trained("resnet18").double()
    plain = copy.deepcopy(model)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    use_fast_kernels(model, model.backbone)  # as a training does
    images = torch.randn(1, 3, 33, 41, dtype=torch.float64)
    for network in (model, plain):
        network.requires_grad_(False)
    seen = []
    for factor in (1.0, 1.25):
        for each in (model, plain):
            for weight in each.parameters():
                weight.mul_(factor)
        with torch.inference_mode():
            expected = plain(images).logits
            for rewritten in (
                for_prediction(model, "cpu"),
                for_prediction(for_prediction(model, "cpu"), "cpu"),
            ):
                for _ in range(2):
                    torch.testing.assert_close(
                        rewritten(images).logits, expected, rtol=0, atol=1e-10 * float(expected.abs().max())
                    )
        seen.append(expected)
    torch.set_num_threads(num_threads)
    assert not torch.allclose(*seen)


@pytest.mark.parametrize("has_shortcut", [True, False])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_in_bf16_what_is_added_and_rectified_is_rounded_once(kernel_size: int, has_shortcut: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 70, kernel_size, padding=kernel_size // 2)
    use_matrix_products(conv, conv)
    x = torch.randn(2, 64, 9, 7).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0], x[1, 1, 1, 1] = float("nan"), float("inf")
    shortcut = torch.randn(2, 70, 9, 7).to(torch.bfloat16) if has_shortcut else None
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert conv.bias is not None
        alone = nn.functional.conv2d(x, conv.weight, padding=conv.padding)
        exact = alone.float() + conv.bias[:, None, None] + (0 if shortcut is None else shortcut.float())
        given = activated(conv, nn.Identity(), x, shortcut)
    assert given.dtype == torch.bfloat16
    rounded = torch.relu(exact).to(torch.bfloat16)
    assert rounded.isnan().any()
    assert rounded.isinf().any()
    if kernel_size == 3:  # by the same kernel, which for products of matrices is another
        torch.testing.assert_close(given, rounded, rtol=0, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(given, rounded, rtol=2**-7, atol=2**-6, equal_nan=True)

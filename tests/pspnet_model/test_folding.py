"""The network rewritten for prediction is the network."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pspnet.folding import fold_batch_norm, for_prediction
from pspnet.inference import predict
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
@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_rewritten_network_gives_the_same_logits_and_has_no_batch_norm(
    backbone: str, options: dict[str, Any], num_threads: int
) -> None:
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
    assert dilations == {(2, 2) if num_threads == 1 else (1, 1)}


def test_predictions_of_the_rewritten_network_are_the_plain_ones() -> None:
    model = trained("resnet18")
    image = np.random.default_rng(0).integers(0, 256, (129, 161, 3), dtype=np.uint8)
    how: dict[str, Any] = {"mean": (120.0,) * 3, "std": (60.0,) * 3, "device": "cpu"}
    plain = predict(model, image, **how)
    assert len(np.unique(plain)) > 1
    assert (predict(for_prediction(model, "cpu"), image, **how) != plain).mean() <= 1e-4


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

"""The pyramid equals its definition; logits lie where the pixels are; a network is rebuilt from its architecture."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pspnet.errors import InputError
from pspnet.inference import argmax_by_strips
from pspnet.model import (
    PSPNet,
    PyramidHead,
    pooled_grids,
    pyramid_convolution,
    refuse_single_values,
    upsampled,
)

BIN_SIZES = (1, 2, 3, 6)


def small(**changes: Any) -> PSPNet:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"num_classes": 5, "backbone": "resnet18", "head_channels": 8}
    return PSPNet(**arguments | changes)


@pytest.mark.parametrize("size", [(17, 17), (9, 14), (4, 3), (1, 1)])
def test_pooling_by_matrix_products_is_adaptive_average_pooling(size: tuple[int, int]) -> None:
    features = torch.randn(2, 5, *size, dtype=torch.float64)
    for grid, bin_size in zip(pooled_grids(features, BIN_SIZES), BIN_SIZES, strict=True):
        torch.testing.assert_close(grid, functional.adaptive_avg_pool2d(features, bin_size))


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(17, 17), (9, 14), (4, 3), (1, 1)])
def test_the_pyramids_convolution_is_that_of_the_concatenation_with_its_gradients(
    size: tuple[int, int], align_corners: bool
) -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    grids = [torch.randn(2, 2, b, b, dtype=torch.float64, requires_grad=True) for b in BIN_SIZES]
    weight = torch.randn(3, 8 + 4 * 2, 3, 3, dtype=torch.float64, requires_grad=True)
    maps = [functional.interpolate(g, size=size, mode="bilinear", align_corners=align_corners) for g in grids]
    expected = functional.conv2d(torch.cat([features, *maps], dim=1), weight, padding=1)
    actual = pyramid_convolution(features, grids, weight, align_corners)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    inputs = [features, weight, *grids]
    for mine, theirs in zip(
        torch.autograd.grad(actual, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_the_gradient_of_the_pyramids_weight_lies_in_memory_as_the_weight() -> None:
    features, weight = torch.randn(2, 8, 9, 9), torch.randn(3, 16, 3, 3)
    grids = [torch.randn(2, 2, b, b, requires_grad=True) for b in BIN_SIZES]
    for dtype in (torch.float32, torch.bfloat16):
        w = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
        x = features.contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = pyramid_convolution(x, grids, w)
        (gradient,) = torch.autograd.grad(output.sum(), w)
        assert gradient.stride() == w.stride(), "or else it is turned round for the optimizer"


def head_by_definition(head: PyramidHead, features: Tensor) -> Tensor:
    """Section 3.2 of the paper, module by module."""
    size = features.shape[2:]
    maps = [
        functional.interpolate(
            branch(functional.adaptive_avg_pool2d(features, b)), size, mode="bilinear", align_corners=True
        )
        for b, branch in zip(head.bin_sizes, head.branches, strict=True)
    ]
    x = functional.relu(head.norm(head.conv(torch.cat([features, *maps], dim=1))))
    return head.classifier(head.dropout(x))


def test_the_head_is_that_of_the_paper() -> None:
    head = small().head.double().eval()
    features = torch.randn(2, 512, 17, 13, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(head(features), head_by_definition(head, features))
    assert head.conv.weight.shape == (8, 2 * 512, 3, 3)


def test_without_bins_the_head_is_a_plain_classifier() -> None:
    head = small(bin_sizes=()).head.double().eval()
    features = torch.randn(1, 512, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(head(features), head_by_definition(head, features))


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(65, 65), (64, 64), (50, 91), (8, 9), (1, 1), (2, 40)])
def test_every_pixel_of_an_image_of_any_size_gets_logits(size: tuple[int, int], align_corners: bool) -> None:
    model = small(align_corners=align_corners).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 3, *size))
    assert output.logits.shape == (1, 5, *size)
    assert output.logits.isfinite().all()
    assert output.aux_logits is None


def test_auxiliary_logits_are_there_in_training_only_and_only_with_a_head_for_them() -> None:
    images = torch.randn(2, 3, 33, 41)
    output = small().train()(images)
    assert output.aux_logits is not None
    assert output.aux_logits.shape == (2, 5, 33, 41)
    assert small(has_aux_head=False).train()(images).aux_logits is None


@pytest.mark.parametrize("size", [(65, 73), (60, 66)])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_cells_lie_on_every_output_stride_th_pixel(size: tuple[int, int], output_stride: int) -> None:
    model = small(output_stride=output_stride).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout2d | nn.BatchNorm2d):
            module.eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        cells, pixels = model(images, upsample=False), model(images)
    assert cells.output_stride == output_stride
    assert pixels.output_stride == 1
    for coarse, fine in ((cells.logits, pixels.logits), (cells.aux_logits, pixels.aux_logits)):
        on_cells = fine[:, :, ::output_stride, ::output_stride]
        torch.testing.assert_close(on_cells, coarse[:, :, : on_cells.shape[2], : on_cells.shape[3]])


def test_upsampling_is_bilinear_with_align_corners() -> None:
    logits = torch.tensor([[[[0.0, 8.0]]]])
    assert upsampled(logits, 8).flatten().tolist() == list(range(9))


def test_an_image_continued_with_zeros_gives_the_same_logits() -> None:
    """60 pixels are continued to 65: predicting the continued image and cutting is the same."""
    model = small().eval()
    image = torch.randn(1, 3, 60, 65)
    with torch.no_grad():
        whole = model(functional.pad(image, (0, 0, 0, 5))).logits
        assert torch.equal(model(image).logits, whole[:, :, :60])


def test_without_align_corners_cells_are_spread_evenly_and_loss_and_prediction_see_the_same_pixels() -> None:
    model = small(align_corners=False).double().eval()
    images = torch.randn(1, 3, 60, 75, dtype=torch.float64)
    with torch.no_grad():
        cells = model.head(model.backbone(images).stage4)
        output = model(images, upsample=False)
    assert cells.shape[2:] == (8, 10)
    assert output.output_stride == 1
    expected = functional.interpolate(cells, size=(60, 75), mode="bilinear", align_corners=False)
    assert torch.equal(output.logits, expected)
    prediction = argmax_by_strips(output.logits, output.output_stride, 60, 75)
    assert torch.equal(prediction, expected.argmax(1).to(torch.uint8))


@pytest.mark.parametrize(
    "changes",
    [
        {"bin_sizes": (1, 4), "output_stride": 16, "dropout": 0.3, "has_aux_head": False, "deep_stem": True},
        {"deep_stem": True, "deep_stem_channels": 64, "contract_dilation": True, "align_corners": False},
        {"backbone": "mobilenet_v2", "norm": "group"},
        {"backbone": "mobilenet_v2", "dilate_first_only": True, "branch_channels": 24, "aux_channels": 7},
        {"dilate_first_only": True, "dilations": (1, 1, 2, 4), "output_stride": 32},
    ],
)
def test_an_architecture_through_json_rebuilds_the_network(changes: dict[str, Any]) -> None:
    model = small(**changes).eval()
    again = PSPNet.from_architecture(json.loads(json.dumps(model.architecture))).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    assert again.architecture == model.architecture
    images = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)


def test_channels_of_branches_and_auxiliary_head_are_the_papers_shares_or_those_given() -> None:
    shares, given = small(), small(branch_channels=9, aux_channels=7)
    for model, channels in ((shares, 512 // 4), (given, 9)):
        first = [next(branch.parameters()) for branch in model.head.branches]
        assert [len(weight) for weight in first] == [channels] * 4
    assert given.head.conv.weight.shape == (8, 512 + 4 * 9, 3, 3)
    assert shares.aux_head is not None
    assert given.aux_head is not None
    assert (len(shares.aux_head.conv.weight), len(given.aux_head.conv.weight)) == (256 // 4, 7)
    head = given.head.double().eval()
    features = torch.randn(2, 512, 17, 13, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(head(features), head_by_definition(head, features))


def test_an_architecture_of_before_there_were_other_stems_and_norms_still_builds_its_network() -> None:
    """As the model.json of a package of then says it."""
    architecture = {
        "num_classes": 5,
        "backbone": "resnet18",
        "output_stride": 8,
        "bin_sizes": [1, 2, 3, 6],
        "head_channels": 8,
        "dropout": 0.1,
        "has_aux_head": True,
        "deep_stem": False,
    }
    assert architecture.items() <= small().architecture.items()
    again = PSPNet.from_architecture(architecture)
    assert again.architecture == small().architecture
    again.load_state_dict(small().state_dict(), strict=True)


def test_one_image_per_worker_is_refused_before_batchnorm_refuses_it() -> None:
    model = small().train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.zeros(1, 3, 33, 33))
    with pytest.raises(InputError, match=r"at least 2 images at a time.*but it has 1: .*model\.norm group"):
        refuse_single_values(model, 1)
    refuse_single_values(model, 2)
    refuse_single_values(nn.SyncBatchNorm.convert_sync_batchnorm(small()), 1)
    without = small(bin_sizes=(2, 3, 6)).train()
    refuse_single_values(without, 1)
    without(torch.zeros(1, 3, 33, 33))


def test_bf16_autocast_pools_in_float32() -> None:
    """1 / 61 has no exact bfloat16: averages computed in it would make 0.992 of ones."""
    features = torch.ones(1, 1, 61, 61, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (grid,) = pooled_grids(features, (1,))
    assert grid.item() == 1


def test_refused_settings_say_what_would_do() -> None:
    with pytest.raises(InputError, match=r"bin_sizes must be at most 512 .* each 1 to 1024"):
        small(bin_sizes=(0, 1))
    with pytest.raises(InputError, match="head_channels must be at least 1, but got 0"):
        small(head_channels=0)
    with pytest.raises(
        InputError, match=r"branch_channels must be at least 0, but got -1\. 0 takes an equal"
    ):
        small(branch_channels=-1)
    with pytest.raises(InputError, match=r"aux_channels must be at least 0, but got -3\. 0 takes a quarter"):
        small(aux_channels=-3)
    with pytest.raises(InputError, match="at least 1 class, but got num_classes = 0"):
        small(num_classes=0)

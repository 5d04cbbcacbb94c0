"""A dilated backbone is torchvision's with other strides."""

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from pspnet.backbones import build_backbone
from pspnet.errors import InputError
from pspnet.initialisation import WithoutDraws
from pspnet.mobilenet import MobileNetV2
from pspnet.resnet import ResNet


def torchvision_stages(name: str) -> Any:
    torch.manual_seed(0)
    return torchvision.models.get_model(name).eval()


def stage3_and_4(network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    stage3 = network.layer3(network.layer2(network.layer1(x)))
    return stage3, network.layer4(stage3)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_without_dilation_it_is_torchvisions_network(name: str) -> None:
    theirs, ours = torchvision_stages(name), ResNet(name, output_stride=32).eval()
    weights = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    ours.load_state_dict(weights, strict=True)
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        expected, features = stage3_and_4(theirs, images), ours(images)
    assert torch.equal(features.stage3, expected[0])
    assert torch.equal(features.stage4, expected[1])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(
    ("output_stride", "dilations"), [(8, {"layer3": 2, "layer4": 4}), (16, {"layer4": 2})]
)
def test_dilated_it_is_torchvisions_network_altered_as_the_papers_authors_do(
    name: str, output_stride: int, dilations: dict[str, int]
) -> None:
    """github.com/hszhao/semseg sets stride 1 and dilation 2 in all of stage 3, and 4 in all of stage 4."""
    theirs, ours = torchvision_stages(name), ResNet(name, output_stride=output_stride).eval()
    ours.load_state_dict(
        {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    )
    for stage, dilation in dilations.items():
        for module in getattr(theirs, stage).modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.dilation = module.padding = (dilation, dilation)
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        expected, features = stage3_and_4(theirs, images), ours(images)
    assert features.stage4.shape[2:] == (64 // output_stride + 1, 96 // output_stride + 1)
    assert torch.equal(features.stage3, expected[0])
    assert torch.equal(features.stage4, expected[1])


@pytest.mark.parametrize("name", ["resnet34", "resnet101", "resnet152"])
def test_the_other_depths_have_torchvisions_names_and_shapes(name: str) -> None:
    with torch.device("meta"), WithoutDraws():
        theirs, ours = torchvision.models.get_model(name), ResNet(name)
    shapes = {key: value.shape for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("size", [(129, 65), (130, 71)])
def test_a_feature_cell_covers_output_stride_pixels(
    name: str, output_stride: int, size: tuple[int, int]
) -> None:
    backbone = build_backbone(name, output_stride=output_stride).eval()
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, *size))
    cells = tuple(-(-side // output_stride) for side in size)
    assert features.stage3.shape == (1, backbone.stage3_channels, *cells)
    assert features.stage4.shape == (1, backbone.stage4_channels, *cells)


def test_a_deep_stem_has_three_convolutions_and_the_same_stride() -> None:
    backbone = ResNet("resnet18", deep_stem=True).eval()
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, 65, 65)).stage4.shape == (1, 512, 9, 9)
    assert [tuple(c.weight.shape) for c in (backbone.conv1, backbone.conv2, backbone.conv3)] == [
        (64, 3, 3, 3),
        (64, 64, 3, 3),
        (128, 64, 3, 3),
    ]


def mobilenet_stages(network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    stage3 = network.features[:14](images)
    return stage3, network.features[14:18](stage3)


def without_classifier(network: Any) -> dict[str, Tensor]:
    return MobileNetV2().named_as_here(network.state_dict())


def test_mobilenet_without_dilation_is_torchvisions_network() -> None:
    theirs, ours = torchvision_stages("mobilenet_v2"), MobileNetV2(output_stride=32).eval()
    ours.load_state_dict(without_classifier(theirs), strict=True)
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        expected, features = mobilenet_stages(theirs, images), ours(images)
    assert features.stage4.shape == (2, 320, 3, 4)
    assert torch.equal(features.stage3, expected[0])
    assert torch.equal(features.stage4, expected[1])


@pytest.mark.parametrize(
    ("output_stride", "dilation_of_block"),
    [
        (8, {7: 2, 8: 2, 9: 2, 10: 2, 11: 2, 12: 2, 13: 2, 14: 4, 15: 4, 16: 4, 17: 4}),
        (16, {14: 2, 15: 2, 16: 2, 17: 2}),
    ],
)
def test_mobilenet_dilated_is_torchvisions_network_with_dilations_in_place_of_strides(
    output_stride: int, dilation_of_block: dict[int, int]
) -> None:
    """At 8 strides 1 2 2 1 1 1 1 and dilations 1 1 1 2 2 4 4 of the seven stages, in all blocks of each."""
    theirs, ours = torchvision_stages("mobilenet_v2"), MobileNetV2(output_stride=output_stride).eval()
    ours.load_state_dict(without_classifier(theirs), strict=True)
    for number, dilation in dilation_of_block.items():
        depthwise = theirs.features[number].conv[1][0]
        depthwise.dilation, depthwise.padding, depthwise.stride = (dilation,) * 2, (dilation,) * 2, (1, 1)
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        expected, features = mobilenet_stages(theirs, images), ours(images)
    assert features.stage4.shape == (1, 320, 64 // output_stride + 1, 96 // output_stride + 1)
    assert torch.equal(features.stage3, expected[0])
    assert torch.equal(features.stage4, expected[1])


def test_contracted_dilation_is_torchvisions() -> None:
    """torchvision's replace_stride_with_dilation leaves the first block of a stage the dilation before it."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    ours = ResNet("resnet50", contract_dilation=True).eval()
    ours.load_state_dict(ours.named_as_here(theirs.state_dict()))
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        expected, features = stage3_and_4(theirs, images), ours(images)
    assert torch.equal(features.stage3, expected[0])
    assert torch.equal(features.stage4, expected[1])


def test_dilations_take_the_place_of_those_of_the_output_stride() -> None:
    """mmsegmentation's d32: all strides, and dilations none the less; the first block has half of them."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50().eval()
    ours = ResNet("resnet50", output_stride=32, dilations=(1, 1, 2, 4), contract_dilation=True).eval()
    ours.load_state_dict(ours.named_as_here(theirs.state_dict()))
    for stage, dilation in ((theirs.layer3, 2), (theirs.layer4, 4)):
        for index, block in enumerate(stage):
            block.conv2.dilation = block.conv2.padding = (dilation if index else dilation // 2,) * 2
    images = torch.randn(1, 3, 161, 129)
    with torch.no_grad():
        expected, features = stage3_and_4(theirs, images), ours(images)
    assert features.stage4.shape[2:] == (6, 5)
    assert torch.equal(features.stage3, expected[0])
    assert torch.equal(features.stage4, expected[1])


def test_of_basic_blocks_the_first_convolutions_alone_are_dilated() -> None:
    theirs = torchvision_stages("resnet18")
    ours = ResNet("resnet18", dilate_first_only=True).eval()
    ours.load_state_dict(ours.named_as_here(theirs.state_dict()))
    for stage, dilation in ((theirs.layer3, 2), (theirs.layer4, 4)):
        stage[0].conv1.stride = stage[0].downsample[0].stride = (1, 1)
        for block in stage:
            block.conv1.dilation = block.conv1.padding = (dilation, dilation)
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        expected, features = stage3_and_4(theirs, images), ours(images)
    assert torch.equal(features.stage3, expected[0])
    assert torch.equal(features.stage4, expected[1])


@pytest.mark.parametrize(
    ("arguments", "dilation_of_block"),
    [
        ({}, {7: 2, 11: 2, 14: 4, 17: 4}),
        ({"output_stride": 16}, {14: 2, 17: 2}),
        ({"dilations": (1, 1, 1, 3, 1, 2, 1)}, {7: 3, 14: 2}),
    ],
)
def test_of_mobilenets_stages_the_first_blocks_alone_are_dilated(
    arguments: dict[str, Any], dilation_of_block: dict[int, int]
) -> None:
    blocks: Any = MobileNetV2(dilate_first_only=True, **arguments).features
    found = {
        number: conv.dilation[0]
        for number in range(1, 18)
        for conv in blocks[number].modules()
        if isinstance(conv, nn.Conv2d) and conv.groups > 1 and conv.dilation != (1, 1)
    }
    assert found == dilation_of_block
    assert [blocks[number].conv[1][0].stride[0] for number in (7, 14)] == (
        [2, 1] if arguments.get("output_stride") == 16 else [1, 1]
    )


def test_dilations_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InputError, match=r"4 numbers of 1 to 64, .*got \(1, 2\)\. At .* means 1 1 2 4\."):
        ResNet("resnet18", dilations=(1, 2))
    with pytest.raises(InputError, match=r"7 numbers of 1 to 64, .*got \(1, 1, 1, 1, 1, 1, 0\)"):
        MobileNetV2(dilations=(1, 1, 1, 1, 1, 1, 0))
    with pytest.raises(InputError, match=r"4 numbers of 1 to 64, .*got \(1, 1, 65, 1\)"):
        ResNet("resnet50", dilations=(1, 1, 65, 1))
    with pytest.raises(InputError, match=r"basic blocks \(resnet18, resnet34\) .*but got resnet50"):
        build_backbone("resnet50", dilate_first_only=True)
    for setting in ({"dilations": (1, 1, 2, 4)}, {"dilate_first_only": True}):
        with pytest.raises(InputError, match=r"but got timm:resnet18, which timm dilates\. Leave them out"):
            build_backbone("timm:resnet18", **setting)


def test_unknown_backbones_and_strides_are_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"one of resnet18, .*mobilenet_v2, timm:NAME, but got 'vgg"):
        build_backbone("vgg")
    with pytest.raises(InputError, match="one of 8, 16, 32, but got 4"):
        ResNet("resnet18", output_stride=4)
    with pytest.raises(InputError, match="one of 8, 16, 32, but got 4"):
        MobileNetV2(output_stride=4)
    with pytest.raises(InputError, match=r"of ResNets \(resnet18, .*\), but got mobilenet_v2"):
        build_backbone("mobilenet_v2", deep_stem=True)

"""A dilated ResNet is torchvision's ResNet with other strides."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from pspnet.backbones import ResNet, load_backbone_weights
from pspnet.errors import InputError
from pspnet.model import PSPNet


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


def test_dilated_it_is_torchvisions_network_altered_as_the_papers_authors_do() -> None:
    """github.com/hszhao/semseg sets stride 1 and dilation 2 in all of stage 3, and 4 in all of stage 4."""
    theirs, ours = torchvision_stages("resnet50"), ResNet("resnet50").eval()
    ours.load_state_dict(
        {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    )
    for stage, dilation in ((theirs.layer3, 2), (theirs.layer4, 4)):
        for name, module in stage.named_modules():
            if name.endswith("conv2"):
                module.dilation, module.padding, module.stride = (dilation,) * 2, (dilation,) * 2, (1, 1)
            elif name.endswith("downsample.0"):
                module.stride = (1, 1)
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        expected, features = stage3_and_4(theirs, images), ours(images)
    assert features.stage4.shape == (1, 2048, 9, 13)
    assert torch.equal(features.stage3, expected[0])
    assert torch.equal(features.stage4, expected[1])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("size", [(129, 65), (130, 71)])
def test_a_feature_cell_covers_output_stride_pixels(
    name: str, output_stride: int, size: tuple[int, int]
) -> None:
    backbone = ResNet(name, output_stride=output_stride).eval()
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


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_weights_of_torchvision_load_from_a_file_with_or_without_the_classifier(
    tmp_path: Path, ending: str
) -> None:
    state = torchvision_stages("resnet18").state_dict()
    path = tmp_path / f"weights{ending}"
    if ending == ".pth":
        torch.save(state, path)
    else:
        # Also as in files of before torch 0.4.1, without counters.
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
        safetensors.torch.save_file(state, path)
    model = PSPNet(3, backbone="resnet18", head_channels=8)
    load_backbone_weights(model, str(path))
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, state.get(key, torch.tensor(0))), key


def test_no_weights_leave_the_random_ones() -> None:
    model = PSPNet(3, backbone="resnet18", head_channels=8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_backbone_weights(model, "")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_every_wrong_key_of_a_weights_file_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = torchvision_stages("resnet18").state_dict()
    del state["layer3.1.conv2.weight"]
    state["stem.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    path = tmp_path / "foreign.pth"
    torch.save(state, path)
    model = PSPNet(3, backbone="resnet18", head_channels=8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_backbone_weights(model, str(path))
    for part in (
        "1 missing: layer3.1.conv2.weight",
        "1 unexpected: stem.weight",
        "1 of another shape: conv1.weight (64, 1, 7, 7) for (64, 3, 7, 7)",
    ):
        assert part in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_weights_file_that_is_absent_damaged_or_no_state_dict_is_refused(tmp_path: Path) -> None:
    model = PSPNet(3, backbone="resnet18", head_channels=8)
    (tmp_path / "torso.pth").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "torso.safetensors").write_bytes(b"\xff" * 20)
    torch.save([1, 2], tmp_path / "list.pth")
    for name, rule in (
        ("absent.pth", "there is no file"),
        ("torso.pth", "cannot be read"),
        ("torso.safetensors", "cannot be read"),
        ("list.pth", "dict of tensors"),
    ):
        with pytest.raises(InputError, match=rule):
            load_backbone_weights(model, str(tmp_path / name))


def test_a_file_that_would_run_code_is_refused_unread(tmp_path: Path) -> None:
    class Shell:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"conv1.weight": Shell()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="cannot be read"):
        load_backbone_weights(PSPNet(3, backbone="resnet18"), str(tmp_path / "evil.pth"))
    assert not (tmp_path / "executed").exists()


def test_genuine_weights_of_another_network_are_refused_with_their_keys(data_dir: Path) -> None:
    path = data_dir / "weights" / "mobilenet_v2_imagenet_features.pth"
    with pytest.raises(InputError, match=r"unexpected: .*features\.0\.0\.weight"):
        load_backbone_weights(PSPNet(3, backbone="resnet18"), str(path))


def test_unknown_backbones_and_strides_are_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"one of resnet18, .* but got vgg"):
        ResNet("vgg")
    with pytest.raises(InputError, match="one of 8, 16, 32, but got 4"):
        ResNet("resnet18", output_stride=4)

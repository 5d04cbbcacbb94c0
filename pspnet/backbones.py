"""Dilated ResNets (He et al., CVPR 2016; Yu et al., CVPR 2017) whose weights carry torchvision's names.

Axes: n images, c channels, h w pixels, fh fw feature cells.
"""

# ruff: noqa: F722
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from pspnet.errors import InputError


class Features(NamedTuple):
    """What the last two stages compute, for the auxiliary head and for the pyramid."""

    stage3: Float[Tensor, "n c3 fh fw"]
    stage4: Float[Tensor, "n c4 fh fw"]


class ResNet(nn.Module):
    """A ResNet without classifier: beyond `output_stride`, stages dilate their convolutions, not stride.

    At output stride 32 and with the plain stem it is torchvision's network. The deep stem is the three 3x3
    convolutions of PSPNet's authors in place of one 7x7.
    """

    def __init__(self, name: str, *, output_stride: int = 8, deep_stem: bool = False) -> None:
        super().__init__()
        _require_known("backbone", name, _ARCHITECTURES)
        _require_known("output_stride", output_stride, _STRIDES_AND_DILATIONS)
        block, num_blocks = _ARCHITECTURES[name]
        if deep_stem:
            self.conv1, self.bn1 = _conv3x3(3, 64, stride=2), nn.BatchNorm2d(64)
            self.conv2, self.bn2 = _conv3x3(64, 64), nn.BatchNorm2d(64)
            self.conv3, self.bn3 = _conv3x3(64, 128), nn.BatchNorm2d(128)
        else:
            self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
        self.name = name
        self.has_deep_stem = deep_stem
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels = 128 if deep_stem else 64
        stages = []
        for stage, (stride, dilation) in enumerate(_STRIDES_AND_DILATIONS[output_stride]):
            blocks: list[nn.Module] = []
            for index in range(num_blocks[stage]):
                blocks.append(block(in_channels, 64 * 2**stage, stride if index == 0 else 1, dilation))
                in_channels = 64 * 2**stage * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.stage3_channels, self.stage4_channels = in_channels // 2, in_channels
        _initialise(self)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Features:
        """Compute the features; each side has ceil(side / output_stride) cells."""
        x = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        if self.has_deep_stem:
            x = functional.relu(self.bn2(self.conv2(x)), inplace=True)
            x = functional.relu(self.bn3(self.conv3(x)), inplace=True)
        stage3 = self.layer3(self.layer2(self.layer1(self.maxpool(x))))
        return Features(stage3, self.layer4(stage3))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input is added: ResNet-18 and -34."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride=stride, dilation=dilation)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n co ho wo"]:
        """Return what the convolutions add to the input."""
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return functional.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around which the input is added: ResNet-50 and deeper."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels, stride=stride, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.downsample = _shortcut(in_channels, channels * self.expansion, stride)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n co ho wo"]:
        """Return what the convolutions add to the input."""
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return functional.relu(y, inplace=True)


_ARCHITECTURES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}

_STRIDES_AND_DILATIONS = {
    8: ((1, 1), (2, 1), (1, 2), (1, 4)),
    16: ((1, 1), (2, 1), (2, 1), (1, 2)),
    32: ((1, 1), (2, 1), (2, 1), (2, 1)),
}


def load_backbone_weights(model: nn.Module, weights: str) -> None:
    """Set the weights of `model.backbone`: "" leaves it, "imagenet" takes torchvision's, else a file's.

    A file is safetensors or a plain state dict of tensors (.pth, read without pickle's code); it has
    torchvision's names, with or without the classifier `fc`. InputError names every key that is missing,
    unexpected or of another shape.
    """
    if weights == "":
        return
    backbone = model.backbone
    assert isinstance(backbone, ResNet)
    given = _download(backbone) if weights == "imagenet" else _read_weights(Path(weights))
    given = {key: value for key, value in given.items() if key not in ("fc.weight", "fc.bias")}
    own = backbone.state_dict()
    # Files from before torch 0.4.1 lack the counters, which only BatchNorm's cumulative average reads.
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in own]
    misshapen = [
        f"{key} {tuple(given[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    if any(keys for _, keys in problems):
        told = "; ".join(f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in problems if keys)
        raise InputError(
            f"model.backbone_weights must hold the weights of {backbone.name} under torchvision's names, "
            f"but in {weights} there are {told}. Give a file of that network, or another model.backbone."
        )
    backbone.load_state_dict(given, strict=False)


def _download(backbone: ResNet) -> Mapping[str, Tensor]:
    if backbone.has_deep_stem:
        raise InputError(
            'model.backbone_weights "imagenet" are torchvision\'s, which have the plain stem, but the model '
            "has the deep one. Give a file, or leave the deep stem out."
        )
    # Here, because it takes as long to import as torch itself, in every worker of every trial.
    import torchvision.models

    weights = torchvision.models.get_model_weights(backbone.name)["IMAGENET1K_V1"]
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (URLError, OSError, RuntimeError) as error:
        raise InputError(
            f"torchvision's weights of {backbone.name} could not be downloaded from {weights.url} ({error}). "
            "Download them elsewhere and give the file as model.backbone_weights."
        ) from error


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise InputError(
            f'model.backbone_weights must be "imagenet", empty or a file, but there is no file {path}.'
        )
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes the readers raise
        reason = str(error).splitlines()[0]
        raise InputError(
            "model.backbone_weights must be a safetensors file or a state dict of tensors, but "
            f"{path} cannot be read ({type(error).__name__}: {reason}). "
            "Save it again with safetensors.torch.save_file."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(
            f"model.backbone_weights must hold a dict of tensors, but {path} holds something else. "
            "Save the network's state_dict() alone."
        )
    return state


def _conv3x3(in_channels: int, channels: int, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
    )


def _initialise(backbone: ResNet) -> None:
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _require_known(field: str, value: object, known: Mapping[Any, object]) -> None:
    if value not in known:
        raise InputError(f"model.{field} must be one of {', '.join(map(str, known))}, but got {value}.")

"""Dilated ResNets (He et al., CVPR 2016; Yu et al., CVPR 2017) whose weights carry torchvision's names.

Axes: n images, c channels, h w pixels, fh fw feature cells.
"""

# ruff: noqa: F722
import functools
import re
from collections.abc import Callable, Mapping, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from pspnet.errors import InputError
from pspnet.features import Features, dilation_of_stages, initialise, require_known
from pspnet.kernels import activated


class ResNet(nn.Module):
    """A ResNet without classifier: beyond `output_stride`, stages dilate their convolutions, not stride.

    At output stride 32 and with the plain stem it is torchvision's network. The deep stem has three 3x3
    convolutions in place of one 7x7: 64, 64 and 128 channels in the code of PSPNet's authors, half of that in
    mmsegmentation's ResNetV1c (`deep_stem_channels` = 64). With `contract_dilation`, as there, the first block of
    a dilated stage has half its dilation: that of the stage before. `dilations` of the four stages take the place of
    those that follow from the output stride (mmsegmentation's d32 has 1 1 2 4 beside all strides). With
    `dilate_first_only`, for mmsegmentation's ResNet-18, a basic block dilates the first of its convolutions alone.
    """

    def __init__(
        self,
        name: str,
        *,
        output_stride: int = 8,
        deep_stem: bool = False,
        deep_stem_channels: int = 128,
        contract_dilation: bool = False,
        dilations: Sequence[int] = (),
        dilate_first_only: bool = False,
    ) -> None:
        super().__init__()
        require_known("backbone", name, ARCHITECTURES)
        require_known("output_stride", output_stride, STRIDES)
        dilations = dilation_of_stages(dilations, DILATIONS[output_stride], name)
        if deep_stem and deep_stem_channels < 2:
            raise InputError(
                f"model.deep_stem_channels must be at least 2, but got {deep_stem_channels}. semseg's are 128."
            )
        block, num_blocks = ARCHITECTURES[name]
        new_block: Callable[..., nn.Module] = block
        if dilate_first_only:
            if block is not BasicBlock:
                raise InputError(
                    f"model.dilate_first_only is of networks of basic blocks ({', '.join(BASIC)}) and of mobilenet_v2, "
                    f"but got {name}, whose blocks have one 3x3 convolution. Leave it out."
                )
            new_block = functools.partial(BasicBlock, dilate_first_only=True)
        if deep_stem:
            half = deep_stem_channels // 2
            self.conv1, self.bn1 = _conv3x3(3, half, stride=2), nn.BatchNorm2d(half)
            self.conv2, self.bn2 = _conv3x3(half, half), nn.BatchNorm2d(half)
            self.conv3, self.bn3 = _conv3x3(half, deep_stem_channels), nn.BatchNorm2d(deep_stem_channels)
        else:
            self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
        self.name = name
        self.has_deep_stem = deep_stem
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels = deep_stem_channels if deep_stem else 64
        stages = []
        for stage, (stride, dilation) in enumerate(zip(STRIDES[output_stride], dilations, strict=True)):
            blocks: list[nn.Module] = []
            first_dilation = max(1, dilation // 2) if contract_dilation else dilation
            for index in range(num_blocks[stage]):
                strided_and_dilated = (stride, first_dilation) if index == 0 else (1, dilation)
                blocks.append(new_block(in_channels, 64 * 2**stage, *strided_and_dilated))
                in_channels = 64 * 2**stage * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.stage3_channels, self.stage4_channels = in_channels // 2, in_channels
        initialise(self)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Features:
        """Compute the features; each side has ceil(side / output_stride) cells."""
        x = activated(self.conv1, self.bn1, images)
        if self.has_deep_stem:
            x = activated(self.conv2, self.bn2, x)
            x = activated(self.conv3, self.bn3, x)
        stage3 = self.layer3(self.layer2(self.layer1(self.maxpool(x))))
        return Features(stage3, self.layer4(stage3))

    def named_as_here(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return published weights of the whole network under this one's names, without the classifier's.

        The deep stem of mmsegmentation's ResNetV1c is a sequence `stem`; all other names are torchvision's.
        """
        return {
            _name_here(key): value for key, value in weights.items() if key not in ("fc.weight", "fc.bias")
        }


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input is added: ResNet-18 and -34."""

    expansion = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int, dilation: int, *, dilate_first_only: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride=stride, dilation=dilation)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels, dilation=1 if dilate_first_only else dilation)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n co ho wo"]:
        """Return what the convolutions add to the input."""
        y = activated(self.conv1, self.bn1, x)
        return activated(self.conv2, self.bn2, y, x if self.downsample is None else self.downsample(x))


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
        y = activated(self.conv2, self.bn2, activated(self.conv1, self.bn1, x))
        return activated(self.conv3, self.bn3, y, x if self.downsample is None else self.downsample(x))


ARCHITECTURES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}

BASIC = tuple(name for name, (block, _) in ARCHITECTURES.items() if block is BasicBlock)
"""The networks of basic blocks."""

STRIDES = {8: (1, 2, 1, 1), 16: (1, 2, 2, 1), 32: (1, 2, 2, 2)}
"""Of the four stages, by output stride."""

DILATIONS = {8: (1, 1, 2, 4), 16: (1, 1, 1, 2), 32: (1, 1, 1, 1)}
"""Of the four stages, by output stride, where no others are given."""


def _conv3x3(in_channels: int, channels: int, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
    )


def _name_here(key: str) -> str:
    stem = re.fullmatch(r"stem\.([013467])\.(.+)", key)
    if not stem:
        return key
    number, is_norm = divmod(int(stem[1]), 3)
    return f"{'bn' if is_norm else 'conv'}{number + 1}.{stem[2]}"

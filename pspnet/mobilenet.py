"""MobileNetV2 (Sandler et al., CVPR 2018), dilated, whose weights carry torchvision's names.

Axes: n images, c channels, h w pixels, fh fw feature cells.
"""

# ruff: noqa: F722
from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from pspnet.features import Features, dilation_of_stages, initialise, require_known

STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
"""Expansion, channels and blocks of each stage (table 2 of the paper)."""

STRIDES = {8: (1, 2, 2, 1, 1, 1, 1), 16: (1, 2, 2, 2, 1, 1, 1), 32: (1, 2, 2, 2, 1, 2, 1)}
"""Of the first block of each stage, by output stride."""

DILATIONS = {8: (1, 1, 1, 2, 2, 4, 4), 16: (1, 1, 1, 1, 1, 2, 2), 32: (1, 1, 1, 1, 1, 1, 1)}
"""Of each stage, by output stride, where no others are given."""

_LAST_OF_STAGE3 = 13


class MobileNetV2(nn.Module):
    """MobileNetV2 without its last 1x1 convolution and classifier, width 1.

    A stage that would stride beyond `output_stride` doubles the dilation instead, in all of its blocks, or, as
    mmsegmentation's MobileNetV2, in the first of each stage alone (`dilate_first_only`). `dilations` of the seven
    stages take the place of those that follow from the output stride. At output stride 32 it is torchvision's network.
    `stage3` is the output of features.13 (96 channels), `stage4` of features.17 (320 channels), from which
    mmsegmentation's PSPNet takes its auxiliary head and its pyramid.
    """

    stage3_channels, stage4_channels = 96, 320

    def __init__(
        self, *, output_stride: int = 8, dilations: Sequence[int] = (), dilate_first_only: bool = False
    ) -> None:
        super().__init__()
        require_known("output_stride", output_stride, STRIDES)
        dilations = dilation_of_stages(dilations, DILATIONS[output_stride], "mobilenet_v2")
        self.name = "mobilenet_v2"
        features: list[nn.Module] = [_conv_norm_relu(3, 32, 3, stride=2)]
        in_channels = 32
        for (expansion, channels, num_blocks), first_stride, first_dilation in zip(
            STAGES, STRIDES[output_stride], dilations, strict=True
        ):
            for index in range(num_blocks):
                stride = first_stride if index == 0 else 1
                dilation = 1 if dilate_first_only and index > 0 else first_dilation
                features.append(InvertedResidual(in_channels, channels, expansion, stride, dilation))
                in_channels = channels
        self.features = nn.Sequential(*features)
        initialise(self)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Features:
        """Compute the features; each side has ceil(side / output_stride) cells."""
        stage3 = self.features[: _LAST_OF_STAGE3 + 1](images)
        return Features(stage3, self.features[_LAST_OF_STAGE3 + 1 :](stage3))

    def named_as_here(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return torchvision's weights without those of the last 1x1 convolution and of the classifier."""
        return {
            key: value
            for key, value in weights.items()
            if not key.startswith(("features.18.", "classifier."))
        }


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise and 1x1 projection, around which the input is added where shapes agree."""

    def __init__(self, in_channels: int, channels: int, expansion: int, stride: int, dilation: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.is_residual = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            *([_conv_norm_relu(in_channels, hidden, 1)] if expansion != 1 else []),
            _conv_norm_relu(hidden, hidden, 3, stride=stride, dilation=dilation, groups=hidden),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n co ho wo"]:
        """Return what the convolutions add to the input, or put in its place."""
        return x + self.conv(x) if self.is_residual else self.conv(x)


def _conv_norm_relu(
    in_channels: int, channels: int, size: int, *, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Sequential:
    padding = (size - 1) // 2 * dilation
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, size, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU6(inplace=True),
    )

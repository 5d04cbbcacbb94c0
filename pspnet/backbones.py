"""The backbones there are, by name: dilated ResNets, MobileNetV2 and those of timm."""

from collections.abc import Sequence
from typing import TypeAlias

from pspnet.errors import InputError
from pspnet.features import require_known
from pspnet.mobilenet import MobileNetV2
from pspnet.resnet import ARCHITECTURES, ResNet
from pspnet.timm_backbones import PREFIX, TimmBackbone

BACKBONES = (*ARCHITECTURES, "mobilenet_v2")
"""Names of the backbones that need no other library."""

Backbone: TypeAlias = ResNet | MobileNetV2 | TimmBackbone


def build_backbone(
    name: str,
    *,
    output_stride: int = 8,
    deep_stem: bool = False,
    deep_stem_channels: int = 128,
    contract_dilation: bool = False,
    dilations: Sequence[int] = (),
    dilate_first_only: bool = False,
) -> Backbone:
    """Return the backbone of that name, one of `BACKBONES` or timm:NAME, with random weights.

    Stem and contracted dilation can be chosen for ResNets only, other dilations for MobileNetV2, too: see both.
    """
    if name in ARCHITECTURES:
        return ResNet(
            name,
            output_stride=output_stride,
            deep_stem=deep_stem,
            deep_stem_channels=deep_stem_channels,
            contract_dilation=contract_dilation,
            dilations=dilations,
            dilate_first_only=dilate_first_only,
        )
    if deep_stem or contract_dilation:
        raise InputError(
            f"model.deep_stem and model.contract_dilation are of ResNets ({', '.join(ARCHITECTURES)}), but got "
            f"{name}. Leave them out."
        )
    if name.startswith(PREFIX):
        if dilations or dilate_first_only:
            raise InputError(
                f"model.dilations and model.dilate_first_only are of {', '.join(BACKBONES)}, but got {name}, which "
                "timm dilates. Leave them out."
            )
        return TimmBackbone(name, output_stride=output_stride)
    require_known("backbone", name, dict.fromkeys((*BACKBONES, f"{PREFIX}NAME")))
    return MobileNetV2(output_stride=output_stride, dilations=dilations, dilate_first_only=dilate_first_only)

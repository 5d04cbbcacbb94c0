"""What a backbone computes, and how one that is written here begins.

Axes: n images, c channels, fh fw feature cells.
"""

# ruff: noqa: F722
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from pspnet.errors import InputError
from pspnet.json_values import shown

MAX_DILATION = 64
"""Of a stage: such a convolution already reaches over pictures of 500 pixels at output stride 8."""


class Features(NamedTuple):
    """What two late stages compute, for the auxiliary head and for the pyramid."""

    stage3: Float[Tensor, "n c3 fh fw"]
    stage4: Float[Tensor, "n c4 fh fw"]


def initialise(backbone: nn.Module) -> None:
    """Draw the convolutions' weights as torchvision does (He et al., ICCV 2015, by the outputs)."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def require_known(field: str, value: object, known: Mapping[Any, object]) -> None:
    """Raise InputError where `known` does not hold the value of this field of the model."""
    if value not in known:
        raise InputError(
            f"model.{field} must be one of {', '.join(map(str, known))}, but got {shown(value)}."
        )


def dilation_of_stages(dilations: Sequence[int], usual: Sequence[int], name: str) -> tuple[int, ...]:
    """Return the dilation of each stage of the backbone `name`: those given, or the `usual` ones where none are.

    Raises InputError for another number of them, or where one is not 1 to MAX_DILATION.
    """
    if not dilations:
        return tuple(usual)
    if len(dilations) != len(usual) or any(not 1 <= dilation <= MAX_DILATION for dilation in dilations):
        raise InputError(
            f"model.dilations must be {len(usual)} numbers of 1 to {MAX_DILATION}, one for each stage of {name}, or "
            f"none, but got {shown(tuple(dilations))}. At this output stride none means {' '.join(map(str, usual))}."
        )
    return tuple(dilations)

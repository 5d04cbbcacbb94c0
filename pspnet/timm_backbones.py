"""Backbones of the library timm, an optional extra, as `timm:NAME`.

Axes: n images, c channels, h w pixels, fh fw feature cells.
"""

# ruff: noqa: F722
import difflib
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pspnet.errors import InputError, MissingPackageError
from pspnet.features import Features
from pspnet.initialisation import WithoutDraws
from pspnet.json_values import shown

PREFIX = "timm:"


class TimmBackbone(nn.Module):
    """A convolutional network of timm at `output_stride`; its last two stages are `stage3` and `stage4`.

    InputError where timm has no such network, where its last two stages cannot both have that stride, or where it does
    not take pictures of any size.
    """

    def __init__(self, name: str, *, output_stride: int = 8) -> None:
        super().__init__()
        self.name = name
        self._timm_name = name.removeprefix(PREFIX)
        timm = _timm(name)
        if not timm.is_model(self._timm_name):
            near = difflib.get_close_matches(self._timm_name, timm.list_models(), n=3)
            raise InputError(
                f"model.backbone must be a network of timm {timm.__version__} after {PREFIX}, but got {shown(name)}. "
                + (f"Near are: {', '.join(near)}." if near else "timm.list_models() names them.")
            )
        try:
            # timm's own errors for what a network cannot do are of many kinds.
            self.network = self._built(timm, output_stride)
            strides = self.network.feature_info.reduction()
        except (TypeError, ValueError, AssertionError, RuntimeError, NotImplementedError) as error:
            raise InputError(_refusal(name, output_stride, str(error) or type(error).__name__)) from error
        if strides != [min(16, output_stride), output_stride]:
            raise InputError(_refusal(name, output_stride, f"they have {' and '.join(map(str, strides))}"))
        self.stage3_channels, self.stage4_channels = self.network.feature_info.channels()
        self.has_cell_on_last_pixel = self._num_cells(8 * output_stride + 1) == 9

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Features:
        """Compute the features; each side has side / output_stride cells, rounded up by most networks."""
        stage3, stage4 = self.network(images)
        return Features(stage3, stage4)

    def named_as_here(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of timm's whole network under this one's names, without those that are not needed."""
        # The cut network joins the first names by _ in place of a dot.
        own = {key.removeprefix("network.").replace(".", "_"): key for key in self.state_dict()}
        with torch.device("meta"), WithoutDraws():
            whole = {
                key.replace(".", "_") for key in _timm(self.name).create_model(self._timm_name).state_dict()
            }
        flat = {key.replace(".", "_"): key for key in weights}
        return {
            own.get(name, key): weights[key] for name, key in flat.items() if name in own or name not in whole
        }

    def download(self) -> Mapping[str, Tensor]:
        """Return timm's pretrained weights of this network; raises what timm and the connection raise."""
        timm = _timm(self.name)
        network = timm.create_model(self._timm_name, pretrained=True)
        return network.state_dict()

    def _built(self, timm: Any, output_stride: int) -> Any:
        return timm.create_model(
            self._timm_name,
            pretrained=False,
            features_only=True,
            output_stride=output_stride,
            out_indices=(-2, -1),
        )

    @torch.no_grad()
    def _num_cells(self, side: int) -> int:
        """Return the cells of a side of so many pixels; InputError where the network does not take such a picture."""
        was_training = self.training
        self.eval()
        try:
            # Attention in blocks of cells asserts, without a word, that they fit.
            cells = self(torch.zeros(1, 3, side, side)).stage4.shape[2]
        except (AssertionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"model.backbone must take pictures of any size, but timm's {self._timm_name} takes those of certain "
                f"sizes only, and {side}x{side} is none of them ({str(error) or type(error).__name__}). Take a "
                "ResNet, RegNet, EfficientNet or MobileNetV3."
            ) from error
        self.train(was_training)
        return int(cells)


def _timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise MissingPackageError(
            f"model.backbone {shown(name)} needs the library timm, which is not installed here ({error}). Install it "
            "with pip install 'segfleet[timm]' on every node, or take a ResNet."
        ) from error


def _refusal(name: str, output_stride: int, reason: str) -> str:
    return (
        f"model.backbone must have its last two stages at model.output_stride {output_stride}, but timm's "
        f"{name.removeprefix(PREFIX)} cannot ({reason}). ResNets, RegNets, EfficientNets and MobileNetV3 can."
    )

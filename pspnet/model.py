"""PSPNet (Zhao et al., CVPR 2017).

Axes: n images, c channels or classes, h w pixels, fh fw feature cells (h / output stride), b cells of a grid.
"""

# ruff: noqa: F722
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from pspnet.backbones import build_backbone
from pspnet.errors import InputError
from pspnet.json_values import shown, typed
from pspnet.kernels import WinogradConv2d, autocast_dtype, convolve3x3
from pspnet.norms import use_group_norm

MAX_BIN_SIZE = 1024
"""Cells of a side of the pyramid's finest grid: an image of 8,000 pixels has as many features at stride 8."""


class PSPNetOutput(NamedTuple):
    """Scores of the classes; `aux_logits` only in training mode and with an auxiliary head."""

    logits: Float[Tensor, "n c h w"]
    aux_logits: Float[Tensor, "n c h w"] | None
    output_stride: int = 1
    """Pixels of the image per cell of the logits: 1 once they are upsampled."""


class PSPNet(nn.Module):
    """Dilated backbone, pyramid pooling and classifier; images of any size, best of 8k + 1 pixels a side.

    Cell (i, j) of the logits lies on pixel (s * i, s * j) for output stride s, in training and prediction:
    an image of another size is continued with zeros (the mean colour) at the right and at the bottom up to
    s * k + 1, and the logits there are cut off. Without `align_corners` the cells of the logits, and of the grids
    of the pyramid, are spread evenly over an image of any size, as in mmsegmentation; logits are then always
    upsampled.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = "resnet50",
        output_stride: int = 8,
        bin_sizes: Sequence[int] = (1, 2, 3, 6),
        head_channels: int = 512,
        dropout: float = 0.1,
        has_aux_head: bool = True,
        deep_stem: bool = False,
        deep_stem_channels: int = 128,
        contract_dilation: bool = False,
        dilations: Sequence[int] = (),
        dilate_first_only: bool = False,
        branch_channels: int = 0,
        aux_channels: int = 0,
        norm: Literal["batch", "group"] = "batch",
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise InputError(f"A model must have at least 1 class, but got num_classes = {num_classes}.")
        if head_channels < 1:
            raise InputError(
                f"model.head_channels must be at least 1, but got {head_channels}. The paper's is 512."
            )
        for name, channels, share in (
            ("branch_channels", branch_channels, "an equal share of the features' for each bin"),
            ("aux_channels", aux_channels, "a quarter of the features'"),
        ):
            if channels < 0:
                raise InputError(f"model.{name} must be at least 0, but got {channels}. 0 takes {share}.")
        if norm not in ("batch", "group"):
            raise InputError(f"A model's norm must be batch or group, but got {norm!r}.")
        self.architecture: dict[str, Any] = {
            "num_classes": num_classes,
            "backbone": backbone,
            "output_stride": output_stride,
            "bin_sizes": list(bin_sizes),
            "head_channels": head_channels,
            "dropout": dropout,
            "has_aux_head": has_aux_head,
            "deep_stem": deep_stem,
            "deep_stem_channels": deep_stem_channels,
            "contract_dilation": contract_dilation,
            "dilations": list(dilations),
            "dilate_first_only": dilate_first_only,
            "branch_channels": branch_channels,
            "aux_channels": aux_channels,
            "norm": norm,
            "align_corners": align_corners,
        }
        """The constructor's arguments, for JSON; `from_architecture` builds the same network."""
        self.num_classes = num_classes
        self.output_stride = output_stride
        self.align_corners = align_corners
        # Any, because parts that only one kind has are reached into.
        self.backbone: Any = build_backbone(
            backbone,
            output_stride=output_stride,
            deep_stem=deep_stem,
            deep_stem_channels=deep_stem_channels,
            contract_dilation=contract_dilation,
            dilations=dilations,
            dilate_first_only=dilate_first_only,
        )
        if align_corners and not getattr(self.backbone, "has_cell_on_last_pixel", True):
            raise InputError(
                f"model.align_corners must be False for {backbone}, none of whose cells lies on the last pixel of "
                f"{output_stride}k + 1, but got True."
            )
        self.head = PyramidHead(
            self.backbone.stage4_channels,
            num_classes,
            bin_sizes=bin_sizes,
            branch_channels=branch_channels,
            head_channels=head_channels,
            dropout=dropout,
            align_corners=align_corners,
        )
        self.aux_head = (
            AuxHead(self.backbone.stage3_channels, num_classes, hidden_channels=aux_channels, dropout=dropout)
            if has_aux_head
            else None
        )
        if norm == "group":
            use_group_norm(self)

    @classmethod
    def from_architecture(cls, architecture: Mapping[str, Any]) -> "PSPNet":
        """Build the network, with random weights, whose `architecture` this is; what is absent has its default.

        Raises InputError for a field that is unknown or of another type: JSON that somebody else wrote may hold any.
        """
        hints = typing.get_type_hints(cls.__init__) | {"bin_sizes": list[int], "dilations": list[int]}
        del hints["return"]
        if "num_classes" not in architecture:
            raise InputError("A model's architecture must have the field num_classes, but has not.")
        for name in architecture:
            if name not in hints:
                raise InputError(
                    f"A model's architecture has no field {shown(name)}. There are: {', '.join(hints)}."
                )
        return cls(
            **{
                name: typed(hints[name], value, f"A model's architecture, {name},")
                for name, value in architecture.items()
            }
        )

    def forward(self, images: Float[Tensor, "n 3 h w"], *, upsample: bool = True) -> PSPNetOutput:
        """Return logits for each pixel; without `upsample` for each feature cell, as the loss takes them."""
        height, width = images.shape[2:]
        stride = self.output_stride
        if self.align_corners:
            images = functional.pad(images, (0, -(width - 1) % stride, 0, -(height - 1) % stride))
        features = self.backbone(images)
        logits = self.head(features.stage4)
        aux_logits = self.aux_head(features.stage3) if self.aux_head is not None and self.training else None
        if not self.align_corners:
            return PSPNetOutput(
                spread(logits, height, width),
                None if aux_logits is None else spread(aux_logits, height, width),
            )
        if not upsample:
            return PSPNetOutput(logits, aux_logits, stride)
        return PSPNetOutput(
            upsampled(logits, stride)[:, :, :height, :width],
            None if aux_logits is None else upsampled(aux_logits, stride)[:, :, :height, :width],
        )


class PyramidHead(nn.Module):
    """Pyramid pooling, 3x3 convolution and classifier (section 3.2).

    The features are averaged over each grid of `bin_sizes` and reduced by a 1x1 convolution to `branch_channels`,
    where these are 0 to an equal share of their channels; the 3x3 convolution sees the features and the upsampled
    grids side by side.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        bin_sizes: Sequence[int],
        branch_channels: int = 0,
        head_channels: int,
        dropout: float,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        if len(bin_sizes) > channels or any(not 1 <= size <= MAX_BIN_SIZE for size in bin_sizes):
            raise InputError(
                f"model.bin_sizes must be at most {channels} (the channels of the features) and each 1 to "
                f"{MAX_BIN_SIZE}, but got {shown(tuple(bin_sizes))}. The paper's are 1 2 3 6."
            )
        self.bin_sizes = tuple(bin_sizes)
        self.align_corners = align_corners
        branch_channels = branch_channels or channels // max(1, len(bin_sizes))
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, branch_channels, 1, bias=False),
                nn.BatchNorm2d(branch_channels),
                nn.ReLU(inplace=True),
            )
            for _ in bin_sizes
        )
        self.conv = nn.Conv2d(
            channels + branch_channels * len(bin_sizes), head_channels, 3, padding=1, bias=False
        )
        self.norm = nn.BatchNorm2d(head_channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(head_channels, num_classes, 1)

    def forward(self, features: Float[Tensor, "n c fh fw"]) -> Float[Tensor, "n classes fh fw"]:
        """Return logits for each cell of the features."""
        pooled = pooled_grids(features, self.bin_sizes)
        grids = [branch(grid) for branch, grid in zip(self.branches, pooled, strict=True)]
        convolve = self.conv.convolve if isinstance(self.conv, WinogradConv2d) else convolve3x3
        x = pyramid_convolution(features, grids, self.conv.weight, self.align_corners, convolve=convolve)
        x = functional.relu(self.norm(x), inplace=True)
        return self.classifier(self.dropout(x))


class AuxHead(nn.Module):
    """The auxiliary classifier on stage 3 (section 3.3); 0 hidden channels are a quarter of the features'."""

    def __init__(self, channels: int, num_classes: int, *, hidden_channels: int = 0, dropout: float) -> None:
        super().__init__()
        hidden_channels = hidden_channels or channels // 4
        self.conv = nn.Conv2d(channels, hidden_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(hidden_channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(hidden_channels, num_classes, 1)

    def forward(self, features: Float[Tensor, "n c fh fw"]) -> Float[Tensor, "n classes fh fw"]:
        """Return logits for each cell of the features."""
        x = functional.relu(self.norm(self.conv(features)), inplace=True)
        return self.classifier(self.dropout(x))


def pooled_grids(features: Float[Tensor, "n c fh fw"], bin_sizes: Sequence[int]) -> list[Tensor]:
    """Return adaptive_avg_pool2d(features, size) for each bin size, as two matrix products for all of them.

    They are computed at least in float32, also under autocast.
    """
    if not bin_sizes:
        return []
    dtype = features.dtype
    with torch.autocast(features.device.type, enabled=False):
        features = at_least_float32(features)
        rows = torch.cat([_averaging(features, features.shape[2], size) for size in bin_sizes])
        columns = torch.cat([_averaging(features, features.shape[3], size) for size in bin_sizes])
        if features.is_contiguous(memory_format=torch.channels_last):
            # Channels are averaged side by side, as they lie in memory.
            pixels = features.permute(0, 2, 3, 1)
            strips = (rows @ pixels.flatten(2)).unflatten(2, pixels.shape[2:])
            averages = (columns @ strips).permute(0, 3, 1, 2).to(dtype)
        else:
            averages = (rows @ (features.contiguous() @ columns.T)).to(dtype)
    starts = [sum(bin_sizes[:index]) for index in range(len(bin_sizes))]
    return [
        averages[:, :, start : start + size, start : start + size]
        for start, size in zip(starts, bin_sizes, strict=True)
    ]


def pyramid_convolution(
    features: Float[Tensor, "n c fh fw"],
    grids: Sequence[Tensor],
    weight: Float[Tensor, "o ci 3 3"],
    align_corners: bool = True,
    *,
    convolve: Callable[[Tensor, Tensor], Tensor] = convolve3x3,
) -> Float[Tensor, "n o fh fw"]:
    """Return conv2d(cat([features, *upsampled grids]), weight, padding=1) without making the concatenation.

    Upsampling is linear: nine taps on the few cells of a grid, then two products with the interpolation
    matrix shifted by the tap, equal nine taps on every cell of the features. This leaves out nearly half of
    the head's arithmetic. `grids` are (n, cb, b, b).
    """
    # Split, whose gradient is one concatenation, with the channels last, as the weight has them in memory: otherwise
    # the gradient is put together in another order, and then turned round.
    by_tap = weight.to(autocast_dtype(features)).permute(0, 2, 3, 1)
    feature_weight, *branch_weights = by_tap.split([features.shape[1], *(grid.shape[1] for grid in grids)], 3)
    result = convolve(features, feature_weight.permute(0, 3, 1, 2))
    if not grids:
        return result
    fh, fw = features.shape[2:]
    rows, columns = [], []
    for grid, branch_weight in zip(grids, branch_weights, strict=True):
        n, _, size, _ = grid.shape
        cells = grid.permute(0, 2, 3, 1).flatten(0, 2)
        taps = functional.linear(cells, branch_weight.flatten(0, 2))
        taps = taps.unflatten(1, (-1, 3, 3)).unflatten(0, (n, size, size)).permute(0, 4, 1, 5, 2, 3)
        shifted = _shifted_upsampling(taps, fh, size, align_corners)
        rows.append((shifted @ taps.reshape(n, 3 * size, -1)).unflatten(2, (3 * size, -1)))
        columns.append(_shifted_upsampling(taps, fw, size, align_corners))
    from_grids = torch.cat(columns, 1) @ torch.cat(rows, 2)
    return result + from_grids.permute(0, 3, 1, 2)


def upsampled(logits: Float[Tensor, "n c fh fw"], stride: int) -> Float[Tensor, "n c h w"]:
    """Interpolate bilinearly, at least in float32, so that cell (i, j) is pixel (stride * i, stride * j)."""
    height, width = logits.shape[2:]
    size = ((height - 1) * stride + 1, (width - 1) * stride + 1)
    return functional.interpolate(at_least_float32(logits), size=size, mode="bilinear", align_corners=True)


def spread(logits: Float[Tensor, "n c fh fw"], height: int, width: int) -> Float[Tensor, "n c h w"]:
    """Interpolate bilinearly, at least in float32, with the cells spread evenly over the pixels."""
    size = (height, width)
    return functional.interpolate(at_least_float32(logits), size=size, mode="bilinear", align_corners=False)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return `tensor` as float32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def refuse_single_values(model: nn.Module, num_images: int) -> None:
    """Raise InputError where BatchNorm over one worker's `num_images` would have a single value per channel.

    That is the 1x1 bin with one image. SyncBatchNorm counts the images of all workers and is not concerned, nor
    is BatchNorm that is not trained (pspnet.freezing).
    """
    for head in model.modules():
        if isinstance(head, PyramidHead) and num_images == 1 and 1 in head.bin_sizes:
            branch = head.branches[head.bin_sizes.index(1)]
            if any(type(it) is nn.BatchNorm2d and it.weight.requires_grad for it in branch.modules()):
                raise InputError(
                    "A worker without SyncBatchNorm must train on at least 2 images at a time, because the "
                    "1x1 bin has one value per image and channel, but it has 1: schedule.global_batch_size / "
                    "workers.num_workers / schedule.accumulation_steps. Double the first, halve one of the others, "
                    "set model.norm group or model.freeze_batch_norm all, or leave 1 out of model.bin_sizes."
                )


def _averaging(like: Tensor, num_cells: int, num_bins: int) -> Float[Tensor, "b cells"]:
    """Return the matrix that averages cells floor(i * cells / b) to ceil((i + 1) * cells / b) into bin i."""
    cell = torch.arange(num_cells, device=like.device)
    bins = torch.arange(num_bins, device=like.device)[:, None]
    first, end = bins * num_cells // num_bins, -((bins + 1) * num_cells // -num_bins)
    return ((cell >= first) & (cell < end)).to(like.dtype) / (end - first)


def _shifted_upsampling(
    like: Tensor, num_cells: int, num_values: int, align_corners: bool
) -> Float[Tensor, "cells taps"]:
    """Return what each tap of a 3-tap convolution reads of `num_values` upsampled to `num_cells`, zeros around.

    The values of the first tap come first. Device and type are those of `like`.
    """
    position = torch.arange(num_cells, device=like.device, dtype=torch.float64)[:, None]
    if align_corners:
        # The first value on the first cell, the last on the last.
        position = position * ((num_values - 1) / max(1, num_cells - 1))
    else:
        position = ((position + 0.5) * (num_values / num_cells) - 0.5).clamp(0, num_values - 1)
    value = torch.arange(num_values, device=like.device, dtype=torch.float64)
    weights = (1 - (position - value).abs()).clamp(min=0)
    around = functional.pad(weights, (0, 0, 1, 1))
    return torch.cat([around[tap : tap + num_cells] for tap in range(3)], dim=1).to(like.dtype)

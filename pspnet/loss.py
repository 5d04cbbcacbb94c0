"""Main and auxiliary cross-entropy, normalised by the valid pixels of all workers.

Axes: n images, c classes, h w pixels, fh fw cells of logits that are not upsampled yet.
"""

# ruff: noqa: F722
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from pspnet.labels import IGNORE_INDEX
from pspnet.model import PSPNetOutput, at_least_float32, upsampled

CELLS_PER_STRIP = 8
"""Rows of cells upsampled at a time: their pixels stay in the cache of a core."""


class SegmentationLoss(NamedTuple):
    """total = main + aux_loss_weight * aux."""

    total: Float[Tensor, ""]
    main: Float[Tensor, ""]
    aux: Float[Tensor, ""]


def segmentation_loss(
    output: PSPNetOutput, target: Int64[Tensor, "n h w"], *, num_valid: Tensor | int, aux_loss_weight: float
) -> SegmentationLoss:
    """Return this worker's share: shares sum over workers to the one-process loss.

    `num_valid` counts the pixels of all workers whose target is not IGNORE_INDEX. DDP averages gradients, so
    the caller multiplies by the number of workers. Without a valid pixel all is 0, and so are the gradients.
    """
    denominator = torch.as_tensor(num_valid, device=target.device).clamp(min=1)
    main = summed_cross_entropy(output.logits, target, output.output_stride) / denominator
    if output.aux_logits is None:
        return SegmentationLoss(main, main, torch.zeros_like(main))
    aux = summed_cross_entropy(output.aux_logits, target, output.output_stride) / denominator
    return SegmentationLoss(main + aux_loss_weight * aux, main, aux)


def summed_cross_entropy(
    logits: Float[Tensor, "n c fh fw"], target: Int64[Tensor, "n h w"], output_stride: int
) -> Float[Tensor, ""]:
    """Return the sum over all valid pixels of the cross-entropy of the upsampled logits."""
    if output_stride == 1:
        return functional.cross_entropy(
            at_least_float32(logits), target, ignore_index=IGNORE_INDEX, reduction="sum"
        )
    return _CrossEntropyByStrips.apply(at_least_float32(logits), target, output_stride)


class _CrossEntropyByStrips(torch.autograd.Function):
    """Cross-entropy of upsampled logits that exist a few rows at a time, its gradient computed on the way."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, stride: int) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False), torch.enable_grad():
            gradient = torch.zeros_like(logits)
            total = torch.zeros((), dtype=logits.dtype, device=logits.device)
            height, width = target.shape[1:]
            num_rows = logits.shape[2]
            for first in range(0, max(1, num_rows - 1), CELLS_PER_STRIP):
                # Neighbouring strips share a row of cells, whose row of pixels belongs to the lower strip.
                last = min(first + CELLS_PER_STRIP, num_rows - 1)
                end = height if last == num_rows - 1 else last * stride
                strip = logits[:, :, first : last + 1].detach().requires_grad_()
                rows = target[:, first * stride : end]
                pixels = upsampled(strip, stride)[:, :, : rows.shape[1], :width]
                loss = functional.cross_entropy(pixels, rows, ignore_index=IGNORE_INDEX, reduction="sum")
                gradient[:, :, first : last + 1] += torch.autograd.grad(loss, strip)[0]
                total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0], None, None

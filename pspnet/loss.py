"""Main and auxiliary cross-entropy, normalised by the valid pixels of all workers.

Label smoothing, class weights and the choice of hard pixels (pspnet.ohem) are options of it.

Axes: n images, c classes, h w pixels, fh fw cells of logits that are not upsampled yet.
"""

# ruff: noqa: F722
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from pspnet.labels import IGNORE_INDEX
from pspnet.model import PSPNetOutput, at_least_float32, upsampled
from pspnet.ohem import hard_pixels

_HAS_NUMBA = importlib.util.find_spec("numba") is not None
CELLS_PER_STRIP = 8
"""Rows of cells upsampled at a time on a CPU: their pixels stay in the cache of a core."""
STRIP_BYTES = 2**27
"""Of upsampled logits at a time on a GPU, which wants few kernels with much to do; the loss keeps four times that."""


class SegmentationLoss(NamedTuple):
    """total = main + aux_loss_weight * aux."""

    total: Float[Tensor, ""]
    main: Float[Tensor, ""]
    aux: Float[Tensor, ""]


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Which cross-entropy is taken: torch's, with its label smoothing and class weights, of all pixels or hard ones."""

    label_smoothing: float = 0.0
    """So much of each target is spread evenly over all classes."""
    class_weights: Float[Tensor, " c"] | None = None
    """Weight of the pixels of each class, on the device of the logits."""
    ohem_threshold: float = 0.0
    """The main loss takes pixels whose class has a smaller probability; 0 takes all. See pspnet.ohem."""
    ohem_min_kept: int = 100_000
    """It takes at least so many pixels an image."""


PLAIN = CrossEntropy()


def segmentation_loss(
    output: PSPNetOutput,
    target: Int64[Tensor, "n h w"],
    *,
    num_valid: Tensor | int,
    aux_loss_weight: float,
    kind: CrossEntropy = PLAIN,
    choose: Callable[..., Tensor] = hard_pixels,
) -> SegmentationLoss:
    """Return this worker's share: shares sum over workers to the one-process loss.

    `num_valid` is the sum of `valid_weight` over all workers. DDP averages gradients, so the caller multiplies by
    the number of workers. Without a valid pixel all is 0, and so are the gradients.

    Of hard pixels it is still all valid ones that the loss is divided by, as mmsegmentation does with avg_non_ignore;
    the auxiliary loss takes all pixels. `choose` picks them.
    """
    denominator = torch.as_tensor(num_valid, device=target.device)
    denominator = denominator.where(denominator > 0, 1)
    if denominator.is_floating_point():
        denominator = denominator.to(at_least_float32(output.logits).dtype)
    hard = target
    if kind.ohem_threshold > 0:
        probabilities = target_probabilities(output.logits, target, output.output_stride)
        hard = choose(target, probabilities, threshold=kind.ohem_threshold, min_kept=kind.ohem_min_kept)
    main = summed_cross_entropy(output.logits, hard, output.output_stride, kind) / denominator
    if output.aux_logits is None:
        return SegmentationLoss(main, main, torch.zeros_like(main))
    aux = summed_cross_entropy(output.aux_logits, target, output.output_stride, kind) / denominator
    return SegmentationLoss(main + aux_loss_weight * aux, main, aux)


def valid_weight(target: Int64[Tensor, "n h w"], class_weights: Float[Tensor, " c"] | None) -> Tensor:
    """Return the number of pixels whose target is not IGNORE_INDEX, or the sum of their classes' weights."""
    valid = target != IGNORE_INDEX
    if class_weights is None:
        return valid.sum()
    weights = class_weights.double()[target.clamp(max=len(class_weights) - 1)]
    return torch.where(valid, weights, 0).sum()


def summed_cross_entropy(
    logits: Float[Tensor, "n c fh fw"],
    target: Int64[Tensor, "n h w"],
    output_stride: int,
    kind: CrossEntropy = PLAIN,
) -> Float[Tensor, ""]:
    """Return the sum over all valid pixels of the cross-entropy of the upsampled logits."""
    if output_stride == 1:
        return _summed_loss(at_least_float32(logits), target, kind)
    return _UpsampledCrossEntropy.apply(at_least_float32(logits), target, output_stride, kind)


def cells_per_strip(logits: Float[Tensor, "n c fh fw"], output_stride: int) -> int:
    """Return how many rows of cells are upsampled at a time on the device of `logits`."""
    if logits.device.type == "cpu":
        return CELLS_PER_STRIP
    num_images, num_classes, _, num_columns = logits.shape
    bytes_per_row = num_images * num_classes * num_columns * output_stride**2 * max(4, logits.element_size())
    return max(CELLS_PER_STRIP, STRIP_BYTES // bytes_per_row)


def target_probabilities(
    logits: Float[Tensor, "n c fh fw"], target: Int64[Tensor, "n h w"], output_stride: int
) -> Float[Tensor, "n h w"]:
    """Return the softmax of the upsampled logits at each pixel's target, at least in float32; 1 at ignored pixels."""
    logits = at_least_float32(logits.detach())
    probabilities = logits.new_ones(target.shape)
    height, width = target.shape[1:]
    for first, last, rows in _strips(logits, height, output_stride):
        wanted = target[:, rows]
        with torch.autocast(logits.device.type, enabled=False):
            pixels = upsampled(logits[:, :, first : last + 1], output_stride)
        pixels = pixels[:, :, : wanted.shape[1], :width].softmax(1)
        right = pixels.gather(1, wanted.clamp(max=pixels.shape[1] - 1)[:, None])[:, 0]
        probabilities[:, rows] = torch.where(wanted == IGNORE_INDEX, 1, right)
    return probabilities


def _summed_loss(pixels: Tensor, target: Tensor, kind: CrossEntropy) -> Tensor:
    return functional.cross_entropy(
        pixels,
        target,
        weight=None if kind.class_weights is None else kind.class_weights.to(pixels.dtype),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        label_smoothing=kind.label_smoothing,
    )


def _strips(logits: Tensor, height: int, stride: int) -> Iterator[tuple[int, int, slice]]:
    """Yield first and last row of cells of each strip, and the rows of pixels that are taken from it.

    Neighbouring strips share a row of cells, whose row of pixels belongs to the lower strip.
    """
    num_rows, step = logits.shape[2], cells_per_strip(logits, stride)
    for first in range(0, max(1, num_rows - 1), step):
        last = min(first + step, num_rows - 1)
        yield first, last, slice(first * stride, height if last == num_rows - 1 else last * stride)


class _UpsampledCrossEntropy(torch.autograd.Function):
    """Cross-entropy of upsampled logits that exist a few rows at a time, its gradient computed on the way.

    In float32 on a CPU by one row of pixels (pspnet.cpu_loss), else by strips, as also sizes without values are
    (pspnet.memory), which are counted for a GPU.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, stride: int, kind: CrossEntropy) -> Tensor:
        if (
            _HAS_NUMBA
            and (logits.device.type, logits.dtype) == ("cpu", torch.float32)
            and type(logits) is Tensor
        ):
            from pspnet.cpu_loss import summed_loss_and_gradient

            with torch.autocast("cpu", enabled=False):
                total, gradient = summed_loss_and_gradient(
                    logits, target, stride, kind.class_weights, kind.label_smoothing
                )
            ctx.save_for_backward(gradient)
            return total.float()
        with torch.autocast(logits.device.type, enabled=False), torch.enable_grad():
            gradient = torch.zeros_like(logits)
            total = torch.zeros((), dtype=logits.dtype, device=logits.device)
            height, width = target.shape[1:]
            for first, last, rows in _strips(logits, height, stride):
                strip = logits[:, :, first : last + 1].detach().requires_grad_()
                wanted = target[:, rows]
                pixels = upsampled(strip, stride)[:, :, : wanted.shape[1], :width]
                loss = _summed_loss(pixels, wanted, kind)
                gradient[:, :, first : last + 1] += torch.autograd.grad(loss, strip)[0]
                total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0], None, None, None

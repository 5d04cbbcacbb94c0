"""Online hard example mining (Shrivastava et al., CVPR 2016) of pixels, as mmsegmentation's OHEMPixelSampler does it.

Axes: n images, h w pixels.
"""

# ruff: noqa: F722
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pspnet.distributed import summed
from pspnet.labels import IGNORE_INDEX

_BITS, _DIGIT_BITS = 30, 10
"""float32 numbers from 0 to 1 are ordered as their lower 30 bits; found ten bits at a time."""


def hard_pixels(
    target: Int64[Tensor, "n h w"],
    probabilities: Float[Tensor, "n h w"],
    *,
    threshold: float,
    min_kept: int,
) -> Int64[Tensor, "n h w"]:
    """Return `target` with IGNORE_INDEX wherever the network gives the right class enough probability.

    Kept are the pixels below `threshold`; where those are no more than `min_kept` times the number of images, all
    pixels below the (min_kept * n + 1)-th smallest probability instead, or below the largest. Images and pixels are
    those of all workers: the choice is that of one process with all images.
    """
    values = probabilities.float()
    valid = target != IGNORE_INDEX
    counts = torch.stack(
        [valid.sum(), (valid & (values < threshold)).sum(), valid.new_tensor(len(target), dtype=torch.int64)]
    )
    num_valid, num_below, num_images = summed(counts).tolist()
    rank = min(min_kept * num_images, num_valid - 1)
    limit: Tensor | float = threshold
    if num_valid > 0 and num_below <= rank:
        limit = _smallest(values[valid], rank)
    # So written that a probability that is not a number stays in the loss, which then says so.
    return target.masked_fill(values >= limit, IGNORE_INDEX)


def _smallest(values: Float[Tensor, " p"], rank: int) -> Tensor:
    """Return the value, of those of all workers, that `rank` others precede in ascending order; all are in [0, 1]."""
    bits = values.contiguous().view(torch.int32).clamp(max=2**_BITS - 1)
    prefix = 0
    for shift in range(_BITS - _DIGIT_BITS, -1, -_DIGIT_BITS):
        digits = bits >> shift
        digits = digits[digits >> _DIGIT_BITS == prefix] & (2**_DIGIT_BITS - 1)
        up_to = summed(torch.bincount(digits, minlength=2**_DIGIT_BITS)).cumsum(0)
        digit = int((up_to <= rank).sum())
        rank -= int(up_to[digit - 1]) if digit else 0
        prefix = prefix << _DIGIT_BITS | digit
    return torch.tensor(prefix, dtype=torch.int32, device=values.device).view(torch.float32)

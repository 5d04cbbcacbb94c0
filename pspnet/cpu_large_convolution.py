"""3x3 convolutions of many channels in bf16 on a CPU, whose weights get their gradients by matrix products.

oneDNN takes 4 to 5 times as long for the gradient of a weight of 2048 channels as for the convolution itself.

Axes: n images, h w cells, c channels in, o channels out.
"""

# ruff: noqa: F722
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def large_convolution(
    images: Float[Tensor, "n c h w"], weight: Float[Tensor, "o c 3 3"], dilation: int = 1
) -> Float[Tensor, "n o h w"]:
    """Return conv2d(images, weight, padding=dilation, dilation=dilation); a faster one to train, any float type."""
    result: Tensor = _LargeConvolution.apply(images, weight, dilation)
    return result


class _LargeConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.dilation = dilation
        return functional.conv2d(images, weight, padding=dilation, dilation=dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        images, weight = ctx.saved_tensors
        of_images = of_weight = None
        if ctx.needs_input_grad[0]:
            twice = [ctx.dilation] * 2
            of_images, _, _ = torch.ops.aten.convolution_backward(
                gradient, images, weight, None, [1, 1], twice, twice, False, [0, 0], 1, [True, False, False]
            )
        if ctx.needs_input_grad[1]:
            of_weight = _gradient_of_weight(images, gradient, ctx.dilation)
        return of_images, of_weight, None


def _gradient_of_weight(images: Tensor, gradient: Tensor, dilation: int) -> Float[Tensor, "o c 3 3"]:
    """Return for each tap the sum, over all cells, of the gradient there times what the tap sees.

    All cells lie in one row, with `dilation` zeros between one line or image and the next, so that what a tap sees is
    that row, shifted.
    """
    images = functional.pad(images.permute(0, 2, 3, 1), (0, 0, dilation, 0, dilation, 0))
    gradient = functional.pad(gradient.permute(0, 2, 3, 1), (0, 0, 0, dilation, 0, dilation))
    line = images.shape[2]
    seen = functional.pad(images.flatten(0, 2), (0, 0, 0, 2 * dilation * (line + 1)))
    by_channel = gradient.flatten(0, 2).T.contiguous()
    result = images.new_empty(len(by_channel), 3, 3, images.shape[3])
    for i in range(3):
        for j in range(3):
            first = dilation * (i * line + j)
            torch.mm(by_channel, seen[first : first + by_channel.shape[1]], out=result[:, i, j])
    return result.permute(0, 3, 1, 2)

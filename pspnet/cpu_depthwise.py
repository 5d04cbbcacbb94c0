"""Depthwise convolutions whose gradients a CPU has no fast kernel for, computed by kernels for others.

Axes: n images, c channels, h w rows and columns of the input, ho wo of the output.
"""

# ruff: noqa: F722
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pspnet.kernels import autocast_dtype


def use_fast_depthwise_gradients(module: nn.Module) -> None:
    """Let depthwise convolutions with a stride or a dilation compute their gradients by kernels made for neither.

    oneDNN has fast kernels for a depthwise convolution's gradients only where stride and dilation are 1: for 960
    channels, dilated by 2, forward and backward take 13 times as long in bf16 and 2.6 times in fp32, for 144 channels
    of stride 2, 9 times in bf16; a stride in fp32 is left as it is (torch 2.14). Results agree up to rounding.
    """
    for part in module.modules():
        if type(part) is nn.Conv2d and _is_slow(part):
            part.__class__ = _DepthwiseConv2d  # its parameters, hooks and place in the network stay


def _is_slow(conv: nn.Conv2d) -> bool:
    stride, dilation = conv.stride[0], conv.dilation[0]
    return (
        conv.groups == conv.in_channels == conv.out_channels > 1
        and conv.kernel_size == (3, 3)
        and conv.stride == (stride, stride)
        and conv.dilation == conv.padding == (dilation, dilation)
        and conv.padding_mode == "zeros"
        and conv.bias is None
        and (stride == 1) != (dilation == 1)
    )


class _DepthwiseConv2d(nn.Conv2d):
    """A 3x3 depthwise convolution, padded by its dilation, with either a stride or a dilation."""

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c ho wo"]:
        dtype = autocast_dtype(input)
        is_fast = dtype == torch.float32 and self.stride[0] > 1
        if input.device.type != "cpu" or is_fast or not torch.is_grad_enabled():
            return super().forward(input)
        input, weight = input.to(dtype), self.weight.to(dtype)
        output: Tensor = _Depthwise.apply(input, weight, self.stride[0], self.dilation[0])
        return output


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.dilation = stride, dilation
        return functional.conv2d(images, weight, None, stride, dilation, dilation, images.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        images, weight = ctx.saved_tensors
        needs_images, needs_weight, *_ = ctx.needs_input_grad
        of_images = (
            _gradient_of_images(gradient, weight, ctx.stride, ctx.dilation, images) if needs_images else None
        )
        of_weight = (
            _gradient_of_weight(gradient, weight, ctx.stride, ctx.dilation, images) if needs_weight else None
        )
        return of_images, of_weight, None, None


def _gradient_of_images(
    gradient: Tensor, weight: Tensor, stride: int, dilation: int, images: Tensor
) -> Tensor:
    """Convolve the gradient, with zeros between its cells for the stride, with the kernel turned about."""
    if stride > 1:
        spread = torch.zeros_like(images)
        spread[:, :, ::stride, ::stride] = gradient
        gradient = spread
    return functional.conv2d(gradient, weight.flip(2, 3), None, 1, dilation, dilation, groups=images.shape[1])


def _gradient_of_weight(
    gradient: Tensor, weight: Tensor, stride: int, dilation: int, images: Tensor
) -> Tensor:
    """Take the interleaved grids of a dilated convolution, which do not see each other, for images of their own."""
    if dilation > 1:
        images, gradient = _interleaved(images, dilation), _interleaved(gradient, dilation)
    strides = [stride, stride]
    _, of_weight, _ = torch.ops.aten.convolution_backward(
        gradient, images, weight, None, strides, [1, 1], [1, 1], False, [0, 0], images.shape[1],
        [False, True, False],
    )  # fmt: skip
    return of_weight


def _interleaved(x: Float[Tensor, "n c h w"], step: int) -> Float[Tensor, "m c hs ws"]:
    """Return every step-th cell of every step-th row, from each place to begin at, with zeros up to whole steps."""
    height, width = x.shape[2:]
    x = functional.pad(x, (0, -width % step, 0, -height % step)).permute(0, 2, 3, 1)
    n, height, width, channels = x.shape
    x = x.reshape(n, height // step, step, width // step, step, channels).permute(2, 4, 0, 1, 3, 5)
    return x.reshape(-1, height // step, width // step, channels).permute(0, 3, 1, 2)

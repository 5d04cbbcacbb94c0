"""Which of a CPU's kernels computes a convolution.

Axes: n images, c channels, h w rows and columns of the input, ho wo of the output.
"""

# ruff: noqa: F722
import functools
import importlib.util
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from pspnet.cpu_large_convolution import large_convolution

_HAS_NUMBA = importlib.util.find_spec("numba") is not None
CHANNELS_PER_PART = 512
"""Input channels that a prediction's largest convolution takes at a time on a CPU; with as many it is large."""
MIN_WINOGRAD_CHANNELS = 64
"""Of inputs and outputs: with fewer, what is saved in products is spent on the tiles."""
MIN_WINOGRAD_VALUES = 2**18
"""Cells times the smaller number of channels: with fewer, it is spent on transforming the kernels."""


def use_fast_kernels(
    model: nn.Module, backbone: nn.Module, *, to_predict: bool = False, num_threads: int = 0
) -> None:
    """Let the convolutions of `model` be computed by what is fastest on this CPU with one thread, by default torch's.

    Intel's processors multiply matrices as fast as they convolve: 1x1 convolutions of the backbone become products of
    matrices, and 3x3 ones need fewer multiplications (`pspnet.cpu_convolution`). On others products of matrices are
    slow, and are avoided. Results agree up to rounding. With `to_predict`, the weights must stay as they are.
    """
    if (num_threads or torch.get_num_threads()) > 1:
        return
    if multiplies_matrices_fast():
        use_matrix_products(model, backbone, to_predict=to_predict)
    else:
        avoid_matrix_products(backbone)


@functools.cache
def multiplies_matrices_fast() -> bool:
    """Return whether torch's matrix products are made for this processor: MKL's for Intel's."""
    cpuinfo = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()


def avoid_matrix_products(backbone: nn.Module) -> None:
    """Give 1x1 convolutions a dilation; it means nothing for them.

    It takes them from a slow matrix product to oneDNN's own kernels: on a Zen 5 a training step in fp32 takes 0.86 of
    the time for ResNet-50 and -18, a prediction 0.7 (torch 2.14).
    """
    for part in backbone.modules():
        if isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1):
            part.dilation = (2, 2)


def use_matrix_products(model: nn.Module, backbone: nn.Module, *, to_predict: bool = False) -> None:
    """Compute 1x1 convolutions of the backbone, and all 3x3 ones that are large enough, by matrix products.

    On a Xeon a training step of ResNet-50 takes 0.67 (crop 473) and 0.85 (257) of the time in fp32, 0.85 in bf16.
    """
    for part in backbone.modules():
        if type(part) is nn.Conv2d and _is_pointwise(part):
            part.__class__ = PointwiseConv2d  # its parameters, hooks and place in the network stay
    if _HAS_NUMBA:
        for part in model.modules():
            if type(part) is nn.Conv2d and _is_worth_winograd(part):
                part.__class__ = WinogradConv2d
            if isinstance(part, WinogradConv2d):
                part.is_fixed = to_predict


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)


def _is_worth_winograd(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.padding == conv.dilation == (conv.dilation[0], conv.dilation[0])
        and conv.padding_mode == "zeros"
        and conv.groups == 1
        and min(conv.in_channels, conv.out_channels) >= MIN_WINOGRAD_CHANNELS
    )


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution as the product of its weight with each pixel's channels, which lie side by side."""

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o h w"]:
        """Return the convolution in channels_last, if `input` is."""
        return self.convolve(input, self.weight, self.bias)

    def convolve(
        self, input: Float[Tensor, "n c h w"], weight: Float[Tensor, "o c 1 1"], bias: Tensor | None = None
    ) -> Float[Tensor, "n o h w"]:
        """Return the convolution with this weight and bias in place of its own."""
        if bias is not None and not torch.is_grad_enabled() and _HAS_NUMBA and _is_in_full_precision(input):
            from pspnet.cpu_activation import pointwise_prediction

            return pointwise_prediction(input, weight, bias, rectify=False)
        pixels = functional.linear(input.permute(0, 2, 3, 1), weight.flatten(1), bias)
        return pixels.permute(0, 3, 1, 2)

    def rectified(self, input: Tensor, shift: Tensor, shortcut: Tensor | None) -> Float[Tensor, "n o h w"]:
        """Return relu(convolution + shift + shortcut), without gradients; the shortcut's memory may become its own."""
        if not _is_in_full_precision(input):
            return _shifted_and_rectified(self.convolve(input, self.weight), shift, shortcut)
        from pspnet.cpu_activation import pointwise_prediction

        return pointwise_prediction(input, self.weight, shift, shortcut, rectify=True)


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution, padded by its dilation, with a quarter of the multiplications in fp32 and fp64."""

    is_fixed = False
    """Whether the weight stays as it is; predictions keep what they compute of it, 4 times its memory."""
    _kernels: Tensor | None = None

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o h w"]:
        """Return the convolution."""
        return self.convolve(input, self.weight, self.bias)

    def convolve(
        self, input: Float[Tensor, "n c h w"], weight: Float[Tensor, "o c 3 3"], bias: Tensor | None = None
    ) -> Float[Tensor, "n o h w"]:
        """Return the convolution with this weight, of its own or a part of that, and this bias."""
        if not self.is_worthwhile(input, weight):
            return convolve3x3(input, weight, bias, dilation=self.dilation[0])
        if self.is_fixed and not torch.is_grad_enabled():
            result = self.predict(input, weight)
        else:
            from pspnet.cpu_convolution import winograd_convolution  # needs numba, which a GPU box may lack

            result = winograd_convolution(input, weight, self.dilation[0])
        return result if bias is None else result + bias[:, None, None]

    def rectified(self, input: Tensor, shift: Tensor, shortcut: Tensor | None) -> Float[Tensor, "n o h w"]:
        """Return relu(convolution + shift + shortcut), without gradients; the shortcut's memory may become its own."""
        if self.is_fixed and shortcut is None and self.is_worthwhile(input, self.weight):
            return self.predict(input, self.weight, shift)
        return _shifted_and_rectified(self.convolve(input, self.weight), shift, shortcut)

    def predict(
        self, input: Float[Tensor, "n c h w"], weight: Float[Tensor, "o c 3 3"], shift: Tensor | None = None
    ) -> Float[Tensor, "n o h w"]:
        """Return the convolution with this weight, always the same; with `shift` relu(convolution + shift)."""
        from pspnet.cpu_convolution import winograd_kernels, winograd_prediction

        if self._kernels is None:
            self._kernels = winograd_kernels(weight)
        return winograd_prediction(input, self._kernels, self.dilation[0], shift)

    def is_worthwhile(self, input: Float[Tensor, "n c h w"], weight: Float[Tensor, "o c 3 3"]) -> bool:
        """Return whether these are many cells and channels, and are not rounded to bf16.

        So rounded, what has been added up for a tile would be too coarse.
        """
        num_values = input.numel() // input.shape[1] * min(weight.shape[:2])
        return _is_in_full_precision(input) and num_values >= MIN_WINOGRAD_VALUES


def activated(
    conv: nn.Module, norm: nn.Module, x: Float[Tensor, "n c h w"], shortcut: Tensor | None = None
) -> Float[Tensor, "n o h w"]:
    """Return relu(norm(conv(x)) + shortcut), on the way to a prediction in one pass over what `conv` gives.

    There the shortcut's memory may become the result's.
    """
    if (
        isinstance(conv, PointwiseConv2d | WinogradConv2d)
        and isinstance(norm, nn.Identity)
        and conv.bias is not None
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and (dtype := autocast_dtype(x)) != torch.float16
        and _HAS_NUMBA
    ):
        return conv.rectified(x, conv.bias, shortcut if shortcut is None else shortcut.to(dtype))
    y = norm(conv(x))
    if shortcut is not None:
        y += shortcut
    return functional.relu(y, inplace=True)


def _shifted_and_rectified(y: Tensor, shift: Tensor, shortcut: Tensor | None) -> Tensor:
    from pspnet.cpu_activation import add_and_rectify

    y = y.contiguous(memory_format=torch.channels_last)
    add_and_rectify(y, shift, shortcut)
    return y


def _is_in_full_precision(x: Tensor) -> bool:
    """Return whether a convolution of `x` is one in float32 or float64 on a CPU."""
    return x.device.type == "cpu" and autocast_dtype(x) in (torch.float32, torch.float64)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the type of what a convolution of `x` gives."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def convolve3x3(
    images: Float[Tensor, "n c h w"],
    weight: Float[Tensor, "o c 3 3"],
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
) -> Float[Tensor, "n o h w"]:
    """Return the convolution, of many channels on a CPU in a faster way than oneDNN's.

    To predict it is a sum over parts of the channels that fit in its cache: 2048 at once take 1.4 times as long. In
    training, where parts would be rounded one by one, all are summed at once.
    """
    is_large = images.device.type == "cpu" and images.shape[1] >= CHANNELS_PER_PART
    is_trained = torch.is_grad_enabled()
    if is_large and is_trained and bias is None and autocast_dtype(images) == torch.bfloat16:
        return large_convolution(images.bfloat16(), weight.bfloat16(), dilation)
    if is_trained or not is_large:
        return functional.conv2d(images, weight, bias, padding=dilation, dilation=dilation)
    parts, weights = images.split(CHANNELS_PER_PART, 1), weight.split(CHANNELS_PER_PART, 1)
    result = functional.conv2d(parts[0], weights[0], bias, padding=dilation, dilation=dilation)
    for part, its_weight in zip(parts[1:], weights[1:], strict=True):
        result += functional.conv2d(part, its_weight, padding=dilation, dilation=dilation)
    return result

"""A trained network rewritten for prediction: the same function in fewer passes over memory."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pspnet.kernels import use_fast_kernels
from pspnet.model import PSPNet, PyramidHead

_SIDE = 33
"""Of the picture that shows which BatchNorm follows which convolution."""


def fold_batch_norm(model: PSPNet) -> PSPNet:
    """Return a copy for evaluation, without auxiliary head, whose BatchNorms are part of the convolutions before them.

    BatchNorm with fixed statistics is a scale and a shift for each channel, which the convolution's weights and bias
    take over. Logits agree up to rounding. What follows what is seen on a picture, whatever the backbone; a BatchNorm
    that does not directly follow a convolution of its own stays.
    """
    folded = copy.deepcopy(model).eval()
    folded.aux_head = None
    for conv, norm in _pairs(folded):
        conv.weight, conv.bias = _fused(conv, norm)
        _replace(folded, norm, nn.Identity())
    for head in folded.modules():
        # Its convolution is computed in parts, never called as a module.
        if isinstance(head, PyramidHead) and type(head.norm) is nn.BatchNorm2d:
            norm = head.norm
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            head.conv.weight = nn.Parameter(head.conv.weight * scale[:, None, None, None])
            head.norm = _Shift(norm.bias - norm.running_mean * scale)  # type: ignore[assignment]
    return folded.requires_grad_(False)


def for_prediction(model: PSPNet, device: torch.device | str) -> PSPNet:
    """Return the network as it predicts fastest on `device`: itself on a GPU, a rewritten copy on CPUs.

    Both keep the channels of a pixel together (channels_last): the weights of the network itself are put in that
    order where they lie, their values stay. The copy has no BatchNorm; see also `use_fast_kernels`.
    """
    if torch.device(device).type != "cpu":
        return model.to(memory_format=torch.channels_last)
    folded = fold_batch_norm(model).to(memory_format=torch.channels_last)
    use_fast_kernels(folded, folded.backbone, to_predict=True)
    return folded


def _fused(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the convolution's weight and bias with the BatchNorm in them, rounded once."""
    dtype = conv.weight.dtype
    conv, norm = copy.deepcopy(conv).double(), copy.deepcopy(norm).double()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return nn.Parameter(weight.detach().to(dtype)), nn.Parameter(bias.detach().to(dtype))


class _Shift(nn.Module):
    """Adds a number to each channel, in place."""

    shift: Tensor

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift.detach()[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.shift)


def _pairs(model: PSPNet) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Return each BatchNorm whose input is the output of a convolution, with it."""
    found: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    made_by: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensors are kept, so that no other takes their id

    def saw_convolution(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        made_by[id(output)] = module, output

    def sees_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        if id(inputs[0]) in made_by:
            found.append((made_by[id(inputs[0])][0], module))

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(saw_convolution))
        elif type(module) is nn.BatchNorm2d:
            hooks.append(module.register_forward_pre_hook(sees_norm))
    weight = next(model.parameters())
    with torch.no_grad():
        model(weight.new_zeros(1, 3, _SIDE, _SIDE), upsample=False)
    for hook in hooks:
        hook.remove()
    convolutions, norms = [conv for conv, _ in found], [norm for _, norm in found]
    # Shared weights have no one scale that they could take over.
    return [pair for pair in found if convolutions.count(pair[0]) == norms.count(pair[1]) == 1]


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)

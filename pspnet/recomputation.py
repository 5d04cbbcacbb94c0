"""Activation checkpointing (Chen et al., 2016): what a block computes is computed again in the backward pass."""

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.batchnorm import _BatchNorm

from pspnet.model import PSPNet


def recompute_blocks(model: PSPNet) -> None:
    """Let each block of the backbone's stages keep only its input for the backward pass.

    Gradients, running statistics and the names in the state dict stay as they are. Do it before DDP.
    """
    for stage in model.backbone.children():
        if isinstance(stage, nn.Sequential):
            for name, block in list(stage.named_children()):
                stage.register_module(name, _recomputed(block))


def _recomputed(block: nn.Module) -> nn.Module:
    return checkpoint_wrapper(
        block, context_fn=lambda: (contextlib.nullcontext(), _statistics_as_they_are(block))
    )


@contextlib.contextmanager
def _statistics_as_they_are(block: nn.Module) -> Iterator[None]:
    """Let BatchNorm compute as in the first pass, without counting the same images twice."""
    kept = [
        (norm, name, buffer)
        for norm in block.modules()
        if isinstance(norm, _BatchNorm)
        for name, buffer in norm.named_buffers(recurse=False)
    ]
    for norm, name, buffer in kept:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)

"""Parts of the network that keep their weights: the first stages of the backbone, and BatchNorm.

A BatchNorm whose weight is not trained normalises with its running statistics, and keeps them.
"""

from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pspnet.errors import InputError
from pspnet.model import PSPNet

Frozen = Literal["none", "backbone", "all"]
_STAGES = ("layer1", "layer2", "layer3", "layer4")


def freeze(model: PSPNet, *, num_stages: int = 0, batch_norm: Frozen = "none") -> None:
    """Let the first `num_stages` of stem and stages 1 to 4 keep their weights, and BatchNorm in the part named.

    The numbers are those of detectron2's FREEZE_AT; mmsegmentation's frozen_stages is smaller by one. Build DDP and
    the optimizer afterwards.
    """
    if num_stages > 0:
        children = dict(model.backbone.named_children())
        missing = [name for name in _STAGES if name not in children]
        if missing:
            raise InputError(
                f"model.freeze_stages needs a backbone of four stages, but got {num_stages} for "
                f"{model.architecture['backbone']}, which has no {', '.join(missing)}. Set it to 0, or take a ResNet."
            )
        kept = _STAGES[num_stages - 1 :]
        for name, child in children.items():
            if name not in kept:
                child.requires_grad_(False)
    if batch_norm != "none":
        part = model if batch_norm == "all" else model.backbone
        norms = [module for module in part.modules() if isinstance(module, _BatchNorm)]
        if not norms:
            raise InputError(
                f"model.freeze_batch_norm {batch_norm} needs BatchNorm there, but {model.architecture['backbone']} has "
                "none. Leave it out, or take another backbone."
            )
        for norm in norms:
            norm.requires_grad_(False)


def train_mode(model: nn.Module) -> None:
    """Put the model in training mode, and BatchNorm that is frozen in evaluation mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine and not module.weight.requires_grad:
            module.eval()

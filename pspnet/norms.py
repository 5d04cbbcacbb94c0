"""What a network normalises with: BatchNorm over a worker's images, over all workers' (sync), or GroupNorm."""

import importlib
from typing import Literal

from torch import nn

Norm = Literal["auto", "batch", "sync", "group"]
"""auto: sync where DDP has GPUs, else batch."""

MAX_GROUPS = 32


def use_group_norm(module: nn.Module) -> None:
    """Replace each BatchNorm inside `module` by GroupNorm (Wu and He, ECCV 2018) of `num_groups` groups."""
    for name, child in module.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            use_group_norm(child)
            continue
        norm = nn.GroupNorm(num_groups(child.num_features), child.num_features, eps=child.eps)
        norm.load_state_dict({"weight": child.weight, "bias": child.bias})
        # timm's BatchNorms drop and activate, too.
        then = [
            part for part in (getattr(child, "drop", None), getattr(child, "act", None)) if part is not None
        ]
        setattr(module, name, nn.Sequential(norm, *then) if then else norm)


def num_groups(channels: int) -> int:
    """Return the most groups of equally many channels, up to 32 (section 4 of the paper), of at least two each.

    A group of one channel has a single value at a 1x1 grid, and no variance.
    """
    return max(n for n in range(1, MAX_GROUPS + 1) if channels % n == 0 and (n == 1 or channels // n > 1))


def synchronised(model: nn.Module) -> nn.Module:
    """Return the model with SyncBatchNorm in place of BatchNorm.

    timm's BatchNorms activate, too, which torch's own function would lose.
    """
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    if kinds <= {nn.BatchNorm2d}:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return importlib.import_module("timm.layers").convert_sync_batchnorm(model)

"""Initial weights: torchvision's or timm's by name, or those of a file, checked key by key.

A file is safetensors or a plain state dict of tensors (.pth), read without pickle's code.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import safetensors.torch
import torch
from torch import Tensor, nn

from pspnet.backbones import Backbone
from pspnet.errors import InputError
from pspnet.json_values import shown
from pspnet.model import PSPNet
from pspnet.resnet import ResNet
from pspnet.timm_backbones import TimmBackbone

IMAGENET = "imagenet"


def load_backbone_weights(model: PSPNet, weights: str) -> None:
    """Set the weights of `model.backbone`: "" leaves it, "imagenet" takes torchvision's or timm's, else a file's.

    A file has torchvision's names (timm's for a backbone of timm), alone or under `state_dict`, with or without the
    layers after the backbone.
    InputError names every key that is missing, unexpected or of another shape.
    """
    if weights == "":
        return
    backbone = model.backbone
    given = (
        _download(backbone) if weights == IMAGENET else read_tensors(Path(weights), "model.backbone_weights")
    )
    problems = load_checked(backbone, backbone.named_as_here(given))
    if problems:
        raise InputError(
            f"model.backbone_weights must hold the weights of {backbone.name} under "
            f"{'timm' if isinstance(backbone, TimmBackbone) else 'torchvision'}'s names, "
            f"but in {weights} there are {problems}. Give a file of that network, or another model.backbone."
        )


def load_checked(module: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Load `weights` where `key_differences` to the module's is ""; otherwise load nothing and return it.

    A module on the device "meta" has no values: it is compared alone.
    """
    own = module.state_dict()
    problems = key_differences(own, weights)
    if not problems and not any(value.is_meta for value in own.values()):
        module.load_state_dict(weights, strict=False)
    return problems


def key_differences(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """Return in words which keys of `own` are missing from `weights`, unexpected or of other values; "" for none.

    Other values are those of another shape or kind of number, none at all (sparse, without memory) and what is not
    finite. Files from before torch 0.4.1 lack the counters num_batches_tracked, which only BatchNorm's cumulative
    average reads: they may be missing.
    """
    problems: dict[str, list[str]] = {
        "missing": [key for key in own if key not in weights and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in weights if key not in own],
    }
    for key in own:
        if key in weights and (found := _difference(own[key], weights[key])):
            what, how = found
            problems.setdefault(what, []).append(f"{key}{how}")
    return "; ".join(f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in problems.items() if keys)


def _difference(own: Tensor, given: Tensor) -> tuple[str, str] | None:
    """Return what is wrong with the values that are given for a tensor, and how they are; None where nothing is."""
    if given.is_nested or given.layout != torch.strided or given.is_meta:
        layout = "no values" if given.is_meta else str(given.layout).removeprefix("torch.")
        return "not a plain tensor", f" ({layout})"
    if given.shape != own.shape:
        return "of another shape", f" {tuple(given.shape)} for {tuple(own.shape)}"
    if given.is_complex() or (own.is_floating_point() and not given.is_floating_point()):
        return "of another kind of number", f" ({given.dtype} for {own.dtype})".replace("torch.", "")
    if own.is_floating_point() and not given.to(own.dtype).isfinite().all():
        return "not finite", ""
    return None


def read_tensors(path: Path, field: str) -> dict[str, Tensor]:
    """Return the tensors of a file by their names; InputError where it is absent, damaged or holds anything else."""
    return tensors_of(read_file(path, field), path, field)


def tensors_of(content: Any, path: Path, field: str) -> dict[str, Tensor]:
    """Return the tensors in what `read_file` returned: alone or under `state_dict`, DDP's `module.` taken away."""
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        raise InputError(
            f"{field} must hold tensors by their names, alone or under state_dict, but {path} holds something else. "
            "Save the network's state_dict() alone."
        )
    if all(str(key).startswith("module.") for key in state):
        return {str(key).removeprefix("module."): value for key, value in state.items()}
    return {str(key): value for key, value in state.items()}


def read_file(path: Path, field: str) -> Any:
    """Return what a safetensors or .pth file holds; what would run code is not read."""
    if not path.is_file():
        wanted = 'be "imagenet", empty or a file' if field == "model.backbone_weights" else "be a file"
        raise InputError(f"{field} must {wanted}, but there is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _check_not_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes the readers raise
        reason = shown(error)
        remedy = _OF_MMENGINE if "mmengine" in str(error) else ""
        raise InputError(
            f"{field} must be a safetensors file or a state dict of tensors, but "
            f"{path} cannot be read ({type(error).__name__}: {reason}). "
            f"Save it again with safetensors.torch.save_file.{remedy}"
        ) from error


_OF_MMENGINE = (
    " mmengine wrote it while it trained, objects of its own beside the tensors: save its state_dict and its meta, as "
    "a dict of these two, where you trust it and have mmengine. The state_dict alone does not say how it was trained: "
    "it is taken for a network at output stride 8, and jobs/import_checkpoint.py needs --align-corners yes or no, and "
    "--crop-size."
)


def _check_not_compressed(path: Path) -> None:
    """torch.save stores tensors as they are; a file that compresses them can inflate to a thousand times its size."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        if sum(info.file_size for info in file.infolist()) > path.stat().st_size:
            raise ValueError("it is compressed, or its parts overlap")


def _download(backbone: Backbone) -> Mapping[str, Tensor]:
    if isinstance(backbone, TimmBackbone):
        try:
            return backbone.download()
        except Exception as error:  # whatever timm, the hub's client and the connection raise
            reason = next(iter(str(error).splitlines()), "no reason given")
            raise InputError(
                f"timm's pretrained weights of {backbone.name} could not be had "
                f"({type(error).__name__}: {reason}). "
                "Download them elsewhere and give the file as model.backbone_weights."
            ) from error
    if isinstance(backbone, ResNet) and backbone.has_deep_stem:
        raise InputError(
            'model.backbone_weights "imagenet" are torchvision\'s, which have the plain stem, but the model '
            "has the deep one. Give a file, or leave the deep stem out."
        )
    # Here, because it takes as long to import as torch itself, in every worker of every trial.
    import torchvision.models

    weights = torchvision.models.get_model_weights(backbone.name)["IMAGENET1K_V1"]
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (URLError, OSError, RuntimeError) as error:
        raise InputError(
            f"torchvision's weights of {backbone.name} could not be downloaded from {weights.url} ({error}). "
            "Download them elsewhere and give the file as model.backbone_weights."
        ) from error

"""PSPNet checkpoints of github.com/hszhao/semseg (the paper's authors) and github.com/open-mmlab/mmsegmentation.

Their tensors are given this network's names; what the network is like follows from them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pspnet import mobilenet, resnet
from pspnet.errors import InputError
from pspnet.labels import CITYSCAPES
from pspnet.model import PSPNet
from pspnet.published_names import Origin, renamed
from pspnet.sizes import notation
from pspnet.sizes_alone import built_without_content
from pspnet.weights import key_differences, load_checked, read_file, read_tensors, tensors_of

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of grey levels 0 to 255, red first: what both take from the images and divide them by."""


@dataclass(frozen=True)
class PublishedNetwork:
    """A network of others in this one's terms."""

    origin: Origin
    architecture: dict[str, Any]
    """`PSPNet.from_architecture` builds it."""
    weights: dict[str, Tensor]
    """Exactly those of the network, under its names."""
    crop_size: int | str | None
    """Of the training, where it is known: semseg's is 713 for the 19 classes of Cityscapes (its files do not say it,
    its configurations of other data have 473); mmsegmentation's stands in a stored configuration."""


def read_published(
    path: str | Path,
    *,
    bin_sizes: Sequence[int] = (1, 2, 3, 6),
    align_corners: bool | None = None,
    field: str = "model.weights",
) -> PublishedNetwork:
    """Return the network in a checkpoint of semseg or mmsegmentation.

    Those of semseg have ResNet-50, -101 or -152, those of mmsegmentation ResNet-18 to -152 or MobileNetV2. The file is
    a .pth, read without pickle's code, or safetensors; its state dict may lie under `state_dict` and its names begin
    with `module.`. The tensors do not tell `bin_sizes`, nor whether mmsegmentation trained with `align_corners`: that
    is taken from the configuration stored with them, and the one given only where it is silent. Strides and dilations
    are those of this configuration; where it has neither, of output stride 8. InputError names every key that does not
    fit, and strides that are of no output stride here.
    """
    path = Path(path)
    content = read_file(path, field)
    given = tensors_of(content, path, field)
    origin = _origin(given, path, field)
    weights = {renamed(key, origin): value for key, value in given.items()}
    # mmengine writes a tuple over several lines, whose ends str() writes as \n.
    settings = "" if origin == "semseg" else str(content.get("meta")).replace("\\n", "\n")
    corners = True if origin == "semseg" else _stored_flag(settings, "align_corners")
    if corners is None and align_corners is None:
        raise InputError(
            f"{field} must be given with align_corners, because {path} does not say how mmsegmentation trained it: "
            "its recipes have True for crops of 769 and False for all others. Give --align-corners yes or no."
        )
    architecture = _architecture(weights, origin, settings, path, field) | {
        "bin_sizes": list(bin_sizes) if _num_branches(weights) else [],
        "align_corners": align_corners if corners is None else corners,
    }
    own = built_without_content(lambda: PSPNet.from_architecture(architecture)).state_dict()
    problems = key_differences(own, weights)
    if problems:
        raise InputError(
            f"{field} must be a PSPNet of {origin} with {len(bin_sizes)} bins, but under the names it has here there "
            f"are in {path} {problems}. Give a checkpoint of their PSPNet, with the bins it was trained with."
        )
    crop_size = _stored_crop_size(settings)
    if origin == "semseg" and architecture["num_classes"] == CITYSCAPES.num_classes:
        crop_size = 713
    return PublishedNetwork(origin, architecture, weights, crop_size)


def load_network_weights(model: PSPNet, weights: str) -> None:
    """Set all weights of the model: "" leaves them, a file is a checkpoint of others or this network's own state dict.

    InputError names the settings in which a checkpoint of others is of another network, or every key that is missing,
    unexpected or of another shape.
    """
    if weights == "":
        return
    path = Path(weights)
    given = read_tensors(path, "model.weights")
    if "head.conv.weight" not in given:
        published = read_published(
            path, bin_sizes=model.architecture["bin_sizes"] or (1, 2, 3, 6), align_corners=model.align_corners
        )
        _require_same(model.architecture, published, path)
        given = published.weights
    problems = load_checked(model, given)
    if problems:
        raise InputError(
            f"model.weights must hold exactly the network's weights, but in {path} there are {problems}. "
            "Give a file of the network that is configured."
        )


def _require_same(architecture: Mapping[str, Any], published: PublishedNetwork, path: Path) -> None:
    different = {
        key: value
        for key, value in published.architecture.items()
        if key != "dropout" and architecture[key] != value
    }
    if (
        different.pop("deep_stem_channels", None)
        and architecture["deep_stem"]
        and "deep_stem" not in different
    ):
        different["deep_stem_channels"] = published.architecture["deep_stem_channels"]
    if different:
        theirs = ", ".join(f"model.{key} {value}" for key, value in different.items())
        ours = ", ".join(f"{architecture[key]}" for key in different)
        raise InputError(
            f"model.weights must be of the network that is configured, but {path} is one of {published.origin} with "
            f"{theirs}, and configured is {ours}. Set these as the file has them."
        )


def _origin(given: Mapping[str, Tensor], path: Path, field: str) -> Origin:
    if "cls.0.weight" in given:
        return "semseg"
    if "decode_head.bottleneck.conv.weight" in given:
        return "mmsegmentation"
    raise InputError(
        f"{field} must be a PSPNet of semseg (cls.0.weight) or of mmsegmentation (decode_head.bottleneck.conv.weight), "
        f"but {path} has neither; its names are {', '.join(list(given)[:5])}…. Give a checkpoint of one of them."
    )


def _architecture(
    weights: Mapping[str, Tensor], origin: Origin, settings: str, path: Path, field: str
) -> dict[str, Any]:
    backbone = _backbone(weights, origin, path, field)
    is_resnet = backbone in resnet.ARCHITECTURES
    output_stride, dilations = _output_stride_and_dilations(backbone, settings, path, field)
    stem = weights.get("backbone.conv3.weight")
    num_branches, has_aux_head = _num_branches(weights), "aux_head.conv.weight" in weights
    return {
        "num_classes": _size(weights, "head.classifier.weight", path, field),
        "backbone": backbone,
        "output_stride": output_stride,
        "head_channels": _size(weights, "head.conv.weight", path, field),
        "branch_channels": _own_share(weights, "head.branches.0.0.weight", num_branches, path, field)
        if num_branches
        else 0,
        "aux_channels": _own_share(weights, "aux_head.conv.weight", 4, path, field) if has_aux_head else 0,
        "dropout": 0.1,
        "has_aux_head": any(key.startswith("aux_head.") for key in weights),
        "deep_stem": stem is not None,
        "deep_stem_channels": 128 if stem is None else len(stem),
        "contract_dilation": origin == "mmsegmentation"
        and is_resnet
        and _stored_flag(settings, "contract_dilation") is not False,
        "dilations": dilations,
        "dilate_first_only": backbone in (*resnet.BASIC, "mobilenet_v2"),
        "norm": "batch",
    }


def _backbone(weights: Mapping[str, Tensor], origin: Origin, path: Path, field: str) -> str:
    if "backbone.features.0.0.weight" in weights:
        return "mobilenet_v2"
    counts = tuple(
        len({key.split(".")[2] for key in weights if key.startswith(f"backbone.layer{stage}.")})
        for stage in range(1, 5)
    )
    is_bottleneck = "backbone.layer1.0.conv3.weight" in weights
    names: dict[tuple[bool, tuple[int, ...]], str] = {
        (name not in resnet.BASIC, num_blocks): name
        for name, (_, num_blocks) in resnet.ARCHITECTURES.items()
        if origin == "mmsegmentation" or name not in resnet.BASIC
    }
    if (is_bottleneck, counts) not in names:
        known = [*names.values(), *(["mobilenet_v2"] if origin == "mmsegmentation" else [])]
        raise InputError(
            f"{field} must be of {origin} with {', '.join(known)}, but the stages in {path} have "
            f"{' '.join(map(str, counts))} {'bottlenecks' if is_bottleneck else 'basic or other blocks'}. Give a "
            "checkpoint of one of those."
        )
    return names[is_bottleneck, counts]


def _size(weights: Mapping[str, Tensor], key: str, path: Path, field: str, *, axis: int = 0) -> int:
    if key not in weights or weights[key].ndim != 4:
        raise InputError(
            f"{field} must hold {key} (by its name here), but {path} does not. Give a whole checkpoint."
        )
    return weights[key].shape[axis]


def _own_share(weights: Mapping[str, Tensor], key: str, num_parts: int, path: Path, field: str) -> int:
    """Return how many channels the convolution gives; 0 where they are as many parts of those that it takes."""
    given, taken = (_size(weights, key, path, field, axis=axis) for axis in (0, 1))
    return 0 if given == taken // num_parts else given


def _num_branches(weights: Mapping[str, Tensor]) -> int:
    return len({key.split(".")[2] for key in weights if key.startswith("head.branches.")})


def _output_stride_and_dilations(
    backbone: str, settings: str, path: Path, field: str
) -> tuple[int, list[int]]:
    """Return what the configuration says of the backbone's strides, which its tensors do not tell.

    Where it says neither strides nor dilations, they are those of output stride 8; where it says one of them, the other
    is what mmsegmentation's backbones have by default, all strides and no dilation.
    """
    module = mobilenet if backbone == "mobilenet_v2" else resnet
    said = {name: _stored_tuples(settings, name) for name in ("strides", "dilations")}
    if not any(said.values()):
        return 8, []
    values = {name: found or {_listed(getattr(module, name.upper())[32])} for name, found in said.items()}
    output_strides = {_listed(strides): output_stride for output_stride, strides in module.STRIDES.items()}
    strides, dilations = values["strides"], values["dilations"]
    if len(strides) > 1 or len(dilations) > 1 or not strides <= output_strides.keys():
        raise InputError(
            f"{field} must be of a {backbone} with one of the strides {_in_brackets(output_strides)}, and with one "
            f"dilation a stage, but {path} was trained with strides {_in_brackets(strides)} and dilations "
            f"{_in_brackets(dilations)}. Give a checkpoint of one of mmsegmentation's d8 or d32 configurations."
        )
    output_stride = output_strides[strides.pop()]
    given = [int(dilation) for dilation in dilations.pop().split(", ")]
    return output_stride, [] if given == list(module.DILATIONS[output_stride]) else given


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _in_brackets(tuples: Iterable[str]) -> str:
    return " ".join(f"({each})" for each in sorted(tuples))


def _stored_tuples(settings: str, name: str) -> set[str]:
    """Return the values of this name in the configuration of mmsegmentation, each as "a, b"."""
    found = re.findall(rf"\b{name}['\"]?\s*[=:]\s*[(\[]([\d,\s]+)[)\]]", settings)
    return {", ".join(re.findall(r"\d{1,6}", each)) for each in found}


def _stored_crop_size(settings: str) -> int | str | None:
    """Return the one crop size that the configuration of mmsegmentation names; None: none or several."""
    said = {each for each in _stored_tuples(settings, "crop_size") if each.count(",") == 1}
    if len(said) != 1:
        return None
    height, width = map(int, said.pop().split(", "))
    return notation((height, width))


def _stored_flag(settings: str, name: str) -> bool | None:
    """Return what the configuration of mmsegmentation beside the tensors says; None: nothing or both."""
    said = set(re.findall(rf"\b{name}['\"]?\s*[=:]\s*(True|False)", settings))
    return said == {"True"} if len(said) == 1 else None

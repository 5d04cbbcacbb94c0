"""PSPNet checkpoints of github.com/hszhao/semseg (the paper's authors) and github.com/open-mmlab/mmsegmentation.

Their tensors are given this network's names; what the network is like follows from them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pspnet.errors import InputError
from pspnet.initialisation import WithoutDraws
from pspnet.labels import CITYSCAPES
from pspnet.model import PSPNet
from pspnet.resnet import ARCHITECTURES, Bottleneck
from pspnet.sizes import notation
from pspnet.weights import key_differences, load_checked, read_file, read_tensors, tensors_of

Origin = Literal["semseg", "mmsegmentation"]

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of grey levels 0 to 255, red first: what both take from the images and divide them by."""

_NAMES: dict[Origin, tuple[tuple[str, str], ...]] = {
    "semseg": (
        (r"layer0\.0\.", "backbone.conv1."),
        (r"layer0\.1\.", "backbone.bn1."),
        (r"layer0\.3\.", "backbone.conv2."),
        (r"layer0\.4\.", "backbone.bn2."),
        (r"layer0\.6\.", "backbone.conv3."),
        (r"layer0\.7\.", "backbone.bn3."),
        (r"(layer[1-4])\.", r"backbone.\1."),
        (r"ppm\.features\.(\d+)\.1\.", r"head.branches.\1.0."),
        (r"ppm\.features\.(\d+)\.2\.", r"head.branches.\1.1."),
        (r"cls\.0\.", "head.conv."),
        (r"cls\.1\.", "head.norm."),
        (r"cls\.4\.", "head.classifier."),
        (r"aux\.0\.", "aux_head.conv."),
        (r"aux\.1\.", "aux_head.norm."),
        (r"aux\.4\.", "aux_head.classifier."),
    ),
    "mmsegmentation": (
        (r"backbone\.stem\.0\.", "backbone.conv1."),
        (r"backbone\.stem\.1\.", "backbone.bn1."),
        (r"backbone\.stem\.3\.", "backbone.conv2."),
        (r"backbone\.stem\.4\.", "backbone.bn2."),
        (r"backbone\.stem\.6\.", "backbone.conv3."),
        (r"backbone\.stem\.7\.", "backbone.bn3."),
        (r"backbone\.((?:conv1|bn1|layer[1-4])\.)", r"backbone.\1"),
        (r"decode_head\.psp_modules\.(\d+)\.1\.conv\.", r"head.branches.\1.0."),
        (r"decode_head\.psp_modules\.(\d+)\.1\.bn\.", r"head.branches.\1.1."),
        (r"decode_head\.bottleneck\.conv\.", "head.conv."),
        (r"decode_head\.bottleneck\.bn\.", "head.norm."),
        (r"decode_head\.conv_seg\.", "head.classifier."),
        (r"auxiliary_head\.convs\.0\.conv\.", "aux_head.conv."),
        (r"auxiliary_head\.convs\.0\.bn\.", "aux_head.norm."),
        (r"auxiliary_head\.conv_seg\.", "aux_head.classifier."),
    ),
}


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
    """Return the network in a checkpoint of semseg or mmsegmentation with ResNet-50, -101 or -152 at output stride 8.

    The file is a .pth, read without pickle's code, or safetensors; its state dict may lie under `state_dict` and its
    names begin with `module.`. The tensors do not tell `bin_sizes`, nor whether mmsegmentation trained with
    `align_corners`: that is taken from the configuration stored with them, and the one given only where it is silent.
    InputError names every key that does not fit, and other strides or dilations than output stride 8 has. Refused are
    mmsegmentation's d32 and its ResNet-18 and MobileNetV2, which are other networks than those here: it dilates the
    first convolution of a basic block alone, and the first block of a stage of MobileNetV2 alone.
    """
    path = Path(path)
    content = read_file(path, field)
    given = tensors_of(content, path, field)
    origin = _origin(given, path, field)
    weights = {_renamed(key, origin): value for key, value in given.items()}
    settings = "" if origin == "semseg" else str(content.get("meta"))
    _check_strides(settings, path, field)
    corners = True if origin == "semseg" else _stored_align_corners(settings)
    if corners is None and align_corners is None:
        raise InputError(
            f"{field} must be given with align_corners, because {path} does not say how mmsegmentation trained it: "
            "its recipes have True for crops of 769 and False for all others. Give --align-corners yes or no."
        )
    architecture = _architecture(weights, origin, path, field) | {
        "bin_sizes": list(bin_sizes) if _num_branches(weights) else [],
        "align_corners": align_corners if corners is None else corners,
    }
    with torch.device("meta"), WithoutDraws():
        own = PSPNet.from_architecture(architecture).state_dict()
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


def _renamed(key: str, origin: Origin) -> str:
    for pattern, name in _NAMES[origin]:
        if re.match(pattern, key):
            return re.sub(f"^{pattern}", name, key)
    return key


def _architecture(weights: Mapping[str, Tensor], origin: Origin, path: Path, field: str) -> dict[str, Any]:
    blocks = tuple(
        len({key.split(".")[2] for key in weights if key.startswith(f"backbone.layer{stage}.")})
        for stage in range(1, 5)
    )
    is_bottleneck = "backbone.layer1.0.conv3.weight" in weights
    names = {counts: name for name, (block, counts) in ARCHITECTURES.items() if block is Bottleneck}
    if not is_bottleneck or blocks not in names:
        raise InputError(
            f"{field} must be of a network with {', '.join(names.values())}, but the stages in {path} have "
            f"{' '.join(map(str, blocks))} {'bottlenecks' if is_bottleneck else 'basic or other blocks'}. Give a "
            "checkpoint of one of those: ResNet-18 and MobileNetV2 are dilated otherwise there."
        )
    stem = weights.get("backbone.conv3.weight")
    return {
        "num_classes": _size(weights, "head.classifier.weight", path, field),
        "backbone": names[blocks],
        "output_stride": 8,
        "head_channels": _size(weights, "head.conv.weight", path, field),
        "dropout": 0.1,
        "has_aux_head": any(key.startswith("aux_head.") for key in weights),
        "deep_stem": stem is not None,
        "deep_stem_channels": 128 if stem is None else len(stem),
        "contract_dilation": origin == "mmsegmentation",
        "norm": "batch",
    }


def _size(weights: Mapping[str, Tensor], key: str, path: Path, field: str) -> int:
    if key not in weights or weights[key].ndim != 4:
        raise InputError(
            f"{field} must hold {key} (by its name here), but {path} does not. Give a whole checkpoint."
        )
    return len(weights[key])


def _num_branches(weights: Mapping[str, Tensor]) -> int:
    return len({key.split(".")[2] for key in weights if key.startswith("head.branches.")})


def _check_strides(settings: str, path: Path, field: str) -> None:
    """Refuse a backbone whose strides, as its configuration says, are of another network: its tensors do not tell."""
    for name, wanted in (("strides", "1, 2, 1, 1"), ("dilations", "1, 1, 2, 4")):
        for said in _stored_tuples(settings, name):
            if said != wanted:
                raise InputError(
                    f"{field} must be of a network at output stride 8, whose backbone has {name} ({wanted}), but "
                    f"{path} was trained with ({said}). Give one of mmsegmentation's d8 checkpoints."
                )


def _stored_tuples(settings: str, name: str) -> set[str]:
    """Return the values of this name in the configuration of mmsegmentation, each as "a, b"."""
    found = re.findall(rf"\b{name}['\"]?\s*[=:]\s*[(\[]([\d,\s]+)[)\]]", settings)
    return {", ".join(re.findall(r"\d+", each)) for each in found}


def _stored_crop_size(settings: str) -> int | str | None:
    """Return the one crop size that the configuration of mmsegmentation names; None: none or several."""
    said = _stored_tuples(settings, "crop_size")
    if len(said) != 1:
        return None
    height, width = map(int, said.pop().split(", "))
    return notation((height, width))


def _stored_align_corners(settings: str) -> bool | None:
    """Return what the configuration of mmsegmentation beside the tensors says; None: nothing or both."""
    said = set(re.findall(r"align_corners['\"]?\s*[=:]\s*(True|False)", settings))
    return said == {"True"} if len(said) == 1 else None

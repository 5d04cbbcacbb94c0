"""What the parts of PSPNet are called by semseg and by mmsegmentation, and what they are called here."""

import re
from typing import Literal

from pspnet import mobilenet

Origin = Literal["semseg", "mmsegmentation"]

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


def renamed(key: str, origin: Origin) -> str:
    """Return the name here of a tensor of theirs; a name that is not theirs stays."""
    if origin == "mmsegmentation" and (name := _mobilenet_name(key)):
        return name
    for pattern, name in _NAMES[origin]:
        if re.match(pattern, key):
            return re.sub(f"^{pattern}", name, key)
    return key


def _mobilenet_name(key: str) -> str | None:
    """Return the name here of a part of mmsegmentation's MobileNetV2: its stages are counted, here all blocks are."""
    if stem := re.fullmatch(r"backbone\.conv1\.(conv|bn)\.(\w+)", key):
        return f"backbone.features.0.{('conv', 'bn').index(stem[1])}.{stem[2]}"
    found = re.fullmatch(r"backbone\.layer([1-7])\.([0-3])\.conv\.([012])\.(conv|bn)\.(\w+)", key)
    if not found:
        return None
    stage, block, layer = (int(number) for number in found.group(1, 2, 3))
    is_norm = found[4] == "bn"
    expansion, _, num_blocks = mobilenet.STAGES[stage - 1]
    last_layer = 1 if expansion == 1 else 2
    if block >= num_blocks or layer > last_layer:
        return None
    number = 1 + sum(each for _, _, each in mobilenet.STAGES[: stage - 1]) + block
    # The last convolution and its BatchNorm are no group of their own here.
    part = f"{layer + is_norm}" if layer == last_layer else f"{layer}.{int(is_norm)}"
    return f"backbone.features.{number}.conv.{part}.{found[5]}"

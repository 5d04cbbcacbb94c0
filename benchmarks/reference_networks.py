"""The network that ours is measured against, with the same weights: semseg's own code, or our layers done plainly."""

import hashlib
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pspnet.model import PSPNet


class Plain(nn.Module):
    """The same layers as the paper and semseg compute them: four pools, one concatenation, whole logits."""

    def __init__(self, network: PSPNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        """Return logits for each pixel; in training mode those of the auxiliary head, too."""
        head, aux_head = self.network.head, self.network.aux_head
        stage3, stage4 = self.network.backbone(images)
        seen = [stage4]
        for size, branch in zip(head.bin_sizes, head.branches, strict=True):
            grid = branch(functional.adaptive_avg_pool2d(stage4, size))
            seen.append(functional.interpolate(grid, stage4.shape[2:], mode="bilinear", align_corners=True))
        x = functional.relu(head.norm(head.conv(torch.cat(seen, 1))), inplace=True)
        logits = _whole(head.classifier(head.dropout(x)), images)
        if not self.training or aux_head is None:
            return logits
        return logits, _whole(aux_head(stage3), images)


def reference_network(network: PSPNet, semseg: Path | None) -> tuple[nn.Module, str]:
    """Return what is compared with, with the weights of `network`, and what it is."""
    if semseg is None:
        return Plain(network), "our own layers, computed as the paper states them (no --semseg)"
    if str(semseg) not in sys.path:
        sys.path.insert(0, str(semseg))
    backbone, num_classes = network.architecture["backbone"], network.num_classes
    theirs: nn.Module = importlib.import_module("model.pspnet").PSPNet(
        layers=50, classes=num_classes, dropout=network.architecture["dropout"], pretrained=False
    )
    what = f"semseg's model/pspnet.py, {_version(semseg)}, with the same weights"
    if backbone != "resnet50":
        _exchange_backbone(theirs, backbone, num_classes)
        what += f"; its constructor knows no {backbone}: its blocks, pyramid and forward pass at that width"
    theirs.load_state_dict({_their_name(name): tensor for name, tensor in network.state_dict().items()})
    return theirs, what


def training_losses(reference: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return main and auxiliary loss of a reference network, as its own code or the paper computes them."""
    if isinstance(reference, Plain):
        logits, aux_logits = reference(images)
        return functional.cross_entropy(logits, target, ignore_index=255), functional.cross_entropy(
            aux_logits, target, ignore_index=255
        )
    _, main, aux = reference(images, target)
    return main, aux


def _whole(logits: Tensor, images: Tensor) -> Tensor:
    return functional.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=True)


def _exchange_backbone(theirs: Any, name: str, num_classes: int) -> None:
    """Put semseg's own ResNet of basic blocks into its PSPNet, dilated as ours is, and heads of its width."""
    module = importlib.import_module("model.pspnet")
    resnet = getattr(importlib.import_module("model.resnet"), name)(pretrained=False)
    stem = [(getattr(resnet, f"conv{n}"), getattr(resnet, f"bn{n}"), resnet.relu) for n in (1, 2, 3)]
    theirs.layer0 = nn.Sequential(*(part for parts in stem for part in parts), resnet.maxpool)
    theirs.layer1, theirs.layer2 = resnet.layer1, resnet.layer2
    theirs.layer3, theirs.layer4 = resnet.layer3, resnet.layer4
    for stage, dilation in ((resnet.layer3, 2), (resnet.layer4, 4)):
        for part in stage.modules():
            if isinstance(part, nn.Conv2d):
                part.stride = (1, 1)
                if part.kernel_size == (3, 3):
                    part.dilation = part.padding = (dilation, dilation)
    theirs.ppm = module.PPM(512, 128, (1, 2, 3, 6))
    theirs.cls[0] = nn.Conv2d(1024, 512, 3, padding=1, bias=False)
    theirs.aux[0] = nn.Conv2d(256, 64, 3, padding=1, bias=False)
    theirs.aux[1], theirs.aux[4] = nn.BatchNorm2d(64), nn.Conv2d(64, num_classes, 1)


def _version(semseg: Path) -> str:
    """Return the commit of the checkout, or what its network's file hashes to."""
    command = ["git", "-C", str(semseg), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if commit:
        return f"commit {commit[:12]}"
    digest = hashlib.sha256((semseg / "model" / "pspnet.py").read_bytes()).hexdigest()
    return f"no checkout of git, sha256 of the file {digest[:12]}"


def _their_name(name: str) -> str:
    """Return semseg's name of a tensor of ours."""
    part, _, rest = name.partition(".")
    layer, _, tail = rest.partition(".")
    if part == "backbone":
        stem = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6, "bn3": 7}
        return f"layer0.{stem[layer]}.{tail}" if layer in stem else rest
    if layer == "branches":
        number, at, which = tail.split(".")
        return f"ppm.features.{number}.{int(at) + 1}.{which}"
    their_part = "cls" if part == "head" else "aux"
    return f"{their_part}.{ {'conv': 0, 'norm': 1, 'classifier': 4}[layer] }.{tail}"

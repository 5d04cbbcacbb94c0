"""The ways of taking a training step that benchmarks/gpu.py compares, each with its own copy of the weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from reference_networks import reference_network, training_losses
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from pspnet.data import Batch
from pspnet.distributed import parallelise
from pspnet.engine import train_one_epoch
from pspnet.inference import Precision, autocast
from pspnet.loss import segmentation_loss
from pspnet.model import PSPNet
from pspnet.optim import build_optimizer, parameter_groups
from pspnet.recomputation import recompute_blocks
from pspnet.transforms import Window

NUM_CLASSES, AUX_LOSS_WEIGHT, TORCHVISION_AUX_LOSS_WEIGHT = 19, 0.4, 0.5
SGD: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4}
BASE_LR, HEAD_LR_FACTOR = 1e-4, 10.0
FIRST_SCALE = 2.0**8
"""Of the loss in fp16, which ends at 65504: a weight's first gradient is up to 59 (two crops of 129, ResNet-50). From
GradScaler's own 2**16 the first steps are left out, and the momentum with them."""

Network = Literal["reference", "fcn", "pspnet"]
How = Literal["", "channels_last", "fused SGD", "recomputed", "compiled"]
OURS: Network = "pspnet"
RECOMPUTED: How = "recomputed"
Loss = tuple[float, float]
"""Main and auxiliary."""
Steps = Callable[[int], Loss]
"""Takes so many optimizer steps and returns the losses, of the last or their mean; gradients are freed at the end."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """Whose network, in which autocast, and what is done about it."""

    of: Network
    precision: Precision
    how: How = ""

    @property
    def name(self) -> str:
        """How it is called in tables."""
        whose = {"reference": "reference", "fcn": "torchvision's fcn_resnet50", "pspnet": "pspnet"}[self.of]
        return ", ".join(filter(None, [whose, self.precision, self.how]))

    @property
    def is_channels_last(self) -> bool:
        """Whether the channels of a pixel lie side by side in memory."""
        return self.of == OURS or self.how == "channels_last"


def all_ways(device: torch.device, *, is_quick: bool, is_compiled: bool) -> list[Way]:
    """Return the ways in the order in which they are tried: what takes longest to begin comes last."""
    is_cuda = device.type == "cuda"
    # fp16 takes minutes on CPUs, where this is only to be tried.
    precisions: tuple[Precision, ...] = ("fp16", "bf16") if is_cuda else ("fp32", "bf16")
    others: tuple[Network, ...] = ("reference", "fcn")
    ways = [Way(of=of, precision=it) for it in precisions for of in (*others, OURS)]
    ways += [Way(of="reference", precision=it, how="channels_last") for it in precisions]
    if not is_quick:
        ways += [Way(of="fcn", precision=it, how="channels_last") for it in precisions]
        # cuDNN's trial of its algorithms (cudnn.benchmark) is not among them: torch keeps what it has once chosen for a
        # shape, by trial or not, as long as the process lives.
        ways += [Way(of=OURS, precision="bf16", how=how) for how in ("fused SGD", RECOMPUTED)]
    if is_compiled:
        ways += [Way(of=OURS, precision=it, how="compiled") for it in reversed(precisions)]
    return ways


@dataclass(frozen=True)
class Networks:
    """Ours and the reference with the same weights, and torchvision's, all on the CPU, to be copied."""

    pspnet: PSPNet
    reference: nn.Module
    fcn: nn.Module
    what: str
    """What the reference is."""

    @classmethod
    def new(cls, backbone: str, semseg: Path | None) -> "Networks":
        """Build them with random weights; nothing is dropped at random, so that losses can be compared."""
        pspnet = PSPNet(NUM_CLASSES, backbone=backbone, deep_stem=True, dropout=0.0)
        reference, what = reference_network(pspnet, semseg)
        fcn = torchvision.models.segmentation.fcn_resnet50(
            weights=None, weights_backbone=None, num_classes=NUM_CLASSES, aux_loss=True
        )
        return cls(pspnet, reference, fcn, what)


def begin(way: Way, networks: Networks, images: Tensor, target: Tensor) -> Steps:
    """Return the way's steps on one batch that is there already; images are contiguous.

    All that are compared begin before the first step of any: a network that is to be compiled makes torch forget what
    was compiled before (`parallelise`).
    """
    if way.of == "pspnet":
        return _our_steps(way, networks.pspnet, images, target)
    return _their_steps(way, getattr(networks, way.of), images, target)


def _our_steps(way: Way, pspnet: PSPNet, images: Tensor, target: Tensor) -> Steps:
    """Return steps of the engine as a worker takes them."""
    network = copy.deepcopy(pspnet).to(images.device)
    if way.how == RECOMPUTED:
        recompute_blocks(network)
    optimizer = build_optimizer(network, base_lr=BASE_LR, head_lr_factor=HEAD_LR_FACTOR, **SGD)
    if way.how == "fused SGD":
        groups = parameter_groups(network, base_lr=BASE_LR, head_lr_factor=HEAD_LR_FACTOR)
        optimizer = torch.optim.SGD(groups, lr=BASE_LR, fused=True, **SGD)
    model = parallelise(network, images.device, compiled=way.how == "compiled")
    images = images.contiguous(memory_format=torch.channels_last)
    windows, names = [Window(0, 0, 0, 0)] * len(images), [str(number) for number in range(len(images))]
    batch = Batch(torch.empty(0, dtype=torch.uint8), windows, [], names)
    scaler_state = _scaler(way, images.device).state_dict()

    def steps(number: int) -> Loss:
        nonlocal scaler_state
        stats = train_one_epoch(
            model,
            optimizer,
            [batch] * number,
            prepare=lambda _: (images, target),
            epoch=0,
            start_iteration=0,
            max_iterations=10**9,
            power=0.9,
            aux_loss_weight=AUX_LOSS_WEIGHT,
            precision=way.precision,
            scaler_state=scaler_state,
        )
        scaler_state = stats.scaler
        optimizer.zero_grad(set_to_none=True)
        return stats.main_loss, stats.aux_loss

    return steps


def _their_steps(way: Way, original: nn.Module, images: Tensor, target: Tensor) -> Steps:
    """Return steps as semseg's and torchvision's loops take them: nothing is waited for between two."""
    network = copy.deepcopy(original).to(images.device).train()
    if way.is_channels_last:
        network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=BASE_LR, **SGD)
    scaler = _scaler(way, images.device)

    def steps(number: int) -> Loss:
        for _ in range(number):
            with autocast(images.device, way.precision):
                main, aux, total = _their_losses(network, images, target)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(total).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return main.item(), aux.item()

    return steps


def _their_losses(network: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return main and auxiliary loss and what is minimised."""
    if not isinstance(network, torchvision.models.segmentation.FCN):
        main, aux = training_losses(network, images, target)
        return main, aux, main + AUX_LOSS_WEIGHT * aux
    output = network(images)  # references/segmentation/train.py, criterion
    main, aux = (functional.cross_entropy(output[name], target, ignore_index=255) for name in ("out", "aux"))
    return main, aux, main + TORCHVISION_AUX_LOSS_WEIGHT * aux


def _scaler(way: Way, device: torch.device) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE, enabled=way.precision == "fp16")


def loss_difference(networks: Networks, images: Tensor, target: Tensor) -> float:
    """Return by how much, relative, our losses differ from the reference's in float64 on the first two images."""
    images, target = images[:2].double(), target[:2]
    with torch.no_grad():
        network = copy.deepcopy(networks.pspnet).to(images).train()
        valid = int((target != 255).sum())
        ours = segmentation_loss(
            network(images, upsample=False), target, num_valid=valid, aux_loss_weight=AUX_LOSS_WEIGHT
        )
        reference = copy.deepcopy(networks.reference).to(images).train()
        theirs = training_losses(reference, images, target)
    return max(abs(a.item() / b.item() - 1) for a, b in zip(ours[1:], theirs, strict=True))


def counted_flops(backbone: str, semseg: Path | None, crop: int) -> dict[Network, int]:
    """Return the operations of an image's forward and backward pass in the networks of others, as pspnet.flops counts.

    Nothing is computed. torchvision's network has a ResNet-50, and is compared with nothing else.
    """
    counts: dict[Network, int] = {}
    with FakeTensorMode():
        networks = Networks.new(backbone, semseg)
        images, target = torch.empty(2, 3, crop, crop), torch.zeros(2, crop, crop, dtype=torch.int64)
        others: tuple[Network, ...] = ("reference", "fcn") if backbone == "resnet50" else ("reference",)
        for name in others:
            network = getattr(networks, name).train()
            with FlopCounterMode(display=False) as counter:
                _their_losses(network, images, target)[2].backward()
            counts[name] = int(counter.get_total_flops()) // 2
    return counts

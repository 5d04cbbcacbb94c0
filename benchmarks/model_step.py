"""How fast is a training step? segfleet's engine against semseg's network, on one core.

Forward pass, both losses, backward pass and SGD; 2 images, 19 classes, auxiliary head. One thread, pinned to one core,
whose own time counts, not that of others on it. All ways begin with the same weights. Before anything is measured, the
losses and the gradient of a first step are compared: in float64, where both must be the same but for rounding, and in
the precision that is measured, where each way's distance from the reference in float64 is told. In each round all ways
take their turn, so that a slow moment of the machine meets all of them; what counts is the median over the rounds of
the ratio inside a round. The last line of output is JSON.

    python benchmarks/model_step.py --quick [--semseg DIR]
    python benchmarks/model_step.py --semseg DIR --cityscapes DIR --write benchmarks/README.md
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from reference_networks import reference_network, training_losses
from reporting import Pair, cell, pictures, pin_to_one_core, versions, write_between
from torch import Tensor, nn

from pspnet.data import Batch
from pspnet.distributed import parallelise
from pspnet.engine import train_one_epoch
from pspnet.inference import Precision
from pspnet.model import PSPNet
from pspnet.optim import build_optimizer
from pspnet.transforms import Window, normalise

NUM_CLASSES, BATCH_SIZE, AUX_LOSS_WEIGHT = 19, 2, 0.4
SGD: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4}
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MAX_DIFFERENCE, MAX_LOSS_DIFFERENCE_FP32 = 1e-9, 1e-4
"""Relative: of the losses and the gradient's norm in float64, and of the losses in fp32. Where more differs, the ways
do not compute the same and nothing is measured. The gradient's norm in fp32 has no limit: the 1x1 bin of two images is
normalised over two values, which amplifies what is rounded, in the reference as well."""
Loss = dict[str, float]
Step = Callable[[], Loss]
"""Takes one optimizer step and returns main and auxiliary loss and the gradient's norm before it."""


@dataclass(frozen=True)
class Measured:
    """The ways for one backbone and crop."""

    backbone: str
    crop: int
    rounds: list[dict[str, float]]
    """Seconds of each way in each round."""
    losses: dict[str, Loss]
    """Of each way's first step."""
    exact: Loss
    """Of the reference's first step in float64."""

    def ratios(self, way: str) -> list[float]:
        """How many times as fast as the reference, in every round."""
        return [seconds["reference"] / seconds[way] for seconds in self.rounds]


def main() -> None:
    """Measure, print the table, and end with one line of JSON."""
    options = _options()
    core = pin_to_one_core()
    pairs, origin, _ = pictures(options.cityscapes)
    cases = [("resnet18", 257)] if options.quick else [(options.backbone, options.crop)]
    if not options.quick and options.backbone is None:
        cases = [(backbone, crop) for backbone in ("resnet18", "resnet50") for crop in (257, 473)]
    measured = []
    what = ""
    for backbone, crop in cases:
        torch.manual_seed(0)
        network = PSPNet(NUM_CLASSES, backbone=backbone, deep_stem=True, dropout=0.0)
        images, target = _batch(pairs, crop)
        reference, what = reference_network(copy.deepcopy(network), options.semseg)
        exact = _exact_loss(network, reference, images, target, where=f"{backbone} at {crop}")
        ways = {"reference": _their_step(reference, images, target)}
        for precision in ("fp32", "bf16"):
            ways[precision] = _our_step(copy.deepcopy(network), images, target, precision)
        num_rounds = 3 if options.quick else options.rounds
        measured.append(_measure(backbone, crop, ways, exact, num_rounds=num_rounds))
        print(_rows(measured[-1]), file=sys.stderr)
    conditions = [
        f"{BATCH_SIZE} images, {NUM_CLASSES} classes, deep stem, auxiliary head, no dropout, one thread",
        f"reference, eager and in fp32: {what}",
        f"pictures: {origin}",
        f"{len(measured[0].rounds)} rounds, core {core}, {versions()}",
    ]
    text = "\n".join([_table(measured), "", *(f"- {line}" for line in conditions)])
    print(text)
    if options.write:
        write_between(options.write, "model_step", text)
    last = measured[-1]
    print(json.dumps({f"step_{way}": round(median(last.ratios(way)), 2) for way in ("fp32", "bf16")}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed of a training step, on one core.")
    parser.add_argument(
        "--semseg",
        type=Path,
        help="checkout of semseg, whose own network is the reference; without, our own layers done plainly",
    )
    parser.add_argument(
        "--cityscapes", type=Path, help="folder with leftImg8bit and gtFine; else drawn noise"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backbone", choices=("resnet18", "resnet50"), help="this one alone")
    parser.add_argument("--crop", type=int, default=473, help="of --backbone, in pixels")
    parser.add_argument("--quick", action="store_true", help="ResNet-18 on crops of 257, under 50 s")
    parser.add_argument("--write", type=Path, help="file whose part between the marks is replaced")
    return parser.parse_args()


# The ways


def _batch(pairs: list[Pair], crop: int) -> tuple[Tensor, Tensor]:
    """Return images, float32 (n, 3, crop, crop), and train ids, int64 (n, crop, crop)."""
    window = slice(300, 300 + crop), slice(900, 900 + crop)
    chosen = [pairs[0], pairs[-1]]
    images = torch.from_numpy(np.stack([image[window] for image, _ in chosen])).permute(0, 3, 1, 2)
    target = torch.from_numpy(np.stack([label[window] for _, label in chosen])).long()
    return normalise(images, MEAN, STD).contiguous(), target


def _their_step(network: nn.Module, images: Tensor, target: Tensor) -> Step:
    """Return semseg's step (tool/train.py): backbone at the learning rate, heads at ten times it."""
    network.train()
    heads = ("head.", "aux_head.", "ppm.", "cls.", "aux.", "network.head.", "network.aux_head.")
    named = list(network.named_parameters())
    optimizer = torch.optim.SGD(
        [
            {"params": [it for name, it in named if not name.startswith(heads)], "lr": 1e-4},
            {"params": [it for name, it in named if name.startswith(heads)], "lr": 1e-3},
        ],
        **SGD,
    )

    def step() -> Loss:
        main_loss, aux_loss = training_losses(network, images, target)
        optimizer.zero_grad()
        (main_loss + AUX_LOSS_WEIGHT * aux_loss).backward()
        optimizer.step()
        return {"main": main_loss.item(), "aux": aux_loss.item(), "gradient": _gradient_norm(network)}

    return step


def _our_step(network: PSPNet, images: Tensor, target: Tensor, precision: Precision) -> Step:
    """Return a step of the engine as a worker takes it, once its batch is there."""
    model = parallelise(network, "cpu")
    optimizer = build_optimizer(network, base_lr=1e-4, head_lr_factor=10.0, **SGD)
    images = images.contiguous(memory_format=torch.channels_last)
    nothing = Window(0, 0, 0, 0)
    batch = Batch(torch.empty(0, dtype=torch.uint8), [nothing] * BATCH_SIZE, [], ["a", "b"])

    def step() -> Loss:
        stats = train_one_epoch(
            model,
            optimizer,
            [batch],
            prepare=lambda _: (images, target),
            epoch=0,
            start_iteration=0,
            max_iterations=10**9,
            power=0.9,
            aux_loss_weight=AUX_LOSS_WEIGHT,
            precision=precision,
        )
        return {"main": stats.main_loss, "aux": stats.aux_loss, "gradient": stats.gradient_norm}

    return step


def _gradient_norm(network: nn.Module) -> float:
    gradients = [it.grad for it in network.parameters() if it.grad is not None]
    return float(nn.utils.get_total_norm(gradients))


# Measuring


def _exact_loss(network: PSPNet, reference: nn.Module, images: Tensor, target: Tensor, *, where: str) -> Loss:
    """Return the reference's first step in float64; ends the program where ours is another."""
    images = images.double()
    exact = _their_step(copy.deepcopy(reference).double(), images, target)()
    ours = _our_step(copy.deepcopy(network).double(), images, target, "fp32")()
    for name, difference in _differences(ours, exact).items():
        if difference > MAX_DIFFERENCE:
            sys.exit(f"{name} of {where} differs by {difference:.1e} from the reference's in float64.")
    return exact


def _measure(backbone: str, crop: int, ways: dict[str, Step], exact: Loss, *, num_rounds: int) -> Measured:
    losses = {name: step() for name, step in ways.items()}
    for name in ("main", "aux"):
        difference = _differences(losses["fp32"], exact)[name]
        if difference > MAX_LOSS_DIFFERENCE_FP32:
            sys.exit(f"{name} of {backbone} at {crop} differs by {difference:.1e} from the reference's.")
    rounds = []
    for _ in range(num_rounds):
        seconds = {}
        for name, step in ways.items():
            begun = time.process_time()
            step()
            seconds[name] = time.process_time() - begun
        rounds.append(seconds)
    return Measured(backbone, crop, rounds, losses, exact)


def _differences(loss: Loss, exact: Loss) -> Loss:
    return {name: abs(loss[name] / exact[name] - 1) for name in exact}


# What is said of it


def _table(measured: list[Measured]) -> str:
    lines = [
        "| backbone, crop | way | s | times the reference | loss, from float64 | gradient's norm |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *map(_rows, measured)])


def _rows(one: Measured) -> str:
    labels: dict[str, Any] = {
        "reference": "reference, fp32",
        "fp32": "**pspnet, fp32**",
        "bf16": "**pspnet, bf16**",
    }
    lines = []
    for name, label in labels.items():
        seconds = median(seconds[name] for seconds in one.rounds)
        differs = _differences(one.losses[name], one.exact)
        lines.append(
            f"| {one.backbone}, {one.crop} | {label} | {seconds:.3g} | {cell(one.ratios(name))} | "
            f"{max(differs['main'], differs['aux']):.0e} | {differs['gradient']:.0e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""How fast are training steps, predictions and crops on a GPU, and how much of the card is used?

A training step of the engine against semseg's network, eager, in the same autocast, and torchvision's fcn_resnet50;
predictions against semseg's network; crops made of windows on the device. All ways begin with the same weights, and
the losses are compared first; where ways do not compute the same, nothing is written. In each round all ways take their
turn in one process; what counts is the median over the rounds of the ratio inside a round. A way that does not fit in
the card's memory, or fails, is a row that says so. The last line of output is JSON.

    python benchmarks/gpu.py --semseg DIR --cityscapes DIR --write benchmarks/README.md     # 6 minutes, estimated
    python benchmarks/gpu.py --quick                                                        # 90 s, estimated
    python benchmarks/gpu.py --device cpu --backbone resnet18 --crop 65 --batch 2 --rounds 1 --steps 1 --quick
"""

import argparse
import itertools
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gpu_predictions import MEAN, STD, measure_crops, measure_predictions
from gpu_rows import Card, Case, Row, noted, say, take_turns
from gpu_tables import aim_line, crop_table, prediction_table, step_table, summary
from gpu_ways import (
    FIRST_SCALE,
    NUM_CLASSES,
    RECOMPUTED,
    Network,
    Networks,
    Steps,
    Way,
    all_ways,
    begin,
    counted_flops,
    loss_difference,
)
from reporting import Pair, pictures, versions, write_between
from torch import Tensor

from pspnet.compilation import require_compiler
from pspnet.flops import training_flops
from pspnet.memory import GIB, Fit, measure_fit, step_memory
from pspnet.model import PSPNet
from pspnet.recomputation import recompute_blocks
from pspnet.transforms import normalise

MAX_LOSS_DIFFERENCE = 1e-9
"""Relative, in float64."""


@dataclass
class Budget:
    """Until when what may take long is begun, so that a command of ten minutes ends by itself."""

    started: float
    compilation_s: float = 90.0
    """Of the next compiled way: a guess, or a little more than the last one took."""

    @property
    def is_enough_to_compile(self) -> bool:
        """Whether a way that is compiled is expected to have taken its first steps in time."""
        return time.monotonic() + self.compilation_s < self.started + 330

    @property
    def rounds_until(self) -> float:
        """After which no round but a first one is begun."""
        return self.started + 480


def main() -> None:
    """Measure, print the tables, and end with one line of JSON."""
    budget = Budget(time.monotonic())
    options = _options()
    card = _card(options.device)
    torch.manual_seed(0)
    pairs, origin, _ = pictures(options.cityscapes)
    networks = Networks.new(options.backbone, options.semseg)
    differs: list[str] = []

    say("arithmetic, counted")
    flops = counted_flops(options.backbone, options.semseg, options.crop)
    flops["pspnet"] = training_flops(networks.pspnet, options.crop)

    cases: list[Case] = []
    compared, fitted = Row("the losses were not compared"), Row("memory was not fitted")
    largest = max(options.batch)
    for batch_size in sorted(options.batch, reverse=True):
        images, target = _batch(pairs, options.crop, batch_size, card.device)
        if not cases:
            with noted(compared):
                if (difference := loss_difference(networks, images, target)) > MAX_LOSS_DIFFERENCE:
                    differs.append(f"the losses of pspnet and the reference in float64 by {difference:.1e}")
        cases.append(_measure_steps(options, card, networks, images, target, flops, budget))
        say(step_table(card, [cases[-1]], flops, Fit()))
        del images, target
    predictions = measure_predictions(options, card, pairs, differs, deadline=budget.rounds_until)
    crops = measure_crops(options, card, pairs, largest, deadline=budget.rounds_until)
    say("\n\n".join([prediction_table(predictions), crop_table(crops, largest), "memory, fitted"]))
    card.free()
    fit = Fit()
    with noted(fitted):
        fit = measure_fit(
            lambda: PSPNet.from_architecture(networks.pspnet.architecture), card.device, precision="bf16"
        )

    measured = [*(case.rows for case in cases), *predictions.values(), crops, [compared, fitted]]
    rows = list(itertools.chain.from_iterable(measured))
    conditions = [
        f"{card.name}; {options.backbone} with deep stem, crop {options.crop}, {NUM_CLASSES} classes, auxiliary head, "
        "no dropout; fcn_resnet50 is another network, with its own arithmetic and loss, measured beside ResNet-50 only",
        f"reference, eager and contiguous unless said: {networks.what}, with torch's autocast and GradScaler; "
        f"the scale of all begins at {FIRST_SCALE:g} and is kept from turn to turn",
        "arithmetic of an image, forward and backward, multiply-adds as two: "
        + ", ".join(f"{name} {flops[name] / 1e12:.3g} TFLOP" for name in flops)
        + "; MFU is of the network's own arithmetic, as progress lines have it (the factored head has less), and "
        "beside it of the reference's, as if all of that had been computed; peak: dense, from the data sheet",
        f"memory: tensors at the same time, of this way alone, of a prediction without the weights; predicted: as "
        f"pspnet.memory counts them; reserved: what the allocator held, predicted by {fit.factor:.3f} times counted "
        f"and {fit.constant / GIB:.2f} GiB, fitted to small crops",
        "predictions in fp32 convolve in TF32, as torch does unless told otherwise",
        f"pictures: {origin}",
        f"{_rounds(rows)} rounds of {options.steps} steps, {_device_versions(card)}, {versions()}",
        *(f"{row.name}: {row.outcome}" for row in (compared, fitted) if row.outcome),
    ]
    text = "\n\n".join(
        [
            step_table(card, cases, flops, fit),
            aim_line(card, cases[0], flops),
            prediction_table(predictions),
            crop_table(crops, largest),
            "\n".join(f"- {line}" for line in conditions),
        ]
    )
    print(text)
    if options.write and not differs:
        write_between(options.write, "gpu", text)
    print(json.dumps(summary(card, cases[0], flops, predictions)))
    if differs:
        sys.exit(f"Nothing is written, because what must be the same differs: {'; '.join(differs)}.")
    if failed := [row.name for row in rows if row.has_failed]:
        sys.exit(f"Failed, see above: {'; '.join(failed)}.")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed, MFU and memory of training and prediction on a GPU.")
    parser.add_argument("--semseg", type=Path, help="checkout of semseg, whose own network is the reference")
    parser.add_argument(
        "--cityscapes", type=Path, help="folder with leftImg8bit and gtFine; else drawn noise"
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try this script without a GPU")
    parser.add_argument("--backbone", choices=("resnet18", "resnet50"), default="resnet50")
    parser.add_argument("--crop", type=int, default=713, help="side in pixels, 8k + 1")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16], help="images a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=4, help="of each way in a round, after one that is not timed"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile, too; else on a GPU only"
    )
    parser.add_argument("--quick", action="store_true", help="batch 8, 3 rounds, nothing compiled")
    parser.add_argument("--write", type=Path, help="file whose part between the marks is replaced")
    options = parser.parse_args()
    if options.crop % 8 != 1 or min(options.batch) < 2:
        parser.error(
            "--crop must be 8k + 1 and --batch at least 2, because BatchNorm refuses a single value."
        )
    if options.quick:
        options.batch, options.rounds = options.batch[:1], min(3, options.rounds)
    if options.compile is None:
        options.compile = options.device != "cpu" and not options.quick
    return options


def _card(device: str) -> Card:
    if device != "cpu" and not torch.cuda.is_available():
        print(
            f"error: --device {device} needs a GPU that torch sees, but torch {torch.__version__} sees none. Run it "
            "where there is one, or try the script with --device cpu --backbone resnet18 --crop 65 --batch 2.",
            file=sys.stderr,
        )
        sys.exit(2)
    if device == "cpu":
        return Card(device=torch.device("cpu"), name=f"no GPU, {platform.machine()}")
    chosen = torch.device("cuda", torch.device(device).index or 0)
    torch.cuda.set_device(chosen)
    return Card(device=chosen, name=torch.cuda.get_device_name(chosen))


def _rounds(rows: Sequence[Row]) -> str:
    """Return how many rounds were taken, and the fewest where the time did not suffice for all."""
    counts = {len(row.seconds) for row in rows if row.seconds and not row.outcome} or {0}
    return " to ".join(str(count) for count in sorted({min(counts), max(counts)}))


def _device_versions(card: Card) -> str:
    if card.device.type == "cpu":
        return f"{torch.get_num_threads()} threads"
    return f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


# Training steps


def _batch(pairs: list[Pair], crop: int, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return images, float32 (n, 3, crop, crop), and train ids, int64 (n, crop, crop)."""
    rng = np.random.default_rng(0)
    images, targets = [], []
    for number in range(batch_size):
        image, label = pairs[number % len(pairs)]
        top, left = (int(rng.integers(0, side - crop + 1)) for side in label.shape)
        images.append(image[top : top + crop, left : left + crop])
        targets.append(label[top : top + crop, left : left + crop])
    pixels = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)
    target = torch.from_numpy(np.stack(targets)).to(device).long()
    return normalise(pixels, MEAN, STD).contiguous(), target


def _measure_steps(
    options: argparse.Namespace,
    card: Card,
    networks: Networks,
    images: Tensor,
    target: Tensor,
    flops: dict[Network, int],
    budget: Budget,
) -> Case:
    ways = all_ways(card.device, is_quick=options.quick, is_compiled=options.compile)
    rows = [Row(way.name, way) for way in ways if way.of in flops]
    begun: list[tuple[Row, Steps]] = []
    for row in rows:
        with noted(row):
            begun.append((row, _begun(row, card, networks, images, target)))
    for row, steps in begun:
        say(f"batch {len(images)}: {row.name}")
        _take_first_steps(row, card, steps, budget)
    take_turns(
        card,
        begun,
        num_rounds=options.rounds,
        calls_per_turn=options.steps,
        deadline=budget.rounds_until,
    )
    return Case(batch_size=len(images), rows=rows, predicted=_counted_memory(networks.pspnet, images, ways))


def _begun(row: Row, card: Card, networks: Networks, images: Tensor, target: Tensor) -> Steps:
    """Return the way's steps, and note the memory of its weights and its batch."""
    assert row.way is not None
    if row.way.how == "compiled":
        require_compiler(card.device)
    card.free()
    allocated, reserved = card.memory()
    steps = begin(row.way, networks, images, target)
    now_allocated, now_reserved = card.memory()
    # A way's own copy of the images is allocated by now; others share them.
    batch_bytes = target.nbytes + (0 if row.way.is_channels_last else images.nbytes)
    row.peak_bytes = now_allocated - allocated + batch_bytes
    row.reserved_bytes = now_reserved - reserved + batch_bytes
    return steps


def _take_first_steps(row: Row, card: Card, steps: Steps, budget: Budget) -> None:
    """Note the losses of the first step and the memory of a later one."""
    assert row.way is not None
    is_compiled = row.way.how == "compiled"
    if is_compiled and not budget.is_enough_to_compile:
        row.outcome = "no time left to compile"
        return
    card.free()
    allocated, reserved = card.memory()
    started = time.monotonic()
    with noted(row):
        row.loss = steps(1)
        steps(1)  # momentum is there from the second step on
        card.free()
        steps(2)
        peak, most_reserved = card.peak_memory()
        row.peak_bytes += peak - allocated
        row.reserved_bytes += most_reserved - reserved
    if is_compiled:
        budget.compilation_s = 1.2 * (time.monotonic() - started)


def _counted_memory(network: PSPNet, images: Tensor, ways: Sequence[Way]) -> dict[str, int]:
    """Return what pspnet.memory predicts of a step in half precision."""

    def build() -> PSPNet:
        return PSPNet.from_architecture(network.architecture)

    def build_recomputed() -> PSPNet:
        model = build()
        recompute_blocks(model)
        return model

    return {
        how: step_memory(builder, images.shape[2], len(images), precision="bf16").peak
        for how, builder in (("", build), (RECOMPUTED, build_recomputed))
        if any(way.how == how for way in ways)
    }


if __name__ == "__main__":
    main()

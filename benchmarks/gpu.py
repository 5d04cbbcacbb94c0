"""How fast are training steps, predictions and crops on a GPU, and how much of the card is used?

A training step of the engine against semseg's network, eager, in the same autocast, and torchvision's fcn_resnet50;
predictions against semseg's network; crops made of windows on the device. All ways begin with the same weights, and
the first losses are compared. In each round all ways take their turn in one process; what counts is the median over
the rounds of the ratio inside a round. A way that does not fit in the card's memory is a row that says so. The last
line of output is JSON.

    python benchmarks/gpu.py --semseg DIR --cityscapes DIR --write benchmarks/README.md     # about 6 minutes
    python benchmarks/gpu.py --quick                                                        # under 90 s
    python benchmarks/gpu.py --device cpu --backbone resnet18 --crop 65 --batch 2 --rounds 1 --steps 1 --quick
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from gpu_predictions import MEAN, STD, measure_crops, measure_predictions
from gpu_rows import Card, Case, Row, say, take_turns
from gpu_tables import aim_line, crop_table, prediction_table, step_table, summary
from gpu_ways import (
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
from pspnet.errors import InputError
from pspnet.flops import training_flops
from pspnet.memory import GIB, Fit, measure_fit, step_memory
from pspnet.model import PSPNet
from pspnet.recomputation import recompute_blocks
from pspnet.transforms import normalise

MAX_LOSS_DIFFERENCE = 1e-4
"""Relative, in fp32 without TF32."""
BUDGET_S, COMPILE_S = 330.0, 90.0
"""A way that is compiled is left out where so little of the budget is left that it may not be done in time."""


def main() -> None:
    """Measure, print the tables, and end with one line of JSON."""
    started = time.monotonic()
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
    for batch_size in sorted(options.batch, reverse=True):
        images, target = _batch(pairs, options.crop, batch_size, card.device)
        if not cases and (difference := loss_difference(networks, images, target)) > MAX_LOSS_DIFFERENCE:
            differs.append(f"the losses of pspnet and the reference by {difference:.1e}")
        cases.append(
            _measure_steps(options, card, networks, images, target, flops, deadline=started + BUDGET_S)
        )
        say(step_table(card, [cases[-1]], flops, Fit()))
        del images, target
    predictions = measure_predictions(options, card, pairs, differs)
    crops = measure_crops(options, card, pairs)
    say("\n\n".join([prediction_table(predictions), crop_table(crops), "memory, fitted"]))
    card.free()
    fit = measure_fit(
        lambda: PSPNet.from_architecture(networks.pspnet.architecture), card.device, precision="bf16"
    )

    conditions = [
        f"{card.name}; {options.backbone} with deep stem, crop {options.crop}, {NUM_CLASSES} classes, auxiliary head, "
        "no dropout; fcn_resnet50 is another network, with its own arithmetic and loss, measured beside ResNet-50 only",
        f"reference, eager and contiguous unless said: {networks.what}, with torch's autocast and GradScaler",
        "arithmetic of an image, forward and backward, multiply-adds as two: "
        + ", ".join(f"{name} {flops[name] / 1e12:.3g} TFLOP" for name in flops)
        + "; MFU is of the network's own arithmetic, as progress lines have it (the factored head has less), and "
        "beside it of the reference's, as if all of that had been computed; peak: dense, from the data sheet",
        f"memory: tensors at the same time, of this way alone; predicted: as pspnet.memory counts them; reserved: "
        f"what the allocator held, predicted by {fit.factor:.3f} times counted and {fit.constant / GIB:.2f} GiB, "
        "fitted to small crops",
        f"pictures: {origin}",
        f"{options.rounds} rounds of {options.steps} steps, {_device_versions()}, {versions()}",
    ]
    text = "\n\n".join(
        [
            step_table(card, cases, flops, fit),
            aim_line(card, cases[0], flops),
            prediction_table(predictions),
            crop_table(crops),
            "\n".join(f"- {line}" for line in conditions),
        ]
    )
    print(text)
    if options.write:
        write_between(options.write, "gpu", text)
    print(json.dumps(summary(card, cases[0], flops, predictions)))
    if differs:
        sys.exit(f"What must be the same in fp32 differs: {'; '.join(differs)}.")


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
    parser.add_argument(
        "--quick", action="store_true", help="batch 8, 3 rounds, nothing compiled, under 90 s"
    )
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
    torch.cuda.set_device(device)
    return Card(device=torch.device(device), name=torch.cuda.get_device_name())


def _device_versions() -> str:
    if not torch.cuda.is_available():
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
    *,
    deadline: float,
) -> Case:
    torch.compiler.reset()  # what was compiled for other batch sizes counts towards a limit
    ways = all_ways(card.device, is_quick=options.quick, is_compiled=options.compile)
    rows = [Row(way.name, way) for way in ways if way.of in flops]
    running: list[tuple[Row, Callable[[int], object]]] = []
    slowest_compilation = COMPILE_S
    for row in rows:
        assert row.way is not None
        say(f"batch {len(images)}: {row.name}")
        is_compiled = row.way.how == "compiled"
        begun = time.monotonic()
        if is_compiled and begun + slowest_compilation > deadline:
            row.outcome = "no time left to compile"
            continue
        steps = _begun(row, card, networks, images, target)
        if is_compiled:
            slowest_compilation = min(slowest_compilation, 1.2 * (time.monotonic() - begun))
        if steps is not None:
            running.append((row, steps))
    take_turns(card, running, num_rounds=options.rounds, calls_per_turn=options.steps)
    return Case(batch_size=len(images), rows=rows, predicted=_counted_memory(networks.pspnet, images, ways))


def _begun(row: Row, card: Card, networks: Networks, images: Tensor, target: Tensor) -> Steps | None:
    """Take the first steps, note losses and memory, and return the way's steps; None, with the reason, if it cannot."""
    assert row.way is not None
    card.free()
    allocated, reserved = card.memory()
    try:
        if row.way.how == "compiled":
            require_compiler(card.device)
        steps = begin(row.way, networks, images, target)
        row.loss = steps(1)
        steps(1)  # momentum is there from the second step on
        card.free()
        steps(2)
    except torch.OutOfMemoryError:
        row.outcome = "oom"
        return None
    except InputError as error:
        row.outcome = str(error)
        return None
    except Exception as error:  # a compiler fails in any way; the other ways are to be measured all the same
        if row.way.how != "compiled":
            raise
        row.outcome = f"not compiled, {type(error).__name__}"
        say(str(error))
        return None
    peak, most_reserved = card.peak_memory()
    batch_bytes = 0
    if card.device.type == "cuda":  # a way's own copy of the images is counted already
        batch_bytes = target.nbytes + (0 if row.way.is_channels_last else images.nbytes)
    row.peak_bytes, row.reserved_bytes = (
        peak - allocated + batch_bytes,
        most_reserved - reserved + batch_bytes,
    )
    return steps


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

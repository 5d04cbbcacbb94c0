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
import contextlib
import copy
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from gpu_ways import (
    NUM_CLASSES,
    RECOMPUTED,
    Loss,
    Network,
    Networks,
    Steps,
    Way,
    all_ways,
    begin,
    counted_flops,
    loss_difference,
)
from inference import _calibrated, _fit_classifier
from reference_networks import reference_network
from reporting import Pair, cell, pictures, versions, write_between
from torch import Tensor, nn
from torch.nn import functional

from pspnet.compilation import require_compiler
from pspnet.data import Batch, draw_sample
from pspnet.errors import InputError
from pspnet.flops import peak_flops, training_flops
from pspnet.folding import fold_batch_norm
from pspnet.inference import Precision, autocast, predict
from pspnet.memory import GIB, Fit, measure_fit, step_memory
from pspnet.model import PSPNet
from pspnet.recomputation import recompute_blocks
from pspnet.transforms import normalise, prepare_batch, source_window

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MAX_LOSS_DIFFERENCE, MAX_DISAGREEMENT = 1e-4, 1e-3
"""In fp32 without TF32: relative of the losses, share of the pixels of a prediction."""
BUDGET_S, COMPILE_S = 330.0, 90.0
"""A way that is compiled is left out where so little of the budget is left that it may not be done in time."""
AIM_SPEED, AIM_MFU = 2.0, 0.5
"""Times semseg's eager fp16; share of the card's peak in bf16."""
FEW_CLASSES = 3


@dataclass
class Row:
    """One way of a step, or of a prediction, and what was seen of it."""

    name: str
    way: Way | None = None
    outcome: str = ""
    """Why there is nothing to be seen: out of memory, not compiled, no time."""
    loss: Loss | None = None
    """Of the first step."""
    peak_bytes: int = 0
    """Most that its tensors took at the same time, with its weights and its batch."""
    reserved_bytes: int = 0
    disagreement: float = 0.0
    seconds: list[float] = field(default_factory=list)
    """Of a step or a prediction, in each round."""

    def ratios(self, base: "Row") -> list[float]:
        """How many times as fast as `base`, in every round."""
        if self.outcome or base.outcome:
            return []
        return [theirs / mine for theirs, mine in zip(base.seconds, self.seconds, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """All ways of a step with one batch size."""

    batch_size: int
    rows: list[Row]
    predicted: dict[str, int]
    """Bytes that pspnet.memory counts, by what is done: "" or "recomputed"."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is measured on."""

    device: torch.device
    name: str

    def peak(self, precision: Precision) -> float | None:
        """Return operations per second at most, None where they are not known."""
        return peak_flops(self.name, precision, is_tf32=torch.backends.cudnn.allow_tf32)

    def free(self) -> None:
        """Give back what no tensor holds, so that no way finds the gaps that another has left."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        """Wait for all that the device was given to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> tuple[int, int]:
        """Return the bytes of living tensors and what is reserved for them."""
        if self.device.type != "cuda":
            return 0, 0
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    def peak_memory(self) -> tuple[int, int]:
        """Return the most of both since `free`, or since the counters were reset."""
        if self.device.type != "cuda":
            return 0, 0
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


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
        say(_step_table(card, [cases[-1]], flops, Fit()))
        del images, target
    predictions = _measure_predictions(options, card, pairs, differs)
    crops = _measure_crops(options, card, pairs)
    say("\n\n".join([_prediction_table(predictions), _crop_table(crops), "memory, fitted"]))
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
            _step_table(card, cases, flops, fit),
            _aim_line(card, cases[0], flops),
            _prediction_table(predictions),
            _crop_table(crops),
            "\n".join(f"- {line}" for line in conditions),
        ]
    )
    print(text)
    if options.write:
        write_between(options.write, "gpu", text)
    print(json.dumps(_summary(card, cases[0], flops, predictions)))
    if differs:
        sys.exit(f"What must be the same in fp32 differs: {'; '.join(differs)}.")


def say(text: str) -> None:
    """Show how far it is, and what there is so far, should it be cut off."""
    print(text, file=sys.stderr, flush=True)


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
    _take_turns(card, running, num_rounds=options.rounds, calls_per_turn=options.steps)
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


def _take_turns(
    card: Card,
    running: Sequence[tuple[Row, Callable[[int], object]]],
    *,
    num_rounds: int,
    calls_per_turn: int,
) -> None:
    """Let every way take its turn in each round, the first call of it not timed; what runs out of memory drops out."""
    for number in range(num_rounds):
        say(f"round {number + 1} of {num_rounds}")
        for row, turn in running:
            if row.outcome:
                continue
            card.free()
            try:
                turn(1)
                card.wait()
                begun = time.perf_counter()
                turn(calls_per_turn)
                card.wait()
                row.seconds.append((time.perf_counter() - begun) / calls_per_turn)
            except torch.OutOfMemoryError:
                row.outcome = "oom"


def _repeated(call: Callable[[], object]) -> Callable[[int], object]:
    """Return what calls it so often."""
    return lambda number: [call() for _ in range(number)]


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


# Predictions


def _measure_predictions(
    options: argparse.Namespace, card: Card, pairs: list[Pair], differs: list[str]
) -> dict[str, list[Row]]:
    """Return the ways on each size of picture; the reference in fp32 is the first."""
    network = _calibrated(PSPNet(NUM_CLASSES, backbone=options.backbone, deep_stem=True), pairs)
    _fit_classifier(network, pairs)
    reference = reference_network(copy.deepcopy(network), options.semseg)[0].eval().to(card.device)
    network.to(card.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    folded = fold_batch_norm(network).to(memory_format=torch.channels_last)
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    precisions: tuple[Precision, ...] = (
        ("fp32", "fp16", "bf16") if card.device.type == "cuda" else ("fp32", "bf16")
    )
    for precision in precisions:
        ways[f"reference, {precision}"] = _reference_prediction(reference, card.device, precision)
    for whose, model in (("pspnet", network), ("pspnet, BatchNorm folded", folded)):
        for precision in precisions:
            how: dict[str, Any] = {"mean": MEAN, "std": STD, "device": card.device, "precision": precision}
            ways[f"{whose}, {precision}"] = partial(predict, model, **how)
    image = pairs[0][0]
    top, left = (max(0, (side - options.crop) // 2) for side in image.shape[:2])
    shown = [image[top : top + options.crop, left : left + options.crop]]
    if card.device.type == "cuda":
        shown.append(image)
    measured = {}
    for picture in shown:
        size = f"{picture.shape[1]}×{picture.shape[0]}"
        say(f"predictions of {size}")
        with _without_tf32():
            difference = float((ways["pspnet, fp32"](picture) != ways["reference, fp32"](picture)).mean())
        if difference > MAX_DISAGREEMENT:
            differs.append(f"predictions of {size} in {difference:.1e} of the pixels")
        measured[size] = _measure_prediction(options, card, ways, picture)
    return measured


def _measure_prediction(
    options: argparse.Namespace,
    card: Card,
    ways: dict[str, Callable[[np.ndarray], np.ndarray]],
    picture: np.ndarray,
) -> list[Row]:
    rows: list[Row] = []
    running: list[tuple[Row, Callable[[int], object]]] = []
    wanted = ways["reference, fp32"](picture)
    if len(np.unique(wanted)) <= FEW_CLASSES:
        say("few classes are predicted: ways agree by chance")
    for name, way in ways.items():
        row = Row(name)
        rows.append(row)
        card.free()
        allocated, _ = card.memory()
        try:
            row.disagreement = float((way(picture) != wanted).mean())
        except torch.OutOfMemoryError:
            row.outcome = "oom"
            continue
        row.peak_bytes = card.peak_memory()[0] - allocated
        running.append((row, _repeated(partial(way, picture))))
    _take_turns(card, running, num_rounds=options.rounds, calls_per_turn=options.steps)
    return rows


def _reference_prediction(
    network: nn.Module, device: torch.device, precision: Precision
) -> Callable[[np.ndarray], np.ndarray]:
    def predicted(image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        pixels = normalise(torch.tensor(image, device=device).permute(2, 0, 1)[None], MEAN, STD).contiguous()
        continued = functional.pad(pixels, (0, -(width - 1) % 8, 0, -(height - 1) % 8))
        with torch.inference_mode(), autocast(device, precision):
            return network(continued).argmax(1)[0, :height, :width].byte().cpu().numpy()

    return predicted


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


# Crops made of windows on the device


def _measure_crops(
    options: argparse.Namespace, card: Card, pairs: list[Pair]
) -> dict[str, tuple[int, list[float]]]:
    """Return the images of a batch and the seconds that preparing it takes, by what is drawn."""
    batch_size = max(options.batch)
    drawn: dict[str, dict[str, Any]] = {
        "scale, flip": {},
        "scale, flip, rotate, blur (semseg)": {"rotate_degrees": 10.0, "blur_probability": 0.5},
        "scale, flip, photometric (mmsegmentation)": {"is_photometric": True},
    }
    rows = {}
    for name, how in drawn.items():
        batch = _windows(pairs, options.crop, batch_size, card.device, how)

        prepare = partial(
            prepare_batch, batch, crop_size=options.crop, mean=MEAN, std=STD, device=card.device
        )

        row = Row(name)
        _take_turns(
            card, [(row, _repeated(prepare))], num_rounds=options.rounds, calls_per_turn=options.steps
        )
        rows[name] = batch_size, row.seconds
    return rows


def _windows(
    pairs: list[Pair], crop: int, batch_size: int, device: torch.device, how: dict[str, Any]
) -> Batch:
    """Return windows as a training reads them, in pinned memory where there is a GPU."""
    defaults: dict[str, Any] = {"rotate_degrees": 0.0, "blur_probability": 0.0}
    samples = [
        draw_sample(
            seed=0,
            epoch=0,
            position=position,
            index=position % len(pairs),
            size=pairs[0][1].shape,
            crop_size=crop,
            min_scale=0.5,
            max_scale=2.0,
            flip_probability=0.5,
            **(defaults | how),
        )
        for position in range(batch_size)
    ]
    areas = [source_window(sample, crop) for sample in samples]
    parts = []
    for sample, area in zip(samples, areas, strict=True):
        window = slice(area.top, area.top + area.height), slice(area.left, area.left + area.width)
        parts += [pixels[window].reshape(-1) for pixels in pairs[sample.index]]
    memory = torch.from_numpy(np.concatenate(parts))
    return Batch(memory.pin_memory() if device.type == "cuda" else memory, areas, samples, [""] * batch_size)


# What is said of it


def _step_table(card: Card, cases: Sequence[Case], flops: dict[Network, int], fit: Fit) -> str:
    lines = [
        "| batch | way | ms a step | images/s | times the reference, same autocast | times the reference, fp16 "
        "| TFLOP/s | MFU | MFU by the reference's arithmetic | peak GiB | predicted | reserved GiB | predicted "
        "| loss differs by |",
        "| --- " * 14 + "|",
    ]
    for case in cases:
        for row in case.rows:
            lines.append(f"| {case.batch_size} | {' | '.join(_step_cells(card, case, row, flops, fit))} |")
    return "\n".join(lines)


def _step_cells(card: Card, case: Case, row: Row, flops: dict[Network, int], fit: Fit) -> list[str]:
    way = row.way
    assert way is not None
    name = f"**{row.name}**" if way.of == "pspnet" else row.name
    if row.outcome:
        return [name, row.outcome, *["–"] * 11]
    seconds = median(row.seconds)
    images_per_s = case.batch_size / seconds
    counted = case.predicted.get(way.how, case.predicted[""])
    is_ours, has_memory = way.of == "pspnet", card.device.type == "cuda"
    base = _row(case, Way(of="reference", precision=way.precision))
    return [
        name,
        f"{seconds * 1e3:.3g}",
        f"{images_per_s:.3g}",
        _cell(row.ratios(base)),
        _cell(row.ratios(_row(case, Way(of="reference", precision="fp16")))),
        f"{images_per_s * flops[way.of] / 1e12:.3g}",
        _percent(_mfu(card, case, row, flops[way.of])),
        _percent(_mfu(card, case, row, flops["reference"])) if is_ours else "–",
        f"{row.peak_bytes / GIB:.2f}" if has_memory else "–",
        f"{counted / GIB:.2f}" if is_ours else "–",
        f"{row.reserved_bytes / GIB:.2f}" if has_memory else "–",
        f"{(fit.factor * counted + fit.constant) / GIB:.2f}" if is_ours else "–",
        "–"
        if way.of == "fcn" or row.loss is None or base.loss is None
        else f"{_differs(row.loss, base.loss):.0e}",
    ]


def _row(case: Case, way: Way) -> Row:
    """Return the row of a way; an empty one where it was not asked for."""
    return next((row for row in case.rows if row.way == way), Row(way.name, way, outcome="not measured"))


def _mfu(card: Card, case: Case, row: Row, flops_per_image: int) -> float | None:
    assert row.way is not None
    peak = card.peak(row.way.precision)
    if peak is None or not row.seconds or row.outcome:
        return None
    return flops_per_image * case.batch_size / median(row.seconds) / peak


def _differs(loss: Loss, other: Loss) -> float:
    return max(abs(mine / theirs - 1) for mine, theirs in zip(loss, other, strict=True))


def _cell(ratios: Sequence[float]) -> str:
    return cell(ratios) if ratios else "–"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _aim_line(card: Card, case: Case, flops: dict[Network, int]) -> str:
    """Return what is wanted of the largest batch and what there is of it."""
    reference = _row(case, Way(of="reference", precision="fp16"))
    said = []
    for row in case.rows:
        if row.way is None or row.way.of != "pspnet" or row.outcome:
            continue
        ratios = row.ratios(reference)
        speed = f"{median(ratios):.2f} times" if ratios else "–"
        said.append(f"{row.name} {speed}, {_percent(_mfu(card, case, row, flops['pspnet']))}")
    return (
        f"Wanted: {AIM_SPEED:g} times the reference's eager fp16, and {AIM_MFU:.0%} MFU in bf16; there is, with batch "
        f"{case.batch_size}: {'; '.join(said) or 'nothing'}."
    )


def _prediction_table(predictions: dict[str, list[Row]]) -> str:
    lines = [
        "| picture | way | ms | times the reference, same precision | other class than its fp32 | peak GiB |",
        "| --- " * 6 + "|",
    ]
    for size, rows in predictions.items():
        bases = {row.name.rpartition(", ")[2]: row for row in rows if row.name.startswith("reference")}
        for row in rows:
            name = f"**{row.name}**" if row.name.startswith("pspnet") else row.name
            if row.outcome:
                lines.append(f"| {size} | {name} | {row.outcome} | – | – | – |")
                continue
            ratios = row.ratios(bases[row.name.rpartition(", ")[2]])
            memory = f"{row.peak_bytes / GIB:.2f}" if row.peak_bytes else "–"
            lines.append(
                f"| {size} | {name} | {median(row.seconds) * 1e3:.3g} | {_cell(ratios)} | {row.disagreement:.1e} | "
                f"{memory} |"
            )
    return "\n".join(lines)


def _crop_table(crops: dict[str, tuple[int, list[float]]]) -> str:
    lines = ["| crops made on the device | ms a batch | images/s |", "| --- " * 3 + "|"]
    for name, (batch_size, seconds) in crops.items():
        rates = [batch_size / each for each in seconds]
        lines.append(f"| {name}, batch {batch_size} | {median(seconds) * 1e3:.3g} | {cell(rates)} |")
    return "\n".join(lines)


def _summary(
    card: Card, case: Case, flops: dict[Network, int], predictions: dict[str, list[Row]]
) -> dict[str, float | None]:
    """Return the numbers of the largest batch and the smallest picture; None where there is none."""

    def speed(precision: Precision, compiled: bool = False) -> float | None:
        row = _row(case, Way(of="pspnet", precision=precision, how="compiled" if compiled else ""))
        return _rounded(row.ratios(_row(case, Way(of="reference", precision=precision))))

    mine = _row(case, Way(of="pspnet", precision="bf16"))
    compiled = _row(case, Way(of="pspnet", precision="bf16", how="compiled"))
    rows = {row.name: row for row in next(iter(predictions.values()))}
    return {
        "gpu_step_bf16": speed("bf16"),
        "gpu_step_fp16": speed("fp16"),
        "gpu_step_bf16_compiled": speed("bf16", compiled=True),
        "gpu_step_bf16_vs_fp16": _rounded(mine.ratios(_row(case, Way(of="reference", precision="fp16")))),
        "gpu_mfu_bf16": _share(_mfu(card, case, mine, flops["pspnet"])),
        "gpu_mfu_bf16_compiled": _share(_mfu(card, case, compiled, flops["pspnet"])),
        "gpu_inference_bf16": _rounded(rows["pspnet, bf16"].ratios(rows["reference, bf16"])),
    }


def _rounded(ratios: Sequence[float]) -> float | None:
    return round(median(ratios), 2) if ratios else None


def _share(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


if __name__ == "__main__":
    main()

"""How fast is a picture segmented, and its confusion counted? segfleet against semseg's network, on one core.

One thread, pinned to one core, whose own time counts, not that of others on it. All ways have the same weights, and
their predictions are compared first. In each round all ways take their turn, so that a slow moment of the machine
meets all of them; what counts is the median over the rounds of the ratio inside a round. The last line of output is
JSON.

    python benchmarks/inference.py --quick [--semseg DIR]
    python benchmarks/inference.py --semseg DIR --cityscapes DIR --write benchmarks/README.md
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
from reference_networks import reference_network
from reporting import Pair, cell, pictures, pin_to_one_core, versions, write_between
from torch import Tensor, nn
from torch.nn import functional

from pspnet.folding import for_prediction
from pspnet.inference import autocast, normalised, predict
from pspnet.labels import IGNORE_INDEX
from pspnet.loss import segmentation_loss, valid_weight
from pspnet.metrics import ConfusionMatrix
from pspnet.model import PSPNet

NUM_CLASSES = 19
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
HOW: dict[str, Any] = {"mean": MEAN, "std": STD, "device": "cpu"}
MAX_DISAGREEMENT = 1e-4
"""Share of the pixels; where more differ, the ways do not compute the same and nothing is measured."""
Way = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Measured:
    """The ways on one size of picture."""

    size: str
    rounds: list[dict[str, float]]
    """Seconds of each way in each round."""
    disagreement: dict[str, float]
    """Share of the pixels where a way's prediction is not the reference's."""
    from_exact: dict[str, float] | None
    """Share of the pixels where it is not the reference's in float64, whose rounding decides no pixel."""

    def ratios(self, way: str) -> list[float]:
        """How many times as fast as the reference, in every round."""
        return [seconds["reference"] / seconds[way] for seconds in self.rounds]


def main() -> None:
    """Measure, print the tables, and end with one line of JSON."""
    options = _options()
    core = pin_to_one_core()
    torch.manual_seed(0)
    pairs, origin, _ = pictures(options.cityscapes)
    backbone = "resnet18" if options.quick else "resnet50"
    num_steps = 30 if options.quick else 60
    network = trained(PSPNet(NUM_CLASSES, backbone=backbone, deep_stem=True), pairs, num_steps=num_steps)
    reference, what = reference_network(network, options.semseg)
    folded = for_prediction(network, "cpu")
    ways: dict[str, Way] = {
        "reference": _way_of(reference.eval()),
        "plain": lambda image: predict(network, image, **HOW),
        "fp32": lambda image: predict(folded, image, **HOW),
        "bf16": lambda image: predict(folded, image, **HOW, precision="bf16"),
    }
    exact = _way_of(copy.deepcopy(reference).double(), torch.float64)
    images = [image for image, _ in pairs]
    if options.quick:
        crops = [image[300:557, 900:1157] for image in images]
        measured = [_measure(ways, crops, num_rounds=5, exact=exact)]
    else:
        crops = [image[150:863, 600:1313] for image in images]
        measured = [
            _measure(ways, crops, num_rounds=options.rounds, exact=exact),
            _measure(ways, images[:1], num_rounds=max(3, options.rounds // 2), exact=None),
        ]
    confusion = _measure_confusion(pairs, num_rounds=20)
    conditions = [
        f"{backbone} with deep stem, {NUM_CLASSES} classes, random weights trained for {num_steps} steps of "
        "four crops of 129, the last layer fitted to two more",
        f"reference: {what}",
        f"pictures: {origin}; of each a crop is compared, the first is timed; a size that is not 8k + 1 is continued "
        "to it with the mean colour by every way",
        f"{' and '.join(str(len(one.rounds)) for one in measured)} rounds, core {core}, {versions()}",
    ]
    text = "\n".join(
        [_table(measured), "", _confusion_line(confusion), "", *(f"- {line}" for line in conditions)]
    )
    print(text)
    if options.write:
        write_between(options.write, "inference", text)
    first = measured[0]
    print(
        json.dumps(
            {
                "inference_fp32": round(median(first.ratios("fp32")), 2),
                "inference_bf16": round(median(first.ratios("bf16")), 2),
                "disagreement_fp32": max(one.disagreement["fp32"] for one in measured),
                "confusion": round(median(a / b for a, b in confusion), 2),
            }
        )
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed of prediction, on one core.")
    parser.add_argument(
        "--semseg",
        type=Path,
        help="checkout of semseg, whose own network is the reference; without, our own layers done plainly",
    )
    parser.add_argument(
        "--cityscapes", type=Path, help="folder with leftImg8bit and gtFine; else drawn noise"
    )
    parser.add_argument("--rounds", type=int, default=7, help="at 713; half as many on whole pictures")
    parser.add_argument("--quick", action="store_true", help="ResNet-18 on a crop of 257, under 50 s")
    parser.add_argument("--write", type=Path, help="file whose part between the marks is replaced")
    return parser.parse_args()


# The network and its reference


def trained(
    network: PSPNet, pairs: list[Pair], device: torch.device | str = "cpu", num_steps: int = 60
) -> PSPNet:
    """Return the network after so many steps on four random crops of 129 each, in bf16 on `device`.

    Random weights predict one class, and of random features no class is preferred clearly. The last layer is then
    fitted to two crops, so that many classes are predicted.
    """
    rng = np.random.default_rng(0)
    network.to(device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(num_steps):
        images, labels = [], []
        for number in rng.integers(len(pairs), size=4):
            y, x = rng.integers(1024 - 129), rng.integers(2048 - 129)
            images.append(pairs[number][0][y : y + 129, x : x + 129])
            labels.append(pairs[number][1][y : y + 129, x : x + 129])
        target = torch.tensor(np.stack(labels), device=device).long()
        with autocast(device, "bf16"):
            output = network(normalised(np.stack(images), MEAN, STD, device), upsample=False)
        loss = segmentation_loss(output, target, num_valid=valid_weight(target, None), aux_loss_weight=0.4)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        if step % 20 == 19:
            print(f"weights: step {step + 1}/{num_steps}  loss {loss.main.item():.3f}", file=sys.stderr)
    _fit_classifier(network.eval(), pairs)
    network.zero_grad()  # nothing of it shall count as memory of a prediction
    return network


def _fit_classifier(network: PSPNet, pairs: list[Pair]) -> None:
    """Fit the last layer to the labels of two crops, of which so few steps leave most unseen."""
    device = next(network.parameters()).device
    seen: list[Tensor] = []
    hook = network.head.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    wanted = []
    with torch.no_grad():
        for image, label in (pairs[0], pairs[-1]):
            network(normalised(image[300:557, 900:1157][None], MEAN, STD, device))
            wanted.append(torch.tensor(label[300:557:8, 900:1157:8], device=device).long())
    hook.remove()
    features, target = torch.cat(seen), torch.stack(wanted)
    optimizer = torch.optim.Adam(network.head.classifier.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        logits = network.head.classifier(features)
        functional.cross_entropy(logits, target, ignore_index=IGNORE_INDEX).backward()
        optimizer.step()


def _way_of(network: nn.Module, dtype: torch.dtype = torch.float32) -> Way:
    def predicted(image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        pixels = (torch.tensor(image).permute(2, 0, 1).float() - torch.tensor(MEAN)[:, None, None]) / (
            torch.tensor(STD)[:, None, None]
        )
        continued = functional.pad(pixels[None], (0, -(width - 1) % 8, 0, -(height - 1) % 8))
        with torch.inference_mode():
            return network(continued.to(dtype)).argmax(1)[0, :height, :width].byte().numpy()

    return predicted


# Measuring


def _measure(
    ways: dict[str, Way], images: list[np.ndarray], *, num_rounds: int, exact: Way | None
) -> Measured:
    """Compare the ways on all images, of one size, and time them on the first."""
    image = images[0]
    predictions = {name: np.stack([way(image) for image in images]) for name, way in ways.items()}
    assert len(np.unique(predictions["reference"])) > 3, "a prediction of few classes agrees by chance"
    disagreement = _other_class(predictions, predictions["reference"])
    from_exact = exact and _other_class(predictions, np.stack([exact(image) for image in images]))
    for name in ("plain", "fp32"):
        if disagreement[name] > MAX_DISAGREEMENT:
            sys.exit(f"{name} differs from the reference in {disagreement[name]:.1e} of the pixels.")
    rounds = []
    for _ in range(num_rounds):
        seconds = {}
        for name, way in ways.items():
            begun = time.process_time()
            way(image)
            seconds[name] = time.process_time() - begun
        rounds.append(seconds)
    return Measured(f"{image.shape[1]}×{image.shape[0]}", rounds, disagreement, from_exact)


def _other_class(predictions: dict[str, np.ndarray], than: np.ndarray) -> dict[str, float]:
    return {name: float((prediction != than).mean()) for name, prediction in predictions.items()}


def _measure_confusion(pairs: list[Pair], *, num_rounds: int) -> list[tuple[float, float]]:
    """Return the seconds that numpy's bincount and our counting take for a picture of 2048x1024, by round."""
    target = pairs[0][1]
    prediction = np.roll(target, 20, axis=1)
    prediction[prediction == IGNORE_INDEX] = 0

    def bincount() -> np.ndarray:
        valid = target != IGNORE_INDEX
        pairs_of_ids = target[valid].astype(np.int64) * NUM_CLASSES + prediction[valid]
        return np.bincount(pairs_of_ids, minlength=NUM_CLASSES**2).reshape(NUM_CLASSES, NUM_CLASSES)

    def ours() -> np.ndarray:
        confusion = ConfusionMatrix(NUM_CLASSES)
        confusion.update(torch.from_numpy(prediction), torch.from_numpy(target))
        return confusion.counts.numpy()

    assert np.array_equal(bincount(), ours())
    rounds = []
    for _ in range(num_rounds):
        begun = time.process_time()
        bincount()
        between = time.process_time()
        ours()
        rounds.append((between - begun, time.process_time() - between))
    return rounds


# What is said of it


def _table(measured: list[Measured]) -> str:
    labels = {
        "reference": "reference, fp32",
        "plain": "pspnet, the network as it is trained, fp32",
        "fp32": "**pspnet, as it predicts, fp32**",
        "bf16": "**pspnet, as it predicts, bf16**",
    }
    lines = [
        "| picture | way | s | times the reference | other class | than in float64 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in measured:
        for name, label in labels.items():
            seconds = median(seconds[name] for seconds in one.rounds)
            from_exact = "-" if one.from_exact is None else f"{one.from_exact[name]:.1e}"
            lines.append(
                f"| {one.size} | {label} | {seconds:.3g} | {cell(one.ratios(name))} | {one.disagreement[name]:.1e} | "
                f"{from_exact} |"
            )
    return "\n".join(lines)


def _confusion_line(rounds: list[tuple[float, float]]) -> str:
    theirs, ours = (median(column) * 1e3 for column in zip(*rounds, strict=True))
    return (
        f"Confusion of a picture of 2048×1024: {ours:.2g} ms, numpy's bincount {theirs:.2g} ms, "
        f"{cell([a / b for a, b in rounds])} times as fast, the same counts."
    )


if __name__ == "__main__":
    main()

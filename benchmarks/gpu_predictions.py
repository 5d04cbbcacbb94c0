"""Predictions and crops on a card, for gpu.py."""

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_rows import Card, Row, noted, repeated, say, take_turns
from gpu_ways import NUM_CLASSES
from inference import trained
from reference_networks import reference_network
from reporting import Pair
from torch import nn
from torch.nn import functional

from pspnet.data import Batch, draw_sample
from pspnet.folding import fold_batch_norm, for_prediction
from pspnet.inference import Precision, autocast, predict
from pspnet.model import PSPNet
from pspnet.transforms import normalise, prepare_batch, source_window

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MAX_DISAGREEMENT = 1e-3
"""Share of the pixels of a prediction in fp32 without TF32."""
FEW_CLASSES = 3


def measure_predictions(
    options: argparse.Namespace, card: Card, pairs: list[Pair], differs: list[str], *, deadline: float
) -> dict[str, list[Row]]:
    """Return the ways on each size of picture; the reference in fp32 is the first."""
    network = PSPNet(NUM_CLASSES, backbone=options.backbone, deep_stem=True)
    trained(network, pairs, card.device, num_steps=60 if card.device.type == "cuda" else 2)
    reference = reference_network(copy.deepcopy(network), options.semseg)[0].eval().to(card.device)
    folded = fold_batch_norm(network).to(memory_format=torch.channels_last)
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    precisions: tuple[Precision, ...] = (
        ("fp32", "fp16", "bf16") if card.device.type == "cuda" else ("fp32", "bf16")
    )
    for precision in precisions:
        ways[f"reference, {precision}"] = _reference_prediction(reference, card.device, precision)
    ours = {"pspnet": for_prediction(network, card.device), "pspnet, BatchNorm folded": folded}
    for whose, model in ours.items():
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
        wanted = _exact(ways, picture, size, differs)
        measured[size] = _measure_prediction(options, card, ways, picture, wanted, deadline=deadline)
    return measured


def _exact(
    ways: dict[str, Callable[[np.ndarray], np.ndarray]], picture: np.ndarray, size: str, differs: list[str]
) -> np.ndarray | None:
    """Return what the reference predicts in fp32 without TF32, None where it cannot, and compare ours with it."""
    wanted = None
    with noted(Row(size)), _without_tf32():  # what goes wrong here does so in the rows, too
        wanted = ways["reference, fp32"](picture)
        if len(np.unique(wanted)) <= FEW_CLASSES:
            say("few classes are predicted: ways agree by chance")
        difference = float((ways["pspnet, fp32"](picture) != wanted).mean())
        if difference > MAX_DISAGREEMENT:
            differs.append(f"predictions of {size} in {difference:.1e} of the pixels")
    return wanted


def _measure_prediction(
    options: argparse.Namespace,
    card: Card,
    ways: dict[str, Callable[[np.ndarray], np.ndarray]],
    picture: np.ndarray,
    wanted: np.ndarray | None,
    *,
    deadline: float,
) -> list[Row]:
    rows = [Row(name) for name in ways]
    for row in rows:
        card.free()
        allocated, _ = card.memory()
        with noted(row):
            prediction = ways[row.name](picture)
            row.peak_bytes = card.peak_memory()[0] - allocated
            if wanted is not None:
                row.disagreement = float((prediction != wanted).mean())
    running = [(row, repeated(partial(ways[row.name], picture))) for row in rows]
    take_turns(card, running, num_rounds=options.rounds, calls_per_turn=options.steps, deadline=deadline)
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


def measure_crops(
    options: argparse.Namespace, card: Card, pairs: list[Pair], batch_size: int, *, deadline: float
) -> list[Row]:
    """Return the ways of preparing a batch, by what is drawn."""
    drawn: dict[str, dict[str, Any]] = {
        "scale, flip": {},
        "scale, flip, rotate, blur (semseg)": {"rotate_degrees": 10.0, "blur_probability": 0.5},
        "scale, flip, photometric (mmsegmentation)": {"is_photometric": True},
    }
    running = []
    for name, how in drawn.items():
        batch = _windows(pairs, options.crop, batch_size, card.device, how)
        prepare = partial(
            prepare_batch, batch, crop_size=options.crop, mean=MEAN, std=STD, device=card.device
        )
        running.append((Row(name), repeated(prepare)))
    take_turns(card, running, num_rounds=options.rounds, calls_per_turn=options.steps, deadline=deadline)
    return [row for row, _ in running]


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

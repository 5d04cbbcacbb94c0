"""How fast is a training sample read? segfleet against semseg, mmsegmentation and torchvision, on one core.

One thread, pinned to one core. In each round all ways take their samples one after another, so that a slow moment of
the machine meets all of them; what counts is the median over the rounds of the ratio inside a round. The last line of
output is JSON.

    python benchmarks/data_path.py --quick
    python benchmarks/data_path.py --cityscapes DIR --semseg DIR --write benchmarks/README.md
"""

import argparse
import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image
from reference_pipelines import (
    CROP,
    MAX_SCALE,
    MEAN,
    MIN_SCALE,
    ROTATE,
    STD,
    Reader,
    references,
)
from reporting import Pair, cell, parser_of, pictures, pin_to_one_core, record, versions

from pspnet.data import Batch, train_batches
from pspnet.labels import CITYSCAPES
from pspnet.store import Split, Store, publish_store, write_shard
from pspnet.transforms import prepare_batch

NUM_IMAGES = 16
"""Images of the stores; where there are fewer pictures, they repeat under other names."""
BATCH_SIZE = 4


def main() -> None:
    """Measure, print the table, and end with one line of JSON."""
    options = _options()
    core = pin_to_one_core()
    with tempfile.TemporaryDirectory(prefix="data_path-") as folder:
        pairs, origin, source_bytes = pictures(options.cityscapes)
        files = _write_files(Path(folder), pairs)
        png_bytes = source_bytes or sum(os.path.getsize(path) for pair in files for path in pair)
        sizes, splits = _write_stores(Path(folder), pairs, png_bytes / len(pairs))
        peers, notes = references(Path(folder), files, options.semseg)
        rounds = _measure(peers, splits, num_rounds=3 if options.quick else options.rounds)
    ratios = _ratios(rounds)
    table = _table(ratios, rounds, sizes)
    conditions = [f"pictures: {origin}", *notes, f"{len(rounds)} rounds, core {core}, {versions()}"]
    text = "\n".join([table, "", *(f"- {line}" for line in conditions)])
    record(text, "data_path", options.write)
    print(
        json.dumps(
            {
                "window_vs_semseg": round(median(ratios["semseg", "window"]), 2),
                "window_vs_copy": round(median(ratios["copy", "window"]), 3),
                "float_vs_semseg": round(median(ratios["semseg", "float, raw"]), 2),
                "float_tiles_vs_semseg": round(median(ratios["semseg", "float, tiles"]), 2),
            }
        )
    )


def _options() -> argparse.Namespace:
    parser = parser_of("Samples a second of the data path, on one core.", quick="3 rounds, under 50 s")
    parser.add_argument(
        "--cityscapes", type=Path, help="folder with leftImg8bit and gtFine; else drawn noise"
    )
    parser.add_argument(
        "--semseg", type=Path, help="checkout of semseg, whose own code is then the reference"
    )
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


# What is read


def _write_files(folder: Path, pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    files = []
    for number, (image, label) in enumerate(pairs):
        names = (str(folder / f"{number}.png"), str(folder / f"{number}_train_ids.png"))
        for name, pixels in zip(names, (image, label), strict=True):
            Image.fromarray(pixels).save(name)
        files.append(names)
    (folder / "list.txt").write_text("".join(f"{image} {label}\n" for image, label in files))
    return files


def _write_stores(
    folder: Path, pairs: Sequence[Pair], png_bytes: float
) -> tuple[dict[str, float], dict[str, Split]]:
    """Return the bytes that a pair takes, relative to its PNG files, and the open split of each format."""
    sizes, splits = {}, {}
    for shard_format in ("raw", "tiles"):
        aside = folder / f"{shard_format}.aside"
        aside.mkdir()
        samples = [(f"{number:02d}", *pairs[number % len(pairs)]) for number in range(NUM_IMAGES)]
        shard = write_shard(
            aside / "train.arrow", samples, num_classes=CITYSCAPES.num_classes, shard_format=shard_format
        )
        sizes[shard_format] = (aside / "train.arrow").stat().st_size / NUM_IMAGES / png_bytes
        publish_store(
            aside,
            folder / shard_format,
            name=shard_format,
            class_table=CITYSCAPES,
            splits={"train": [shard]},
            source={},
        )
        splits[shard_format] = Store.open(folder / shard_format).split("train")
    return sizes, splits


# Who reads it: each takes its next samples when it is called


def _measure(
    peers: dict[str, Reader], splits: dict[str, Split], *, num_rounds: int
) -> list[dict[str, float]]:
    """Return for each round the seconds a sample takes by each way."""
    window = _batches(splits["raw"])

    def prepared(split: Split) -> Reader:
        batches = _batches(split)
        return lambda: prepare_batch(next(batches), crop_size=CROP, mean=MEAN, std=STD, device="cpu")

    ways: dict[str, tuple[Reader, int, int]] = {name: (reader, 4, 1) for name, reader in peers.items()} | {
        "window": (lambda: next(window), 16, BATCH_SIZE),
        "copy": (_copies(splits["raw"], is_contiguous=False), 16, BATCH_SIZE),
        "contiguous": (_copies(splits["raw"], is_contiguous=True), 16, BATCH_SIZE),
        "float, raw": (prepared(splits["raw"]), 4, BATCH_SIZE),
        "float, tiles": (prepared(splits["tiles"]), 4, BATCH_SIZE),
    }
    rounds = []
    for number in range(num_rounds + 1):
        seconds = {}
        for name, (reader, num_calls, per_call) in ways.items():
            reader()
            begun = time.perf_counter()
            for _ in range(num_calls):
                reader()
            seconds[name] = (time.perf_counter() - begun) / (num_calls * per_call)
        if number:  # the first warms up
            rounds.append(seconds)
    return rounds


def _batches(split: Split) -> Iterator[Batch]:
    """Yield uint8 batches of epoch after epoch, read in this thread."""
    for epoch in itertools.count():
        yield from train_batches(
            split,
            seed=0,
            epoch=epoch,
            rank=0,
            world_size=1,
            global_batch_size=BATCH_SIZE,
            crop_size=CROP,
            min_scale=MIN_SCALE,
            max_scale=MAX_SCALE,
            flip_probability=0.5,
            rotate_degrees=ROTATE,
            blur_probability=0.5,
            num_prefetch_threads=0,
        )


def _copies(split: Split, *, is_contiguous: bool) -> Reader:
    """Return a reader that copies what the windows of a batch hold, and nothing else.

    Either the very windows, row by row out of their images, or as many bytes in one piece from anywhere in them.
    """
    rng = random.Random(0)
    batches = itertools.cycle([next(batches) for batches in [_batches(split)] for _ in range(64)])
    images = [(split.image(index), split.label(index)) for index in range(len(split))]

    def copied() -> list[np.ndarray]:
        batch, copies = next(batches), []
        for sample, area in zip(batch.samples, batch.areas, strict=True):
            for pixels in images[sample.index]:
                assert pixels is not None
                if is_contiguous:
                    size = area.height * area.width * pixels[0, 0].size
                    start = rng.randrange(pixels.size - size + 1)
                    copies.append(pixels.reshape(-1)[start : start + size].copy())
                else:
                    rows, columns = (
                        slice(area.top, area.top + area.height),
                        slice(area.left, area.left + area.width),
                    )
                    copies.append(pixels[rows, columns].copy())
        return copies

    return copied


# What is said of it


Ratios = dict[tuple[str, str], list[float]]


def _ratios(rounds: Sequence[dict[str, float]]) -> Ratios:
    """Return how many times as fast the second of each pair is, in every round."""
    names = list(rounds[0])
    return {(a, b): [seconds[a] / seconds[b] for seconds in rounds] for a in names for b in names}


def _table(ratios: Ratios, rounds: Sequence[dict[str, float]], sizes: dict[str, float]) -> str:
    rows = [
        (label, name)
        for label, name in (
            ("semseg: scale, rotate, blur, flip, crop", "semseg"),
            ("torchvision v2: scale, flip, crop", "torchvision"),
            ("mmsegmentation: scale, crop, flip, photometric", "mmseg"),
            ("**window → uint8 batch**, the rest on the device", "window"),
            ("plain copy of the same windows", "copy"),
            ("plain copy of as many bytes in one piece each", "contiguous"),
            ("**window → float32 crops on this core**, raw shards", "float, raw"),
            ("**window → float32 crops on this core**, tiles", "float, tiles"),
        )
        if name in rounds[0]
    ]
    lines = ["| way | ms a sample | times semseg | times a plain copy |", "| --- | --- | --- | --- |"]
    for label, name in rows:
        milliseconds = median(seconds[name] for seconds in rounds) * 1e3
        lines.append(
            f"| {label} | {milliseconds:.3g} | {cell(ratios['semseg', name])} | {cell(ratios['copy', name])} |"
        )
    lines += ["", "Bytes of a store, relative to the PNG files of images and labels: "]
    lines[-1] += ", ".join(f"{name} {size:.2f}" for name, size in sizes.items()) + "."
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""How fast are pictures ingested? Against decoding the same files alone, with as many processes.

Pairs of Cityscapes' size are written as PNG; then, in turns, a pool of processes decodes them all with Pillow and
nothing else, and jobs' own ingest makes a store of them on a local Ray cluster of as many CPUs (checks, digests,
duplicates, statistics, shards, page of findings). The last line of output is JSON.

    python benchmarks/ingest.py --quick
    python benchmarks/ingest.py --cityscapes DIR --write benchmarks/README.md
"""

import contextlib
import io
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import ray
from PIL import Image
from reporting import cell, parser_of, pictures, record, versions

from pspnet.labels import CITYSCAPES, IGNORE_INDEX
from segfleet.cluster import connect
from segfleet.ingest import ingest
from segfleet.sources.cityscapes import cityscapes_source

CITYSCAPES_PAIRS = 3475
"""Finely labelled pairs of train and val."""
_ID_OF = np.zeros(256, dtype=np.uint8)
for _entry in CITYSCAPES.classes:
    if _entry.train_id != IGNORE_INDEX:
        _ID_OF[_entry.train_id] = _entry.id


def main() -> None:
    """Measure, print the table, and end with one line of JSON."""
    parser = parser_of(__doc__, quick="32 pairs, 1 round")
    parser.add_argument(
        "--cityscapes", type=Path, help="folder with leftImg8bit and gtFine; else drawn noise"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    num_pairs, num_rounds = (32, 1) if options.quick else (options.pairs, options.rounds)
    with tempfile.TemporaryDirectory(prefix="ingest-") as folder:
        root = Path(folder) / "cityscapes"
        origin = _write_cityscapes(root, options.cityscapes, num_pairs)
        files = sorted(root.glob("*/train/*/*.png"))
        num_bytes = sum(file.stat().st_size for file in files)
        with ProcessPoolExecutor(options.processes) as pool, _cluster(Path(folder), options.processes):
            rounds = [
                (_decoded_s(pool, files), *_ingested_s(root, Path(folder) / "store"))
                for _ in range(num_rounds + 1)
            ][1:]
    text = _table(rounds, num_pairs, num_bytes, options.processes)
    text += "\n\n" + "\n".join(
        f"- {line}" for line in [f"pictures: {origin}, turned about", f"{num_rounds} rounds, {versions()}"]
    )
    record(text, "ingest", options.write)
    ratio = median(decoded / raw for decoded, raw, _ in rounds)
    print(json.dumps({"ingest_vs_decoding": round(ratio, 3)}))


def _write_cityscapes(root: Path, cityscapes: Path | None, num_pairs: int) -> str:
    """Write pairs in the official layout: the genuine ones, or drawn ones, turned about so that none is there twice."""
    pairs, origin, _ = pictures(cityscapes)
    for number in range(num_pairs):
        image, label = pairs[number % len(pairs)]
        shift = 97 * (number // len(pairs))
        stem = f"bochum_{number:06d}_000019"
        for kind, suffix, pixels in (
            ("leftImg8bit", "leftImg8bit", np.roll(image, shift, axis=1)),
            ("gtFine", "gtFine_labelIds", np.roll(_ID_OF[label], shift, axis=1)),
        ):
            path = root / kind / "train" / "bochum" / f"{stem}_{suffix}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return origin


@contextlib.contextmanager
def _cluster(folder: Path, num_cpus: int) -> Iterator[None]:
    with connect(folder):
        assert ray.cluster_resources()["CPU"] >= num_cpus
        yield


def _decode(path: Path) -> int:
    with Image.open(path) as picture:
        return int(np.asarray(picture)[0, 0].sum())


def _decoded_s(pool: ProcessPoolExecutor, files: Sequence[Path]) -> float:
    begun = time.perf_counter()
    assert len(list(pool.map(_decode, files))) == len(files)
    return time.perf_counter() - begun


def _ingested_s(root: Path, store: Path) -> tuple[float, float]:
    """Return the seconds of an ingest into raw shards and into tiles."""
    seconds = []
    for shard_format in ("raw", "tiles"):
        shutil.rmtree(store, ignore_errors=True)
        begun = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ingest(cityscapes_source(str(root)), str(store), shard_format=shard_format)
        seconds.append(time.perf_counter() - begun)
    return seconds[0], seconds[1]


def _table(
    rounds: Sequence[tuple[float, float, float]], num_pairs: int, num_bytes: int, processes: int
) -> str:
    lines = [
        f"| {processes} processes, {num_pairs} pairs, {num_bytes / 1e6:.0f} MB of PNG | pairs/s | MB/s | "
        f"times bare decoding | {CITYSCAPES_PAIRS} pairs |",
        "| --- | --- | --- | --- | --- |",
    ]
    ways = ("decoded with Pillow, nothing else", "ingested into raw shards", "ingested into tiles")
    for column, way in enumerate(ways):
        seconds = median(round_[column] for round_ in rounds)
        ratio = cell([round_[0] / round_[column] for round_ in rounds])
        lines.append(
            f"| {way} | {num_pairs / seconds:.3g} | {num_bytes / 1e6 / seconds:.3g} | {ratio} | "
            f"{CITYSCAPES_PAIRS / num_pairs * seconds / 60:.3g} min |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

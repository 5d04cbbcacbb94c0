"""What does Ray cost a training step? The same loop under bare torchrun and under our Ray trainer, two gloo workers.

Both run `segfleet.worker.execute`, with the same environment, on the same drawn data, one thread a worker. In each
round both take their turn, and a Ray cluster is there only in its own; what counts is the median over the rounds of the
ratio of the median steps of a round. The last line of output is JSON.

    python benchmarks/overhead.py --quick
    python benchmarks/overhead.py --write benchmarks/README.md
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from reporting import cell, versions, write_between

from pspnet.engine import train_one_epoch
from pspnet.labels import NYUV2_13
from pspnet.store import publish_store, write_shard
from segfleet import cluster, trainer, worker
from segfleet.config import TrainingConfig
from segfleet.override import override
from segfleet.place import Place, here
from segfleet.presets import training_preset

NUM_WORKERS, BATCH_SIZE, NUM_WARM_STEPS = 2, 4, 10
Report = Callable[[dict[str, Any]], None]


class Found(NamedTuple):
    """Seconds: a step's medians on the clock and on rank 0's processor, and all from start to end."""

    clock: float
    processor: float
    whole: float


def main() -> None:
    """Measure, print the table, and end with one line of JSON."""
    options = _options()
    if options.worker_settings is not None:
        _bare_worker(json.loads(options.worker_settings.read_text()))
        return
    num_rounds, num_steps = (1, 25) if options.quick else (options.rounds, options.steps)
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), num_steps, crop_size=65 if options.quick else 129)
        for number in range(num_rounds):
            ways = {"torchrun": _under_torchrun, "ray": _under_ray}
            order = list(ways) if number % 2 == 0 else list(reversed(ways))
            found = {name: _timed(ways[name], config, Path(folder) / f"{name}{number}") for name in order}
            rounds.append(found)
            print({name: f"{one.clock * 1e3:.1f} ms" for name, one in found.items()}, file=sys.stderr)
    ratios = [found["ray"].clock / found["torchrun"].clock for found in rounds]
    lines = [
        "| under | ms a step | times torchrun | its processor time, ms | times torchrun | s from start to end |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, label in (("torchrun", "bare torchrun"), ("ray", "**our Ray trainer**, cluster not counted")):
        cells = []
        for clock in ("clock", "processor"):
            times = [getattr(found[name], clock) for found in rounds]
            bare = [getattr(found["torchrun"], clock) for found in rounds]
            cells += [f"{median(times) * 1e3:.1f}", cell([a / b for a, b in zip(times, bare, strict=True)])]
        whole = median(found[name].whole for found in rounds)
        lines.append(f"| {label} | {' | '.join(cells)} | {whole:.1f} |")
    conditions = [
        f"ResNet-18, crop {config.data.crop_size}, {NUM_WORKERS} gloo workers of {BATCH_SIZE // NUM_WORKERS} images, "
        f"{num_steps} steps, the first {NUM_WARM_STEPS} left out",
        f"{num_rounds} rounds, {os.cpu_count()} cores, {versions()}, ray {ray.__version__}",
    ]
    text = "\n".join([*lines, "", *(f"- {line}" for line in conditions)])
    print(text)
    if options.write:
        write_between(options.write, "overhead", text)
    print(json.dumps({"ray_vs_torchrun": round(median(ratios), 3)}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What Ray costs a training step.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--quick", action="store_true", help="one round of 25 steps at crop 65")
    parser.add_argument("--write", type=Path, help="file whose part between the marks is replaced")
    parser.add_argument("--worker-settings", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _config(folder: Path, num_steps: int, crop_size: int) -> TrainingConfig:
    """Return one epoch of `num_steps` on drawn noise, none of which is evaluated but two images at the end."""
    rng = np.random.default_rng(0)
    (folder / "aside").mkdir()
    splits = {}
    for split, num_images in (("train", num_steps * BATCH_SIZE), ("val", NUM_WORKERS)):
        samples = [
            (
                f"{split}{number}",
                rng.integers(0, 256, (144, 192, 3), dtype=np.uint8),
                rng.integers(0, 13, (144, 192), dtype=np.uint8),
            )
            for number in range(num_images)
        ]
        splits[split] = [write_shard(folder / "aside" / f"{split}.arrow", samples, num_classes=13)]
    publish_store(
        folder / "aside", folder / "store", name="noise", class_table=NYUV2_13, splits=splits, source={}
    )
    return override(
        training_preset("tiny"),
        {
            "data.store": str(folder / "store"),
            "data.crop_size": crop_size,
            "schedule.num_epochs": 1,
            "schedule.global_batch_size": BATCH_SIZE,
            "schedule.max_iterations_per_epoch": num_steps,
            "workers.num_workers": NUM_WORKERS,
        },
    )


def _timed(
    way: Callable[[TrainingConfig, dict[str, Any]], float], config: TrainingConfig, folder: Path
) -> Found:
    folder.mkdir()
    config = override(config, {"tracking.storage_dir": str(folder)})
    task = asdict(trainer.new_task(config, name="run", run_id="", attempt="1"))
    whole = way(config, {"task": task, "steps": str(folder / "steps.json")})
    steps = np.array(json.loads((folder / "steps.json").read_text()))
    clock, processor = np.median(steps, axis=0).tolist()
    return Found(clock, processor, whole)


def _under_torchrun(config: TrainingConfig, settings: dict[str, Any]) -> float:
    path = Path(settings["steps"]).with_name("settings.json")
    path.write_text(json.dumps(settings))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(NUM_WORKERS),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(config.workers.cpus_per_worker)}
    begun = time.perf_counter()
    subprocess.run([*command, __file__, "--worker-settings", str(path)], env=environment, check=True)
    return time.perf_counter() - begun


def _bare_worker(settings: dict[str, Any]) -> None:
    dist.init_process_group("gloo")
    place = Place(rank=dist.get_rank(), world_size=dist.get_world_size(), device=torch.device("cpu"))
    _train(settings, place, lambda metrics: None)
    dist.destroy_process_group()


def _under_ray(config: TrainingConfig, settings: dict[str, Any]) -> float:
    storage = config.tracking.storage_dir
    with cluster.connect(storage):
        run = trainer.train_run(
            config, _ray_worker, settings, name="run", storage_path=storage, max_failures=0
        )
        begun = time.perf_counter()
        run.fit()
        return time.perf_counter() - begun


def _ray_worker(settings: dict[str, Any]) -> None:
    _train(settings, here(), ray.train.report)


def _train(settings: dict[str, Any], place: Place, report: Report) -> None:
    """Train as every worker does, and let rank 0 write down each step: seconds on the clock and its processor."""
    marks: list[tuple[float, float]] = []

    def marked_epoch(*values: Any, on_iteration: Callable[[Any], None], **options: Any) -> Any:
        def marked(stats: Any) -> None:
            on_iteration(stats)
            marks.append((time.perf_counter(), time.process_time()))

        return train_one_epoch(*values, on_iteration=marked, **options)

    with mock.patch.object(worker, "train_one_epoch", marked_epoch):
        worker.execute(worker.Task(**settings["task"]), place, report=report)
    if place.rank == 0:
        Path(settings["steps"]).write_text(json.dumps(np.diff(marks, axis=0)[NUM_WARM_STEPS:].tolist()))


if __name__ == "__main__":
    main()

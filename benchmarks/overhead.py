"""What does Ray cost a training step? The same loop under torchrun and under our Ray trainer, two gloo workers.

All run `segfleet.worker.execute` on the same drawn data, one thread a worker: under our trainer, under torchrun with
the environment that the trainer gives its workers (`cluster.KEPT_MEMORY`), which is what Ray itself costs, and under
torchrun as one types it. They are started together and then take turns of a few steps: those whose turn it is not are
stopped (SIGSTOP) with all their processes, the cluster's among them, so that each has the cores for itself and all see
the same neighbours. What counts is the median of the ratios of one turn's median step to that of the turn before or
after. `--quick` leaves out the last way and takes a crop of 65; one of 257 would leave time for a single pair of turns.
The last line is JSON.

    python benchmarks/overhead.py --quick
    python benchmarks/overhead.py --write benchmarks/README.md
    python benchmarks/overhead.py --spare-core --write benchmarks/README.md
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from multiprocessing.context import ForkProcess
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import psutil
import ray.train
import torch
import torch.distributed as dist
import torch.distributed.run
from reporting import cell, versions, write_between

from pspnet.engine import train_one_epoch
from pspnet.labels import NYUV2_13
from pspnet.store import publish_store, write_shard
from segfleet import cluster, trainer, worker
from segfleet.config import TrainingConfig
from segfleet.config_json import from_json
from segfleet.override import override
from segfleet.place import Place, here
from segfleet.presets import training_preset

NUM_WORKERS, BATCH_SIZE, NUM_WARM_STEPS = 2, 4, 5
STEPS_PER_TURN = 5
WAYS = {
    "ray": "**our Ray trainer**",
    "torchrun": "torchrun, with the trainer's environment",
    "bare": "torchrun as it is typed",
}
LONGEST_TURN_S = 300
Report = Callable[[dict[str, Any]], None]


class Turn(NamedTuple):
    """Medians of the steps of one turn, in seconds: on the clock and on rank 0's processor."""

    way: str
    clock: float
    processor: float


def main() -> None:
    """Measure, print the table, and end with one line of JSON."""
    options = _options()
    if options.worker_settings is not None:
        _bare_worker(json.loads(options.worker_settings.read_text()))
        return
    num_rounds, num_steps = (1, 20) if options.quick else (options.rounds, options.steps)
    ways = [way for way in WAYS if way != "bare" or not options.quick]
    core = max(os.sched_getaffinity(0)) if options.spare_core else None
    turns: list[list[Turn]] = []
    others = []
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), num_steps, crop_size=65 if options.quick else 129)
        for number in range(num_rounds):
            found, of_cluster = _round(config, Path(folder) / str(number), ways, core)
            turns.append(found)
            others.append(of_cluster)
            print([f"{turn.way} {turn.clock * 1e3:.1f} ms" for turn in found], file=sys.stderr)
    lines = [
        "| under | ms a step | our trainer, times that | its processor time, ms | our trainer, times that |",
        "| --- | --- | --- | --- | --- |",
    ]
    for way in ways:
        cells = []
        for measure in ("clock", "processor"):
            times = [getattr(turn, measure) for found in turns for turn in found if turn.way == way]
            ratios = [1.0] if way == "ray" else _ratios(turns, way, measure)
            cells += [f"{median(times) * 1e3:.1f}", cell(ratios)]
        lines.append(f"| {WAYS[way]} | {' | '.join(cells)} |")
    price = _ratios(turns, "torchrun", "clock")
    low, high = np.percentile(price, (25, 75))
    conditions = [
        f"ResNet-18, crop {config.data.crop_size}, {NUM_WORKERS} gloo workers of {BATCH_SIZE // NUM_WORKERS} images; "
        f"{num_rounds} starts of all, turns of {STEPS_PER_TURN} steps, {len(price)} pairs of turns with each torchrun",
        f"the middle half of the pairs with the same environment: {low:.3f} to {high:.3f}; Ray's processes but the "
        f"workers, which stand still in torchrun's turns, take {median(others):.1%} of a core",
        f"both workers share core {core}" if options.spare_core else "a core for each worker",
        f"{os.cpu_count()} cores, {versions()}, ray {ray.__version__}",
    ]
    text = "\n".join([*lines, "", *(f"- {line}" for line in conditions)])
    print(text)
    if options.write:
        write_between(options.write, "overhead_spare" if options.spare_core else "overhead", text)
    named = {"ray_vs_torchrun": price, "ray_vs_torchrun_as_typed": _ratios(turns, "bare", "clock")}
    print(json.dumps({name: round(median(of_it), 3) for name, of_it in named.items() if of_it}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What Ray costs a training step.")
    parser.add_argument("--rounds", type=int, default=3, help="starts of every way")
    parser.add_argument("--steps", type=int, default=120, help="of our trainer in a round")
    parser.add_argument(
        "--quick", action="store_true", help="one round of 20 steps at crop 65, without bare torchrun"
    )
    parser.add_argument("--spare-core", action="store_true", help="let the workers share one core")
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


def _round(
    config: TrainingConfig, folder: Path, ways: list[str], core: int | None
) -> tuple[list[Turn], float]:
    """Start the ways, let ours and each other take turns until one has done its steps, and return the turns.

    All are then killed. The second number is the part of a core that the cluster's processes but the workers took in
    Ray's turns.
    """
    marks = {way: folder / f"{way}.txt" for way in ways}
    order = [way for other in ways if other != "ray" for way in ("ray", other)]
    with _started(config, folder, ways, core) as processes:
        deadline = time.monotonic() + LONGEST_TURN_S
        cold = list(ways)
        while cold:
            _check(processes, folder, deadline)
            for way in [way for way in cold if len(_read(marks[way])) >= NUM_WARM_STEPS]:
                _signal(processes[way], "suspend")
                cold.remove(way)
            time.sleep(0.1)
        spans: list[tuple[str, float, float]] = []
        of_cluster: list[float] = []
        while not _has_ended(marks, config):
            way = order[len(spans) % len(order)]
            if spans:
                _signal(processes[spans[-1][0]], "suspend")
            _signal(processes[way], "resume")
            begun, taken, num_done = (
                time.monotonic(),
                _seconds_of_cluster(processes["ray"]),
                len(_read(marks[way])),
            )
            while len(_read(marks[way])) < num_done + STEPS_PER_TURN + 1 and not _has_ended(marks, config):
                _check(processes, folder, begun + LONGEST_TURN_S)
                time.sleep(0.1)
            spans.append((way, begun, time.monotonic()))
            if way == "ray":
                taken = _seconds_of_cluster(processes["ray"]) - taken
                of_cluster.append(taken / (time.monotonic() - begun))
    steps = {way: _read(path) for way, path in marks.items()}
    turns = []
    for way, begun, ended in spans:
        # The first step of a turn began before it, and the one after it finds others' data in the caches.
        whole = [step for last, step in pairwise(steps[way]) if begun < last[0] and step[0] < ended][1:]
        if whole:
            times = np.array([(clock, processor) for _, clock, processor in whole])
            turns.append(Turn(way, *np.median(times, axis=0).tolist()))
    return turns, median(of_cluster)


def _ratios(rounds: list[list[Turn]], way: str, measure: str) -> list[float]:
    """Return our trainer's times by those of `way`, of turns that follow each other."""
    found = []
    for turns in rounds:
        for pair in pairwise(turns):
            both = {turn.way: getattr(turn, measure) for turn in pair}
            if both.keys() == {"ray", way}:
                found.append(both["ray"] / both[way])
    return found


def _read(path: Path) -> list[tuple[float, float, float]]:
    """Return when each step ended, what it took on the clock and what on rank 0's processor."""
    text = path.read_text() if path.exists() else ""
    marks = [
        tuple(map(float, line.split())) for line in text.splitlines(keepends=True) if line.endswith("\n")
    ]
    return [(end[0], end[0] - begun[0], end[1] - begun[1]) for begun, end in pairwise(marks)]


def _has_ended(marks: dict[str, Path], config: TrainingConfig) -> bool:
    return any(len(_read(path)) >= config.schedule.max_iterations_per_epoch - 1 for path in marks.values())


@contextmanager
def _started(
    config: TrainingConfig, folder: Path, ways: list[str], core: int | None
) -> Iterator[dict[str, ForkProcess]]:
    """Start the ways as processes that have imported what this one has, and leave nothing of them behind."""
    processes = {}
    try:
        for way in ways:
            storage = folder / way
            storage.mkdir(parents=True)
            own = override(config, {"tracking.storage_dir": str(storage)})
            task = asdict(trainer.new_task(own, name="run", run_id="", attempt="1"))
            path = folder / f"{way}.json"
            path.write_text(json.dumps({"task": task, "marks": str(folder / f"{way}.txt"), "core": core}))
            process = multiprocessing.get_context("fork").Process(target=_launch, args=(way, path, config))
            process.start()
            processes[way] = process
        yield processes
    finally:
        everything = [each for process in processes.values() for each in _tree(process)]
        for process in processes.values():
            _signal(process, "kill")
        psutil.wait_procs(everything, timeout=10)


def _launch(way: str, settings: Path, config: TrainingConfig) -> None:
    with settings.with_suffix(".log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.environ["OMP_NUM_THREADS"] = str(config.workers.cpus_per_worker)
    if way != "bare":
        os.environ |= cluster.KEPT_MEMORY
    if way == "ray":
        _under_ray(json.loads(settings.read_text()))
    else:
        launcher = ["--standalone", "--nproc-per-node", str(NUM_WORKERS)]
        torch.distributed.run.main([*launcher, __file__, "--worker-settings", str(settings)])


def _check(processes: dict[str, ForkProcess], folder: Path, deadline: float = math.inf) -> None:
    for way, process in processes.items():
        if process.exitcode not in (None, 0) or time.monotonic() > deadline:
            log = (folder / f"{way}.log").read_text()[-2000:]
            sys.exit(f"{WAYS[way]} did not run (exit status {process.exitcode}):\n{log}")


def _tree(process: ForkProcess) -> list[psutil.Process]:
    if process.exitcode is not None:
        return []
    first = psutil.Process(process.pid)
    return [first, *first.children(recursive=True)]


def _signal(process: ForkProcess, what: str) -> None:
    for each in _tree(process):
        try:
            getattr(each, what)()
        except psutil.NoSuchProcess:
            continue  # it has ended meanwhile


def _seconds_of_cluster(process: ForkProcess) -> float:
    """Return the processor time of all its processes but the workers."""
    total = 0.0
    for each in _tree(process):
        try:
            if "RayTrainWorker" not in each.name() + " ".join(each.cmdline()):
                times = each.cpu_times()
                total += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return total


def _bare_worker(settings: dict[str, Any]) -> None:
    dist.init_process_group("gloo")
    place = Place(rank=dist.get_rank(), world_size=dist.get_world_size(), device=torch.device("cpu"))
    _train(settings, place, lambda metrics: None)
    dist.destroy_process_group()


def _under_ray(settings: dict[str, Any]) -> None:
    config = from_json(TrainingConfig, settings["task"]["config_json"])
    storage = config.tracking.storage_dir
    with cluster.connect(storage):
        run = trainer.train_run(
            config, _ray_worker, settings, name="run", storage_path=storage, max_failures=0
        )
        run.fit()


def _ray_worker(settings: dict[str, Any]) -> None:
    _train(settings, here(), ray.train.report)


def _train(settings: dict[str, Any], place: Place, report: Report) -> None:
    """Train as every worker does, and let rank 0 write down when each step ended, by the clock and its processor."""
    if settings["core"] is not None:
        os.sched_setaffinity(0, {settings["core"]})  # of this thread and those that it starts
    with Path(settings["marks"]).open("a") as file:

        def marked_epoch(*values: Any, on_iteration: Callable[[Any], None], **options: Any) -> Any:
            def marked(stats: Any) -> None:
                on_iteration(stats)
                if place.rank == 0:
                    file.write(f"{time.monotonic()} {time.process_time()}\n")
                    file.flush()

            return train_one_epoch(*values, on_iteration=marked, **options)

        with mock.patch.object(worker, "train_one_epoch", marked_epoch):
            worker.execute(worker.Task(**settings["task"]), place, report=report)


if __name__ == "__main__":
    main()

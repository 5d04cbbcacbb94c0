"""What does Ray cost a training step? The same loop under bare torchrun and under our Ray trainer, two gloo workers.

Both run `segfleet.worker.execute`, with the same environment, on the same drawn data, one thread a worker. Both are
started, and then let go in turns of some steps while every process of the other is stopped, so that what else the
machine does meets both. Each turn of Ray's is compared with the two of torchrun around it, by the median step; what
counts is the median of these ratios. The last line of output is JSON.

    python benchmarks/overhead.py --quick
    python benchmarks/overhead.py --write benchmarks/README.md
"""

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import psutil
import ray.train
import torch
import torch.distributed as dist
from reporting import cell, versions, write_between

from pspnet.engine import train_one_epoch
from pspnet.labels import NYUV2_13
from pspnet.store import publish_store, write_shard
from segfleet import cluster, trainer, worker
from segfleet.config import TrainingConfig
from segfleet.config_json import from_json
from segfleet.override import override
from segfleet.presets import training_preset

NUM_WORKERS, BATCH_SIZE, EPOCH_STEPS = 2, 4, 100
NUM_FIRST_STEPS, NUM_WARM_STEPS, NUM_STEPS = 10, 2, 8
"""Steps after the start, and after each time a group was stopped, that do not count; and those of a turn that do."""
RAY_NICENESS = 15
"""Ray's workers give way to others by so much; where other programs compute, that would be a part of the ratio."""
START_TIMEOUT_S, QUICK_S, NUM_LEAST_TURNS = 600.0, 38.0, 3
Report = Callable[[dict[str, Any]], None]


class Turn(NamedTuple):
    """Medians of a turn's steps, in seconds: on the clock and on rank 0's processor."""

    clock: float
    processor: float


def main() -> None:
    """Measure, print the table, and end with one line of JSON."""
    options = _options()
    if options.bare is not None:
        _bare_worker(json.loads(options.bare.read_text()))
        return
    if options.ray is not None:
        _under_ray(json.loads(options.ray.read_text()))
        return
    begun, num_turns = time.monotonic(), 8 if options.quick else options.turns
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        config = _config(Path(folder), NUM_FIRST_STEPS + (num_turns + 1) * 2 * (NUM_WARM_STEPS + NUM_STEPS))
        groups = []
        for name, command in (("torchrun", _torchrun()), ("ray", [sys.executable, __file__, "--ray"])):
            groups.append(stack.enter_context(_started(config, Path(folder) / name, command)))
        bare, ours = groups
        turns: dict[str, list[Turn]] = {"torchrun": [bare.turn()], "ray": []}
        while len(turns["ray"]) < num_turns:
            turns["ray"].append(ours.turn())
            turns["torchrun"].append(bare.turn())
            if options.quick and len(turns["ray"]) >= NUM_LEAST_TURNS and time.monotonic() - begun > QUICK_S:
                break
        others = {"torchrun": bare.others_s(), "ray": ours.others_s()}
    ratios = {
        kind: [
            getattr(turn, kind) / ((getattr(before, kind) + getattr(after, kind)) / 2)
            for turn, (before, after) in zip(turns["ray"], pairwise(turns["torchrun"]), strict=True)
        ]
        for kind in Turn._fields
    }
    lines = [
        "| under | ms a step | times torchrun | rank 0's processor time, ms | times torchrun "
        "| processor time of all but the workers, ms | s to the first step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, label, group in (("torchrun", "bare torchrun", bare), ("ray", "**our Ray trainer**", ours)):
        cells = []
        for kind in Turn._fields:
            cells.append(f"{median(getattr(turn, kind) for turn in turns[name]) * 1e3:.1f}")
            cells.append(cell(ratios[kind]) if name == "ray" else "1")
        lines.append(f"| {label} | {' | '.join(cells)} | {others[name] * 1e3:.2f} | {group.start_s:.1f} |")
    conditions = [
        f"ResNet-18, crop {config.data.crop_size}, {NUM_WORKERS} gloo workers of {BATCH_SIZE // NUM_WORKERS} images",
        f"{len(turns['ray'])} turns of {NUM_STEPS} steps, the first {NUM_WARM_STEPS} of each left out, "
        f"{os.cpu_count()} cores, {versions()}, ray {ray.__version__}",
    ]
    text = "\n".join([*lines, "", *(f"- {line}" for line in conditions)])
    print(text)
    if options.write:
        write_between(options.write, "overhead", text)
    print(json.dumps({"ray_vs_torchrun": round(median(ratios["clock"]), 3)}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What Ray costs a training step.")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument(
        "--quick", action="store_true", help=f"8 turns, or as many as end within {QUICK_S:.0f} s"
    )
    parser.add_argument("--write", type=Path, help="file whose part between the marks is replaced")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ray", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _config(folder: Path, num_steps: int) -> TrainingConfig:
    """Return a training of at least `num_steps` on drawn noise, evaluated only when they are done."""
    num_epochs = math.ceil(num_steps / EPOCH_STEPS)
    rng = np.random.default_rng(0)
    (folder / "aside").mkdir()
    splits = {}
    for split, num_images in (("train", EPOCH_STEPS * BATCH_SIZE), ("val", NUM_WORKERS)):
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
            "data.crop_size": 129,
            "schedule.num_epochs": num_epochs,
            "schedule.evaluate_every_epochs": num_epochs,
            "schedule.global_batch_size": BATCH_SIZE,
            "schedule.max_iterations_per_epoch": EPOCH_STEPS,
            "workers.num_workers": NUM_WORKERS,
        },
    )


class Group:
    """A training and all processes that belong to it, which run only in its turns."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, log: Path) -> None:
        self._root, self._folder, self._log = psutil.Process(process.pid), folder, log
        self._started_at = time.monotonic()

    def start(self) -> None:
        """Wait for the first steps, and stop."""
        self._wait_for(NUM_FIRST_STEPS)
        self.start_s = self._steps()[0, 0] - self._started_at
        self._begun_s, self._begun_steps = self._others(), len(self._steps())
        self._signal(signal.SIGSTOP)

    def turn(self) -> Turn:
        """Let the training go on for some steps."""
        before = len(self._steps())
        self._signal(signal.SIGCONT)
        self._wait_for(before + NUM_WARM_STEPS + NUM_STEPS)
        self._signal(signal.SIGSTOP)
        # differences of marks: the first spans the stop
        marks = self._steps()[before + NUM_WARM_STEPS - 1 : before + NUM_WARM_STEPS + NUM_STEPS]
        return Turn(*np.median(np.diff(marks, axis=0), axis=0).tolist())

    def others_s(self) -> float:
        """Return what all processes but the workers computed for a step, in all turns together."""
        return (self._others() - self._begun_s) / (len(self._steps()) - self._begun_steps)

    def end(self) -> None:
        """End every process that belongs to the training."""
        processes = self._processes()
        self._signal(signal.SIGCONT)
        self._root.terminate()
        with contextlib.suppress(psutil.TimeoutExpired):
            self._root.wait(20)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _wait_for(self, num_steps: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(self._steps()) < num_steps:
            if time.monotonic() > deadline or self._root.status() == psutil.STATUS_ZOMBIE:
                sys.exit(f"the training in {self._folder} stands still:\n{self._log.read_text()}")
            time.sleep(0.1)

    def _steps(self) -> np.ndarray:
        """Return the marks so far, (steps, 2): the time and rank 0's processor time after each."""
        path = self._folder / "steps0"
        return np.fromfile(path).reshape(-1, 2) if path.exists() else np.empty((0, 2))

    def _processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self._root, *self._root.children(recursive=True)]
        return []

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _others(self) -> float:
        workers = {int(path.read_text()) for path in self._folder.glob("pid*")}
        seconds = 0.0
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid not in workers:
                    times = process.cpu_times()
                    seconds += times.user + times.system
        return seconds


@contextlib.contextmanager
def _started(config: TrainingConfig, folder: Path, command: list[str]) -> Iterator[Group]:
    """Start the training of `config` by `command` and stop it after its first steps; end it at the end."""
    folder.mkdir()
    config = override(config, {"tracking.storage_dir": str(folder / "runs")})
    task = asdict(trainer.new_task(config, name="run", run_id="", attempt="1"))
    settings = folder / "settings.json"
    settings.write_text(json.dumps({"task": task, "marks": str(folder)}))
    environment = os.environ | {"OMP_NUM_THREADS": str(config.workers.cpus_per_worker)}
    environment.pop("RAY_ADDRESS", None)
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, str(settings)], env=environment, stdout=file, stderr=file, start_new_session=True
        )
    group = Group(process, folder, log)
    try:
        group.start()
        yield group
    finally:
        group.end()


def _torchrun() -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*run, "--nproc-per-node", str(NUM_WORKERS), __file__, "--bare"]


def _bare_worker(settings: dict[str, Any]) -> None:
    os.nice(RAY_NICENESS)
    dist.init_process_group("gloo")
    place = worker.Place(rank=dist.get_rank(), world_size=dist.get_world_size(), device=torch.device("cpu"))
    _train(settings, place, lambda metrics: None)
    dist.destroy_process_group()


def _under_ray(settings: dict[str, Any]) -> None:
    config = from_json(TrainingConfig, settings["task"]["config_json"])
    storage = config.tracking.storage_dir
    with cluster.connect(storage):
        trainer.train_run(
            config, _ray_worker, settings, name="run", storage_path=storage, max_failures=0
        ).fit()


def _ray_worker(settings: dict[str, Any]) -> None:
    _train(settings, worker.here(), ray.train.report)


def _train(settings: dict[str, Any], place: worker.Place, report: Report) -> None:
    """Train as every worker does; each writes its process id, and after each step the time and its processor time."""
    folder = Path(settings["marks"])
    (folder / f"pid{place.rank}").write_text(str(os.getpid()))

    def marked_epoch(*values: Any, on_iteration: Callable[[Any], None], **options: Any) -> Any:
        with (folder / f"steps{place.rank}").open("ab", buffering=0) as file:

            def marked(stats: Any) -> None:
                on_iteration(stats)
                file.write(np.array([time.monotonic(), time.process_time()]).tobytes())

            return train_one_epoch(*values, on_iteration=marked, **options)

    with mock.patch.object(worker, "train_one_epoch", marked_epoch):
        worker.execute(worker.Task(**settings["task"]), place, report=report)


if __name__ == "__main__":
    main()

"""Does a training slow down while its MLflow server is dead?

One training on drawn street scenes, in one process, is tracked to a server on this machine, which is killed and started
again by turns. What counts is the median over the outages of the ratio of the median epoch in an outage to that of the
time with a server before it; afterwards every point must be on the server, once. The last line of output is JSON.

    python benchmarks/tracking_outage.py --quick
    python benchmarks/tracking_outage.py --write benchmarks/README.md
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from reporting import cell, parser_of, pin_to_one_core, record, versions

from segfleet.config import TrainingConfig
from segfleet.config_json import to_json
from segfleet.ingest import ingest
from segfleet.override import override
from segfleet.place import Place
from segfleet.ports import free_ports
from segfleet.presets import training_preset
from segfleet.run_writer import ship_spool
from segfleet.sources.cityscapes import cityscapes_source
from segfleet.sources.demo import draw_demo
from segfleet.tracking import open_run, points
from segfleet.worker import SPOOL_FOLDER, Task, train

STARTING_S = 180
"""A server that does not answer for so long has not started."""


class OutagesOverError(Exception):
    """The last outage is over."""


class MlflowServer:
    """An MLflow server on this machine that can be killed and started again at the same place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (self._port,) = free_ports(1, "127.0.0.1")
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={self._port}"]
        command += [f"--backend-store-uri=sqlite:///{self._folder / 'mlflow.db'}", "--workers=1"]
        command += ["--serve-artifacts", f"--artifacts-destination={self._folder / 'artifacts'}"]
        changes = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | changes, start_new_session=True
            )
        deadline = time.monotonic() + STARTING_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return
            time.sleep(0.5)
        sys.exit(f"The server did not answer within {STARTING_S} s: {self._folder / 'server.log'}")

    def kill(self) -> None:
        """End it at once, with all that it started."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def main() -> None:
    """Measure, print the table, and end with one line of JSON."""
    parser = parser_of(__doc__, quick="one outage of 10 seconds")
    parser.add_argument("--outages", type=int, default=4)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of an outage, and of the time between two"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server goes with this process
    num_outages, seconds = (1, 10.0) if options.quick else (options.outages, options.seconds)
    with tempfile.TemporaryDirectory(prefix="outage-") as folder, _server(Path(folder)) as server:
        core = pin_to_one_core()  # the server was started before, so that it may take the others
        found = _measure(Path(folder), server, num_outages, seconds)
    ratios = [without / with_one for with_one, without in found["epochs"]]
    alive, dead = ([one[index] * 1e3 for one in found["epochs"]] for index in (0, 1))
    counts = " | ".join(str(found[name]) for name in ("num_points", "num_missing", "num_double"))
    lines = [
        "| an epoch with a server, ms | without, ms | times as long | points sent | missing | double |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| {cell(alive)} | {cell(dead)} | {cell(ratios)} | {counts} |",
        "",
        f"- {num_outages} outages of {seconds:.0f} s, core {core}, {versions()}",
    ]
    text = "\n".join(lines)
    record(text, "tracking_outage", options.write)
    print(
        json.dumps(
            {
                "slower": round(median(ratios), 4),
                "missing": found["num_missing"],
                "double": found["num_double"],
            }
        )
    )


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def _measure(folder: Path, server: MlflowServer, num_outages: int, seconds: float) -> dict[str, Any]:
    config = _config(folder, server.uri)
    run_id = open_run(
        config.tracking, run_name="outage", key="outage", parent_run_id=None, tags={}, params={}
    )
    task = Task(
        config_json=to_json(config),
        run_dir=str(folder / "run"),
        run_id=run_id,
        tracking_uri=server.uri,
        attempt="1",
    )
    ends: list[float] = []
    phases: list[tuple[bool, float, float]] = []  # with a server, from, to

    def take_turns() -> None:
        for number in range(2 * num_outages):
            is_alive = number % 2 == 0
            if not is_alive:
                server.kill()
            began = time.monotonic()
            time.sleep(seconds)
            phases.append((is_alive, began, time.monotonic()))
            if not is_alive:
                server.start()

    turns = threading.Thread(target=take_turns)

    def report(metrics: dict[str, Any]) -> None:
        ends.append(time.monotonic())
        if len(ends) == 5:  # warm by now
            turns.start()
        if len(ends) > 5 and not turns.is_alive():
            raise OutagesOverError

    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.suppress(OutagesOverError),
    ):
        train(task, Place(), report=report)
    ship_spool(server.uri, run_id, folder / "run" / SPOOL_FOLDER)
    steps = [point.step for point in points(server.uri, run_id)["val/miou"]]
    return {
        "epochs": [
            tuple(_median_epoch(ends, phase) for phase in phases[number : number + 2])
            for number in range(0, 2 * num_outages, 2)
        ],
        "num_points": len(steps),
        "num_missing": len(set(range(1, len(ends) + 1)) - set(steps)),
        "num_double": len(steps) - len(set(steps)),
    }


def _median_epoch(ends: list[float], phase: tuple[bool, float, float]) -> float:
    """Return the seconds between two reports, both inside of the phase."""
    _, began, ended = phase
    inside = [end for end in ends if began <= end <= ended]
    return median(later - earlier for earlier, later in itertools.pairwise(inside))


def _config(folder: Path, uri: str) -> TrainingConfig:
    """Return a training whose epochs take about a second, each evaluated, checkpointed and tracked."""
    draw_demo(folder / "scenes", num_train=16, num_val=2, size=(192, 96))
    ingest(cityscapes_source(str(folder / "scenes")), folder / "store", selection_fraction=0.0)
    return override(
        training_preset("tiny"),
        {
            "data.store": str(folder / "store"),
            "data.crop_size": 65,
            "schedule.num_epochs": 100_000,
            "schedule.max_iterations_per_epoch": 6,
            "workers.num_workers": 1,
            "tracking.storage_dir": str(folder),
            "tracking.tracking_uri": uri,
            "tracking.experiment_name": "outage",
        },
    )


if __name__ == "__main__":
    main()

"""Does anything grow? Small studies one after another on one cluster and one MLflow server, for hours.

After each study it is noted what is held: memory, open files and threads of the process that searches, and of the
cluster's own processes; processes, living actors and placement groups; files in the folder for temporary files. What
counts is the last quarter of the studies against the second (the first fills caches). The last line of output is JSON.

    python benchmarks/soak.py --hours 2 --write benchmarks/README.md --csv soak.csv
"""

import contextlib
import csv
import io
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

import psutil
from ray.util.state import list_actors, list_placement_groups
from reporting import parser_of, record, versions
from tracking_outage import MlflowServer

from segfleet.cluster import connect
from segfleet.config import TrainingConfig
from segfleet.ingest import ingest
from segfleet.interruption import terminable
from segfleet.override import override
from segfleet.presets import training_preset
from segfleet.search import run_search
from segfleet.search_config import SearchConfig, SpaceConfig
from segfleet.sources.cityscapes import cityscapes_source
from segfleet.sources.demo import draw_demo

CLUSTER_PROCESSES = ("raylet", "gcs_server", "dashboard", "runtime_env", "log_monitor", "monitor.py")


@dataclass(frozen=True)
class Held:
    """What is held after a study."""

    seconds: float
    study_s: float
    own_mib: float
    own_files: int
    own_threads: int
    cluster_mib: float
    gcs_mib: float
    raylet_mib: float
    cluster_files: int
    processes: int
    actors: int
    placement_groups: int
    temporary_files: int
    ray_logs: int


def main() -> None:
    """Search until the time is over, print the table, and end with one line of JSON."""
    parser = parser_of(__doc__, quick="four studies, two minutes, most of them Ray's")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--csv", type=Path, help="file for what is held after each study")
    options = parser.parse_args()
    with terminable(), tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = str(Path(folder) / "tmp")
        Path(os.environ["TMPDIR"]).mkdir()
        tempfile.tempdir = None
        held = _soak(Path(folder), 0 if options.quick else options.hours * 3600, options.csv)
    text = (
        _table(held)
        + f"\n\n- {len(held)} studies of two trials in {held[-1].seconds / 60:.0f} minutes, {versions()}"
    )
    record(text, "soak", options.write)
    second, last = _quarters(held)
    grown = {
        name: round(last[name] - second[name], 2) for name in second if name not in ("seconds", "study_s")
    }
    print(json.dumps({"studies": len(held), "grown": grown}))


def _soak(folder: Path, seconds: float, csv_path: Path | None) -> list[Held]:
    logging.disable()
    draw_demo(folder / "scenes", num_train=8, num_val=2, size=(96, 64))
    ingest(cityscapes_source(str(folder / "scenes")), folder / "store", selection_fraction=0.0)
    server = MlflowServer(folder)
    server.start()
    held: list[Held] = []
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        stack.enter_context(connect(folder, has_dashboard=True))
        while len(held) < 4 or time.monotonic() - began < seconds:
            started = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                result = run_search(_search(folder, server.uri, len(held)))
            assert result.num_trained == 2, result
            held.append(_held(time.monotonic() - began, time.monotonic() - started))
            print(held[-1], file=sys.stderr, flush=True)
            if csv_path:
                _append(csv_path, held)
    return held


def _search(folder: Path, uri: str, number: int) -> SearchConfig:
    training: TrainingConfig = override(
        training_preset("tiny"),
        {
            "data.store": str(folder / "store"),
            "data.crop_size": 33,
            "schedule.num_epochs": 2,
            "schedule.max_iterations_per_epoch": 1,
            "workers.num_workers": 1,
            "tracking.storage_dir": str(folder / "runs"),
            "tracking.tracking_uri": uri,
            "tracking.registered_model_name": "",
        },
    )
    return SearchConfig(
        training=training,
        space=SpaceConfig(crop_sizes=(33,)),
        study=f"soak-{number:04d}",
        num_trials=2,
        num_finalists=0,
        score_trials_on="val",
    )


def _held(seconds: float, study_s: float) -> Held:
    time.sleep(5)  # what a study leaves to itself is gone by then
    own = psutil.Process()
    family = own.children(recursive=True)
    cluster = [process for process in family if _is_of_cluster(process)]
    actors = _ask(lambda: list_actors(filters=[("state", "=", "ALIVE")], limit=1000))
    groups = _ask(lambda: list_placement_groups(filters=[("state", "=", "CREATED")], limit=1000))
    return Held(
        seconds=round(seconds, 1),
        study_s=round(study_s, 1),
        own_mib=round(own.memory_info().rss / 2**20, 1),
        own_files=own.num_fds(),
        own_threads=own.num_threads(),
        cluster_mib=_mib(cluster),
        gcs_mib=_mib([process for process in cluster if _is_named(process, "gcs_server")]),
        raylet_mib=_mib([process for process in cluster if _is_named(process, "raylet/raylet")]),
        cluster_files=sum(_of(process, lambda it: it.num_fds()) for process in cluster),
        processes=len(family),
        actors=actors,
        placement_groups=groups,
        temporary_files=sum(not _is_log(path) for path in _temporary_files()),
        ray_logs=sum(map(_is_log, _temporary_files())),
    )


def _temporary_files() -> Iterator[Path]:
    return (path for path in Path(tempfile.gettempdir()).rglob("*") if not path.is_dir())


def _is_log(path: Path) -> bool:
    """Whether Ray logs in it: five files for each of its processes, kept until the cluster ends."""
    return "logs" in path.parts


def _is_of_cluster(process: psutil.Process) -> bool:
    return any(_is_named(process, name) for name in CLUSTER_PROCESSES)


def _is_named(process: psutil.Process, name: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return name in " ".join(process.cmdline())
    return False


def _mib(processes: Sequence[psutil.Process]) -> float:
    return round(sum(_of(process, lambda it: it.memory_info().rss) for process in processes) / 2**20, 1)


def _of(process: psutil.Process, value: Callable[[psutil.Process], int]) -> int:
    with contextlib.suppress(psutil.Error):
        return value(process)
    return 0


def _ask(listed: Callable[[], Sequence[object]]) -> int:
    return len(listed())


def _append(path: Path, held: Sequence[Held]) -> None:
    with path.open("a" if len(held) > 1 else "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Held)])
        if len(held) == 1:
            writer.writeheader()
        writer.writerow(asdict(held[-1]))


def _quarters(held: Sequence[Held]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the medians of the second and of the last quarter of the studies."""
    size = len(held) // 4
    parts = (held[size : 2 * size], held[-size:])
    names = [field.name for field in fields(Held)]
    second, last = ({name: median(getattr(one, name) for one in part) for name in names} for part in parts)
    return second, last


def _table(held: Sequence[Held]) -> str:
    second, last = _quarters(held)
    rows = {
        "memory of the process that searches, MiB": "own_mib",
        "its open files": "own_files",
        "its threads": "own_threads",
        "memory of the cluster's own processes, MiB": "cluster_mib",
        "of which its head (gcs_server)": "gcs_mib",
        "of which its node (raylet)": "raylet_mib",
        "their open files": "cluster_files",
        "processes": "processes",
        "living actors": "actors",
        "placement groups": "placement_groups",
        "temporary files, Ray's logs apart": "temporary_files",
        "files of Ray's logs, which it keeps as long as the cluster lives": "ray_logs",
        "seconds of a study": "study_s",
    }
    lines = ["| held after a study, median | second quarter | last quarter |", "| --- | --- | --- |"]
    return "\n".join(
        [*lines, *(f"| {label} | {second[name]:g} | {last[name]:g} |" for label, name in rows.items())]
    )


if __name__ == "__main__":
    main()

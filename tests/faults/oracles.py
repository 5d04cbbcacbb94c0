"""What a run that met a fault must share with one that met none: W weights, M history, O trials, L nothing left."""

import contextlib
import gc
import hashlib
import time
from collections import Counter
from pathlib import Path

import psutil
import ray
from ray._private.state import actors
from ray.util import placement_group_table

from segfleet import tracking
from segfleet.checkpoint import MODEL_FILE, checkpoint_folders

MEASURED = ("images_per_s", "data_wait_s", "report_wait_s", "tflops_per_s", "mfu", "step/", "system/")
"""Curves of seconds: their points must be there, once, but no two runs have the same."""

OF_THE_CLUSTER = ("_AutoscalingCoordinatorActor", "DatasetManager")
"""Ray starts one of each in a cluster, and keeps it."""

AT_REST = ("IDLE", "DashboardAgent", "RuntimeEnvAgent", *OF_THE_CLUSTER)
"""What the titles of processes begin with that belong to a node and to nobody's run."""

History = dict[tuple[str, int], float | None]


def weights(run_dir: Path) -> dict[str, str]:
    """W: the sha256 of the weights of each checkpoint that is kept."""
    return {
        folder.name: hashlib.sha256((folder / MODEL_FILE).read_bytes()).hexdigest()
        for folder in checkpoint_folders(run_dir / "checkpoints")
    }


def history(uri: str, run_id: str) -> History:
    """M: every point of the run; fails where a (key, step) is there twice."""
    curves = tracking.points(uri, run_id)
    times = Counter((key, point.step) for key, points in curves.items() for point in points)
    double = [point for point, number in times.items() if number > 1]
    assert not double, double
    return {
        (key, point.step): None if key.startswith(MEASURED) else point.value
        for key, points in curves.items()
        for point in points
    }


def assert_nothing_left(run_dir: Path, *, timeout_s: float = 30.0) -> None:
    """L, on the cluster that this process is connected to: no worker, actor, reservation or file that is aside."""
    deadline = time.monotonic() + timeout_s
    while (left := _left(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, left


def training_processes() -> list[psutil.Process]:
    """Return the worker processes of the clusters that this process started."""
    return [process for process, title in _ray_processes() if "RayTrainWorker" in title]


def processes_of_runs() -> dict[int, str]:
    """Return the titles of all processes of runs, of those clusters, by id: one may live on after its actor."""
    return {process.pid: title for process, title in _ray_processes() if not title.startswith(AT_REST)}


def _ray_processes() -> list[tuple[psutil.Process, str]]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            title = "".join(process.cmdline())
            if title.startswith("ray::"):
                found.append((process, title.removeprefix("ray::")))
    return found


def files_aside(run_dir: Path) -> list[str]:
    """Return what was to be renamed or removed and was not."""
    aside = [path for path in run_dir.rglob("*") if path.name.startswith(".")]
    aside += list((run_dir / "ray").glob("*"))
    return [str(path) for path in aside]


def _left(run_dir: Path) -> list[str]:
    gc.collect()  # an actor lives as long as its handle
    alive = [f"process {pid}: {title}" for pid, title in processes_of_runs().items()]
    names = [actor["ActorClassName"] for actor in actors().values() if actor["State"] != "DEAD"]
    alive += [f"actor {name}" for name in names if name not in OF_THE_CLUSTER]
    groups = placement_group_table().values()
    alive += [f"placement group {group['state']}" for group in groups if group["state"] != "REMOVED"]
    assert ray.is_initialized()
    return alive + files_aside(run_dir)

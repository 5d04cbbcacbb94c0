"""The Ray cluster: the one RAY_ADDRESS names, or a local one that lives as long as the job."""

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.util

from pspnet.errors import InputError
from pspnet.location import is_uri
from segfleet.config import TrainingConfig, WorkersConfig
from segfleet.folders import writable_folder
from segfleet.interruption import kept_sigterm, terminable
from segfleet.ports import free_ports
from segfleet.secret import is_secret

CONNECT_TIMEOUT_S = 5.0
HALT_S = 75.0
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Variable by which Ray Train is told whether to watch for nodes that are taken back."""
NO_WATCHER = "no, on a single node"
"""Ours, so that it is not taken for what a person has set. Ray takes all but 1 and true for no."""
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20
QUIET_DAEMONS = {
    # Nobody is sent the logs (log_to_driver), so their monitor need not look for files ten times a second.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "1e9",
    # What the agent of the node gathers for a dashboard that nobody opens.
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "SCAN_EVENT_DIR_INTERVAL_SECONDS": "60",
    "RAY_DASHBOARD_AGGREGATOR_AGENT_CHECK_MAIN_THREAD_LIVENESS_INTERVAL_SECONDS": "2",
}
"""Environment of the processes of a local cluster, which share the cores with the workers."""
QUIET_CLUSTER = {"enable_metrics_collection": False, "task_events_report_interval_ms": 0}
"""Settings of a local cluster: neither numbers for Prometheus nor the history of tasks."""
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": str(2**60)}
"""Environment in which glibc keeps freed memory for the next step instead of asking Linux for it anew, page by page.

A training step on a CPU takes about a tenth less time so (docs/LOG.md, 2026-11-30), and about the same memory. One
arena, because others than the first ask Linux for each large piece all the same. What a person has set counts instead.
"""
LAUNCHER_FILE = Path("~/ray_bootstrap_config.yaml").expanduser()


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray."""

    address: str
    """host:port of the cluster's head, as RAY_ADDRESS wants it."""

    is_local: bool
    """Whether this process started it, and ends it."""


@contextlib.contextmanager
def connect(storage_dir: str | Path, *, has_dashboard: bool = False) -> Iterator[Cluster]:
    """Join the cluster at RAY_ADDRESS, or start a local one; on leaving, end only what was begun here.

    A local cluster whose trainings are stopped midway needs the dashboard: Ray Train's placement-group cleaner,
    one process a training, ends only when the dashboard tells it that its training is gone.
    Every process of the cluster that we start learns RAY_ADDRESS: without it, Ray Train's helpers may ask
    another cluster on the same host. InputError where nothing answers or `storage_dir` cannot be written.
    """
    writable_folder(absolute_path(storage_dir, "tracking.storage_dir"), "tracking.storage_dir")
    if ray.is_initialized():
        yield Cluster(address=ray.get_runtime_context().gcs_address, is_local=False)
        return
    given = os.environ.get("RAY_ADDRESS", "")
    tune_ray()
    with kept_sigterm():
        if given:
            _check_address(given)
            ray.init(
                address=given,
                log_to_driver=False,
                logging_level=logging.ERROR,
                # What Ray Train starts beside the workers asks the state API for "the" cluster: it must know which.
                runtime_env=None if given == "auto" else {"env_vars": {"RAY_ADDRESS": given}},
            )
        else:
            _start_local(has_dashboard=has_dashboard)
    try:
        with terminable():
            yield Cluster(address=ray.get_runtime_context().gcs_address, is_local=not given)
    finally:
        try:
            ray.shutdown()
        finally:
            _forget_single_node()
            if not given:
                os.environ.pop("RAY_ADDRESS", None)


@contextlib.contextmanager
def joined(config: TrainingConfig) -> Iterator[None]:
    """Join the cluster at RAY_ADDRESS, where one is given, and raise at once what `check_resources` raises.

    For jobs: this module imports neither torch nor MLflow, which take seconds, and whoever asks for too much should
    not wait for them. A local cluster is started by `connect`, inside, once everything else is known to be right.
    """
    with connect(config.tracking.storage_dir) if os.environ.get("RAY_ADDRESS") else contextlib.nullcontext():
        check_resources(config)
        yield


def check_resources(config: TrainingConfig) -> None:
    """Raise InputError at once where the cluster can never hold the workers that `config` asks for.

    Without a connection and RAY_ADDRESS it is this machine that would have to hold them.
    """
    if not ray.is_initialized() and os.environ.get("RAY_ADDRESS"):
        return
    workers, nodes = config.workers, _nodes()
    places = _places(workers, nodes)
    if places >= (workers.min_workers or workers.num_workers) or has_autoscaler():
        return
    largest_cpus = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    cpus, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    asked = f"{workers.num_workers} x {workers.cpus_per_worker} CPU" + (
        " and 1 GPU" if workers.use_gpu else ""
    )
    if workers.use_gpu and gpus == 0:
        remedy = "Set --workers.use-gpu False"
    elif workers.cpus_per_worker > largest_cpus:
        remedy = f"Set --workers.cpus-per-worker to at most {largest_cpus}"
    else:
        remedy = f"Set --workers.num-workers to at most {places}"
    raise InputError(
        f"workers.num_workers must fit on the cluster, but {asked} were asked for and it has {cpus} CPUs and "
        f"{gpus} GPUs (nodes: {len(nodes)}). {remedy}, or add nodes."
    )


def max_concurrent_trials(config: TrainingConfig) -> int:
    """Return how many trainings of `config` the cluster holds side by side now, at least one."""
    return max(1, _places(config.workers, _nodes()) // config.workers.num_workers)


def is_single_node() -> bool:
    """Whether the cluster that is connected is one node and stays that."""
    return ray.is_initialized() and len(ray.nodes()) == 1 and not has_autoscaler()


def has_autoscaler() -> bool:
    """Whether the cluster starts nodes of its own accord, so that what it lacks now may come.

    The cluster launcher leaves its file on the head; elsewhere (KubeRay) set SEGFLEET_AUTOSCALER=1. Ray 2.60
    has no call that tells an autoscaler from the read-only monitor of a cluster started by hand.
    """
    return os.environ.get("SEGFLEET_AUTOSCALER", "") == "1" or LAUNCHER_FILE.exists()


def absolute_location(location: str, setting: str) -> str:
    """Return the folder or address of a store as workers can use it; InputError as `absolute_path`."""
    return location if is_uri(location) else str(absolute_path(location, setting))


def absolute_path(path: str | Path, setting: str) -> Path:
    """Return `path` as workers can use it; InputError for a relative one inside a submitted job's copy."""
    path = Path(path).expanduser()
    if not path.is_absolute() and "runtime_resources" in Path.cwd().parts:
        raise InputError(
            f"{setting} must be an absolute path in a submitted job, which runs in a copy of the working "
            f"directory, but got {str(path)!r}. Give the path from / on."
        )
    return path.absolute()


def check_place(workers: WorkersConfig) -> None:
    """Raise InputError where no node of the cluster that is connected can ever hold one of the workers."""
    nodes = _nodes()
    if _places(workers, nodes) or has_autoscaler():
        return
    raise InputError(
        f"A worker must fit on a node of the cluster, but {workers.cpus_per_worker} CPUs"
        + (" and 1 GPU" if workers.use_gpu else "")
        + f" were asked for and the largest of {len(nodes)} nodes has "
        f"{int(max((node.get('CPU', 0) for node in nodes), default=0))} CPUs and "
        f"{int(max((node.get('GPU', 0) for node in nodes), default=0))} GPUs. Ask for less, or add nodes."
    )


def worker_environment(config: TrainingConfig) -> dict[str, str]:
    """Return the environment variables that every training process of `config` is started with."""
    return environment(config.workers)


def environment(workers: WorkersConfig) -> dict[str, str]:
    """Return the environment variables that each of the workers is started with: no secret, as Ray records them."""
    passed_on = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("MLFLOW_", "SEGFLEET_")) and not is_secret(name, value)
    }
    if not workers.use_gpu:
        passed_on |= {name: os.environ.get(name, value) for name, value in KEPT_MEMORY.items()}
    return passed_on | {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "OMP_NUM_THREADS": str(workers.cpus_per_worker),
    }


def _nodes() -> list[dict[str, float]]:
    """Return the resources of each node that is alive, or of this machine before a local cluster is started."""
    if not ray.is_initialized():
        import torch

        return [{"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}]
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _places(workers: WorkersConfig, nodes: list[dict[str, float]]) -> int:
    """Return how many of the workers the nodes hold."""
    return sum(
        min(
            int(node.get("CPU", 0)) // workers.cpus_per_worker,
            int(node.get("GPU", 0)) if workers.use_gpu else sys.maxsize,
        )
        for node in nodes
    )


def _start_local(*, has_dashboard: bool) -> None:
    """Start a cluster whose address is known before its first process starts."""
    port, dashboard_port = free_ports(2)
    address = f"{ray.util.get_node_ip_address()}:{port}"
    with _environment({"RAY_GCS_SERVER_PORT": str(port)} | QUIET_DAEMONS):
        ray.init(
            address="local",
            include_dashboard=has_dashboard,
            # Without a dashboard this port is where Ray Train asks whether its controller lives. At the usual one, the
            # dashboard of another cluster on this host answers that it knows no such controller: the workers are ended.
            dashboard_port=dashboard_port,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"RAY_ADDRESS": address}},
            _system_config=dict(QUIET_CLUSTER),
        )
    os.environ["RAY_ADDRESS"] = address


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Have these in the environment meanwhile; what a person set stays."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def tune_ray() -> None:
    """Ask Ray Train for an interval short enough to start quickly and too long to be felt, and for no needless process.

    A worker that answers nothing for HALT_S (stopped, or its host frozen) is taken for dead; Ray would wait 600 s.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", f"{HALT_S:.0f}")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    if is_single_node():
        # a warning before the only node goes helps nobody: seconds of imports saved at every start
        os.environ.setdefault(WATCHER, NO_WATCHER)
    else:
        _forget_single_node()


def _forget_single_node() -> None:
    """Leave nothing of a cluster of one node to the next one, nor to nodes that this process starts."""
    if os.environ.get(WATCHER) == NO_WATCHER:
        del os.environ[WATCHER]


def watches_nodes() -> bool:
    """Whether Ray Train watches for nodes that are taken back, and tells this worker."""
    return os.environ.get(WATCHER, "1").lower() in ("1", "true")


def _check_address(address: str) -> None:
    """Raise InputError within CONNECT_TIMEOUT_S where nothing listens (ray.init itself waits much longer)."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise InputError(
            f"RAY_ADDRESS must be host:port of the cluster's head for a job that runs on it, "
            f"but got {address!r}. "
            "Unset it to use a local cluster; an http:// address is for `ray job submit` only."
        )
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise InputError(
            f"RAY_ADDRESS must name a running cluster, but nothing answers at {address} ({error}). "
            "Start it, or unset RAY_ADDRESS to use a local one."
        ) from error

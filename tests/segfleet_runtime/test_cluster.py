"""What a person hears of a cluster that is absent or too small, and that processes on it are sane."""

import os
import platform as standard_platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ray

from pspnet.errors import InputError
from segfleet import cluster
from segfleet.config import TrainingConfig, WorkersConfig
from segfleet.override import override


def nodes(*resources: dict[str, float]) -> list[dict[str, Any]]:
    return [{"Alive": True, "Resources": dict(each)} for each in resources] + [
        {"Alive": False, "Resources": {"CPU": 100, "GPU": 8}}
    ]


@pytest.mark.parametrize(
    ("have", "asked", "remedy"),
    [
        ([{"CPU": 2}], {"num_workers": 2}, ""),
        ([{"CPU": 2}], {"num_workers": 3}, "num-workers to at most 2"),
        ([{"CPU": 2}, {"CPU": 3}], {"num_workers": 2, "cpus_per_worker": 2}, ""),
        ([{"CPU": 2}, {"CPU": 3}], {"num_workers": 3, "cpus_per_worker": 2}, "num-workers to at most 2"),
        ([{"CPU": 2}], {"num_workers": 1, "cpus_per_worker": 3}, "cpus-per-worker to at most 2"),
        ([{"CPU": 64}], {"num_workers": 1, "use_gpu": True}, "use-gpu False"),
        ([{"CPU": 64, "GPU": 4}, {"CPU": 64, "GPU": 4}], {"num_workers": 8, "use_gpu": True}, ""),
        (
            [{"CPU": 8, "GPU": 4}],
            {"num_workers": 4, "use_gpu": True, "cpus_per_worker": 4},
            "num-workers to at most 2",
        ),
    ],
)
def test_more_workers_than_the_cluster_holds_are_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, have: list[dict[str, float]], asked: dict[str, Any], remedy: str
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: nodes(*have))
    monkeypatch.setattr(cluster, "LAUNCHER_FILE", Path("/nonexistent"))
    monkeypatch.delenv("SEGFLEET_AUTOSCALER", raising=False)
    changes = {f"workers.{name}": value for name, value in asked.items()}
    config = override(TrainingConfig(), changes | {"schedule.global_batch_size": 2 * asked["num_workers"]})
    if not remedy:
        cluster.check_resources(config)
        return
    with pytest.raises(InputError, match=remedy):
        cluster.check_resources(config)
    monkeypatch.setenv("SEGFLEET_AUTOSCALER", "1")
    cluster.check_resources(config)


def test_an_address_where_nothing_listens_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    started = time.monotonic()
    with (
        pytest.raises(InputError, match=f"nothing answers at 127[.]0[.]0[.]1:{port}"),
        cluster.connect(tmp_path),
    ):
        pass
    assert time.monotonic() - started < 10
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://head:10001", "head", "head:port"])
def test_an_address_of_another_kind_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match="must be host:port"), cluster.connect(tmp_path):
        pass


def test_a_storage_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="storage_dir"), cluster.connect(tmp_path / "file" / "runs"):
        pass


def test_a_relative_path_in_the_copy_of_a_submitted_job_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert cluster.absolute_path("/data/store", "data.store") == Path("/data/store")
    with pytest.raises(InputError, match=r"data\.store must be an absolute path"):
        cluster.absolute_path("store", "data.store")
    monkeypatch.chdir(tmp_path)
    assert cluster.absolute_path("store", "data.store") == tmp_path / "store"


@pytest.mark.slow
def test_a_local_cluster_lives_as_long_as_its_context_and_its_processes_know_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    @ray.remote(num_cpus=0)
    def seen_by_a_worker() -> tuple[str, str | None]:
        import os
        import platform

        import segfleet.cluster  # noqa: F401

        return platform.python_version(), os.environ.get("RAY_ADDRESS")

    before = dict(os.environ)
    with cluster.connect(tmp_path) as connection:
        assert connection.is_local
        assert {name: os.environ[name] for name in before} == before
        assert not set(cluster.QUIET_DAEMONS) & (set(os.environ) - set(before))
        version, address = ray.get(seen_by_a_worker.remote())
        assert version == standard_platform.python_version()
        assert address == connection.address
        with cluster.connect(tmp_path) as inner:
            assert inner.address == connection.address
            assert not inner.is_local
        assert ray.is_initialized()
    assert not ray.is_initialized()
    host, _, port = connection.address.rpartition(":")
    with pytest.raises(OSError, match=r"refused|unreachable"):
        socket.create_connection((host, int(port)), timeout=2)


@pytest.mark.slow
def test_the_processes_of_a_local_cluster_leave_the_cores_to_the_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nobody reads what its agent and its log monitor would gather; see docs/LOG.md, 2026-11-28."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with cluster.connect(tmp_path):
        actor: Any = ray.remote(num_cpus=0)(Living).remote()
        ray.get(actor.own_id.remote())
        logs = Path(ray.nodes()[0]["RayletSocketName"]).parents[1] / "logs"
        assert list(logs.glob("worker-*.out"))
        time.sleep(2)
        assert ray.nodes()[0]["MetricsExportPort"] == -1
        assert "Beginning to track file" not in (logs / "log_monitor.log").read_text()


@pytest.mark.slow
@pytest.mark.skipif(standard_platform.libc_ver()[0] != "glibc", reason="it is glibc that is told to")
def test_a_worker_without_a_gpu_keeps_memory_for_its_next_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray Train trains in a thread, which may not ask Linux for memory that the step before had."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in cluster.KEPT_MEMORY:
        monkeypatch.delenv(name, raising=False)

    def faults_of_a_second_step() -> int:
        """Count the pages that Linux has to find when 64 MiB are written that were freed just before."""
        import resource
        from concurrent.futures import ThreadPoolExecutor

        def step(num_bytes: int) -> int:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            assert len(b"x" * num_bytes) == num_bytes
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        with ThreadPoolExecutor(1) as training:
            training.submit(step, 2**26).result()
            return training.submit(step, 2**26).result()

    def measured(workers: WorkersConfig) -> int:
        task = ray.remote(num_cpus=0, runtime_env={"env_vars": cluster.environment(workers)})
        faults: int = ray.get(task(faults_of_a_second_step).remote())
        return faults

    pages = 2**26 // os.sysconf("SC_PAGE_SIZE")
    with cluster.connect(tmp_path):
        assert measured(WorkersConfig()) < pages / 10
        assert not set(cluster.KEPT_MEMORY) & set(cluster.environment(WorkersConfig(use_gpu=True)))
        monkeypatch.setenv("MALLOC_ARENA_MAX", "16")  # what a person has set counts
        assert measured(WorkersConfig()) > pages / 2


BESIDE = """
import sys
from segfleet import cluster
with cluster.connect(sys.argv[1], has_dashboard=True):
    print("up", flush=True)
    sys.stdin.readline()
"""


def test_a_process_that_was_on_a_single_node_watches_the_nodes_of_the_next_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is set for one cluster is not kept for another; what a person has set is."""
    with mock.patch.dict(os.environ):
        os.environ.pop(cluster.WATCHER, None)
        for is_single in (True, False, True, False):
            monkeypatch.setattr(cluster, "is_single_node", lambda: is_single)  # noqa: B023 # called at once
            cluster.tune_ray()
            assert cluster.watches_nodes() == (not is_single)
        os.environ[cluster.WATCHER] = "0"
        cluster.tune_ray()
        assert not cluster.watches_nodes()


@pytest.mark.slow
def test_a_cluster_that_comes_up_beside_is_not_asked_about_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray Train removes the workers of a controller of which somebody says that it does not live."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def lives(actor_id: str) -> bool | None:
        from ray.train.v2._internal.state.util import is_actor_alive
        from ray.util.state.exception import RayStateApiException

        try:
            return bool(is_actor_alive(actor_id, 5))
        except RayStateApiException:
            return None  # nobody knows: nothing is done

    with cluster.connect(tmp_path):
        actor: Any = ray.remote(num_cpus=0)(Living).remote()
        actor_id = ray.get(actor.own_id.remote())
        asking: Any = ray.remote(num_cpus=0)(lives)
        command = [sys.executable, "-c", BESIDE, str(tmp_path / "beside")]
        apart = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        beside = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=apart
        )
        try:
            assert beside.stdout is not None
            assert beside.stdout.readline() == "up\n"
            answers = ray.get([asking.remote(actor_id) for _ in range(3)])
        finally:
            beside.communicate("\n", timeout=60)
        assert False not in answers


class Living:
    """An actor that knows what it is called."""

    def own_id(self) -> str:
        return str(ray.get_runtime_context().get_actor_id())

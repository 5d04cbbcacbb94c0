"""Servers of the demo: found again, ended with all they started, and nobody else's process touched."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pspnet.errors import InputError
from segfleet import services
from segfleet.ports import free_ports
from segfleet.services import Service

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
PARENT_AND_CHILD = [
    sys.executable,
    "-c",
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    "time.sleep(60)",
]


@pytest.fixture
def bystander() -> Iterator[psutil.Popen]:
    with psutil.Popen(SLEEP) as process:
        yield process
        process.kill()


def _started(folder: Path, command: list[str], mark: str) -> Service:
    process = subprocess.Popen(command, env={**os.environ, services.MARK: mark}, start_new_session=True)
    process.returncode = 0  # ended, and waited for, by what is tested
    started_s = psutil.Process(process.pid).create_time()
    service = Service(
        name="mlflow", pid=process.pid, started_s=started_s, mark=mark, url="http://127.0.0.1:9"
    )
    services._record(folder, [service])
    return service


def _wait_for(number: int, service: Service) -> list[psutil.Process]:
    for _ in range(100):
        found = services.processes(service)
        if len(found) == number:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{len(found)} processes instead of {number}")


def test_a_server_is_ended_with_its_children_and_forgotten(tmp_path: Path, bystander: psutil.Popen) -> None:
    service = _started(tmp_path, PARENT_AND_CHILD, "mark-of-children")
    family = _wait_for(2, service)
    assert services.end_all(tmp_path) == [f"mlflow (process {service.pid}) ended"]
    assert not [process for process in family if process.is_running()]
    assert services.recorded(tmp_path) == []
    assert bystander.is_running()


def test_a_child_that_outlived_its_parent_is_ended_too(tmp_path: Path) -> None:
    service = _started(tmp_path, PARENT_AND_CHILD, "mark-of-an-orphan")
    parent, child = sorted(_wait_for(2, service), key=lambda process: process.pid != service.pid)
    parent.kill()
    parent.wait(5)
    assert services.processes(service) == [child]
    services.end_all(tmp_path)
    assert not child.is_running()


def test_a_process_id_that_means_another_process_by_now_is_left_alone(
    tmp_path: Path, bystander: psutil.Popen
) -> None:
    recycled = Service(
        name="ray",
        pid=bystander.pid,
        started_s=bystander.create_time() - 3600,
        mark="mark-of-nobody",
        url="http://127.0.0.1:9",
    )
    services._record(tmp_path, [recycled])
    assert services.end_all(tmp_path) == [f"ray (process {bystander.pid}) had ended before"]
    assert bystander.is_running()


def test_ending_twice_and_ending_nothing_are_no_errors(tmp_path: Path) -> None:
    _started(tmp_path, SLEEP, "mark-of-one-that-ends-twice")
    assert len(services.end_all(tmp_path)) == 1
    assert services.end_all(tmp_path) == []


def test_what_does_not_come_up_is_ended_and_says_why(tmp_path: Path) -> None:
    service = Service(name="mlflow", pid=0, started_s=0, mark="mark-of-a-failure", url="http://127.0.0.1:9")
    command = [sys.executable, "-c", "import sys; sys.exit('the disk is full')"]
    with pytest.raises(RuntimeError, match=r"mlflow did not come up[\s\S]*the disk is full"):
        services._start(tmp_path, service, command, {})
    assert services.recorded(tmp_path) == []


def test_the_record_of_a_token_is_for_its_owner_only(tmp_path: Path) -> None:
    services._record(tmp_path, [])
    assert (tmp_path / services.RECORD).stat().st_mode & 0o077 == 0


def test_one_process_at_a_time_holds_the_folder(tmp_path: Path) -> None:
    with services.exclusive(tmp_path):
        code = (
            "import sys, pathlib; from segfleet import services\n"
            f"with services.exclusive(pathlib.Path({str(tmp_path)!r})): print('held')"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode != 0
        assert InputError.__name__ in other.stderr
    with services.exclusive(tmp_path):
        pass


def test_free_ports_differ_can_be_bound_and_are_no_port_that_a_connection_gets() -> None:
    ports = free_ports(8, services.HOST)
    assert len(set(ports)) == 8
    assert max(ports) < 32768
    for port in ports:
        http.server.HTTPServer(("127.0.0.1", port), http.server.BaseHTTPRequestHandler).server_close()


def test_a_server_that_refuses_or_is_absent_does_not_answer() -> None:
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.headers.get("Authorization") == "Bearer right" else 401)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert services.answers(url, token="right")
        assert not services.answers(url, token="wrong")
        server.shutdown()
    assert not services.answers(url)


def test_a_childs_environment_knows_no_other_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    monkeypatch.setenv("NO_PROXY", "example.org")
    environment = services.local_environment({"X": "1"})
    assert "RAY_ADDRESS" not in environment
    assert "MLFLOW_TRACKING_URI" not in environment
    assert environment["NO_PROXY"] == "example.org,127.0.0.1,localhost"
    assert environment["X"] == "1"
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))


@pytest.mark.slow
def test_a_job_on_the_demos_ray_finds_our_code_and_the_standard_librarys_platform(tmp_path: Path) -> None:
    ray = services.ensure_ray(tmp_path, num_cpus=2)
    try:
        assert services.ensure_ray(tmp_path, num_cpus=2) == ray
        assert not services.answers(services._probe(replace(ray, token="")))
        addresses = {
            connection.laddr.ip
            for process in services.processes(ray)
            for connection in process.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}
        script = (
            "import json, os, platform, pspnet, segfleet, ray\n"
            "ray.init(log_to_driver=False)\n"
            "where = lambda: [__import__(name).__file__ for name in ('platform', 'pspnet', 'segfleet')]\n"
            "print('FOUND', json.dumps(where() + ray.get(ray.remote(where).remote())))\n"
            "address = lambda: os.environ.get('RAY_ADDRESS')\n"
            "assert ray.get(ray.remote(address).remote()) == ray.get_runtime_context().gcs_address\n"
        )
        command = [
            "ray",
            "job",
            "submit",
            "--address",
            ray.url,
            "--runtime-env",
            "jobs/runtime_env.yaml",
            "--",
        ]
        root = Path(__file__).resolve().parents[2]
        submitted = subprocess.run(
            [*command, "python", "-c", script],
            cwd=root,
            env=services.local_environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ray.token}),
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        (found,) = [line for line in submitted.stdout.splitlines() if line.startswith("FOUND ")]
        for stdlib, pspnet, segfleet in zip(
            *[iter(json.loads(found.removeprefix("FOUND ")))] * 3, strict=True
        ):
            assert not Path(stdlib).is_relative_to(root)
            assert "runtime_resources" not in stdlib
            assert "working_dir_files" in pspnet
            assert "py_modules_files" in segfleet
    finally:
        services.end_all(tmp_path)
    assert not Path(ray.scratch_dir).exists()


@pytest.mark.slow
def test_the_demos_mlflow_answers_on_loopback_to_its_own_names_only(tmp_path: Path) -> None:
    import urllib.error
    import urllib.request

    mlflow = services.ensure_mlflow(tmp_path)
    try:
        assert services.ensure_mlflow(tmp_path) == mlflow
        assert (tmp_path / "mlflow.db").exists()
        foreign = urllib.request.Request(f"{mlflow.url}/api/2.0/mlflow/experiments/get-by-name")
        foreign.add_header("Host", "evil.example")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(foreign, timeout=5)
        assert refused.value.code == 403
        refused.value.close()
    finally:
        services.end_all(tmp_path)
    assert not services.answers(mlflow.url + "/health")

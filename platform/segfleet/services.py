"""Servers on this machine that a script starts, finds again and ends: a Ray head and an MLflow server.

Each is recorded in <folder>/services.json before it is waited for, with its process id, its start time and a mark
that every process it starts inherits. Only that process (same id and same start time), those that carry the mark
and their descendants are ever ended: an id that the system has given to somebody else since is safe.
"""

import fcntl
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from pspnet.errors import InputError
from segfleet.ports import free_ports

Name = Literal["ray", "mlflow"]

MARK = "SEGFLEET_SERVICE"
RECORD = "services.json"
HOST = "127.0.0.1"
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 20.0
OBJECT_STORE_BYTES = 256 * 2**20
START_TOLERANCE_S = 2.0
"""Start times are read from a clock that is set now and then."""

SCRATCH_PATH_LENGTH = 45
"""Ray puts unix sockets 60 characters below its scratch folder, and the system allows 107 in all."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """A server that was started here."""

    name: Name
    pid: int
    started_s: float
    mark: str
    url: str
    """Where it answers HTTP."""

    token: str = ""
    """What a client must send (Ray only)."""

    scratch_dir: str = ""
    """A folder that is its own and goes with it."""


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; InputError where another one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"One process at a time may start or end the servers of {folder}, but another is at it. "
                "Wait until it has ended."
            ) from error
        yield


def ensure_ray(folder: Path, *, num_cpus: int) -> Service:
    """Return the Ray head recorded in `folder`, started now where there is none that answers."""
    running = _answering(folder, "ray")
    if running is not None:
        return running
    folder.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(32)
    token_path = folder / "ray_token"
    token_path.unlink(missing_ok=True)
    token_path.touch(mode=0o600)
    token_path.write_text(token)
    scratch_dir = _short_scratch_dir()
    gcs_port, dashboard_port, agent_port, agent_grpc_port, runtime_env_port, client_port = free_ports(6, HOST)
    command = [
        *(_tool("ray"), "start", "--head", "--block", "--disable-usage-stats"),
        f"--node-ip-address={HOST}",
        f"--port={gcs_port}",
        f"--dashboard-host={HOST}",
        f"--dashboard-port={dashboard_port}",
        f"--dashboard-agent-listen-port={agent_port}",
        f"--dashboard-agent-grpc-port={agent_grpc_port}",
        f"--runtime-env-agent-port={runtime_env_port}",
        f"--ray-client-server-port={client_port}",
        f"--num-cpus={num_cpus}",
        "--num-gpus=0",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--temp-dir={scratch_dir}",
    ]
    return _start(
        folder,
        Service(
            name="ray",
            pid=0,
            started_s=0.0,
            mark=uuid.uuid4().hex,
            url=f"http://{HOST}:{dashboard_port}",
            token=token,
            scratch_dir=str(scratch_dir),
        ),
        command,
        {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_path.absolute()),
            # Ray's own helpers ask for the cluster of this name; without it, any that runs on this host confuses them.
            "RAY_ADDRESS": f"{HOST}:{gcs_port}",
            # Without it Ray takes another address of the host for the node and listens on all of them.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        },
        # It takes no job before its agent answers, which on a busy machine is long after itself.
        f"http://{HOST}:{agent_port}/api/local_raylet_healthz",
    )


def ensure_mlflow(folder: Path) -> Service:
    """Return the MLflow server recorded in `folder`, started now where there is none that answers.

    Runs lie in <folder>/mlflow.db, artifacts in <folder>/artifacts; both outlive the server.
    """
    running = _answering(folder, "mlflow")
    if running is not None:
        return running
    folder.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1, HOST)
    command = [
        *(_tool("mlflow"), "server", "--serve-artifacts", "--workers=1"),
        f"--host={HOST}",
        f"--port={port}",
        f"--backend-store-uri=sqlite:///{folder.absolute() / 'mlflow.db'}",
        f"--artifacts-destination={folder.absolute() / 'artifacts'}",
        f"--allowed-hosts={HOST}:{port},localhost:{port}",
        f"--cors-allowed-origins=http://{HOST}:{port},http://localhost:{port}",
    ]
    service = Service(name="mlflow", pid=0, started_s=0.0, mark=uuid.uuid4().hex, url=f"http://{HOST}:{port}")
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return _start(folder, service, command, environment)


def end_all(folder: Path) -> list[str]:
    """End every server recorded in `folder` with all it started; return a sentence about each."""
    sentences = [end(folder, service) for service in recorded(folder)]
    (folder / "ray_token").unlink(missing_ok=True)
    return sentences


def end(folder: Path, service: Service) -> str:
    """End `service` and every process that carries its mark, and forget it; return a sentence about it."""
    left = processes(service)
    was_running = bool(left)
    leader = _leader(service)
    if leader is not None:
        # the server ends its own children in order; what it leaves is ended below
        leader.terminate()
        psutil.wait_procs([leader], timeout=END_TIMEOUT_S)
    for do_end in (psutil.Process.terminate, psutil.Process.kill):
        left = [process for process in {*left, *processes(service)} if process.is_running()]
        for process in left:
            with suppress(psutil.NoSuchProcess):
                do_end(process)
        _, left = psutil.wait_procs(left, timeout=3)
    if left:
        raise RuntimeError(f"{service.name} does not end: processes {[process.pid for process in left]}")
    if service.scratch_dir:
        shutil.rmtree(service.scratch_dir, ignore_errors=True)
    _record(folder, [other for other in recorded(folder) if other.mark != service.mark])
    return f"{service.name} (process {service.pid}) " + ("ended" if was_running else "had ended before")


def recorded(folder: Path) -> list[Service]:
    """Return the servers that were started from `folder` and not ended since, running or not."""
    try:
        return [Service(**entry) for entry in json.loads((folder / RECORD).read_text())]
    except FileNotFoundError:
        return []


def processes(service: Service) -> list[psutil.Process]:
    """Return the living processes of `service`: its first one, all that carry the mark, and their descendants."""
    leader = _leader(service)
    roots = [process for process in psutil.process_iter() if _has_mark(process, service.mark)]
    roots += [leader] if leader is not None else []
    found = set(roots)
    for root in roots:
        with suppress(psutil.NoSuchProcess):
            # some overwrite their environment with a title, so that the mark cannot be read
            found.update(root.children(recursive=True))
    return sorted(found, key=lambda process: process.pid)


def answers(url: str, *, token: str = "") -> bool:
    """Whether an HTTP server says yes at `url` within two seconds."""
    return read(url, token=token) is not None


def read(url: str, *, token: str = "") -> str | None:
    """Return what a server on this machine answers at `url`, None where it does not within two seconds."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=2) as response:
            return str(response.read().decode())
    except OSError:
        return None


def local_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment for a child that talks to servers here, with our own tools first."""
    environment = dict(os.environ)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
    for name in ("NO_PROXY", "no_proxy"):
        environment[name] = ",".join(filter(None, (environment.get(name, ""), HOST, "localhost")))
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    return environment | dict(changes)


def _start(
    folder: Path, service: Service, command: Sequence[str], environment: Mapping[str, str], *others: str
) -> Service:
    """Start `command`, record it and return it once it and `others`, addresses, answer; else it is ended again."""
    log_path = folder / f"{service.name}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=local_environment({**environment, MARK: service.mark}),
        )
    started_s = psutil.Process(process.pid).create_time()
    service = Service(**{**asdict(service), "pid": process.pid, "started_s": started_s})
    _record(folder, [*(other for other in recorded(folder) if other.name != service.name), service])
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if all(answers(url, token=service.token) for url in (_probe(service), *others)):
            process.returncode = 0  # it outlives us: Python need not warn that nobody waits for it
            return service
        time.sleep(0.3)
    end(folder, service)
    process.wait()
    last_lines = "\n".join(log_path.read_text(errors="replace").splitlines()[-15:])
    raise RuntimeError(f"{service.name} did not come up; the end of {log_path}:\n{last_lines}")


def _answering(folder: Path, name: Name) -> Service | None:
    """Return the recorded server where it runs and answers; end it where it runs and does not."""
    for service in recorded(folder):
        if service.name != name:
            continue
        if _leader(service) is not None and answers(_probe(service), token=service.token):
            return service
        end(folder, service)
    return None


def _probe(service: Service) -> str:
    return service.url + {"ray": "/api/jobs/", "mlflow": "/health"}[service.name]


def _leader(service: Service) -> psutil.Process | None:
    """Return the process that was started, unless its id means another one by now."""
    try:
        process = psutil.Process(service.pid)
        is_same = abs(process.create_time() - service.started_s) < START_TOLERANCE_S
        return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return bool(process.environ().get(MARK) == mark)
    except (psutil.Error, OSError):
        return False


def _record(folder: Path, services: Sequence[Service]) -> None:
    path = folder / RECORD
    aside = path.with_suffix(".tmp")
    aside.touch(mode=0o600)
    aside.write_text(json.dumps([asdict(service) for service in services], indent=2) + "\n")
    aside.replace(path)


def _tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _short_scratch_dir() -> Path:
    given = tempfile.mkdtemp(prefix="segfleet-")
    if len(given) <= SCRATCH_PATH_LENGTH:
        return Path(given)
    Path(given).rmdir()
    return Path(tempfile.mkdtemp(prefix="segfleet-", dir="/tmp"))

"""Row G5: who has no token, or comes by another name or from another page, is turned away: docs/security.md."""

import json
import os
import re
import shlex
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from segfleet import services
from segfleet.services import Service

pytestmark = [
    pytest.mark.slow,
    pytest.mark.fault("G5", "no token, a wrong one, a foreign host, a foreign page"),
]
ROOT = Path(__file__).parents[2]
BROWSER = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0 Safari/537.36"
JOB = json.dumps({"entrypoint": "touch canary"}).encode()
EXPERIMENT = b'{"name": "foreign"}'


def answer(url: str, body: bytes | None = None, /, method: str = "", **headers: str) -> int:
    """Return the status with which a server answers."""
    request = urllib.request.Request(url, data=body, method=method or ("POST" if body else "GET"))
    for name, value in headers.items():
        request.add_header(name.replace("_", "-"), value)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def rows_of_ray(ray: Service) -> dict[str, int]:
    """Return the answers of the job server."""
    jobs = f"{ray.url}/api/jobs/"
    right, wrong = {"Authorization": f"Bearer {ray.token}"}, {"Authorization": f"Bearer {'0' * 64}"}
    cookie = {"Cookie": f"ray-authentication-token={ray.token}"}
    page = {"Origin": "http://evil.example", "User_Agent": BROWSER}
    return {
        "list the jobs with the token": answer(jobs, **right),
        "list the jobs without a token": answer(jobs),
        "list the jobs with a wrong token": answer(jobs, **wrong),
        "submit a job without a token": answer(jobs, JOB),
        "submit a job with a wrong token": answer(jobs, JOB, **wrong),
        "submit a job without a token, foreign host": answer(jobs, JOB, Host="evil.example"),
        "submit a job from a foreign page": answer(jobs, JOB, **page),
        "submit a job from a foreign page, in a browser that has the token's cookie": answer(
            jobs, JOB, **cookie, **page
        ),
        "list the nodes without a token": answer(f"{ray.url}/api/v0/nodes"),
        "read a log without a token": answer(f"{ray.url}/api/v0/logs/file?filename=gcs_server.out"),
    }


def rows_of_mlflow(url: str) -> dict[str, int]:
    """Return the answers of a tracking server."""
    read = f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0"
    create = f"{url}/api/2.0/mlflow/experiments/create"
    artifact = f"{url}/api/2.0/mlflow-artifacts/artifacts/foreign"
    page = {"Origin": "http://evil.example", "Content_Type": "text/plain"}
    return {
        "read by its own name": answer(read),
        "read, foreign host": answer(read, Host="evil.example"),
        "write, foreign host": answer(create, EXPERIMENT, Host="evil.example"),
        "write from a foreign page": answer(create, EXPERIMENT, **page),
        "write from a page without an origin": answer(create, EXPERIMENT, Origin="null"),
        "write an artifact from a foreign page": answer(artifact, b"x", "PUT", **page),
        "delete from a foreign page": answer(
            f"{url}/api/2.0/mlflow/experiments/delete", b'{"experiment_id": "0"}', **page
        ),
    }


def lines(server: str, rows: dict[str, int]) -> list[str]:
    return [f"| {server} | {request} | {status} |" for request, status in rows.items()]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    services.end_all(tmp_path)


def test_the_demos_ray_is_closed(demo: Path) -> None:
    rows = rows_of_ray(services.ensure_ray(demo, num_cpus=1))
    assert all(
        status in (401, 403, 405) for request, status in rows.items() if "with the token" not in request
    )
    assert rows["list the jobs with the token"] == 200
    documented = (ROOT / "docs" / "security.md").read_text()
    assert [line for line in lines("Ray's job server", rows) if line not in documented] == []


def test_the_demos_mlflow_is_closed(demo: Path) -> None:
    rows = rows_of_mlflow(services.ensure_mlflow(demo).url)
    assert all(status == 403 for request, status in rows.items() if "own name" not in request)
    documented = (ROOT / "docs" / "security.md").read_text()
    assert [line for line in lines("MLflow", rows) if line not in documented] == []


def test_the_clusters_mlflow_is_closed(demo: Path) -> None:
    """With the flags of cluster.yaml, on another port and folder."""
    text = " ".join((ROOT / "cluster.yaml").read_text().split())
    found = re.search(r"setsid nohup (mlflow server .*?) > ~/mlflow/server.log", text)
    assert found is not None
    (port,) = services.free_ports(1)
    given = found[1].replace("$HEAD_IP", services.HOST).replace("5000", str(port))
    given = given.replace("$HOME/mlflow", str(demo)).replace("/shared/mlflow", str(demo))
    command = shlex.split(given)
    assert "--allowed-hosts" in command
    command[0] = services._tool("mlflow")
    command[command.index("--workers") + 1] = "1"
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    service = Service(
        name="mlflow", pid=0, started_s=0.0, mark=os.urandom(8).hex(), url=f"http://{services.HOST}:{port}"
    )
    rows = rows_of_mlflow(services._start(demo, service, command, environment).url)
    assert all(status == 403 for request, status in rows.items() if "own name" not in request)

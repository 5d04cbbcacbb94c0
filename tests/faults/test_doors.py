"""Row G5: who has no token, or comes by another name or from another page, is turned away: docs/security.md."""

import base64
import json
import os
import re
import shlex
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pspnet.errors import InputError
from segfleet import services, tracking, tracking_server
from segfleet.config import TrackingConfig
from segfleet.ports import free_ports
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


def test_a_server_with_accounts_lets_in_who_has_one(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/security.md says how to start it."""
    password, (port,) = f"p{os.urandom(12).hex()}", free_ports(1, services.HOST)
    (demo / "accounts.ini").write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
        f"database_uri = sqlite:///{demo / 'accounts.db'}\nadmin_password = {password}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    command = [
        services._tool("mlflow"),
        "server",
        "--app-name=basic-auth",
        "--serve-artifacts",
        "--workers=1",
    ]
    command += [f"--host={services.HOST}", f"--port={port}", f"--artifacts-destination={demo / 'artifacts'}"]
    command += [f"--backend-store-uri=sqlite:///{demo / 'mlflow.db'}"]
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment |= {
        "MLFLOW_AUTH_CONFIG_PATH": str(demo / "accounts.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": os.urandom(16).hex(),
    }
    url = f"http://{services.HOST}:{port}"
    service = Service(name="mlflow", pid=0, started_s=0.0, mark=os.urandom(8).hex(), url=url)
    services._start(demo, service, command, environment)
    accounts = {
        "without an account": {},
        "with a wrong password": {"Authorization": f"Basic {base64.b64encode(b'admin:wrong').decode()}"},
        "with an account": {
            "Authorization": f"Basic {base64.b64encode(f'admin:{password}'.encode()).decode()}"
        },
    }
    read = f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0"
    artifact = f"{url}/api/2.0/mlflow-artifacts/artifacts?path="
    rows = {f"read {who}": answer(read, **headers) for who, headers in accounts.items()}
    rows |= {f"list artifacts {who}": answer(artifact, **headers) for who, headers in accounts.items()}
    assert all((status == 200) == request.endswith("with an account") for request, status in rows.items())
    documented = (ROOT / "docs" / "security.md").read_text()
    assert [line for line in lines("MLflow with accounts", rows) if line not in documented] == []

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(InputError, match=r"must know who asks .* 401 .*MLFLOW_TRACKING_PASSWORD"):
        tracking_server.check_server(url)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    tracking_server.check_server(url)
    settings = TrackingConfig(tracking_uri=url)
    run_id = tracking.open_run(settings, run_name="r", key="k", parent_run_id=None, tags={}, params={"a": 1})
    assert tracking_server.client(url).get_run(run_id).data.params == {"a": "1"}


def test_the_clusters_mlflow_is_closed(demo: Path) -> None:
    """With the flags of cluster.yaml, on another port and folder."""
    text = " ".join((ROOT / "cluster.yaml").read_text().split())
    found = re.search(r"setsid nohup (mlflow server .*?) > ~/mlflow/server.log", text)
    assert found is not None
    (port,) = free_ports(1, services.HOST)
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

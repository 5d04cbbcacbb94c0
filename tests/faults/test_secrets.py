"""Row G6: a password of the tracking server is in no parameter, log, tag, artifact, terminal or record of Ray."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from pspnet.errors import InputError
from segfleet import services, tracking_server, trainer
from segfleet.cli import parse_training
from segfleet.config import TrackingConfig, TrainingConfig
from segfleet.config_json import from_json, to_json, without_passwords
from segfleet.override import override
from segfleet.presets import training_preset
from segfleet.search_config import SearchConfig
from segfleet.secret import masked, secrets_of, unmasked
from segfleet.trials import shown_params
from tests.conftest import Server

pytestmark = pytest.mark.fault("G6", "a password in the environment and in an address")
ROOT = Path(__file__).parents[2]
WORD = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.~%!$'()*+,", min_size=8, max_size=20)


@given(
    user=WORD, password=WORD.map(lambda word: f"p{word}"), kind=st.sampled_from("abc"), slash=st.booleans()
)
def test_the_password_of_any_address_is_masked(user: str, password: str, kind: str, slash: bool) -> None:
    if slash:
        password = f"{password}/@:{password}"
    uri = {
        "a": f"http://{user}:{password}@host:5000/path",
        "b": f"postgresql+psycopg://:{password}@host/base?sslmode=require",
        "c": f"mysql://host:3306/base?user=a&password={password.replace('@', '-')}&ssl_key=1",
    }[kind]
    hidden = masked(uri)
    assert "host" in hidden
    assert password not in hidden
    assert password.replace("@", "-") not in hidden
    assert masked(hidden) == hidden
    assert masked(f"cannot reach {uri} now") == f"cannot reach {hidden} now"


@pytest.mark.parametrize(
    "uri", ["http://host:5000", "http://host:5000/a@b", "sqlite:////data/a:b@c.db", "", "https://user@host/x"]
)
def test_an_address_without_a_password_stays(uri: str) -> None:
    assert masked(uri) == uri


def test_what_is_stored_asks_for_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "http://me:hunter2@host:5000"
    config = override(
        SearchConfig(), {"training.tracking.tracking_uri": uri, "study_storage": "mysql://a:hunter2@b/c"}
    )
    stored = from_json(SearchConfig, to_json(without_passwords(config)))
    assert "hunter2" not in to_json(stored) + repr(shown_params(config))
    assert stored.training.tracking.tracking_uri == "http://me:***@host:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="must have its password"):
        tracking_server.resolve_uri(stored.training.tracking)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking_server.resolve_uri(stored.training.tracking) == uri
    assert unmasked("http://me:***@host:5000", "x") == uri
    assert secrets_of(os.environ) == {"MLFLOW_TRACKING_URI": uri}
    with pytest.raises(InputError) as refused:
        override(TrainingConfig(), {"data.store": "s3://id:hunter2@bucket/store"})
    assert "hunter2" not in str(refused.value)
    with pytest.raises(InputError) as refused:
        tracking_server.resolve_uri(TrackingConfig(tracking_uri="ftp://me:hunter2@host"))
    assert "hunter2" not in str(refused.value)


def test_print_config_prints_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tracking.tracking-uri", "http://me:hunter2@host", "--print-config"]
    with pytest.raises(SystemExit):
        parse_training(training_preset, "tiny", arguments, description="")
    said = capsys.readouterr()
    assert "http://me:***@host" in said.out
    assert "hunter2" not in said.out + said.err


def test_what_ray_records_of_a_run_holds_no_password(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "9")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="host:1"))
    config = override(config, {"tracking.tracking_uri": "http://me:hunter2@host:5000"})
    run = trainer.build_trainer(config, name="run", run_id="1")
    recorded = repr(run.train_loop_config) + repr(run.run_config.worker_runtime_env)
    assert "hunter2" not in recorded
    assert "http://me:***@host:5000" in recorded
    assert "'MLFLOW_HTTP_REQUEST_TIMEOUT': '9'" in recorded


@pytest.mark.slow
@pytest.mark.faults_long
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
def test_a_training_leaves_no_password_anywhere(
    config: TrainingConfig, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the server's files, the run's folder, the terminal, and the files of Ray; through the job that people run."""
    in_uri, in_environment = (f"secret{uuid.uuid4().hex}" for _ in range(2))
    uri = server.uri.replace("://", f"://me:{in_uri}@")
    scratch = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    environment = {"RAY_TMPDIR": str(scratch), "MLFLOW_TRACKING_URI": uri, "NO_PROXY": "127.0.0.1"}
    environment |= {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": in_environment}
    changes = {
        "tracking.storage_dir": str(tmp_path / "runs"),
        "tracking.registered_model_name": "secretive",
        "schedule.num_epochs": 1,
    }
    stored = override(without_passwords(override(config, {"tracking.tracking_uri": uri})), changes)
    (tmp_path / "config.json").write_text(to_json(stored))
    try:
        done = subprocess.run(
            [sys.executable, "jobs/train_cityscapes.py", "--config", str(tmp_path / "config.json")],
            cwd=ROOT,
            env=kept | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "models:/secretive/1" in done.stdout
        (run_id,) = re.findall(r"MLflow run (\w{32})", done.stdout)[:1]
        points = tracking_server.client(uri).get_run(run_id).data.metrics
        assert "val/miou" in points, "the workers reached the server with the password"
        texts = {"terminal": (done.stdout + done.stderr).encode()}
        for folder in (server.folder, tmp_path, scratch):
            texts |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    assert any("mlflow.db" in name for name in texts)
    assert any("session_" in name for name in texts), "Ray's logs"
    found = [
        name for name, text in texts.items() if in_uri.encode() in text or in_environment.encode() in text
    ]
    assert found == []


@pytest.mark.slow
@pytest.mark.faults_long
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
def test_a_submitted_job_leaves_no_password_in_ray_s_records(
    config: TrainingConfig, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ray job submit` to a cluster whose nodes have the password in their environment, as docs/security.md says."""
    password = f"secret{uuid.uuid4().hex}"
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    changes: dict[str, Any] = {
        "tracking.storage_dir": str(tmp_path / "runs"),
        "tracking.tracking_uri": server.uri,
    }
    changes |= {"tracking.registered_model_name": "submitted", "schedule.num_epochs": 1}
    (tmp_path / "config.json").write_text(to_json(override(config, changes)))
    job = ["python", "jobs/train_cityscapes.py", "--config", str(tmp_path / "config.json")]
    head = services.ensure_ray(tmp_path / "head", num_cpus=2)
    command = ["ray", "job", "submit", "--address", head.url, "--runtime-env", "jobs/runtime_env.yaml", "--"]
    environment = services.local_environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token})
    try:
        done = subprocess.run([*command, *job], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        texts = {"terminal": (done.stdout + done.stderr).encode()}
        for record in ("jobs/", "v0/tasks?detail=1", "v0/actors?detail=1", "v0/runtime_envs", "v0/workers"):
            answer = services.read(f"{head.url}/api/{record}", token=head.token)
            assert answer is not None, record
            texts[record] = answer.encode()
        for folder in (server.folder, tmp_path, Path(head.scratch_dir)):
            texts |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    finally:
        services.end_all(tmp_path / "head")
    assert "models:/submitted/1" in done.stdout
    assert b"train_cityscapes.py" in texts["jobs/"]
    assert b"RayTrainWorker" in texts["v0/actors?detail=1"]
    assert [name for name, text in texts.items() if password.encode() in text] == []

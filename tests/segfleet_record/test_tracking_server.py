"""Laws of tracking and registry against a real MLflow server that freezes, dies and comes back."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pspnet.errors import InputError
from segfleet import tracking, tracking_server
from segfleet.config import TrackingConfig
from segfleet.package import load_package, package_model
from segfleet.registry import aliases_of, register
from segfleet.run_writer import RunWriter, end_run

pytestmark = pytest.mark.slow

CLEAN_PROCESS = """
import sys
import numpy as np
from segfleet.registry import fetch

address, uri, folder = sys.argv[1:]
model = fetch(address, tracking_uri=uri, device="cpu")
assert "ray" not in sys.modules and "optuna" not in sys.modules
for index in range(3):
    image = np.load(f"{folder}/image_{index}.npy")
    np.save(f"{folder}/fetched_{index}.npy", model.predict(image))

import mlflow
import mlflow.pyfunc

mlflow.set_tracking_uri(uri)
pyfunc = mlflow.pyfunc.load_model(address)
for index in range(3):
    image = np.load(f"{folder}/image_{index}.npy")
    for num_images in (1, 2):
        np.save(f"{folder}/pyfunc_{index}_{num_images}.npy", pyfunc.predict(np.stack([image] * num_images)))
"""


def config(server: Any, tmp_path: Path) -> TrackingConfig:
    return TrackingConfig(tracking_uri=server.uri, storage_dir=str(tmp_path))


def open_run(server: Any, tmp_path: Path, key: str) -> str:
    return tracking.open_run(
        config(server, tmp_path), run_name=key, key=key, parent_run_id=None, tags={}, params={"lr": 0.1}
    )


def losses(server: Any, run_id: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in tracking.points(server.uri, run_id).get("loss", [])]


def test_a_server_that_freezes_delays_no_training_and_costs_no_point(server: Any, tmp_path: Path) -> None:
    run_id = open_run(server, tmp_path, "freezes")
    writer = RunWriter(server.uri, run_id, tmp_path / "spool")
    server.freeze()
    try:
        slowest = 0.0
        for step in range(30):
            started = time.monotonic()
            writer.log_metrics({"loss": float(step)}, step=step)
            slowest = max(slowest, time.monotonic() - started)
            time.sleep(0.02)
        assert slowest < 1.0
        started = time.monotonic()
        with pytest.raises(InputError, match="MLflow server"):
            tracking_server.check_server(server.uri)
        assert time.monotonic() - started < 10
        assert not writer.flush(0.5)
    finally:
        server.thaw()
    assert writer.flush(60)
    writer.close()
    assert losses(server, run_id) == [(step, float(step)) for step in range(30)]


def test_a_server_that_dies_gets_everything_when_it_is_back(server: Any, tmp_path: Path) -> None:
    run_id = open_run(server, tmp_path, "dies")
    spool = tmp_path / "spool"
    writer = RunWriter(server.uri, run_id, spool)
    writer.log_metrics({"loss": 3.0}, step=1)
    assert writer.flush(60)
    server.stop()
    try:
        writer.log_metrics({"loss": 2.0}, step=2)
        writer.log_text("kept", "notes/kept.txt")
        writer.close(timeout_s=0.5)
        assert not end_run(
            server.uri, run_id, status="FINISHED", tags={"reason": "complete"}, spool_dir=spool
        )
    finally:
        server.start()
    job = Path(__file__).parents[2] / "jobs/sync_tracking.py"
    done = subprocess.run(
        [sys.executable, str(job), "--storage-dir", str(tmp_path), "--tracking-uri", server.uri],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 of 1 unsent runs sent" in done.stdout
    assert losses(server, run_id) == [(1, 3.0), (2, 2.0)]
    client = tracking_server.client(server.uri)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["reason"]) == ("FINISHED", "complete")
    assert [item.path for item in client.list_artifacts(run_id, "notes")] == ["notes/kept.txt"]


def test_a_writer_that_is_killed_leaves_what_it_had_to_the_next(server: Any, tmp_path: Path) -> None:
    """SIGKILL in the middle: what log_metrics returned from is in the spool."""
    run_id = open_run(server, tmp_path, "killed")
    script = (
        "import os, sys; from segfleet.run_writer import RunWriter; "
        "writer = RunWriter(sys.argv[1], sys.argv[2], sys.argv[3]); "
        "[writer.log_metrics({'loss': float(step)}, step=step) for step in range(10)]; os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", script, server.uri, run_id, str(tmp_path / "spool")]
    assert subprocess.run(command, check=False).returncode == -9
    writer = RunWriter(server.uri, run_id, tmp_path / "spool")
    for step in range(8, 12):
        writer.log_metrics({"loss": float(step)}, step=step)
    assert writer.flush(60)
    writer.close()
    assert losses(server, run_id) == [(step, float(step)) for step in range(12)]


def test_a_registered_model_loads_in_a_clean_process_without_pickle(
    server: Any, checkpoint: Path, images: list[np.ndarray], tmp_path: Path
) -> None:
    """At three sizes by our loader, and as MLflow's pyfunc at two batch sizes as well."""
    run_id = open_run(server, tmp_path, "registers")
    package = package_model(checkpoint, tmp_path / "package", run_id=run_id)
    assert register(server.uri, "clean", package, run_id=run_id) == 1
    assert register(server.uri, "clean", package, run_id=run_id) == 1
    assert aliases_of(server.uri, "clean") == {"challenger": 1, "champion": 1}
    for index, image in enumerate(images):
        np.save(tmp_path / f"image_{index}.npy", image)
    done = subprocess.run(
        [sys.executable, "-c", CLEAN_PROCESS, "models:/clean@champion", server.uri, str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = load_package(package, device="cpu")
    for index, image in enumerate(images):
        expected = model.predict(image)
        assert np.array_equal(np.load(tmp_path / f"fetched_{index}.npy"), expected)
        for num_images in (1, 2):
            by_pyfunc = np.load(tmp_path / f"pyfunc_{index}_{num_images}.npy")
            assert np.array_equal(by_pyfunc, np.stack([expected] * num_images))


def test_the_registry_shows_run_model_and_version_together(
    server: Any, write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    run_id = open_run(server, tmp_path, "linked")
    checkpoint = write_checkpoint(tmp_path / "epoch_0001", seed=3)
    register(
        server.uri, "linked", package_model(checkpoint, tmp_path / "package", run_id=run_id), run_id=run_id
    )
    client = tracking_server.client(server.uri)
    version = client.get_model_version("linked", "1")
    model = client.get_logged_model(version.tags["segfleet.model_id"])
    assert version.run_id == model.source_run_id == run_id
    assert version.source == f"models:/{model.model_id}"
    assert '"name": "linked"' in model.tags["mlflow.modelVersions"]
    assert model.status == "READY"
    paths = [item.path for item in client.list_logged_model_artifacts(model.model_id)]
    assert {"MLmodel", "data"} <= set(paths)

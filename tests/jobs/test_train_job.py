"""jobs/train_cityscapes.py: bad input is one line and exit code 2; a small training is printed as it went."""

import importlib.util
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import boto3
import moto.server
import numpy as np
import pytest

from pspnet.errors import InputError
from pspnet.labels import ClassInfo, ClassTable
from pspnet.store_copy import copy_store
from tests.stores import write_store

JOB = Path(__file__).parents[2] / "jobs" / "train_cityscapes.py"


def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_cityscapes_job", JOB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    """Eight training and two validation images of noise over two halves."""
    table = ClassTable(
        name="halves",
        classes=tuple(
            ClassInfo(name=name, id=id_, train_id=id_, colour=(0, 200 * id_, 0))
            for id_, name in enumerate(["left", "right"])
        ),
    )
    label = np.repeat([[0] * 36 + [1] * 36], 70, axis=0).astype(np.uint8)
    splits = {
        split: [
            (
                f"{split}_{index}",
                (label[..., None] * 150 + np.random.default_rng(index).integers(0, 90, (70, 72, 3))).astype(
                    np.uint8
                ),
                label,
            )
            for index in range(num_images)
        ]
        for split, num_images in (("train", 8), ("val", 2))
    }
    write_store(tmp_path / "store", table, splits)
    return tmp_path / "store"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "data.store must be an ingested data set"),
        (["--data.store", "absent"], "absent"),
        (["--data.store", "STORE", "--data.val-split", "test"], "test"),
        (["--data.store", "STORE", "--data.crop-size", "713"], "data.crop_size must fit"),
        (["--data.store", "STORE", "--schedule.global-batch-size", "10"], "global_batch_size"),
        (["--data.store", "STORE", "--schedule.global-batch-size", "2"], "at least 2 images"),
        (["--data.store", "STORE", "--model.backbone-weights", "absent.pth"], "absent.pth"),
        (["--data.store", "STORE", "--tracking.registered-model-name", "a/b"], "registered_model_name"),
        (["--data.store", "STORE", "--tracking.tracking-uri", "http://127.0.0.1:9"], "127.0.0.1:9"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store_path: Path, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(store_path) if flag == "STORE" else flag for flag in flags]
    monkeypatch.setattr(sys, "argv", [str(JOB), "--preset", "tiny", *arguments])
    with pytest.raises(InputError) as caught:
        job().main()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def run_job(*flags: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(JOB), *flags], capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.mark.slow
def test_the_job_trains_and_says_what_came_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store_path: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    flags = ("--preset", "tiny", "--data.store", "store", "--tracking.registered-model-name", "halves")
    done = run_job(*flags)
    assert done.returncode == 0, done.stderr
    assert "epoch 2/2 done" in done.stdout
    assert "ended: complete" in done.stdout
    assert "registered: models:/halves/1" in done.stdout
    printed = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert "split val of store" in printed["protocol"]
    assert Path(printed["picture"]).is_file()
    assert Path(printed["checkpoint"]).is_dir()

    again = run_job(*flags)
    assert again.returncode == 0, again.stderr
    assert "epoch 2/2 done" not in again.stdout
    assert f"MLflow run: {printed['MLflow run']}" in again.stdout
    assert "registered: models:/halves/1" in again.stdout

    started = time.monotonic()
    refused = run_job(*flags, "--workers.cpus-per-worker", "100000", "--tracking.run-name", "too-big")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: workers.num_workers must fit on the cluster")
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "runs" / "too-big").exists()
    print(f"refused after {time.monotonic() - started:.1f} s")


@pytest.mark.slow
@pytest.mark.long
def test_two_workers_train_on_a_store_in_object_storage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store_path: Path
) -> None:
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("SEGFLEET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="stores")
        uri = f"s3://stores/halves?scheme=http&endpoint_override={host}:{port}&region=us-east-1"
        copy_store(store_path, uri, say=lambda _: None)
        flags = ("--preset", "tiny", "--workers.num-workers", "2", "--schedule.global-batch-size", "4")
        done = [
            run_job(*flags, "--data.store", store, "--tracking.run-name", name)
            for store, name in ((uri, "far"), ("store", "near"))
        ]
    finally:
        server.stop()
    assert [job.returncode for job in done] == [0, 0], [job.stderr for job in done]
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2  # train and val, for both workers
    digests = [
        {
            path.name: json.loads((path / "manifest.json").read_text())["files"]["model.safetensors"]
            for path in (tmp_path / "runs" / name / "checkpoints").iterdir()
        }
        for name in ("far", "near")
    ]
    assert digests[0] == digests[1]

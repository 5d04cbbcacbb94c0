"""Law: `mlflow models serve` of a registered version answers posted images as the model itself does."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from mlflow import MlflowClient

from segfleet import services
from segfleet.package import load_package, package_model
from segfleet.ports import free_ports
from segfleet.registry import register

pytestmark = [
    pytest.mark.slow,
    # MLflow 3.17 uses what SQLAlchemy 2.1 deprecates
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def package(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package_model(checkpoint, tmp_path_factory.mktemp("packages") / "package")


@pytest.fixture(scope="module")
def address(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the version, in a process that may not unpickle anything."""
    folder = tmp_path_factory.mktemp("serving")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    experiment = MlflowClient(uri, uri).create_experiment(
        "e", artifact_location=(folder / "artifacts").as_uri()
    )
    run_id = MlflowClient(uri, uri).create_run(experiment).info.run_id
    version = register(uri, "pspnet-served", package, run_id=run_id)
    (port,) = free_ports(1, services.HOST)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/pspnet-served/{version}"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PATH": os.pathsep.join(
            (str(Path(sys.executable).parent), os.environ["PATH"])
        ),  # mlflow calls uvicorn by name
        "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "platform"))),
    }
    log = folder / "serve.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=folder)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 240
        while not answers(f"{address}/ping"):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield address
    finally:
        if server.poll() is None:
            family = [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]
            for process in family:
                process.terminate()
            psutil.wait_procs(family, timeout=20)


def test_posted_images_of_any_size_and_batch_are_segmented(
    address: str, package: Path, images: list[np.ndarray]
) -> None:
    model = load_package(package, device="cpu")
    for image, batch_size in ((images[0], 1), (images[1], 2), (images[2], 1)):
        batch = np.stack([np.roll(image, 5 * number, axis=1) for number in range(batch_size)])
        request = urllib.request.Request(
            f"{address}/invocations",
            data=json.dumps({"inputs": batch.tolist()}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = np.array(json.load(answer)["predictions"], dtype=np.uint8)
        expected = np.stack(model.predict_batch(list(batch)))
        assert found.shape == expected.shape
        assert (
            found == expected
        ).mean() > 1 - 1e-3  # the same but where rounding decides between two classes


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False

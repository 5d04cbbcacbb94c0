"""A real MLflow server on 127.0.0.1 for the slow tests, and a small checkpoint for all."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings

# pspnet and segfleet are imported inside the fixtures: jaxtyping checks only what is imported after this file.
if TYPE_CHECKING:
    from pspnet.labels import ClassTable
    from pspnet.store import Store
    from segfleet.config import TrackingConfig

IGNORED = 255

settings.register_profile(
    "untimed", deadline=None
)  # speed is measured in benchmarks, and machines are shared
settings.load_profile("untimed")


def three_classes() -> "ClassTable":
    from pspnet.labels import ClassInfo, ClassTable

    return ClassTable(
        "three",
        (
            ClassInfo("void", 0, IGNORED, (0, 0, 0)),
            ClassInfo("road", 7, 0, (128, 64, 128)),
            ClassInfo("car", 26, 1, (0, 0, 142)),
            ClassInfo("sky", 23, 2, (70, 130, 180)),
        ),
    )


def write_checkpoint(
    folder: Path, *, favourite: int | None = None, seed: int = 0, classes: "ClassTable | None" = None
) -> Path:
    """Save a small network with random weights, or one that sees `favourite` everywhere."""
    import torch

    from pspnet.model import PSPNet
    from pspnet.optim import build_optimizer
    from segfleet.checkpoint import save_checkpoint
    from segfleet.config_json import to_json
    from segfleet.presets import tiny

    classes = classes or three_classes()
    torch.manual_seed(seed)
    model = PSPNet(classes.num_classes, backbone="resnet18", head_channels=8)
    if favourite is not None:
        biases = [(name, tensor) for name, tensor in model.head.named_parameters() if name.endswith("bias")]
        classifier = [tensor for _, tensor in biases if tensor.shape == (classes.num_classes,)][-1]
        classifier.data[favourite] = 1e4
    optimizer = build_optimizer(model, base_lr=0.1, head_lr_factor=1.0, momentum=0.9, weight_decay=0.0)
    state = {
        "config": json.loads(to_json(tiny())),
        "architecture": model.architecture,
        "class_table": classes.to_dict(),
        "mean": [100.0, 110.0, 120.0],
        "std": [50.0, 51.0, 52.0],
        "store_digest": "5" * 64,
        "epoch": 2,
        "iteration": 4,
        "metrics": {
            "miou": 0.5,
            "mean_accuracy": 0.625,
            "pixel_accuracy": 0.75,
            "class_iou": {"road": 0.75, "car": 0.25, "sky": None},
        },
    }
    return save_checkpoint(
        folder, model_state=model.state_dict(), optimizer_state=optimizer.state_dict(), state=state
    )


def images() -> list[np.ndarray]:
    """Return pictures of three sizes."""
    random = np.random.default_rng(0)
    return [
        random.integers(0, 256, (height, width, 3), np.uint8)
        for height, width in ((33, 41), (64, 48), (97, 130))
    ]


@pytest.fixture(scope="session", name="write_checkpoint")
def write_checkpoint_fixture() -> Callable[..., Path]:
    return write_checkpoint


@pytest.fixture(scope="session", name="images")
def images_fixture() -> list[np.ndarray]:
    return images()


@pytest.fixture(scope="session")
def class_table() -> "ClassTable":
    return three_classes()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "epoch_0002")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> "Store":
    """Three labelled validation images: three quarters road, the rest car, a row ignored; and one without a label."""
    from tests.stores import write_store

    samples = []
    for number, image in enumerate(images()):
        label = np.zeros(image.shape[:2], dtype=np.uint8)
        label[:, image.shape[1] * 3 // 4 :] = 1
        label[0] = IGNORED
        samples.append((f"image_{number}", image, label))
    unlabelled = [("unlabelled", images()[0], None)]
    return write_store(
        tmp_path_factory.mktemp("store") / "store",
        three_classes(),
        {"val": [*samples, *unlabelled], "test": unlabelled},
    )


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables without an experiment of ours, to copy: MLflow computes for two seconds to make them."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow 3.17 uses what SQLAlchemy 2.1 deprecates
        MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> "TrackingConfig":
    """A tracking database and registry of the test module's own."""
    from segfleet.config import TrackingConfig

    folder = tmp_path_factory.mktemp("tracking")
    shutil.copy(empty_database, folder)
    return TrackingConfig(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}", storage_dir=str(folder))


class Server:
    """`mlflow serve` with SQLite and artifacts by the server; it can be frozen, ended and started again."""

    def __init__(self, folder: Path) -> None:
        from segfleet.ports import free_ports

        (self.port,) = free_ports(1, "127.0.0.1")
        self.folder = folder
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}", "--workers", "1"]
        command += ["--serve-artifacts", "--artifacts-destination", (self.folder / "artifacts").as_uri()]
        environment = os.environ | {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "NO_PROXY": "127.0.0.1",
        }
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(self.uri + "/health", timeout=2):
                return
            time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text()[-2000:])

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGCONT)
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            self.process = None

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def freeze(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Server]:
    mlflow_server = Server(tmp_path_factory.mktemp("mlflow"))
    shutil.copy(empty_database, mlflow_server.folder)
    mlflow_server.start()
    yield mlflow_server
    mlflow_server.stop()

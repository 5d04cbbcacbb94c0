"""A store of random pictures and the smallest training on it."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pspnet.labels import IGNORE_INDEX, ClassInfo, ClassTable
from segfleet.config import TrainingConfig
from segfleet.override import override
from segfleet.presets import tiny
from tests.stores import write_store

TABLE = ClassTable(
    name="patches",
    classes=(
        *(
            ClassInfo(name=name, id=id_, train_id=id_, colour=(90 * id_, 50, 200 - 90 * id_))
            for id_, name in enumerate(["dark", "grey", "light"])
        ),
        ClassInfo(name="never seen", id=3, train_id=3, colour=(255, 255, 255)),
        ClassInfo(name="void", id=4, train_id=IGNORE_INDEX, colour=(0, 0, 0)),
    ),
)


def pictures(split: str, num_images: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Patches of three greys, some of them void; the last class occurs nowhere."""
    for index in range(num_images):
        random = np.random.default_rng([index, len(split)])
        patches = random.choice([0, 1, 2, IGNORE_INDEX], p=[0.3, 0.3, 0.3, 0.1], size=(4, 6 + index % 2))
        label = np.kron(patches, np.ones((8, 8))).astype(np.uint8)
        image = (np.where(label == IGNORE_INDEX, 1, label)[..., None] * 80).astype(np.uint8)
        yield (
            f"{split}_{index}",
            image + random.integers(0, 40, (*image.shape[:2], 3), dtype=np.uint8),
            label,
        )


@pytest.fixture(scope="session")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training and 3 validation images of two sizes."""
    path = tmp_path_factory.mktemp("store") / "store"
    write_store(path, TABLE, {"train": pictures("train", 12), "val": pictures("val", 3)})
    return path


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """As if a terminal had started the tests: what `&` of a script starts ignores SIGINT, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def config(store_path: Path, tmp_path: Path, empty_database: Path) -> TrainingConfig:
    """One worker, three epochs of two iterations, everything random in use."""
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_database, tmp_path / "runs")
    return override(
        tiny(),
        {
            "data.store": str(store_path),
            "data.crop_size": 33,
            "data.rotate_degrees": 10.0,
            "data.blur_probability": 0.5,
            "data.photometric": True,
            "data.max_class_share": 0.75,
            "data.class_uniform_share": 0.5,
            "workers.num_workers": 1,
            "schedule.num_epochs": 3,
            "schedule.global_batch_size": 2,
            "tracking.storage_dir": str(tmp_path / "runs"),
        },
    )

"""Rows A2, C1, C3: whatever happens to a checkpoint, the weights in the end are those of an undisturbed run."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from segfleet.checkpoint import MODEL_FILE, OPTIMIZER_FILE, newest_good
from segfleet.config import TrainingConfig
from segfleet.worker import Task
from tests.faults.processes import reports, train_in_process
from tests.segfleet_runtime.test_training import task_of, weights_digest

pytestmark = pytest.mark.slow

STEPS_PER_EPOCH = 2
LONG = pytest.mark.faults_long

Recorded = Callable[[str, object], None]


@pytest.fixture(scope="module")
def clean() -> dict[str, str]:
    """The digest of the weights of an undisturbed run, once it is known."""
    return {}


@pytest.fixture
def expected(config: TrainingConfig, tmp_path: Path, clean: dict[str, str]) -> str:
    if not clean:
        assert train_in_process(task_of(config, tmp_path / "clean")) == 0
        clean["weights"] = weights_digest(tmp_path / "clean")
    return clean["weights"]


def recovered(task: Task, record_property: Recorded, *, steps_redone: int) -> str:
    """Train on without a fault; return the digest of the weights."""
    num_before, started = len(reports(task)), time.time()
    assert train_in_process(task) == 0
    new = reports(task)[num_before:]
    record_property("recovery_s", new[0]["at"] - started)
    record_property("steps_redone", steps_redone)
    left = [path.name for path in Path(task.run_dir, "checkpoints").iterdir() if path.name.startswith(".")]
    assert left == []
    epochs = {report["epoch"] for report in reports(task)}
    assert epochs == {1, 2, 3}
    return weights_digest(Path(task.run_dir))


@pytest.mark.fault("A2", "SIGKILL at each step of writing a checkpoint")
@pytest.mark.parametrize(
    ("fault", "survives"),
    [
        ("checkpoint.opened:kill:2", 1),
        ("checkpoint.file:kill:5", 1),
        *(pytest.param(f"checkpoint.file:kill:{number}", 1, marks=LONG) for number in (6, 7, 8)),
        pytest.param("checkpoint.files:kill:2", 1, marks=LONG),
        ("checkpoint.manifest:kill:2", 1),
        ("checkpoint.renamed:kill:2", 2),
        ("checkpoint.saved:kill:2", 2),
    ],
)
def test_a_torn_checkpoint_is_never_chosen(
    config: TrainingConfig,
    tmp_path: Path,
    expected: str,
    record_property: Recorded,
    fault: str,
    survives: int,
) -> None:
    task = task_of(config, tmp_path / "run")
    assert train_in_process(task, fault=fault) == -9
    found = newest_good(tmp_path / "run" / "checkpoints", say=pytest.fail)
    assert found is not None
    assert found.state["epoch"] == survives
    assert recovered(task, record_property, steps_redone=STEPS_PER_EPOCH * (2 - survives)) == expected


@pytest.mark.fault("A2", "SIGKILL while a damaged checkpoint is replaced")
@pytest.mark.parametrize(("point", "survives"), [("moved", 1), pytest.param("renamed", 2, marks=LONG)])
def test_a_damaged_checkpoint_is_replaced_whole_or_not_at_all(
    config: TrainingConfig,
    tmp_path: Path,
    expected: str,
    record_property: Recorded,
    point: str,
    survives: int,
) -> None:
    task = task_of(config, tmp_path / "run")
    assert train_in_process(task, fault="checkpoint.saved:kill:2") == -9
    (tmp_path / "run" / "checkpoints" / "epoch_0002" / OPTIMIZER_FILE).unlink()
    assert train_in_process(task, fault=f"checkpoint.{point}:kill:1") == -9
    found = newest_good(tmp_path / "run" / "checkpoints", say=pytest.fail)
    assert found is not None
    assert found.state["epoch"] == survives
    assert recovered(task, record_property, steps_redone=STEPS_PER_EPOCH * (2 - survives)) == expected


@pytest.mark.fault("C1", "no space for a checkpoint's file")
@pytest.mark.parametrize("share", [0.5, pytest.param(0.0, marks=LONG), pytest.param(0.99, marks=LONG)])
def test_a_full_disk_costs_no_earlier_checkpoint(
    config: TrainingConfig, tmp_path: Path, expected: str, record_property: Recorded, share: float
) -> None:
    """The limit on a file's size refuses a write where a full disk does: in the midst of it."""
    task = task_of(config, tmp_path / "run")
    assert train_in_process(task, fault="checkpoint.saved:kill:1") == -9
    checkpoints = tmp_path / "run" / "checkpoints"
    size = (checkpoints / "epoch_0001" / MODEL_FILE).stat().st_size
    assert train_in_process(task, max_file_bytes=max(20_000, int(share * size))) == 1
    assert_first_is_left(checkpoints)
    assert recovered(task, record_property, steps_redone=STEPS_PER_EPOCH) == expected


def assert_first_is_left(checkpoints: Path) -> None:
    """Nothing but the first epoch's checkpoint is there, and it is whole."""
    assert [path.name for path in checkpoints.iterdir()] == ["epoch_0001"]
    assert newest_good(checkpoints, say=pytest.fail) is not None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 GiB in memory."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system in memory cannot be mounted by this user: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.fault("C1", "a small file system is full while a checkpoint is written")
@pytest.mark.parametrize("share", [0.5, pytest.param(0.0, marks=LONG), pytest.param(0.99, marks=LONG)])
def test_a_file_system_that_others_fill_costs_no_checkpoint(
    config: TrainingConfig, small_disk: Path, expected: str, record_property: Recorded, share: float
) -> None:
    """Every file of the training lies there: its log, its curves and its reports meet the full disk as well."""
    task = task_of(config, small_disk / "run")
    assert train_in_process(task, fault="checkpoint.saved:kill:1") == -9
    checkpoints = small_disk / "run" / "checkpoints"
    size = sum(file.stat().st_size for file in (checkpoints / "epoch_0001").iterdir())
    of_others = small_disk / "others"
    fill(of_others, leave=int(share * size))
    assert train_in_process(task) == 1
    log = (small_disk / "run" / "progress.log").read_text()
    assert_first_is_left(checkpoints)
    of_others.unlink()
    assert recovered(task, record_property, steps_redone=STEPS_PER_EPOCH) == expected
    if share:  # else there was no room for a line
        assert "storage: " in log


def fill(file: Path, *, leave: int) -> None:
    """Write `file` until its file system has no more than `leave` bytes, and a page, free."""
    with file.open("wb") as opened:
        while (free := shutil.disk_usage(file.parent).free) > leave:
            opened.write(bytes(min(free - leave, 2**20)))
            opened.flush()


@pytest.mark.fault("C3", "the newest checkpoint cut, changed in one byte, or deleted")
@pytest.mark.parametrize(
    "damage",
    [
        "flipped byte",
        *(pytest.param(damage, marks=LONG) for damage in ("cut", "file deleted", "folder deleted")),
    ],
)
def test_the_newest_checkpoint_that_is_whole_is_used_and_said(
    config: TrainingConfig, tmp_path: Path, expected: str, record_property: Recorded, damage: str
) -> None:
    task = task_of(config, tmp_path / "run")
    assert train_in_process(task, fault="checkpoint.saved:kill:2") == -9
    newest = tmp_path / "run" / "checkpoints" / "epoch_0002"
    content = bytearray((newest / MODEL_FILE).read_bytes())
    if damage == "folder deleted":
        shutil.rmtree(newest)
    elif damage == "file deleted":
        (newest / MODEL_FILE).unlink()
    else:
        content[len(content) // 2] ^= 1
        (newest / MODEL_FILE).write_bytes(content[:-1] if damage == "cut" else content)
    assert recovered(task, record_property, steps_redone=STEPS_PER_EPOCH) == expected
    log = (tmp_path / "run" / "progress.log").read_text()
    assert "resumed after epoch 1" in log
    assert ("passed over a damaged checkpoint" in log) == (damage != "folder deleted")

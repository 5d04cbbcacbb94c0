"""Rows A9, E1, E6: what cannot get better ends once, with its reason, and the rest of the search goes on."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pspnet.engine import train_one_epoch
from segfleet import worker
from segfleet.config import TrainingConfig
from segfleet.config_json import to_json
from segfleet.outcome import Outcome, read_outcome
from segfleet.override import override
from segfleet.place import Place
from segfleet.search_report import ended_badly
from segfleet.study import TrialRecord
from segfleet.worker import PROGRESS_FILE, execute
from tests.segfleet_runtime.test_training import task_of
from tests.segfleet_search.test_search import environment

ROOT = Path(__file__).parents[2]
BUGS = [
    TypeError("unsupported operand type(s) for +: 'NoneType' and 'int'"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    KeyError("miou"),
    AssertionError(),
]


def ended(config: TrainingConfig, run_dir: Path) -> Outcome:
    """Train as often as Ray Train would start a group anew; return how it ended."""
    task = task_of(config, run_dir)
    for _ in range(3):
        try:
            execute(task, Place(), report=lambda _: None)
        except Exception:
            continue
    outcome = read_outcome(task.run_dir, task.attempt)
    assert outcome is not None
    assert "\n" not in outcome.message
    return outcome


@pytest.mark.fault("A9", "a bug in user code")
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
def test_a_bug_ends_the_training_once(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: Exception
) -> None:
    calls: list[int] = []

    def buggy(*_: object, **__: object) -> None:
        calls.append(1)
        raise bug

    monkeypatch.setattr(worker, "train_one_epoch", buggy)
    outcome = ended(config, tmp_path / "run")
    assert len(calls) == 1
    assert outcome.reason == "failed"
    assert outcome.message.startswith(type(bug).__name__)
    assert "in buggy" in outcome.detail, "the traceback is kept for who mends it"


@pytest.mark.fault("A9", "a bad configuration")
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data.val_split": "test"}, "no split 'test'"),
        ({"data.store": "/nowhere"}, "/nowhere"),
        ({"model.weights": "/nowhere.pth"}, "nowhere.pth"),
        ({"loss.class_weights": [1.0, 2.0]}, "each of the 4 classes"),
    ],
    ids=str,
)
def test_a_bad_configuration_ends_the_training_once(
    config: TrainingConfig, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    outcome = ended(override(config, changes), tmp_path / "run")
    assert outcome.reason == "refused"
    assert named in outcome.message
    log = tmp_path / "run" / PROGRESS_FILE
    assert not re.search(r"epoch \d", log.read_text())


@pytest.mark.fault("E1", "NaN loss in a training")
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_loss_that_is_not_a_number_ends_within_the_epoch(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    """Whatever makes it so: here, weights that are spoilt before an epoch."""
    real = train_one_epoch
    begun: list[int] = []

    def spoilt(model: Any, *arguments: Any, **options: Any) -> Any:
        begun.append(1)
        if len(begun) == epoch:
            next(model.parameters()).data.fill_(float("nan"))
        return real(model, *arguments, **options)

    monkeypatch.setattr(worker, "train_one_epoch", spoilt)
    outcome = ended(config, tmp_path / "run")
    assert outcome.reason == "diverged"
    assert "not finite" in outcome.message
    assert len(begun) == epoch
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*"))
    assert kept == [f"epoch_{number:04d}" for number in range(1, epoch)]


def trial(number: int, reason: str, detail: str) -> TrialRecord:
    return TrialRecord(
        number=number, changes={}, reason=reason, detail=detail, miou_by_epoch={}, attributes={}
    )


@pytest.mark.fault("E6", "some trials fail, all fail: what is said")
def test_causes_are_said_once_with_their_trials() -> None:
    trials = [trial(number, "diverged", "the loss is not finite") for number in range(10)]
    trials += [trial(10, "oom", "8 GiB"), trial(11, "complete", ""), trial(12, "pruned", "low")]
    assert ended_badly(trials) == [
        "10 of 13 trials diverged (0, 1, 2, 3, 4, 5, 6, 7, …): the loss is not finite",
        "1 of 13 trials oom (10): 8 GiB",
    ]
    assert ended_badly(trials[11:]) == []


def search(config: TrainingConfig, folder: Path, lowest: float) -> subprocess.CompletedProcess[str]:
    """Search a grid of two learning rates, of which the higher one, or both, diverge."""
    settings = {
        "training": json.loads(to_json(override(config, {"tracking.storage_dir": str(folder)}))),
        "space": {
            "min_base_lr": lowest,
            "max_base_lr": 1e30,
            "min_aux_loss_weight": 0.4,
            "max_aux_loss_weight": 0.4,
            "crop_sizes": [33],
        },
        "study": "ends",
        "sampler": "grid",
        "grid_points": 2,
        "num_trials": 2,
        "num_finalists": 0,
        "scheduler": "none",
        "score_trials_on": "val",
        "max_concurrent_trials": 1,
    }
    folder.mkdir(exist_ok=True)
    (folder / "search.json").write_text(json.dumps(settings))
    return subprocess.run(
        [sys.executable, "jobs/tune_cityscapes.py", "--config", str(folder / "search.json")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.fault("E1", "NaN loss in one trial of a search")
def test_a_trial_that_diverges_leaves_the_study_going(config: TrainingConfig, tmp_path: Path) -> None:
    done = search(config, tmp_path / "runs", 0.01)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"^warning: 1 of 2 trials diverged \(\d\): .*not finite", done.stderr, re.M), done.stderr
    assert len(re.findall(r"^trial \d complete: 3 epochs$", done.stdout, re.M)) == 1
    assert len(re.findall(r"^trial \d starts", done.stdout, re.M)) == 2
    assert "best trial" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.faults_long
@pytest.mark.fault("E6", "every trial of a search fails")
def test_where_every_trial_fails_the_job_says_why_and_exits_1(config: TrainingConfig, tmp_path: Path) -> None:
    done = search(config, tmp_path / "runs", 1e29)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"^error: 2 of 2 trials diverged \(\d, \d\): .*not finite", done.stderr, re.M), (
        done.stderr
    )
    assert "No trial completed" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.fault("A9", "a configuration file that cannot be used, through the job")
@pytest.mark.slow
def test_a_job_with_a_bad_configuration_exits_2_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"optim": {"base_lr": "fast"}}')
    done = subprocess.run(
        [sys.executable, "jobs/train_cityscapes.py", "--config", str(path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line == "error: optim.base_lr must be of type float, but got 'fast'."

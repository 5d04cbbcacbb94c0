"""Laws of the notice that a node is to be taken back: the training is saved in the midst of an epoch, to the bit."""

import shutil
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from segfleet import notice, worker
from segfleet.checkpoint import MODEL_FILE, PART_FOLDER, load_checkpoint
from segfleet.config import TrainingConfig
from segfleet.notice import GRACE_S, MARGIN_S, MAX_SHARE, UNKNOWN, Notice
from segfleet.override import override
from segfleet.place import Place
from segfleet.worker import train
from tests.segfleet_runtime.every_flag import EVERY_FLAG
from tests.segfleet_runtime.test_training import KilledError, learned, task_of, trained, weights_digest


def cut_off(
    config: TrainingConfig, run_dir: Path, monkeypatch: pytest.MonkeyPatch, *, at: int
) -> list[dict[str, Any]]:
    """Train with a notice from step `at` on, die two steps later, and return the reports until then."""
    steps: list[int] = []
    reports: list[dict[str, Any]] = []

    def step(name: str) -> None:
        if name == "training.step":
            steps.append(1)
            if len(steps) == at + 2:
                raise KilledError

    def report(metrics: Mapping[str, Any]) -> None:
        reports.append(dict(metrics))

    with monkeypatch.context() as patch:
        patch.setattr(worker, "fault", step)
        patch.setattr(notice, "POLL_S", 0.0)
        with pytest.raises(KilledError):
            train(
                task_of(config, run_dir),
                Place(taken_back_at=lambda: UNKNOWN if len(steps) >= at else None),
                report=report,
            )
    return reports


@pytest.mark.parametrize(
    ("changes", "at"),
    [
        ({}, 1),
        (EVERY_FLAG | {"schedule.global_batch_size": 4}, 4),
        ({"schedule.evaluate_every_epochs": 3}, 4),
    ],
    ids=["plain", "every flag", "seldom evaluated"],
)
def test_cut_off_after_a_notice_and_resumed_is_uninterrupted(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], at: int
) -> None:
    config = override(
        config, {"schedule.max_iterations_per_epoch": 0, "schedule.global_batch_size": 2} | changes
    )
    monkeypatch.setattr(notice, "MAX_SHARE", 1.0)
    whole = trained(config, tmp_path / "a")
    before = cut_off(config, tmp_path / "b", monkeypatch, at=at)
    part = load_checkpoint(tmp_path / "b" / "checkpoints" / PART_FOLDER)
    assert part.state["iteration"] >= at
    after = trained(config, tmp_path / "b")
    assert learned(after)[-1:] == learned(whole)[-1:]
    assert learned(before)[: len(before)] == learned(whole)[: len(before)]
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")
    ends = [load_checkpoint(tmp_path / run / "checkpoints" / "epoch_0003").trained_state for run in "ab"]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    log = (tmp_path / "b" / "progress.log").read_text()
    assert f"iterations from {tmp_path / 'b' / 'checkpoints' / PART_FOLDER}" in log
    assert not (tmp_path / "b" / "checkpoints" / PART_FOLDER).exists()


def test_a_damaged_part_is_passed_over_and_one_that_is_behind_is_not_used(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(config, {"schedule.max_iterations_per_epoch": 0})
    trained(config, tmp_path / "a")
    cut_off(config, tmp_path / "b", monkeypatch, at=1)
    part = tmp_path / "b" / "checkpoints" / PART_FOLDER
    shutil.copytree(part, tmp_path / "kept")
    (part / MODEL_FILE).write_bytes(b"")
    trained(config, tmp_path / "b", die_after=2)
    assert "passed over a damaged checkpoint" in (tmp_path / "b" / "progress.log").read_text()
    shutil.copytree(tmp_path / "kept", part)
    trained(config, tmp_path / "b")
    assert "resumed after epoch 2 from" in (tmp_path / "b" / "progress.log").read_text()
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")


def test_nobody_asks_before_it_is_time_and_saving_takes_a_bounded_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    asked: list[float] = []

    def taken_back_at() -> float:
        asked.append(clock[0])
        return UNKNOWN

    first, other = Notice(taken_back_at, asks=True), Notice(taken_back_at, asks=False)
    assert not first.is_due()
    clock[0] += notice.POLL_S
    assert (first.is_due(), other.is_due(), asked) == (True, False, [])
    assert first.hears()
    with first.saving():
        clock[0] += 3.0
    assert not first.is_due()
    clock[0] += 3.0 / MAX_SHARE - 3.1
    assert not first.is_due()
    clock[0] += 0.2
    assert first.is_due()
    assert not Notice(None, asks=True).is_due()


def test_the_last_time_is_before_the_end_and_no_step_is_taken_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, step_s, save_s, end = [0.0], 4.0, 0.5, 60.0
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "time", lambda: clock[0] + 1e9)
    heard = Notice(lambda: end + 1e9, asks=True)
    saved: list[float] = []
    idle_s = 0.0
    while clock[0] < end:
        is_due = heard.is_due()
        clock[0] += step_s
        if is_due and heard.hears():
            with heard.saving():
                clock[0] += save_s
            saved.append(clock[0])
            if idle_s := heard.seconds_idle():
                break
    assert idle_s == pytest.approx(end + GRACE_S - clock[0])
    assert all(later - earlier >= save_s / MAX_SHARE for earlier, later in pairwise(saved[:-1]))
    assert end - (2 * step_s + 2 * save_s + MARGIN_S) <= saved[-1] <= end - MARGIN_S - save_s
    clock[0] = end + GRACE_S
    assert heard.seconds_idle() == 0.0
    clock[0] += 100 * step_s
    with heard.saving():
        clock[0] += save_s
    clock[0] += 0.5 * save_s / MAX_SHARE
    assert not heard.is_due()
    assert Notice(lambda: UNKNOWN, asks=True).seconds_idle() == 0.0

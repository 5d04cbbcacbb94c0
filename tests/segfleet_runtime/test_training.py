"""Laws of one training in one process: repeated, killed and resumed, refused."""

import contextlib
import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from pspnet import engine
from pspnet.engine import evaluate, train_one_epoch
from pspnet.errors import InputError
from pspnet.memory import GIB
from pspnet.model import PSPNet
from pspnet.resnet import ARCHITECTURES, BasicBlock
from pspnet.store import Store
from pspnet.training_stats import DivergedError, TrainStats
from segfleet import worker
from segfleet.building import arithmetic_of, new_cross_entropy
from segfleet.checkpoint import MODEL_FILE, load_checkpoint
from segfleet.config import TrainingConfig
from segfleet.config_json import load_config, to_json
from segfleet.memory import peak_bytes, predicted
from segfleet.outcome import Outcome, message_of, read_outcome, reason_of, record_outcome
from segfleet.override import override
from segfleet.place import Place
from segfleet.progress_log import ProgressLog
from segfleet.trainer import check_data
from segfleet.worker import PROGRESS_FILE, Task, Training, execute, train
from tests.segfleet_runtime.every_flag import EVERY_FLAG


class KilledError(BaseException):
    """Stands for SIGKILL: no handler of the training sees it coming or cleans up after it."""


def task_of(config: TrainingConfig, run_dir: Path) -> Task:
    return Task(config_json=to_json(config), run_dir=str(run_dir), run_id="", tracking_uri="", attempt="1")


def trained(config: TrainingConfig, run_dir: Path, *, die_after: int = 0) -> list[dict[str, Any]]:
    """Train and return the reports; with `die_after` die just after the checkpoint of that epoch."""
    reports: list[dict[str, Any]] = []

    def report(metrics: Mapping[str, Any]) -> None:
        if metrics["epoch"] == die_after:
            raise KilledError
        reports.append(dict(metrics))

    if die_after:
        with pytest.raises(KilledError):
            train(task_of(config, run_dir), Place(), report=report)
    else:
        train(task_of(config, run_dir), Place(), report=report)
    return reports


def built(config: TrainingConfig, run_dir: Path) -> Training:
    return Training(config, task_of(config, run_dir), Place(), log=ProgressLog(None), writer=None)


def weights_digest(run_dir: Path, epoch: int = 3) -> str:
    path = run_dir / "checkpoints" / f"epoch_{epoch:04d}" / MODEL_FILE
    return hashlib.sha256(path.read_bytes()).hexdigest()


LEARNED = (
    "epoch",
    "iteration",
    "pixels_seen",
    "loss",
    "main_loss",
    "aux_loss",
    "lr",
    "miou",
    "class_iou",
    "is_last",
)


def learned(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the reports without what depends on the clock."""
    return [{name: report[name] for name in LEARNED} for report in reports]


def test_a_stored_configuration_repeats_the_run(config: TrainingConfig, tmp_path: Path) -> None:
    first = trained(config, tmp_path / "a")
    stored = load_config(TrainingConfig, tmp_path / "a" / "config.json")
    assert stored == config
    second = trained(stored, tmp_path / "b")
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")
    assert learned(first) == learned(second)
    other = override(config, {"schedule.seed": 1})
    trained(other, tmp_path / "c")
    assert weights_digest(tmp_path / "a") != weights_digest(tmp_path / "c")


@pytest.mark.parametrize(
    ("damaged", "changes"),
    [(True, {}), (False, EVERY_FLAG | {"schedule.global_batch_size": 4})],
    ids=["damaged", "every flag"],
)
def test_killed_and_resumed_is_uninterrupted(
    config: TrainingConfig, tmp_path: Path, damaged: bool, changes: dict[str, Any]
) -> None:
    config = override(config, changes)
    whole = trained(config, tmp_path / "a")
    before = trained(config, tmp_path / "b", die_after=2)
    if damaged:
        (tmp_path / "b" / "checkpoints" / "epoch_0002" / MODEL_FILE).write_bytes(b"")
    after = trained(config, tmp_path / "b")
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")
    assert learned(before + after) == learned(whole) if not damaged else learned(after) == learned(whole)
    trained_on = [
        load_checkpoint(tmp_path / run / "checkpoints" / "epoch_0003").trained_state for run in "ab"
    ]
    assert all(torch.equal(value, trained_on[1][name]) for name, value in trained_on[0].items())
    log = (tmp_path / "b" / "progress.log").read_text()
    assert ("resumed after epoch 1" if damaged else "resumed after epoch 2") in log
    assert ("damaged" in log) == damaged


def test_an_epoch_begins_with_the_scaler_of_the_one_before_also_where_it_was_resumed(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []

    def in_fp16(*values: Any, **named: Any) -> TrainStats:
        begun.append(named["scaler_state"])
        return train_one_epoch(*values, **named | {"precision": "fp16"})

    monkeypatch.setattr(worker, "train_one_epoch", in_fp16)
    # On CPUs a convolution in fp16 takes seconds.
    monkeypatch.setattr(engine, "autocast", lambda *_: contextlib.nullcontext())
    trained(config, tmp_path / "a")
    whole = [*begun]
    begun.clear()
    trained(config, tmp_path / "b", die_after=1)
    trained(config, tmp_path / "b")
    assert begun == whole
    assert [state.get("_growth_tracker") for state in whole] == [None, 2, 4]
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")


def test_a_report_carries_every_evaluation_so_that_lost_reports_are_made_good(
    config: TrainingConfig, tmp_path: Path
) -> None:
    whole = trained(config, tmp_path / "a")
    trained(config, tmp_path / "b", die_after=2)
    resumed = trained(config, tmp_path / "b")
    for reports in (whole, resumed):
        assert reports[-1]["history"] == [[report["epoch"], report["miou"]] for report in whole]


def test_an_attempt_ended_from_outside_keeps_nothing_of_the_next_epoch(
    config: TrainingConfig, tmp_path: Path
) -> None:
    reports: list[int] = []

    def report(metrics: Mapping[str, Any]) -> None:
        reports.append(metrics["epoch"])
        record_outcome(tmp_path / "a", Outcome(attempt="1", reason="pruned"))

    train(task_of(config, tmp_path / "a"), Place(), report=report)
    assert reports == [1]
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["epoch_0001"]


def test_a_finished_training_is_reported_again_and_not_trained_again(
    config: TrainingConfig, tmp_path: Path
) -> None:
    reports = trained(config, tmp_path / "a")
    before = weights_digest(tmp_path / "a")
    again = trained(config, tmp_path / "a")
    assert again == [reports[-1] | {"useful_s_at_start": reports[-1]["useful_s"]}]
    assert again[0]["is_last"]
    assert weights_digest(tmp_path / "a") == before


ALONE: list[dict[str, Any]] = [
    {"schedule.accumulation_steps": 2},
    {"optim.max_gradient_norm": 0.1},
    {"optim.warm_up_iterations": 2},
    {"optim.warm_up_iterations": 2, "optim.warm_up_start": 0.5},
    {"optim.min_lr": 0.005},
    {"optim.aux_loss_weight": 0.2},
    {"loss.label_smoothing": 0.1},
    {"model.freeze_stages": 2},
    {"model.freeze_batch_norm": "backbone"},
    {"workers.precision": "bf16"},
]


def test_each_setting_alone_trains_other_weights(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One epoch each, of half the blocks of a ResNet-18."""
    monkeypatch.setitem(ARCHITECTURES, "resnet18", (BasicBlock, (1, 1, 1, 1)))
    config = override(
        config, {"schedule.global_batch_size": 4, "schedule.num_epochs": 1, "model.head_channels": 8}
    )
    settings_of: dict[str, dict[str, Any]] = {}
    for changes in [{}, *ALONE]:
        training = built(override(config, changes), tmp_path)
        training._train_epoch(0, None)
        digest = hashlib.sha256()
        for value in training.evaluated_model.state_dict().values():
            digest.update(value.numpy().tobytes())
        same = settings_of.setdefault(digest.hexdigest(), changes)
        assert same is changes, f"{changes} trains the weights of {same}"


@pytest.mark.parametrize("setting", ["workers.recompute", "workers.compile"])
def test_blocks_are_recomputed_and_steps_compiled_where_that_is_set(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    asked: list[str] = []

    def compiled(model: PSPNet, **_: object) -> PSPNet:
        asked.append("workers.compile")
        return model

    monkeypatch.setattr(worker, "recompute_blocks", lambda model: asked.append("workers.recompute"))
    monkeypatch.setattr(worker, "require_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", compiled)
    built(config, tmp_path)
    assert asked == []
    built(override(config, {setting: True}), tmp_path)
    assert asked == [setting]


def test_evaluating_less_often_trains_the_same(config: TrainingConfig, tmp_path: Path) -> None:
    trained(config, tmp_path / "a")
    rarely = trained(override(config, {"schedule.evaluate_every_epochs": 2}), tmp_path / "b")
    assert [report["epoch"] for report in rarely] == [2, 3]
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")


def test_a_limit_on_memory_is_as_many_accumulation_steps_as_it_asks_for(
    config: TrainingConfig, tmp_path: Path
) -> None:
    config = override(config, {"schedule.global_batch_size": 6, "schedule.num_epochs": 1})
    with pytest.raises(InputError, match=r"fit in workers\.memory_gib 0\.01, .*6 at a time 0\.\d+ GiB"):
        check_data(override(config, {"workers.memory_gib": 0.01}))
    config = override(config, {"data.crop_size": 129})  # of less, three parts take more than the whole
    num_classes = Store.open(config.data.store).class_table.num_classes
    limit = peak_bytes(config, predicted(config, num_classes, 2)) / GIB * 1.001
    trained(override(config, {"workers.memory_gib": limit}), tmp_path / "limited")
    trained(override(config, {"schedule.accumulation_steps": 3}), tmp_path / "by hand")
    assert weights_digest(tmp_path / "limited", 1) == weights_digest(tmp_path / "by hand", 1)
    said = (tmp_path / "limited" / "progress.log").read_text()
    assert re.search(r"memory: [\d.]+ GiB predicted of .*, 2 images at a time in 3 accumulation steps", said)


@pytest.mark.parametrize(("name", "align_corners"), [("regnety_002", True), ("convnext_atto", False)])
def test_a_network_of_timm_trains_and_what_it_takes_is_said(
    config: TrainingConfig, tmp_path: Path, name: str, align_corners: bool
) -> None:
    pytest.importorskip("timm", reason="the extra `timm` is not installed")
    changes = {
        "model.backbone": f"timm:{name}",
        "model.align_corners": align_corners,
        "schedule.num_epochs": 1,
        "schedule.max_iterations_per_epoch": 2,
        "workers.memory_gib": 1.0,
    }
    (report,) = trained(override(config, changes), tmp_path / "a")
    assert report["iteration"] == 2
    said = (tmp_path / "a" / "progress.log").read_text()
    assert "GiB predicted of 1, 2 images at a time" in said
    assert " TFLOP/s" in said


def test_the_peak_that_a_person_gives_is_each_workers_and_the_mfu_of_every_line_is_of_it(
    config: TrainingConfig, tmp_path: Path
) -> None:
    config = override(config, {"workers.peak_tflops": 0.5, "schedule.num_epochs": 1})
    trained(config, tmp_path / "a")
    lines = (tmp_path / "a" / "progress.log").read_text().splitlines()
    told = [line for line in lines if "images/s" in line]
    assert told
    assert all(" MFU " in line for line in told)
    model = PSPNet(3, backbone="resnet18", head_channels=8)
    assert arithmetic_of(config, model, torch.device("cpu"), 2).peak_flops == 1e12


def test_a_network_that_fits_in_no_memory_is_checked_by_its_sizes(
    config: TrainingConfig, tmp_path: Path
) -> None:
    """Its terabytes are the workers' matter; a file of weights is compared with them all the same."""
    config = override(config, {"model.head_channels": 10**8})
    assert check_data(config).digest == Store.open(config.data.store).digest
    small = PSPNet(4, backbone="resnet18", head_channels=8)
    torch.save(small.state_dict(), tmp_path / "small.pth")
    with pytest.raises(InputError, match=r"of another shape: .*head\.conv\.weight \(8, .* for \(100000000, "):
        check_data(override(config, {"model.weights": str(tmp_path / "small.pth")}))


def test_a_warm_up_as_long_as_the_training_is_refused(config: TrainingConfig) -> None:
    """Three epochs of two iterations: the sixth would be the first at the scheduled rate after five."""
    check_data(override(config, {"optim.warm_up_iterations": 5}))
    with pytest.raises(
        InputError,
        match=r"below the 6 iterations of the training \(3 epochs of 2\), .*but got 6\. Warm up for",
    ):
        check_data(override(config, {"optim.warm_up_iterations": 6}))


def test_stages_that_are_frozen_with_random_weights_are_warned_of(
    config: TrainingConfig, tmp_path: Path
) -> None:
    trained(override(config, {"model.freeze_stages": 2, "schedule.num_epochs": 1}), tmp_path / "a")
    assert (
        "warning: model.freeze_stages 2 keeps random weights" in (tmp_path / "a" / "progress.log").read_text()
    )


def test_reports_are_finite_and_name_the_checkpoint(config: TrainingConfig, tmp_path: Path) -> None:
    config = override(config, {"data.crop_size": "33x41"})
    for number, report in enumerate(trained(config, tmp_path / "a"), start=1):
        assert report["epoch"] == number
        assert report["pixels_seen"] == number * 2 * config.schedule.global_batch_size * 33 * 41
        assert report["is_last"] == (number == 3)
        assert report["class_iou"]["never seen"] in (None, 0.0)
        numbers = [value for value in report.values() if isinstance(value, float)]
        assert len(numbers) >= 9
        assert all(map(math.isfinite, numbers))
        json.dumps(report, allow_nan=False)
        assert 0 < sum(report["step_s"].values()) < 60
        assert report["tflops_per_s"] > 0
        assert "mfu" not in report  # CPUs have no peak in the table
    assert Path(report["checkpoint_path"]).name == "epoch_0003"
    lines = (tmp_path / "a" / "progress.log").read_text()
    assert re.search(
        r"images/s  [\d.e-]+ TFLOP/s  data_wait \d+%  prepare \d+%  forward \d+%  backward \d+%  all_reduce \d+%  "
        r"optimizer \d+%",
        lines,
    )
    assert (tmp_path / "a" / "panel.png").stat().st_size > 0
    assert (tmp_path / "a" / "confusion_matrix.png").stat().st_size > 0


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_the_checkpoint_scores_what_was_reported(
    config: TrainingConfig, tmp_path: Path, ema_decay: float
) -> None:
    last = trained(override(config, {"optim.ema_decay": ema_decay}), tmp_path / "a")[-1]
    checkpoint = load_checkpoint(last["checkpoint_path"])
    model = PSPNet.from_architecture(checkpoint.state["architecture"])
    model.load_state_dict(checkpoint.model_state)
    split = Store.open(config.data.store).split("val")
    confusion = evaluate(
        model,
        split,
        indices=range(len(split)),
        mean=checkpoint.state["mean"],
        std=checkpoint.state["std"],
        device=torch.device("cpu"),
    )
    assert confusion.miou == last["miou"]
    name = "head.classifier.weight"
    assert torch.equal(checkpoint.model_state[name], checkpoint.trained_state[name]) == (ema_decay == 0)


def test_averaging_recomputing_and_their_absence_train_the_same_weights(
    config: TrainingConfig, tmp_path: Path
) -> None:
    states = []
    variants: list[dict[str, Any]] = [{}, {"optim.ema_decay": 0.9}, {"workers.recompute": True}]
    for number, changes in enumerate(variants):
        report = trained(override(config, changes), tmp_path / str(number))[-1]
        states.append(load_checkpoint(report["checkpoint_path"]).trained_state)
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(value, state[name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("change", "is_refused"),
    [
        ({"optim.base_lr": 0.5}, True),
        ({"schedule.num_epochs": 4}, True),
        (
            {"data.num_prefetch_threads": 2, "workers.max_failures": 0, "tracking.experiment_name": "other"},
            False,
        ),
    ],
)
def test_a_run_goes_on_only_with_the_configuration_it_began_with(
    config: TrainingConfig, tmp_path: Path, change: dict[str, Any], is_refused: bool
) -> None:
    trained(config, tmp_path / "a", die_after=1)
    if not is_refused:
        assert trained(override(config, change), tmp_path / "a")
        return
    stored = (tmp_path / "a" / "config.json").read_text()
    with pytest.raises(InputError, match=next(iter(change))):
        trained(override(config, change), tmp_path / "a")
    assert (tmp_path / "a" / "config.json").read_text() == stored


def test_a_loss_that_is_not_finite_ends_as_diverged(config: TrainingConfig, tmp_path: Path) -> None:
    with pytest.raises(DivergedError) as caught:
        trained(override(config, {"optim.base_lr": 1e30}), tmp_path / "a")
    assert reason_of(caught.value) == "diverged"
    assert "not finite" in message_of(caught.value)


def test_out_of_memory_in_a_step_is_not_tried_again(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.Tensor, "backward", exhausted)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trained(config, tmp_path / "a")
    assert reason_of(caught.value) == "oom"
    assert not list((tmp_path / "a" / "checkpoints").glob("*"))


def test_weights_of_the_classes_are_those_of_the_training_pixels(config: TrainingConfig) -> None:
    """Counted anew, label by label; the class that occurs nowhere has none."""
    store = Store.open(config.data.store)
    split = store.split("train")
    labels = [split.label(index) for index in range(len(split))]
    counts = np.array([sum((label == train_id).sum() for label in labels) for train_id in range(3)])
    balanced = override(config, {"loss.class_balance": "balanced"})
    weights = new_cross_entropy(balanced, store).class_weights
    assert weights is not None
    np.testing.assert_allclose(weights, [*(counts.sum() / (3 * counts)), 0], rtol=1e-6)
    given = override(config, {"loss.class_weights": [1.0, 2.0]})
    with pytest.raises(InputError, match=r"each of the 4 classes.*but got 2.*dark, grey, light, never seen"):
        new_cross_entropy(given, store)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (InputError("no such store"), "refused"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"), "oom"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), "oom"),
        (RuntimeError("CUDA driver error: out of memory"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "oom"),
        (
            torch.distributed.DistBackendError(
                "NCCL error, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"
            ),
            "oom",
        ),
        (RuntimeError("Connection closed by peer [127.0.0.1]:1"), None),
        (OSError(28, "No space left on device"), None),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Read timeout"), None),
        (RuntimeError("NCCL communicator was aborted on rank 1."), None),
        (torch.distributed.DistBackendError("ended"), None),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), "failed"),
        (
            RuntimeError("Given groups=1, weight of size [8, 3, 3, 3], expected input to have 3 channels"),
            "failed",
        ),
        (KeyError("miou"), "failed"),
        (TypeError("a defect"), "failed"),
    ],
)
def test_only_what_may_get_better_is_tried_again(error: Exception, reason: str | None) -> None:
    assert reason_of(error) == reason
    assert ("Raise schedule.accumulation_steps" in message_of(error)) == (reason == "oom")
    assert "\n" not in message_of(error)


@pytest.mark.parametrize(("world_size", "reason"), [(1, "failed"), (2, None)])
def test_what_fails_because_ray_took_the_group_apart_is_no_defect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, reason: str | None
) -> None:
    """Ray destroys the process group of workers that it is about to replace, in the midst of their step."""
    task = Task(config_json="", run_dir=str(tmp_path), run_id="", tracking_uri="", attempt="1")
    error = ValueError("Default process group has not been initialized")
    monkeypatch.setattr(worker, "train", mock.Mock(side_effect=error))
    with pytest.raises(ValueError, match="process group"):
        execute(task, Place(world_size=world_size), report=mock.Mock())
    outcome = read_outcome(tmp_path, "1")
    assert (outcome and outcome.reason) == reason


@pytest.mark.parametrize("changes", [{}, {"optim.ema_decay": 0.9}], ids=["plain", "averaged"])
def test_a_disk_too_small_for_the_checkpoints_is_said_before_the_first_step(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    config = override(config, changes | {"schedule.num_epochs": 1})
    trained(config, tmp_path / "enough")
    assert "storage:" not in (tmp_path / "enough" / PROGRESS_FILE).read_text()
    folder = tmp_path / "enough" / "checkpoints" / "epoch_0001"
    size = sum(file.stat().st_size for file in folder.iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(3.9 * size)))
    trained(config, tmp_path / "small")
    before, _, _ = (tmp_path / "small" / PROGRESS_FILE).read_text().partition("epoch 1/1")
    assert "storage: 4 checkpoints of " in before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(4.1 * size)))
    trained(config, tmp_path / "larger")
    assert "storage:" not in (tmp_path / "larger" / PROGRESS_FILE).read_text()

"""What each Ray Train worker executes around pspnet.engine: resume, train, evaluate, checkpoint, report.

A run's folder, <storage_dir>/<name>, is all it leaves beside the MLflow run:
  config.json            the resolved configuration: `--config` with it repeats the run
  checkpoints/epoch_…    see checkpoint.py: the two newest and the best
  outcome.json           how the last attempt ended
  progress.log           one line every two seconds
  panel.png, confusion_matrix.png
  spool/                 what the tracking server has not got yet
"""

import contextlib
import json
import math
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import ray.exceptions
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from pspnet.averaging import new_average
from pspnet.class_weights import class_weights
from pspnet.compilation import require_compiler
from pspnet.data import num_iterations, shard_indices, train_batches
from pspnet.distributed import parallelise, unwrapped
from pspnet.engine import evaluate, seed_everything, train_one_epoch
from pspnet.errors import InputError
from pspnet.flops import Arithmetic, peak_flops, training_flops
from pspnet.freezing import freeze
from pspnet.inference import predict
from pspnet.loss import CrossEntropy
from pspnet.memory import GIB
from pspnet.metrics import ConfusionMatrix
from pspnet.model import PSPNet
from pspnet.optim import build_optimizer
from pspnet.pictures import confusion_matrix_picture, panel
from pspnet.published import load_network_weights
from pspnet.recomputation import recompute_blocks
from pspnet.sampling import ClassUniform, class_uniform
from pspnet.sizes import sides
from pspnet.store import Store
from pspnet.training_stats import DivergedError, IterationStats, TrainStats
from pspnet.transforms import prepare_batch
from pspnet.weights import load_backbone_weights
from segfleet.checkpoint import (
    Checkpoint,
    checkpoint_path,
    finite,
    load_checkpoint,
    newest_good,
    retain,
    save_checkpoint,
)
from segfleet.config import TrainingConfig, differences, from_json, to_json
from segfleet.memory import fitted, network_of, peak_bytes, predicted

if TYPE_CHECKING:
    from segfleet.tracking import RunWriter

Reason = Literal["complete", "pruned", "diverged", "oom", "refused", "failed", "lost"]
Report = Callable[[dict[str, Any]], None]

PROGRESS_INTERVAL_S = 2.0
NUM_PANEL_IMAGES = 6
OUTCOME_FILE = "outcome.json"
PROGRESS_FILE = "progress.log"
SPOOL_FOLDER = "spool"
PANEL_FILE = "panel.png"
CONFUSION_FILE = "confusion_matrix.png"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the trainer hands to every worker; JSON-able by `asdict`."""

    config_json: str
    run_dir: str
    """Absolute, on storage that every node sees."""
    run_id: str
    """MLflow run to write to; "" for none."""
    tracking_uri: str
    attempt: str
    """Names this call of `fit`: outcomes of earlier ones do not count."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process in the DDP group."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended."""

    attempt: str
    reason: Reason
    message: str = ""
    detail: str = ""
    """The traceback of a defect."""


def train_worker(task_values: Mapping[str, Any]) -> None:
    """Train as the `Task` says, from the newest good checkpoint on, and record the `Outcome`.

    What cannot get better by trying again (refused, diverged, oom, a defect) is recorded before it is raised:
    the group that Ray Train starts in place of the failed one finds the record and ends at once.
    """
    execute(Task(**task_values), here(), report=ray.train.report)


def here() -> Place:
    """Return the place of this Ray Train worker."""
    context = ray.train.get_context()
    return Place(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
    )


def execute(task: Task, place: Place, *, report: Report) -> None:
    """Train as `train_worker`, wherever reports go; StoppedError passes through, and leaves no record."""
    if read_outcome(task.run_dir, task.attempt) is not None:
        return
    try:
        train(task, place, report=report)
    except StoppedError:
        raise
    except Exception as error:
        reason = reason_of(error)
        if reason is None:
            raise
        detail = "".join(traceback.format_exception(error))
        record_outcome(
            task.run_dir,
            Outcome(attempt=task.attempt, reason=reason, message=message_of(error), detail=detail),
        )
        if isinstance(error, _AgreedError | DivergedError):
            return
        raise
    if place.rank == 0:
        record_outcome(task.run_dir, Outcome(attempt=task.attempt, reason="complete"))


def train(task: Task, place: Place, *, report: Report) -> None:
    """Train to the last epoch in this process, which may be one of a DDP group that is already initialised.

    Killed and run again, it ends with the weights of an uninterrupted run, bit by bit on CPUs.
    """
    config = from_json(TrainingConfig, task.config_json)
    torch.set_num_threads(config.workers.cpus_per_worker)
    run_dir = Path(task.run_dir)
    with contextlib.ExitStack() as stack:
        writer = None
        if place.rank == 0 and task.run_id:
            # MLflow takes seconds to import, and only this worker needs it
            from segfleet.tracking import RunWriter

            writer = stack.enter_context(
                contextlib.closing(RunWriter(task.tracking_uri, task.run_id, run_dir / SPOOL_FOLDER))
            )
        log = stack.enter_context(ProgressLog(run_dir / PROGRESS_FILE if place.rank == 0 else None))
        Training(config, task, place, log=log, writer=writer).run(report)


class Training:
    """One training in one process of its group: everything built, and resumed where a checkpoint is found."""

    def __init__(
        self,
        config: TrainingConfig,
        task: Task,
        place: Place,
        *,
        log: "ProgressLog",
        writer: "RunWriter | None",
    ) -> None:
        self.task, self.place, self.log, self.writer = task, place, log, writer
        self.run_dir = Path(task.run_dir)
        with _agreed(place):
            self.store = Store.open(config.data.store, say=log.say)
            self.config = config = self._fitted(config)
            self.train_split = self.store.split(config.data.train_split)
            self.val_split = self.store.split(config.data.val_split)
            self.iterations_per_epoch = num_iterations(
                len(self.train_split),
                config.schedule.global_batch_size,
                config.schedule.max_iterations_per_epoch,
            )
            self.classes = self._class_uniform()
            self.cross_entropy = new_cross_entropy(config, self.store, place.device)
            seed_everything(config.schedule.seed)
            self.model = new_model(config, self.store.class_table.num_classes)
            self.model.to(place.device)
            if config.workers.recompute:
                recompute_blocks(self.model)
            if config.workers.compile:
                require_compiler(place.device)
            self.arithmetic = _arithmetic(config, self.model, place)
            log.arithmetic = self.arithmetic
            self.optimizer = build_optimizer(
                self.model,
                base_lr=config.optim.base_lr,
                head_lr_factor=config.optim.head_lr_factor,
                momentum=config.optim.momentum,
                weight_decay=config.optim.weight_decay,
                min_lr=config.optim.min_lr,
            )
        self.group_model = parallelise(
            self.model, place.device, norm=config.model.norm, compiled=config.workers.compile
        )
        self.average = new_average(self.model, config.optim.ema_decay) if config.optim.ema_decay else None
        self.evaluated_model = self.model if self.average is None else unwrapped(self.average.module)
        """What is evaluated and kept: the weights, or their average."""
        checkpoint = _same_checkpoint(self.run_dir / "checkpoints", place, say=log.say)
        with _agreed(place):
            self.last_metrics = None if checkpoint is None else self._resume(checkpoint)

    def run(self, report: Report) -> None:
        """Train the epochs that are left; each evaluated one is checkpointed, tracked, and then reported.

        The epoch that was resumed from is tracked and reported again: its worker may have died in between.
        Whoever ends this attempt from outside records its outcome: nothing is kept of an epoch after that.
        """
        if self.place.rank == 0:
            self._track_config()
        useful_s_at_start = useful_s = 0.0
        if self.last_metrics is not None:
            useful_s_at_start = useful_s = self.last_metrics.get("useful_s", 0.0)
            self._track(self.last_metrics)
            report(_reported(self.last_metrics | {"useful_s_at_start": useful_s}))
        num_epochs = self.config.schedule.num_epochs
        for epoch in range(self._epochs_done, num_epochs):
            started = time.monotonic()
            stats = self._train_epoch(epoch)
            is_last = epoch + 1 == num_epochs
            metrics = self._training_metrics(epoch + 1, stats)
            if not is_last and (epoch + 1) % self.config.schedule.evaluate_every_epochs:
                self._track(metrics)
                self.log.epoch(metrics, num_epochs, time.monotonic() - started)
                useful_s += time.monotonic() - started
                continue
            confusion = self._evaluate()
            metrics |= self._validation_metrics(confusion) | {
                "is_last": is_last,
                "checkpoint_path": str(checkpoint_path(self.run_dir / "checkpoints", epoch + 1)),
            }
            if self._is_ended():
                return
            useful_s += time.monotonic() - started
            metrics |= {"useful_s": useful_s, "useful_s_at_start": useful_s_at_start}
            metrics["history"] = [*self._history, [epoch + 1, metrics["miou"]]]
            if self.place.rank == 0:
                self._save(metrics)
                self._track(metrics)
                if is_last:
                    self._draw(confusion)
            self.log.epoch(metrics, num_epochs, time.monotonic() - started)
            self.last_metrics = metrics
            report(_reported(metrics))

    def _fitted(self, config: TrainingConfig) -> TrainingConfig:
        """Return `config` with as many accumulation steps as its memory asks for, and say so."""
        if not config.workers.memory_gib:
            return config
        num_classes = self.store.class_table.num_classes
        chosen = fitted(config, num_classes)
        peak = peak_bytes(chosen, predicted(chosen, num_classes)) / GIB
        self.log.say(
            f"memory: {peak:.2f} GiB predicted of {config.workers.memory_gib:g}, {chosen.micro_batch_size} images at a "
            f"time in {chosen.schedule.accumulation_steps} accumulation steps"
        )
        return chosen

    def _class_uniform(self) -> ClassUniform | None:
        """Find out which images hold which class, where a share of the windows is drawn by class."""
        share = self.config.data.class_uniform_share
        if share == 0:
            return None
        started = time.monotonic()
        classes = class_uniform(self.train_split, share)
        counts = [len(indices) for indices in classes.images.values()]
        self.log.say(
            f"class-uniform windows: {share:.0%}, of {len(counts)} classes that are in {min(counts, default=0)} to "
            f"{max(counts, default=0)} of {len(self.train_split)} images ({time.monotonic() - started:.1f} s)"
        )
        return classes

    def _is_ended(self) -> bool:
        """Whether rank 0 finds an outcome of this attempt; the same on every worker."""
        ended = [self.place.rank == 0 and read_outcome(self.task.run_dir, self.task.attempt) is not None]
        if self.place.world_size > 1:
            dist.broadcast_object_list(ended, src=0)
        return ended[0]

    @property
    def _history(self) -> list[list[float]]:
        """Epoch and mIoU of every evaluation so far: who missed a report learns it from the next."""
        return [] if self.last_metrics is None else list(self.last_metrics["history"])

    @property
    def _epochs_done(self) -> int:
        return 0 if self.last_metrics is None else int(self.last_metrics["epoch"])

    def _resume(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Take over the checkpoint's weights and optimizer state and return its metrics."""
        _check_same_training(self.config, self.store.digest, checkpoint)
        metrics: dict[str, Any] = checkpoint.state["metrics"]
        self.model.load_state_dict(checkpoint.trained_state)
        self.optimizer.load_state_dict(checkpoint.optimizer_state)
        if self.average is not None:
            self.evaluated_model.load_state_dict(checkpoint.model_state)
            self.average.n_averaged.fill_(metrics["iteration"])
        self.log.say(f"resumed after epoch {metrics['epoch']} from {checkpoint.path}")
        return metrics

    def _train_epoch(self, epoch: int) -> TrainStats:
        data, schedule, optim = self.config.data, self.config.schedule, self.config.optim
        torch.manual_seed(_dropout_seed(schedule.seed, epoch, self.place.rank))
        batches = train_batches(
            self.train_split,
            seed=schedule.seed,
            epoch=epoch,
            rank=self.place.rank,
            world_size=self.place.world_size,
            global_batch_size=schedule.global_batch_size,
            crop_size=data.crop_size,
            min_scale=data.min_scale,
            max_scale=data.max_scale,
            flip_probability=data.flip_probability,
            rotate_degrees=data.rotate_degrees,
            blur_probability=data.blur_probability,
            is_photometric=data.photometric,
            max_class_share=data.max_class_share,
            classes=self.classes,
            max_iterations=self.iterations_per_epoch,
            num_prefetch_threads=data.num_prefetch_threads,
        )
        max_iterations = self.iterations_per_epoch * schedule.num_epochs
        return train_one_epoch(
            self.group_model,
            self.optimizer,
            batches,
            prepare=lambda batch: prepare_batch(
                batch,
                crop_size=data.crop_size,
                mean=self.store.mean,
                std=self.store.std,
                device=self.place.device,
            ),
            epoch=epoch,
            start_iteration=epoch * self.iterations_per_epoch,
            max_iterations=max_iterations,
            power=optim.power,
            aux_loss_weight=optim.aux_loss_weight,
            precision=self.config.workers.precision,
            accumulation_steps=schedule.accumulation_steps,
            max_gradient_norm=optim.max_gradient_norm,
            warm_up_iterations=optim.warm_up_iterations,
            warm_up_start=optim.warm_up_start,
            cross_entropy=self.cross_entropy,
            average=self.average,
            on_iteration=lambda stats: self.log.iteration(
                stats, epoch, schedule.num_epochs, max_iterations, schedule.global_batch_size
            ),
        )

    def _evaluate(self) -> ConfusionMatrix:
        """Return the counts of the whole validation split, each image once, by rank 0's statistics."""
        _share_buffers(self.evaluated_model, self.place)
        return evaluate(
            self.evaluated_model,
            self.val_split,
            indices=shard_indices(len(self.val_split), self.place.rank, self.place.world_size),
            mean=self.store.mean,
            std=self.store.std,
            device=self.place.device,
            precision=self.config.workers.precision,
        )

    def _training_metrics(self, epochs_done: int, stats: TrainStats) -> dict[str, Any]:
        iteration = epochs_done * self.iterations_per_epoch
        batch, crop_size = self.config.schedule.global_batch_size, self.config.data.crop_size
        return {
            "epoch": epochs_done,
            "iteration": iteration,
            "pixels_seen": iteration * batch * math.prod(sides(crop_size)),
            "loss": stats.loss,
            "main_loss": stats.main_loss,
            "aux_loss": stats.aux_loss,
            "lr": stats.lr,
            "images_per_s": stats.images_per_s,
            "data_wait_s": stats.data_wait_s,
            "gradient_norm": stats.gradient_norm,
            **self.arithmetic.rates(stats.images_per_s),
            "step_s": stats.parts_s,
            "is_last": False,
        }

    def _validation_metrics(self, confusion: ConfusionMatrix) -> dict[str, Any]:
        miou = float(confusion.miou)
        if not math.isfinite(miou):
            raise InputError(
                f"data.val_split must have labelled pixels, but all of {self.config.data.val_split!r} are "
                "ignored. Give another split, or ingest its labels."
            )
        names = self.store.class_table.class_names
        class_iou = dict(zip(names, map(float, confusion.class_iou), strict=True))
        return {
            "miou": miou,
            "pixel_accuracy": float(confusion.pixel_accuracy),
            "mean_accuracy": float(confusion.mean_accuracy),
            "class_iou": finite(class_iou),
        }

    def _save(self, metrics: dict[str, Any]) -> None:
        folder = save_checkpoint(
            metrics["checkpoint_path"],
            model_state=self.evaluated_model.state_dict(),
            trained_state=None if self.average is None else self.model.state_dict(),
            optimizer_state=self.optimizer.state_dict(),
            state={
                "config": json.loads(to_json(self.config)),
                "architecture": self.model.architecture,
                "class_table": self.store.class_table.to_dict(),
                "mean": list(map(float, self.store.mean)),
                "std": list(map(float, self.store.std)),
                "store_digest": self.store.digest,
                "epoch": metrics["epoch"],
                "iteration": metrics["iteration"],
                "metrics": metrics,
            },
        )
        retain(folder.parent)

    def _track_config(self) -> None:
        path = self.run_dir / "config.json"
        _write_atomically(path, to_json(self.config).encode())
        if self.writer is not None:
            self.writer.log_artifact(path, "")

    def _track(self, metrics: Mapping[str, Any]) -> None:
        if self.writer is not None:
            track(self.writer, metrics)

    def _draw(self, confusion: ConfusionMatrix) -> None:
        """Write the panel of a few validation images, always the same ones, and the confusion matrix."""
        rows, titles = [], []
        for index in _spread(len(self.val_split), NUM_PANEL_IMAGES):
            image, label = self.val_split.image(index), self.val_split.label(index)
            if label is None:
                continue
            prediction = predict(
                self.evaluated_model,
                image,
                mean=self.store.mean,
                std=self.store.std,
                device=self.place.device,
            )
            rows.append((image, label, prediction))
            titles.append(self.val_split.name(index))
        names = list(self.store.class_table.class_names)
        pictures = {CONFUSION_FILE: confusion_matrix_picture(confusion.counts.cpu(), names)}
        if rows:
            pictures[PANEL_FILE] = panel(rows, self.store.class_table, titles)
        for name, picture in pictures.items():
            path = self.run_dir / name
            aside = path.with_name(f".{name}")
            picture.save(aside, format="PNG")
            os.replace(aside, path)
            if self.writer is not None:
                self.writer.log_artifact(path, "pictures")


def track(writer: "RunWriter", metrics: Mapping[str, Any]) -> None:
    """Send the curves of one epoch; the step is the number of epochs done."""
    points = {f"train/{name}": metrics[name] for name in ("loss", "main_loss", "aux_loss")}
    points |= {name: metrics[name] for name in ("lr", "images_per_s", "data_wait_s")}
    # Checkpoints of earlier versions lack these; there is no mfu without a peak.
    points |= {
        name: metrics[name]
        for name in ("gradient_norm", "tflops_per_s", "mfu")
        if metrics.get(name) is not None
    }
    points |= {f"step/{part}_s": seconds for part, seconds in metrics.get("step_s", {}).items()}
    if "miou" in metrics:
        points |= {f"val/{name}": metrics[name] for name in ("miou", "pixel_accuracy", "mean_accuracy")}
        points |= {f"class_iou/{name}": iou for name, iou in metrics["class_iou"].items() if iou is not None}
    writer.log_metrics(points, step=metrics["epoch"])


class ProgressLog:
    """Appends plain lines to a file that the job's terminal follows; silent where it has none (rank > 0)."""

    def __init__(self, path: Path | None) -> None:
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a")
        self._last_line = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._parts_s: Counter[str] = Counter()
        self.arithmetic: Arithmetic | None = None
        """What an image costs; set once the network is known."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def say(self, line: str) -> None:
        """Write one line."""
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()

    def iteration(
        self, stats: IterationStats, epoch: int, num_epochs: int, max_iterations: int, batch: int
    ) -> None:
        """Write where the training is, at most every PROGRESS_INTERVAL_S."""
        self._parts_s.update(stats.parts_s)
        now = time.monotonic()
        self._first = self._first or (now, stats.iteration)
        if now - self._last_line < PROGRESS_INTERVAL_S or stats.iteration == self._first[1]:
            return
        self._last_line = now
        seconds_each = (now - self._first[0]) / (stats.iteration - self._first[1])
        left = seconds_each * (max_iterations - stats.iteration - 1)
        self.say(
            f"epoch {epoch + 1}/{num_epochs}  iteration {stats.iteration + 1}/{max_iterations}  "
            f"loss {stats.loss:.4f}  lr {stats.lr:.5f}  {self._speed(batch / seconds_each)}  "
            f"{_shares(self._parts_s)}  ETA {_clock(left)}"
        )
        self._parts_s.clear()

    def epoch(self, metrics: Mapping[str, Any], num_epochs: int, seconds: float) -> None:
        """Write what an epoch ended with."""
        line = (
            f"epoch {metrics['epoch']}/{num_epochs} done in {seconds:.1f} s  loss {metrics['loss']:.4f}  "
            f"{self._speed(metrics['images_per_s'])}  {_shares(metrics['step_s'])}"
        )
        if "miou" in metrics:
            line += f"  val mIoU {metrics['miou']:.4f}  pixel accuracy {metrics['pixel_accuracy']:.4f}"
        self._last_line = time.monotonic()
        self.say(line)

    def _speed(self, images_per_s: float) -> str:
        text = f"{images_per_s:.1f} images/s"
        if self.arithmetic is None:
            return text
        rates = self.arithmetic.rates(images_per_s)
        if "mfu" in rates:
            return f"{text}  MFU {rates['mfu']:.1%}"
        return f"{text}  {rates['tflops_per_s']:.3g} TFLOP/s"


def _shares(parts_s: Mapping[str, float]) -> str:
    """Return each part's share of the steps' time, in whole percent."""
    whole = sum(parts_s.values()) or 1.0
    return "  ".join(f"{part} {seconds / whole:.0%}" for part, seconds in parts_s.items())


def read_outcome(run_dir: str | Path, attempt: str) -> Outcome | None:
    """Return how the attempt ended, or None while it has not."""
    try:
        outcome = Outcome(**json.loads((Path(run_dir) / OUTCOME_FILE).read_text()))
    except FileNotFoundError:
        return None
    return outcome if outcome.attempt == attempt else None


def record_outcome(run_dir: str | Path, outcome: Outcome) -> None:
    """Store how an attempt ended; the first record of an attempt stays."""
    if read_outcome(run_dir, outcome.attempt) is None:
        _write_atomically(Path(run_dir) / OUTCOME_FILE, json.dumps(asdict(outcome), indent=1).encode())


def reason_of(error: Exception) -> Reason | None:
    """Return the reason with which a training ends for good, or None where another try may do better.

    RuntimeError and OSError are what a peer's death, a broken connection or a full disk look like.
    """
    if isinstance(error, _AgreedError):
        return error.reason
    if isinstance(error, InputError):
        return "refused"
    if isinstance(error, DivergedError):
        return "diverged"
    if _is_out_of_memory(error):
        return "oom"
    if isinstance(error, RuntimeError | OSError | ray.exceptions.RayError):
        return None
    return "failed"


def message_of(error: Exception) -> str:
    """Return an error in one line, with its type where it is not meant for people."""
    if isinstance(error, InputError | DivergedError | _AgreedError):
        return str(error)
    if isinstance(error, ray.exceptions.RayTaskError):  # a remote traceback: its last line is the error
        return str(error).strip().splitlines()[-1]
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{line} {_MEMORY_REMEDY}" if _is_out_of_memory(error) else line


_MEMORY_REMEDY = (
    "Raise schedule.accumulation_steps or set workers.memory_gib (the global batch stays), set workers.recompute, "
    "lower data.crop_size."
)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class StoppedError(Exception):
    """Who hears the reports ended the training: every worker raises it from the same report."""


class _AgreedError(Exception):
    """An error that every worker of the group raises together."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@contextlib.contextmanager
def _agreed(place: Place) -> Iterator[None]:
    """Let all workers fail together where one fails for good in this block, which has no collective call."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if place.world_size == 1:
        if error is not None:
            raise error
        return
    reason = None if error is None else reason_of(error)
    if error is not None and reason is None:
        raise error
    mine = None if error is None else (reason, message_of(error))
    everyones: list[Any] = [None] * place.world_size
    dist.all_gather_object(everyones, mine)
    for theirs in everyones:
        if theirs is not None:
            raise _AgreedError(*theirs) from error


def _same_checkpoint(checkpoints_dir: Path, place: Place, *, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest good checkpoint of the run, the one that rank 0 chose, on every worker."""
    checkpoint = newest_good(checkpoints_dir, say=say) if place.rank == 0 else None
    if place.world_size == 1:
        return checkpoint
    chosen = [None if checkpoint is None else str(checkpoint.path)]
    dist.broadcast_object_list(chosen, src=0)
    if place.rank > 0 and chosen[0] is not None:
        checkpoint = load_checkpoint(chosen[0])
    return checkpoint


def _check_same_training(config: TrainingConfig, store_digest: str, checkpoint: Checkpoint) -> None:
    """Raise InputError where the checkpoint belongs to another training; other workers make no other one."""
    stored = from_json(TrainingConfig, json.dumps(checkpoint.state["config"]))
    changes = {
        path: value
        for path, value in differences(stored, config).items()
        if not path.startswith(("tracking.", "workers."))
        and path not in ("data.store", "data.num_prefetch_threads")
    }
    if checkpoint.state["store_digest"] != store_digest:
        changes["data.store"] = f"a store with digest {store_digest}"
    if changes:
        listed = ", ".join(f"{path} = {value}" for path, value in sorted(changes.items()))
        raise InputError(
            f"A run must go on with the configuration it began with, but {checkpoint.path.parent.parent} was "
            f"trained without {listed}. Give another --tracking.run-name, or delete that folder."
        )


def new_model(config: TrainingConfig, num_classes: int) -> PSPNet:
    """Return the network that `config.model` describes, with its initial weights, parts of it frozen."""
    model = network_of(config.model, num_classes)
    load_backbone_weights(model, config.model.backbone_weights)
    load_network_weights(model, config.model.weights)
    freeze(model, num_stages=config.model.freeze_stages, batch_norm=config.model.freeze_batch_norm)
    return model


def _arithmetic(config: TrainingConfig, model: PSPNet, place: Place) -> Arithmetic:
    """Return what a training image costs and what the devices of all workers, taken to be alike, could do."""
    peak = None
    if place.device.type == "cuda":
        peak = peak_flops(
            torch.cuda.get_device_name(place.device),
            config.workers.precision,
            is_tf32=torch.backends.cudnn.allow_tf32,
        )
    flops = training_flops(
        model,
        config.data.crop_size,
        num_frozen_stages=config.model.freeze_stages,
        frozen_batch_norm=config.model.freeze_batch_norm,
    )
    return Arithmetic(
        flops_per_image=flops, peak_flops=None if peak is None else peak * config.workers.num_workers
    )


def new_cross_entropy(
    config: TrainingConfig, store: Store, device: torch.device | str = "cpu"
) -> CrossEntropy:
    """Return the loss that `config.loss` describes; InputError where its weights do not fit the store's classes."""
    loss, names = config.loss, store.class_table.class_names
    weights = list(loss.class_weights)
    if loss.class_balance != "none":
        counts = store.manifest.class_counts(config.data.train_split)[:-1]
        weights = class_weights(counts, loss.class_balance)
    if weights and len(weights) != len(names):
        raise InputError(
            f"loss.class_weights must have one weight for each of the {len(names)} classes of the store, but got "
            f"{len(weights)}. The classes are, in this order: {', '.join(names)}."
        )
    return CrossEntropy(
        label_smoothing=loss.label_smoothing,
        class_weights=torch.tensor(weights, device=device) if weights else None,
        ohem_threshold=loss.ohem_threshold,
        ohem_min_kept=loss.ohem_min_kept,
    )


def _share_buffers(model: torch.nn.Module, place: Place) -> None:
    """Give every worker rank 0's running statistics: DDP itself shares them only before a training step."""
    if place.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def _dropout_seed(seed: int, epoch: int, rank: int) -> int:
    """Return what a worker seeds its dropout with in an epoch, so that no generator state need be stored."""
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1, np.uint64)[0] >> 1)


def _reported(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Ray is told: numbers that are finite, and where the checkpoint is."""
    return {name: value for name, value in metrics.items() if value is not None}


def _spread(num_images: int, num_wanted: int) -> list[int]:
    """Return up to `num_wanted` indices, evenly spread from the first image on."""
    return sorted({index * num_images // num_wanted for index in range(num_wanted)} & set(range(num_images)))


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)

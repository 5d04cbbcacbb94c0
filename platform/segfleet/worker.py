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
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.exceptions
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from pspnet.averaging import new_average
from pspnet.compilation import require_compiler
from pspnet.data import num_iterations, shard_indices, train_batches
from pspnet.distributed import parallelise, unwrapped
from pspnet.engine import evaluate, seed_everything, train_one_epoch
from pspnet.errors import InputError
from pspnet.memory import GIB
from pspnet.metrics import ConfusionMatrix
from pspnet.optim import build_optimizer, load_optimizer_state
from pspnet.recomputation import recompute_blocks
from pspnet.sampling import ClassUniform, class_uniform
from pspnet.sizes import sides
from pspnet.store import Store
from pspnet.training_stats import DivergedError, EpochPart, IterationStats, TrainStats
from pspnet.transforms import prepare_batch
from segfleet.building import arithmetic_of, new_cross_entropy, new_model
from segfleet.checkpoint import (
    PART_FOLDER,
    Checkpoint,
    checkpoint_path,
    finite,
    retain,
    save_checkpoint,
    space_warning,
)
from segfleet.config import TrainingConfig
from segfleet.config_json import from_json, to_json
from segfleet.continuation import check_same_training
from segfleet.faults import fault
from segfleet.memory import fit_note, fitted, peak_bytes, predicted
from segfleet.notice import Notice, epoch_part
from segfleet.outcome import (
    AgreedError,
    Outcome,
    StoppedError,
    message_of,
    read_outcome,
    reason_of,
    record_outcome,
    write_atomically,
)
from segfleet.place import Place, agreed, here, is_group_gone, same_checkpoint, share_buffers
from segfleet.progress_log import ProgressLog
from segfleet.run_pictures import draw, track
from segfleet.secret import masked, unmasked

if TYPE_CHECKING:
    from segfleet.run_writer import RunWriter
    from segfleet.system_metrics import SystemMetrics

Report = Callable[[dict[str, Any]], None]

PROGRESS_FILE = "progress.log"
SPOOL_FOLDER = "spool"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the trainer hands to every worker; JSON-able by `asdict`."""

    config_json: str
    run_dir: str
    """Absolute, on storage that every node sees."""
    run_id: str
    """MLflow run to write to; "" for none."""
    tracking_uri: str
    """Without its password, which is in the environment of the workers."""
    attempt: str
    """Names this call of `fit`: outcomes of earlier ones do not count."""


def train_worker(task_values: Mapping[str, Any]) -> None:
    """Train as the `Task` says, from the newest good checkpoint on, and record the `Outcome`.

    What cannot get better by trying again (refused, diverged, oom, a defect) is recorded before it is raised:
    the group that Ray Train starts in place of the failed one finds the record and ends at once.
    """
    execute(Task(**task_values), here(), report=ray.train.report)


def execute(task: Task, place: Place, *, report: Report) -> None:
    """Train as `train_worker`, wherever reports go; StoppedError passes through, and leaves no record."""
    if read_outcome(task.run_dir, task.attempt) is not None:
        return
    try:
        train(task, place, report=report)
    except StoppedError:
        raise
    except Exception as error:
        reason = None if is_group_gone(place) else reason_of(error)
        if reason is None:
            raise
        detail = masked("".join(traceback.format_exception(error)))
        record_outcome(
            task.run_dir,
            Outcome(attempt=task.attempt, reason=reason, message=message_of(error), detail=detail),
        )
        if isinstance(error, AgreedError | DivergedError):
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
        writer = system = None
        if place.rank == 0 and task.run_id:
            # MLflow takes seconds to import, and only this worker needs it
            from segfleet.run_writer import RunWriter
            from segfleet.system_metrics import SystemMetrics

            writer = stack.enter_context(
                contextlib.closing(
                    RunWriter(
                        unmasked(task.tracking_uri, "The tracking server"),
                        task.run_id,
                        run_dir / SPOOL_FOLDER,
                    )
                )
            )
            system = stack.enter_context(SystemMetrics())
        log = stack.enter_context(ProgressLog(run_dir / PROGRESS_FILE if place.rank == 0 else None))
        Training(config, task, place, log=log, writer=writer, system=system).run(report)


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
        system: "SystemMetrics | None" = None,
    ) -> None:
        self.task, self.place, self.log, self.writer, self.system = task, place, log, writer, system
        self.run_dir = Path(task.run_dir)
        with agreed(place):
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
            if config.model.freeze_stages and not (config.model.backbone_weights or config.model.weights):
                log.say(
                    f"warning: model.freeze_stages {config.model.freeze_stages} keeps random weights, since neither "
                    "model.backbone_weights nor model.weights is given"
                )
            self.model.to(place.device)
            if config.workers.recompute:
                recompute_blocks(self.model)
            if config.workers.compile:
                require_compiler(place.device)
            self.arithmetic = arithmetic_of(config, self.model, place.device, place.world_size)
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
        if place.rank == 0 and (
            warning := space_warning(self.run_dir / "checkpoints", self._checkpoint_bytes())
        ):
            log.say(warning)
        self.notice = Notice(place.taken_back_at, asks=place.rank == 0)
        self._epochs_done = 0
        self._begun: EpochPart | None = None
        """What a checkpoint has of the epoch after these."""
        self._scaler_state: dict[str, float | int] = {}
        self._useful_s = 0.0
        checkpoint = same_checkpoint(self.run_dir / "checkpoints", place, say=log.say)
        with agreed(place):
            self.last_metrics = None if checkpoint is None else self._resume(checkpoint)
        self._report_wait_s: float | None = None

    def run(self, report: Report) -> None:
        """Train the epochs that are left; each evaluated one is checkpointed, tracked, and then reported.

        The epoch that was resumed from is tracked and reported again: its worker may have died in between.
        Whoever ends this attempt from outside records its outcome: nothing is kept of an epoch after that.
        """
        if self.place.rank == 0:
            self._track_config()
        if self.config.workers.min_workers:
            size, workers = self.place.world_size, self.config.workers.num_workers
            parts = self.config.accumulation_steps_of(size)
            self.log.say(f"with {size} of {workers} workers, each its share of a batch in {parts} parts")
        useful_s_at_start = 0.0
        if self.last_metrics is not None:
            useful_s_at_start = self.last_metrics.get("useful_s", 0.0)
            self._track(self.last_metrics)
            self._report(report, self.last_metrics | {"useful_s_at_start": useful_s_at_start})
        num_epochs = self.config.schedule.num_epochs
        for epoch in range(self._epochs_done, num_epochs):
            begun, self._begun = self._begun, None
            started = time.monotonic() - (0.0 if begun is None else begun.seconds)
            stats = self._train_epoch(epoch, begun)
            self._scaler_state = stats.scaler
            is_last = epoch + 1 == num_epochs
            metrics = self._training_metrics(epoch + 1, stats)
            if self.system is not None:
                metrics["system"] = self.system.take()
            if not is_last and (epoch + 1) % self.config.schedule.evaluate_every_epochs:
                self._track(metrics)
                self.log.epoch(metrics, num_epochs, time.monotonic() - started)
                self._useful_s += time.monotonic() - started
                continue
            confusion = self._evaluate()
            metrics |= self._validation_metrics(confusion) | {
                "is_last": is_last,
                "checkpoint_path": str(checkpoint_path(self.run_dir / "checkpoints", epoch + 1)),
            }
            if self._is_ended():
                return
            self._useful_s += time.monotonic() - started
            metrics |= {"useful_s": self._useful_s, "useful_s_at_start": useful_s_at_start}
            metrics |= {"report_wait_s": self._report_wait_s}  # of the report before this one
            metrics["history"] = [*self._history, [epoch + 1, metrics["miou"]]]
            if self.place.rank == 0:
                self._save(metrics)
                self._track(metrics)
                draw(
                    self.run_dir,
                    self.evaluated_model,
                    self.store,
                    self.val_split,
                    confusion,
                    metrics,
                    device=self.place.device,
                    writer=self.writer,
                )
            self.log.epoch(metrics, num_epochs, time.monotonic() - started)
            self.last_metrics = metrics
            self._report(report, metrics)

    def _report(self, report: Report, metrics: Mapping[str, Any]) -> None:
        """Report, and measure how long it took whoever decides to let this training go on."""
        started = time.monotonic()
        report(_reported(metrics))
        self._report_wait_s = time.monotonic() - started

    def _fitted(self, config: TrainingConfig) -> TrainingConfig:
        """Return `config` with as many accumulation steps as its memory asks for, and say so."""
        if not config.workers.memory_gib:
            return config
        num_classes = self.store.class_table.num_classes
        chosen = fitted(config, num_classes)
        peak = peak_bytes(chosen, predicted(chosen, num_classes)) / GIB
        note = fit_note(chosen)
        self.log.say(
            f"memory: {peak:.2f} GiB predicted of {config.workers.memory_gib:g}, {chosen.micro_batch_size} images at a "
            f"time in {chosen.schedule.accumulation_steps} accumulation steps{note and f'; {note}'}"
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

    def _resume(self, checkpoint: Checkpoint) -> dict[str, Any] | None:
        """Take over the checkpoint's weights and optimizer state; return the metrics of its last whole epoch."""
        check_same_training(self.config, self.store, checkpoint)
        self.model.load_state_dict(checkpoint.trained_state)
        load_optimizer_state(self.optimizer, checkpoint.optimizer_state)
        if self.average is not None:
            self.evaluated_model.load_state_dict(checkpoint.model_state)
            self.average.n_averaged.fill_(checkpoint.state["iteration"])
        self._epochs_done = checkpoint.state["epoch"]
        self._scaler_state = checkpoint.state.get("scaler", {})
        metrics: dict[str, Any] = checkpoint.state["metrics"]
        self._useful_s = checkpoint.state.get("useful_s", metrics.get("useful_s", 0.0))
        where = f"after epoch {self._epochs_done}"
        if "part" in checkpoint.state:
            self._begun = epoch_part(checkpoint.state["part"])
            where += f" and {self._begun.iterations} of {self.iterations_per_epoch} iterations"
        self.log.say(f"resumed {where} from {checkpoint.path}")
        return metrics or None

    def _train_epoch(self, epoch: int, begun: EpochPart | None) -> TrainStats:
        data, schedule, optim = self.config.data, self.config.schedule, self.config.optim
        num_begun = 0 if begun is None else begun.iterations
        self._seed_dropout(epoch * self.iterations_per_epoch + num_begun)
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
            start_iteration=num_begun,
            max_iterations=self.iterations_per_epoch,
            num_prefetch_threads=data.num_prefetch_threads,
        )
        max_iterations = self.iterations_per_epoch * schedule.num_epochs

        def on_iteration(stats: IterationStats) -> None:
            self.log.iteration(stats, epoch, schedule.num_epochs, max_iterations, schedule.global_batch_size)
            self._seed_dropout(stats.iteration + 1)
            fault("training.step")

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
            accumulation_steps=self.config.accumulation_steps_of(self.place.world_size),
            max_gradient_norm=optim.max_gradient_norm,
            warm_up_iterations=optim.warm_up_iterations,
            warm_up_start=optim.warm_up_start,
            cross_entropy=self.cross_entropy,
            average=self.average,
            on_iteration=on_iteration,
            scaler_state=self._scaler_state,
            begun=begun,
            is_called=self.notice.is_due,
            on_call=lambda part: self._save_part(epoch, part),
        )

    def _seed_dropout(self, iteration: int) -> None:
        """Seed what is dropped in an iteration, so that no generator's state need be stored."""
        schedule = self.config.schedule
        torch.manual_seed(_dropout_seed(schedule.seed, iteration, self.place.rank))

    def _save_part(self, epoch: int, part: EpochPart) -> None:
        """Save the training as it is in the midst of an epoch, if a node of its group is to be taken back."""
        if not self.notice.hears() or self.place.rank != 0:
            return
        iteration = epoch * self.iterations_per_epoch + part.iterations
        with self.notice.saving():
            try:
                path = self._write_checkpoint(
                    self.run_dir / "checkpoints" / PART_FOLDER,
                    {
                        "epoch": epoch,
                        "iteration": iteration,
                        "metrics": self.last_metrics or {},
                        "useful_s": self._useful_s,
                        "part": asdict(part),
                    },
                )
            except OSError as error:  # the last whole one is still there
                self.log.say(f"notice: iteration {iteration} could not be saved: {error}")
                return
        self.log.say(
            f"notice: a node is taken back {self.notice.when}; saved iteration {iteration} to {path}"
        )
        if idle_s := self.notice.seconds_idle():
            self.log.say(f"notice: no time for another step; waiting up to {idle_s:.0f} s for other nodes")
            time.sleep(idle_s)

    def _evaluate(self) -> ConfusionMatrix:
        """Return the counts of the whole validation split, each image once, by rank 0's statistics."""
        share_buffers(self.evaluated_model, self.place)
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
        state = {
            "epoch": metrics["epoch"],
            "iteration": metrics["iteration"],
            "metrics": metrics,
            "scaler": self._scaler_state,
        }
        retain(self._write_checkpoint(metrics["checkpoint_path"], state).parent)

    def _checkpoint_bytes(self) -> int:
        """Return about how large a checkpoint is: the weights, their average if there is one, and momentum."""
        weights = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        momentum = sum(parameter.nbytes for parameter in self.model.parameters() if parameter.requires_grad)
        return weights * (1 if self.average is None else 2) + momentum

    def _write_checkpoint(self, folder: str | Path, state: Mapping[str, Any]) -> Path:
        return save_checkpoint(
            folder,
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
                **state,
            },
        )

    def _track_config(self) -> None:
        path = self.run_dir / "config.json"
        write_atomically(path, to_json(self.config).encode())
        if self.writer is not None:
            self.writer.log_artifact(path, "")

    def _track(self, metrics: Mapping[str, Any]) -> None:
        if self.writer is not None:
            track(self.writer, metrics)


def _dropout_seed(seed: int, iteration: int, rank: int) -> int:
    """Return what a worker seeds its dropout with in an iteration."""
    return int(np.random.SeedSequence([seed, iteration, rank]).generate_state(1, np.uint64)[0] >> 1)


def _reported(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Ray is told: numbers that are finite, and where the checkpoint is."""
    return {name: value for name, value in metrics.items() if value is not None}

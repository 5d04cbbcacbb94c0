"""One training on the cluster: from a configuration to a result with a reason, a run and a checkpoint.

Ray Train starts the workers and replaces dead ones. It is handed no checkpoint: ours lie in the run's folder,
and a worker group resumes from the newest of them that passes its verification.
"""

import contextlib
import json
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray.exceptions
import ray.train
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from pspnet.data import num_iterations
from pspnet.errors import InputError
from pspnet.metrics import constant_miou
from pspnet.model import refuse_single_values
from pspnet.sizes import sides
from pspnet.store import Store
from segfleet import cluster, lease, registry, tracking, tracking_server
from segfleet.building import new_cross_entropy, sizes_of_model
from segfleet.checkpoint import STATE_FILE, best_checkpoint, checkpoint_folders
from segfleet.config import TrainingConfig
from segfleet.config_json import digest, to_json, without_passwords
from segfleet.faults import fault
from segfleet.interruption import known_interruption
from segfleet.memory import fitted
from segfleet.outcome import Outcome, Reason, message_of, read_outcome, record_outcome, write_atomically
from segfleet.override import flat, override
from segfleet.package import package_model
from segfleet.protocol import Protocol, protocol_tags, training_protocol
from segfleet.ray_train import GroupTrainer, is_killed_for_memory
from segfleet.run_pictures import PANEL_FILE, TABLE_TAG, track
from segfleet.run_writer import RunWriter, end_run, killed_when_interrupted
from segfleet.secret import masked, secrets_of
from segfleet.torsos import set_aside
from segfleet.worker import PROGRESS_FILE, SPOOL_FOLDER, Task, train_worker

_DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
"""What Ray Train names as the cause where a worker's process or node is gone, or answers no more."""

RESIZE_CHECK_S = 60.0
"""How often a group that is smaller than it might be is compared with what the cluster has."""
FOLLOW_INTERVAL_S = 0.2
KEY_CHARACTERS = 32


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a training ended and what it left."""

    reason: Reason
    """complete; pruned (ended from outside, see `stop`); diverged (loss not finite); oom; refused (input cannot
    be used); failed (a defect, or a fault that came again); lost (workers died more often than
    workers.max_failures)."""

    message: str
    """One line on the reason, empty for complete."""

    run_id: str
    """MLflow run, "" where none was asked for."""

    epochs: int
    """Epochs trained, as of the newest checkpoint."""

    miou: float | None
    """Validation mIoU of the newest checkpoint; None where there is none."""

    class_iou: dict[str, float]
    """IoU of each class that occurs."""

    checkpoint_path: Path | None
    """Newest checkpoint."""

    best_checkpoint_path: Path | None
    """Checkpoint with the highest validation mIoU."""

    panel_path: Path | None
    """Picture: image | label | prediction | error for fixed validation images."""

    baseline: str = ""
    """What the most frequent training class, predicted everywhere, scores on the same images."""

    protocol: Protocol | None = None
    """How `miou` was measured."""

    model_version: str = ""
    """models:/name/version in the registry, "" where none was registered."""


def run_training(config: TrainingConfig) -> TrainingResult:
    """Train `config` on the cluster at RAY_ADDRESS or a local one, under one MLflow run per run folder.

    The same command goes on after any interruption. Raises InputError for what a person can mend, HeldError where
    another process trains in the folder.
    """
    config = resolve(config)
    model_name = config.tracking.registered_model_name
    if model_name:
        registry.check_name(model_name)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cluster.joined(config))
        store = check_data(config)
        uri = tracking_server.resolve_uri(config.tracking)
        tracking_server.check_server(uri)
        name = run_name(config)
        run_dir = run_folder(config, name)
        stack.enter_context(lease.held(run_dir, f"training {name}"))
        shutil.rmtree(run_dir / "ray", ignore_errors=True)  # of a process that died
        stack.enter_context(cluster.connect(config.tracking.storage_dir))
        run_id = tracking.open_run(
            config.tracking,
            run_name=name,
            key=_run_key(run_dir),
            parent_run_id=None,
            tags={
                "segfleet.config_digest": digest(config),
                **TABLE_TAG,
                "mlflow.note.content": _described(config, store),
                **protocol_tags(training_protocol(config, store.digest)),
            },
            params={path: value for path, value in flat(config).items() if not path.startswith("tracking.")},
        )
        with killed_when_interrupted(uri, run_id):
            tracking.log_dataset(
                uri,
                run_id,
                name=store.manifest.name,
                digest=store.digest,
                source=config.data.store,
                splits={
                    split: store.manifest.num_images(split)
                    for split in (config.data.train_split, config.data.val_split)
                },
            )
            print(f"run {name}  MLflow run {run_id}  folder {run_dir}", flush=True)
            with follow(run_dir / PROGRESS_FILE):
                result = fit(build_trainer(config, name=name, run_id=run_id))
            fault("run.trained")
            result = replace(
                result, baseline=baseline(config, store), protocol=training_protocol(config, store.digest)
            )
            end_run(
                uri,
                run_id,
                status="FINISHED" if result.reason == "complete" else "FAILED",
                tags={"segfleet.reason": result.reason, "segfleet.message": result.message},
                spool_dir=spool_dir(config, name),
            )
        if result.reason == "refused":
            raise InputError(result.message)
        if model_name and result.reason == "complete" and result.best_checkpoint_path is not None:
            package = package_model(result.best_checkpoint_path, run_dir / "package", run_id=run_id)
            version = registry.register(uri, model_name, package, run_id=run_id)
            result = replace(result, model_version=f"models:/{model_name}/{version}")
    return result


def build_trainer(
    config: TrainingConfig,
    *,
    name: str,
    run_id: str,
    attempt: str = "",
) -> TorchTrainer:
    """Return the trainer of `config` whose checkpoints lie in <storage_dir>/<name>; `fit` runs it.

    `run_id` is the MLflow run to write to ("" for none). `attempt`, unique to this call, is what `stop` ends it by.
    """
    config = resolve(config)
    task = new_task(config, name=name, run_id=run_id, attempt=attempt or uuid.uuid4().hex[:12])
    return train_run(
        config,
        train_worker,
        asdict(task),
        name=task.attempt,
        storage_path=str(Path(task.run_dir) / "ray"),
        max_failures=config.workers.max_failures,
    )


def new_task(config: TrainingConfig, *, name: str, run_id: str, attempt: str) -> Task:
    """Return what workers are told of the training `name`, whose paths are absolute."""
    return Task(
        config_json=to_json(without_passwords(config)),
        run_dir=str(run_folder(config, name)),
        run_id=run_id,
        tracking_uri=masked(tracking_server.resolve_uri(config.tracking)) if run_id else "",
        attempt=attempt,
    )


def train_run(
    config: TrainingConfig,
    worker: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    *,
    name: str,
    storage_path: str,
    max_failures: int,
) -> TorchTrainer:
    """Return the Ray Train run of `worker(settings)` in the processes that `config.workers` asks for."""
    cluster.tune_ray()
    workers = config.workers
    return GroupTrainer(
        _knowing(secrets_of(os.environ, config.tracking.tracking_uri), worker),
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=(workers.min_workers, workers.num_workers)
            if workers.min_workers
            else workers.num_workers,
            elastic_resize_monitor_interval_s=RESIZE_CHECK_S,
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.cpus_per_worker} | ({"GPU": 1} if workers.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=max_failures),
            worker_runtime_env={"env_vars": cluster.worker_environment(config)},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _knowing(
    secrets: Mapping[str, str], worker: Callable[[dict[str, Any]], None]
) -> Callable[[dict[str, Any]], None]:
    """Return `worker` with what is secret in its environment: Ray keeps its settings, not the function itself."""

    def run(settings: dict[str, Any]) -> None:
        os.environ.update(secrets)
        worker(settings)

    return run if secrets else worker


def fit(trainer: TorchTrainer) -> TrainingResult:
    """Run the trainer to its end and say how it ended; never raises for what happens in the workers."""
    task = Task(**(trainer.train_loop_config or {}))
    error: Exception | None = None
    try:
        with known_interruption():
            trainer.fit()
    except (
        ray.train.TrainingFailedError,
        ray.exceptions.RayError,
    ) as raised:  # the second: its controller died
        error = raised
    outcome = read_outcome(task.run_dir, task.attempt)
    if outcome is None:
        outcome = outcome_of(error, task)
        record_outcome(task.run_dir, outcome)
    shutil.rmtree(Path(task.run_dir) / "ray" / task.attempt, ignore_errors=True)
    return _result(task, outcome)


def stop(config: TrainingConfig, *, name: str, attempt: str, message: str) -> None:
    """End an attempt of the training `name` as pruned: its workers leave after the epoch they are in."""
    folder = run_folder(config, name)
    record_outcome(folder, Outcome(attempt=attempt, reason="pruned", message=message))


def summary(result: TrainingResult) -> str:
    """Return what a person wants to know of a training that ended, one fact a line."""
    lines = [f"ended: {result.reason}" + (f" ({result.message})" if result.message else "")]
    if result.miou is not None:
        worst = sorted(result.class_iou.items(), key=lambda item: item[1])[:3]
        lines += [
            f"mIoU {result.miou:.4f} after {result.epochs} epochs ({result.baseline})",
            *([f"protocol: {result.protocol.digest}: {result.protocol}"] if result.protocol else []),
            "weakest classes: " + ", ".join(f"{name} {iou:.3f}" for name, iou in worst),
        ]
    named = {
        "checkpoint": result.checkpoint_path,
        "best checkpoint": result.best_checkpoint_path,
        "picture": result.panel_path,
        "MLflow run": result.run_id,
        "registered": result.model_version,
    }
    return "\n".join([*lines, *(f"{name}: {value}" for name, value in named.items() if value)])


def resolve(config: TrainingConfig) -> TrainingConfig:
    """Return `config` with the paths that workers on other nodes, in other folders, need."""
    return override(
        config,
        {
            "data.store": cluster.absolute_location(config.data.store, "data.store")
            if config.data.store
            else "",
            "tracking.storage_dir": str(
                cluster.absolute_path(config.tracking.storage_dir, "tracking.storage_dir")
            ),
        },
    )


def open_store(config: TrainingConfig) -> Store:
    """Return the store; InputError where none is named or there is none."""
    if not config.data.store:
        raise InputError(
            "data.store must be an ingested data set, but none was given. "
            "Make one with jobs/ingest_*.py and give it as --data.store FOLDER."
        )
    return Store.open(config.data.store)


def check_data(config: TrainingConfig) -> Store:
    """Return the store; InputError where it, the crop, the batch or the backbone's weights cannot be used."""
    data, store = config.data, open_store(config)
    manifest = store.manifest
    for split in (data.train_split, data.val_split):
        store.check_split(split)
    num_val = manifest.num_images(data.val_split)
    if not num_val:
        raise InputError(
            f"data.val_split must hold images, but {data.val_split!r} is empty. Give another split."
        )
    if num_unlabelled := manifest.num_unlabelled(data.val_split):
        raise InputError(
            f"data.val_split must be labelled throughout, but {num_unlabelled} of {num_val} images of "
            f"{data.val_split!r} have no label. Give another split."
        )
    per_epoch = num_iterations(
        manifest.num_images(data.train_split),
        config.schedule.global_batch_size,
        config.schedule.max_iterations_per_epoch,
    )
    warm_up, num_epochs = config.optim.warm_up_iterations, config.schedule.num_epochs
    if warm_up >= per_epoch * num_epochs:
        raise InputError(
            f"optim.warm_up_iterations must be below the {per_epoch * num_epochs} iterations of the training "
            f"({num_epochs} epochs of {per_epoch}), or the scheduled rate is never reached, but got {warm_up}. "
            "Warm up for fewer, or raise schedule.num_epochs."
        )
    largest = manifest.largest_side(data.train_split)
    if max(sides(data.crop_size)) > largest * data.max_scale:
        below = max(33, (int(largest * data.max_scale) - 1) // 8 * 8 + 1)
        raise InputError(
            f"data.crop_size must fit into the largest training image at data.max_scale ({largest} pixels x "
            f"{data.max_scale}), but got {data.crop_size}. At most {below} does."
        )
    new_cross_entropy(config, store)
    config = fitted(config, store.class_table.num_classes)
    model = sizes_of_model(config, store.class_table.num_classes)
    is_ddp_on_gpus = config.workers.use_gpu and config.workers.num_workers > 1
    if not is_ddp_on_gpus or config.model.norm == "batch":  # others use SyncBatchNorm
        refuse_single_values(model, config.micro_batch_size)
    return store


def baseline(config: TrainingConfig, store: Store) -> str:
    """Return, in words, the mIoU of predicting the most frequent training class on the validation split."""
    train_counts = store.manifest.class_counts(config.data.train_split)[:-1]
    train_id = train_counts.index(max(train_counts))
    miou = constant_miou(store.manifest.class_counts(config.data.val_split)[:-1], train_id)
    return f"{store.class_table.class_names[train_id]} everywhere: {miou:.4f}"


def _described(config: TrainingConfig, store: Store) -> str:
    """Return what the tracking server's page says of the run at first sight."""
    data, schedule = config.data, config.schedule
    return (
        f"{config.model.backbone}, crop {data.crop_size}, {schedule.num_epochs} epochs of batch "
        f"{schedule.global_batch_size}, base_lr {config.optim.base_lr:g}, on {data.train_split} of "
        f"{store.manifest.name}, scored on {data.val_split}."
    )


def run_folder(config: TrainingConfig, name: str) -> Path:
    """Return the folder of all that the training `name` leaves: see worker.py."""
    return Path(config.tracking.storage_dir) / name


def spool_dir(config: TrainingConfig, name: str) -> Path:
    """Return where the training `name` keeps what the tracking server has not got yet."""
    return run_folder(config, name) / SPOOL_FOLDER


def complete_record(config: TrainingConfig, *, name: str, run_id: str) -> list[list[float]]:
    """Track what the newest checkpoint of the ended training `name` holds, and return its evaluations.

    A worker that is stopped between a checkpoint and its report leaves an epoch that nobody heard of.
    Returns [epoch, mIoU] of every evaluation; nothing where there is no readable checkpoint.
    """
    folder = run_folder(config, name)
    try:
        newest = checkpoint_folders(folder / "checkpoints")[-1]
        metrics = json.loads((newest / STATE_FILE).read_text())["metrics"]
        evaluations: list[list[float]] = metrics["history"]
    except (IndexError, OSError, ValueError, KeyError):
        return []
    uri = tracking_server.resolve_uri(config.tracking)
    with contextlib.closing(RunWriter(uri, run_id, spool_dir(config, name))) as writer:
        track(writer, metrics)
    return evaluations


def run_name(config: TrainingConfig) -> str:
    """Return the name of the run and its folder: the one asked for, or the experiment's and the digest."""
    return config.tracking.run_name or f"{config.tracking.experiment_name}-{digest(config)}"


@contextlib.contextmanager
def follow(path: Path) -> Iterator[None]:
    """Print the lines that appear in the file at `path` meanwhile."""
    start = path.stat().st_size if path.exists() else 0
    is_over = threading.Event()

    def copy() -> None:
        position, last_round = start, False
        while not last_round:
            last_round = is_over.wait(FOLLOW_INTERVAL_S)
            if not path.exists():
                continue
            with path.open() as file:
                file.seek(position)
                text = file.read()
                position = file.tell()
            sys.stdout.write(text)
            sys.stdout.flush()

    thread = threading.Thread(target=copy, name="follow-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def outcome_of(error: Exception | None, task: Task) -> Outcome:
    """Return the outcome of an attempt whose workers left no record."""
    causes = [
        getattr(cause, "_base_exc", cause)  # what the worker raised, without Ray's wrapper
        for cause in getattr(error, "worker_failures", {}).values()
    ]
    if isinstance(error, ray.train.ControllerError):
        causes = [error.controller_failure]
    reason: Reason = "failed"
    if isinstance(error, ray.exceptions.RayError):
        causes = [error]
    if not causes or any(isinstance(cause, _DEATHS) for cause in causes):
        reason = "lost"
    if is_killed_for_memory(error):
        reason = "oom"
    return Outcome(
        attempt=task.attempt,
        reason=reason,
        message=message_of(causes[0]) if causes else "the workers ended without a word",
        detail=str(error or ""),
    )


def _result(task: Task, outcome: Outcome) -> TrainingResult:
    run_dir = Path(task.run_dir)
    folders = [folder for folder in checkpoint_folders(run_dir / "checkpoints") if _has_state(folder)]
    metrics: dict[str, Any] = {}
    if folders:
        metrics = json.loads((folders[-1] / STATE_FILE).read_text())["metrics"]
    panel_path = run_dir / PANEL_FILE
    return TrainingResult(
        reason=outcome.reason,
        message=outcome.message,
        run_id=task.run_id,
        epochs=metrics.get("epoch", 0),
        miou=metrics.get("miou"),
        class_iou={name: iou for name, iou in metrics.get("class_iou", {}).items() if iou is not None},
        checkpoint_path=folders[-1] if folders else None,
        best_checkpoint_path=best_checkpoint(run_dir / "checkpoints"),
        panel_path=panel_path if panel_path.exists() else None,
    )


def _has_state(checkpoint: Path) -> bool:
    """Whether the checkpoint's description can be read: a damaged one is passed over."""
    try:
        return "metrics" in json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError):
        return False


def _run_key(run_dir: Path) -> str:
    """Return what ties the MLflow run to this folder for ever: a deleted folder begins a new run."""
    path, start = run_dir / "run_key", f"training/{run_dir.name}/"
    if path.exists():
        key = path.read_text(errors="replace")
        if len(key) == len(start) + KEY_CHARACTERS:
            return key
        set_aside(path, f"{len(key)} characters")
    write_atomically(path, f"{start}{uuid.uuid4().hex}".encode())
    return path.read_text()

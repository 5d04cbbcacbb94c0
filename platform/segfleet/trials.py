"""The trials of a search: Ray Tune executes them, the study decides, MLflow remembers.

Tune keeps nothing that is needed: after any death the same call starts a fresh Tuner, finished trials are not run
again and unfinished ones go on from their checkpoint under the same MLflow run.
"""

import contextlib
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.train._internal.storage import _get_ray_train_session_dir
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pspnet.errors import InputError
from pspnet.store import Store
from segfleet import cluster, groups, ledger, tracking, tracking_server, trainer
from segfleet.checkpoint import best_checkpoint
from segfleet.config import TrainingConfig
from segfleet.config_json import without_passwords
from segfleet.faults import fault
from segfleet.interruption import heard, known_interruption
from segfleet.memory import fitted
from segfleet.override import flat, override
from segfleet.protocol import protocol_tags, training_protocol
from segfleet.run_pictures import TABLE_TAG
from segfleet.run_writer import end_run
from segfleet.search_config import SearchConfig
from segfleet.study import FINALIST_OF, Proposal, Reason, Study
from segfleet.trial import Trial

DRIVER_RESOURCES = {"memory": 1.0}
"""What a trial's driver reserves: one byte, since Tune insists on something and a CPU would be missing to a worker."""

os.environ.setdefault(
    "RAY_AIR_NEW_OUTPUT", "0"
)  # else Tune announces folders that are gone when a search has ended
os.environ.setdefault(
    "TUNE_DISABLE_SIGINT_HANDLER", "1"
)  # else its search returns at Ctrl-C as if it were through

MAX_DRIVER_FAILURES = 3
"""How often a trial's process in Tune, which only passes reports on, is started again."""


def train_trials(
    config: SearchConfig, study: Study, store: Store, parent_run_id: str, *, word: str = "trial"
) -> int:
    """Run the trials that are left on the connected cluster and return how many that were."""
    study_dir = Path(config.training.tracking.storage_dir).resolve() / study.name
    for left in study_dir.glob("ray-*"):  # of a process that died
        _remove_files_of(left)
    complete_runs(config, study, parent_run_id)
    waiting = study.unfinished()
    num_trials = len(waiting) + study.num_left()
    if num_trials == 0:
        print(
            f"study {study.name}: all {study.num_wanted} {word}s are finished, nothing to train", flush=True
        )
        return 0
    num_concurrent = cluster.max_concurrent_trials(config.training)
    if config.max_concurrent_trials:
        num_concurrent = min(num_concurrent, config.max_concurrent_trials)
    print(
        f"study {study.name}: {num_trials} of {study.num_wanted} {word}s to train ({len(waiting)} resumed), "
        f"{num_concurrent} at a time, {config.training.workers.num_workers} workers each",
        flush=True,
    )
    ray_dir = study_dir / f"ray-{uuid.uuid4().hex[:8]}"
    execution = _Execution(config, study, store, parent_run_id, ray_dir / "groups", word)
    tuner = tune.Tuner(
        tune.with_resources(Trial, DRIVER_RESOURCES),
        tune_config=tune.TuneConfig(
            search_alg=_StudySearcher(execution, waiting),
            scheduler=_StudyScheduler(execution),
            num_samples=num_trials,
            max_concurrent_trials=num_concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=ray_dir.name,
            storage_path=str(ray_dir),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=MAX_DRIVER_FAILURES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    try:
        with known_interruption():
            tuner.fit()
        if study.num_left() or any(trial.reason == "running" for trial in study.trials()):
            raise KeyboardInterrupt  # SIGUSR1, at which Tune returns as if it were through
    except KeyboardInterrupt as interruption:
        heard(interruption)
        with contextlib.suppress(Exception):  # a study's database that is away must not take its place
            execution.close(at_once=True)
        raise
    finally:
        execution.close()
        _remove_files_of(ray_dir)
    return num_trials


def _remove_files_of(ray_dir: Path) -> None:
    """Remove Tune's folder, and the one of the same name that it filled in Ray's session on this node.

    Tune leaves the latter, some files for each trial, for as long as the cluster lives.
    """
    shutil.rmtree(ray_dir, ignore_errors=True)
    for staged in Path(_get_ray_train_session_dir()).glob(f"*/{ray_dir.name}"):
        shutil.rmtree(staged, ignore_errors=True)
        with contextlib.suppress(OSError):
            staged.parent.rmdir()  # that of the second in which it began; another search may have begun in it


class _Execution:
    """What happens to the study, the runs and the terminal when Tune's trials begin, report and end."""

    def __init__(
        self,
        config: SearchConfig,
        study: Study,
        store: Store,
        parent_run_id: str,
        groups_path: Path,
        word: str = "trial",
    ) -> None:
        self._config = config
        self._word = word
        self._groups_path = groups_path
        self._groups: dict[str, ActorHandle] = {}
        self._held_since: dict[str, float] = {}
        self._free: list[str] = []
        self._study = study
        self._store = store
        self._parent_run_id = parent_run_id
        self._settings: dict[int, dict[str, str]] = {}
        self._attempts: dict[int, list[ledger.Attempt]] = {}
        self._pruned: dict[int, str] = {}

    def next_proposal(self) -> Proposal | None:
        return self._study.ask() if self._study.num_left() else None

    def begin(self, proposal: Proposal) -> dict[str, Any] | None:
        """Open the trial's run and return what `_run_trial` needs; None where its point cannot be trained."""
        number, name = proposal.number, _trial_name(self._study, proposal.number)
        try:
            config = override(
                self._config.training,
                {
                    **proposal.changes,
                    **self._study.schedule_of(proposal.changes),
                    "tracking.run_name": name,
                    "tracking.registered_model_name": "",
                },
            )
            fitted(config, self._store.class_table.num_classes)
        except InputError as error:  # settings that are possible one by one, but not together
            self._study.finish(number, "refused", str(error))
            print(f"{self._word} {number} refused: {error}", flush=True)
            return None
        attributes = self._study.trials()[number].attributes
        point = ", ".join(
            f"{path.split('.')[-1]} {_short(value)}" for path, value in proposal.changes.items()
        )
        run_id = tracking_server.patiently(lambda: self._open_run(config, number, name, point))
        fault("trial.opened")
        self._study.note(number, {"run_id": run_id})
        fault("trial.noted")
        print(f"{self._word} {number} {'goes on' if proposal.is_resumed else 'starts'}: {point}", flush=True)
        known = attributes.get(ledger.ATTEMPTS, [])
        self._attempts[number] = ledger.begun(known, time.time())
        self._study.note(number, {ledger.ATTEMPTS: self._attempts[number]})
        attempt = uuid.uuid4().hex[:12]
        self._settings[number] = {
            "name": name,
            "run_id": run_id,
            "attempt": attempt,
            "group": self._free_group(),
        }
        task = trainer.new_task(config, name=name, run_id=run_id, attempt=attempt)
        return {"number": number, "group": self._settings[number]["group"], "task": asdict(task)}

    def _open_run(self, config: TrainingConfig, number: int, name: str, point: str) -> str:
        finalist = self._study.trials()[number].attributes.get(FINALIST_OF)
        kind = {"segfleet.kind": "trial"}
        if finalist is not None:
            kind = {"segfleet.kind": "finalist", "segfleet.finalist_of": str(finalist)}
        run_id = tracking.open_run(
            config.tracking,
            run_name=_run_name(name),
            key=f"{self._study.key}/{number}",
            parent_run_id=self._parent_run_id,
            tags={
                **kind,
                "segfleet.study": self._study.name,
                "segfleet.trial": str(number),
                **TABLE_TAG,
                "mlflow.note.content": f"Trial {number} of study {self._study.name}: {point}.",
                **protocol_tags(training_protocol(config, self._store.digest)),
            },
            params=shown_params(config),
        )
        log_dataset(config, self._store, run_id)
        return run_id

    def close(self, *, at_once: bool = False) -> None:
        """End the groups of workers, and what they train."""
        for actor in self._groups.values():
            if at_once:
                ray.kill(actor)
            else:
                groups.close(actor)
        ended = [*self._groups]
        self._groups.clear()
        if ended:
            self._note_groups(ended)

    def _free_group(self) -> str:
        """Return a group of workers that no trial has, started if need be."""
        if not self._free:
            begun = time.time()
            name, actor = groups.start(self._config.training, self._groups_path)
            self._groups[name], self._held_since[name] = actor, begun
            self._free.append(name)
        return self._free.pop()

    def _note_groups(self, names: Iterable[str]) -> None:
        """Note that the groups are held until now."""
        now = time.time()
        self._study.note_groups({name: (self._held_since[name], now) for name in names})

    def report(self, number: int, result: dict[str, Any]) -> bool:
        """Store what a trial reported and return whether it stops."""
        if "miou" not in result or not math.isfinite(result["miou"]):
            return False
        self._see(number, result)
        self._catch_up(number, result["history"][:-1])
        epoch, miou = int(result["epoch"]), float(result["miou"])
        decision = self._study.report(number, epoch=epoch, miou=miou)
        fault("trial.reported")
        said = f"mIoU {miou:.4f}"
        if decision.reason:
            said = decision.reason if said in decision.reason else f"{said} - {decision.reason}"
        print(f"{self._word} {number} epoch {epoch}: {said}", flush=True)
        if decision.stop:
            self._pruned[number] = decision.reason
        return decision.stop

    def _see(self, number: int, result: dict[str, Any] | None = None) -> None:
        """Note that the trial gave a sign of life."""
        self._attempts[number] = ledger.seen(self._attempts[number], time.time(), result)
        self._study.note(number, {ledger.ATTEMPTS: self._attempts[number]})

    def _note_best_checkpoint(self, number: int, name: str) -> None:
        """As the files say, which know of every evaluation: this process may not have seen the first ones."""
        best = best_checkpoint(trainer.run_folder(self._config.training, name) / "checkpoints")
        if best is not None:
            self._study.note(number, {"checkpoint_path": str(best)})

    def _catch_up(self, number: int, history: list[list[float]]) -> None:
        """Store the evaluations whose report got lost because this process, or the worker, died in between."""
        for epoch, miou in history:
            decision = self._study.report(number, epoch=int(epoch), miou=miou)
            if decision.stop:
                self._pruned[number] = decision.reason

    def end(self, number: int, result: dict[str, Any] | None, *, error: bool) -> None:
        """Write down why a trial ended, in the study and in its run."""
        settings = self._settings[number]
        if number in self._pruned:
            trainer.stop(
                self._config.training,
                name=settings["name"],
                attempt=settings["attempt"],
                message=self._pruned[number],
            )
        self._catch_up(
            number,
            trainer.complete_record(self._config.training, name=settings["name"], run_id=settings["run_id"]),
        )
        self._leave_group(settings, error=error)
        self._note_best_checkpoint(number, settings["name"])
        reason, detail = self._why(number, result or {}, error=error)
        self._see(number)
        self._note_groups(self._groups)
        record = self._study.trials()[number]
        spent = ledger.entry(record, self._config.training.workers.num_workers)
        self._study.finish(number, reason, detail, cost_s=round(spent.useful, 3))
        fault("trial.finished")
        _end_run(self._config.training, settings["name"], settings["run_id"], reason, detail, record.miou)
        print(f"{self._word} {number} {reason}: {detail}", flush=True)

    def _leave_group(self, settings: dict[str, str], *, error: bool) -> None:
        """Have the workers leave the trial, and keep them for another unless something is wrong with them."""
        name = settings["group"]
        if error:
            groups.close(self._groups.pop(name))
            self._note_groups([name])
            return
        self._groups[name].stop.remote(settings["attempt"])
        self._free.append(name)

    def _why(self, number: int, result: dict[str, Any], *, error: bool) -> tuple[Reason, str]:
        if number in self._pruned:
            return "pruned", self._pruned[number]
        if "outcome" in result:
            return result["outcome"], result.get("detail", "")
        if error:
            return "lost", "the process that drives the trial died; the log of the Ray job has its last lines"
        record = self._study.trials()[number]
        if not record.miou_by_epoch:
            return "failed", "the training ended without an evaluation"
        return "complete", f"{record.num_epochs} epochs"


class _StudySearcher(Searcher):
    """Gives Tune the study's proposals, unfinished trials first."""

    def __init__(self, execution: _Execution, waiting: list[Proposal]) -> None:
        super().__init__()
        self._execution = execution
        self._waiting = list(waiting)
        self._number_of: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        """Return the settings of the next trial, or that there is none."""
        with known_interruption():
            while proposal := self._waiting.pop(0) if self._waiting else self._execution.next_proposal():
                settings = self._execution.begin(proposal)
                if settings is not None:
                    self._number_of[trial_id] = proposal.number
                    return settings
        return Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        with known_interruption():  # Tune takes an error here for the trial's, and goes on
            self._execution.end(self._number_of.pop(trial_id), result, error=error)

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the study is the truth."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was kept."""


class _StudyScheduler(FIFOScheduler):
    """Lets the study decide whether a trial goes on."""

    def __init__(self, execution: _Execution) -> None:
        super().__init__()
        self._execution = execution

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        with known_interruption():
            stop = self._execution.report(trial.config["number"], result)
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)


def complete_runs(config: SearchConfig, study: Study, parent_run_id: str) -> None:
    """End the runs of trials that the study has ended before this process died, or another did."""
    unended = tracking.unended_runs(config.training.tracking, parent_run_id)
    for trial in study.trials():
        run_id = trial.attributes.get("run_id")
        if trial.reason != "running" and run_id in unended:
            name = _trial_name(study, trial.number)
            _end_run(config.training, name, run_id, trial.reason, trial.detail, trial.miou)
            print(
                f"trial {trial.number} {trial.reason}: its run, left open by a dead process, is ended",
                flush=True,
            )


def _end_run(training: TrainingConfig, name: str, run_id: str, reason: str, detail: str, miou: float) -> None:
    """Send what the spool of a trial still holds and write down in its run why it ended."""
    end_run(
        tracking_server.resolve_uri(training.tracking),
        run_id,
        status="FAILED" if reason in ("failed", "lost") else "FINISHED",
        tags={
            "segfleet.reason": reason,
            "segfleet.detail": detail,
            **tracking.outcome_name(_run_name(name), reason if math.isnan(miou) else f"{miou:.4f} {reason}"),
        },
        spool_dir=trainer.spool_dir(training, name),
    )


def _trial_name(study: Study, number: int) -> str:
    return f"{study.name}/trial_{number:04d}"


def _run_name(trial_name: str) -> str:
    return trial_name.replace("/", "-")


def log_dataset(training: TrainingConfig, store: Store, run_id: str) -> None:
    """Write down in a run which data it saw."""
    data = training.data
    tracking.log_dataset(
        tracking_server.resolve_uri(training.tracking),
        run_id,
        name=store.manifest.name,
        digest=store.digest,
        source=data.store,
        splits={split: store.manifest.num_images(split) for split in (data.train_split, data.val_split)},
    )


def shown_params(config: TrainingConfig | SearchConfig) -> dict[str, Any]:
    """Return what MLflow shows as parameters: everything but where results go."""
    shown = flat(without_passwords(config))
    return {path: value for path, value in shown.items() if "tracking." not in path}


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

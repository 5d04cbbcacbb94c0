"""A search: Ray Tune executes the trials, the study decides, MLflow remembers.

`run_search` is the whole of it. Tune keeps nothing that is needed: after any death the same call starts a fresh
Tuner, finished trials are not run again and unfinished ones go on from their checkpoint under the same MLflow run.
"""

import contextlib
import hashlib
import json
import math
import shutil
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.actor import ActorHandle
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pspnet.errors import InputError
from pspnet.pictures import panel
from pspnet.sizes import sides
from pspnet.store import Store
from segfleet import cluster, groups, ledger, registry, tracking, trainer
from segfleet.config import SearchConfig, TrainingConfig, flat, override, to_json
from segfleet.final_score import final_protocol, final_scores, split_for_trials
from segfleet.importance import importances, interactive_plots
from segfleet.memory import fitted
from segfleet.protocol import protocol_tags, require_same_protocol, training_protocol
from segfleet.scores import Scores
from segfleet.search_page import SearchFacts, write_page
from segfleet.search_report import draw_slices, draw_study, leaderboard_table
from segfleet.space import dimensions, narrowed
from segfleet.study import Proposal, Reason, Study, TrialRecord, exists
from segfleet.trial import Trial

NUM_PANEL_IMAGES = 6
DRIVER_RESOURCES = {"memory": 1.0}
"""What a trial's driver reserves: one byte, since Tune insists on something and a CPU would be missing to a worker."""


MAX_DRIVER_FAILURES = 3
"""How often a trial's process in Tune, which only passes reports on, is started again."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found."""

    study: str
    leaderboard: list[TrialRecord]
    best: TrialRecord | None
    """The complete trial with the highest mIoU; None where none completed."""

    run_id: str
    """MLflow run of the study, the parent of the trials' runs."""

    tracking_uri: str
    num_trained: int
    """Trials that this call trained; 0 where the study was finished before."""

    study_picture: Path
    model_version: str = ""
    """models:/name/version, "" where none was registered."""

    aliases: tuple[str, ...] = ()
    baseline: str = ""
    """What the most frequent training class, predicted everywhere, scores on the images that scored the trials."""

    final_scores: Scores | None = None
    """The best trial's scores on the official validation split, where trials were scored on another."""

    final_baseline: str = ""
    num_final_readings: int = 0
    """How many trials were ever scored on the official validation split, after the search."""

    panel_path: Path | None = None
    """Picture of the best model: image | label | prediction | error for fixed validation images."""


def run_search(config: SearchConfig) -> SearchResult:
    """Bring the study to `config.num_trials` trials and return what it knows.

    Raises InputError, before anything is made, for a store, a tracking server or resources that are not there.
    """
    config = replace(config, training=trainer.resolve(config.training))
    asked, val_split = config, config.training.data.val_split
    dimensions(narrowed(config.space, config.training, config.narrow), config.training)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cluster.joined(config.training))
        trainer.check_data(config.training)
        config = split_for_trials(config, trainer.open_store(config.training))
        training = config.training
        for crop_size in sorted(config.space.crop_sizes, key=sides):
            store = trainer.check_data(override(training, {"data.crop_size": crop_size}))
        tracking_uri = tracking.resolve_uri(training.tracking)
        tracking.check_server(tracking_uri)
        if training.tracking.registered_model_name:
            registry.check_name(training.tracking.registered_model_name)
        stack.enter_context(cluster.connect(training.tracking.storage_dir, has_dashboard=True))
        study = _study(config, store.digest)
        config = study.config
        run_id = tracking.open_run(
            training.tracking,
            run_name=f"study {study.name}",
            key=study.key,
            parent_run_id=None,
            tags={"segfleet.kind": "study", **protocol_tags(training_protocol(training, store.digest))},
            params=_params(config),
        )
        _log_dataset(training, store, run_id)
        with contextlib.closing(tracking.RunWriter(tracking_uri, run_id, _spool_dir(config))) as writer:
            writer.log_text(to_json(asked), "config.json")
        num_trained = _execute(config, study, store, run_id)
        package = _package(config, study, store, val_split)
    return _conclude(config, study, store, run_id, package, num_trained=num_trained)


def _study(config: SearchConfig, store_digest: str) -> Study:
    """Return the study to search in: the named one, or the child of it that `config.narrow` asks for."""
    if not config.narrow:
        return Study(config, store_digest=store_digest)
    whole = replace(config, narrow=())
    if not exists(whole):
        raise InputError(
            f"narrow must be given with a study that has trials to begin with, but there is no study {config.study!r}. "
            "Search it first without narrow."
        )
    space = narrowed(config.space, config.training, config.narrow)
    parent = Study(whole, store_digest=store_digest)
    part = hashlib.sha256(json.dumps(sorted(config.narrow)).encode()).hexdigest()[:6]
    child = Study(replace(whole, space=space, study=f"{config.study}-{part}"), store_digest=store_digest)
    num_inherited = child.inherit(parent)
    print(
        f"study {child.name}: the part {', '.join(config.narrow)} of {parent.name}, begun with {num_inherited} of its "
        f"{len(parent.trials())} trials",
        flush=True,
    )
    return child


def print_search(result: SearchResult) -> int:
    """Print the leaderboard and where the best model is; return the exit code, 1 where no trial completed."""
    print(f"\nLeaderboard of study {result.study} ({result.num_trained} trials trained by this call)\n")
    print(leaderboard_table(result.leaderboard))
    print(f"\nstudy picture  {result.study_picture}")
    print(f"report         {result.study_picture.with_name('report.html')}")
    print(f"MLflow run     {result.run_id} at {tracking.shown(result.tracking_uri)}")
    if result.best is None:
        print("\nNo trial completed; the last column says why. Nothing was registered.")
        return 1
    print(f"best trial     {result.best.number}: mIoU {result.best.miou:.4f} ({result.baseline})")
    if result.final_scores is not None:
        print(
            f"validation     mIoU {result.final_scores.miou:.4f} ({result.final_baseline}), "
            f"{result.final_scores.protocol}; read {result.num_final_readings}x, never by a trial"
        )
    if result.model_version:
        print(f"model version  {result.model_version}, alias {', '.join(result.aliases) or 'none'}")
    print(f"panel          {result.panel_path}")
    return 0


@dataclass(frozen=True)
class _Package:
    """The best trial's model."""

    path: Path
    trial: TrialRecord
    final_scores: Scores | None
    """On the official validation split; None where the trials were scored on it."""


def _package(config: SearchConfig, study: Study, store: Store, val_split: str) -> _Package | None:
    """Package the best trial's model, scored on the official validation split if it has not been yet."""
    best = study.best()
    if best is None:
        return None
    folder = Path(config.training.tracking.storage_dir) / study.name / "model"
    checkpoint_path, run_id = best.attributes["checkpoint_path"], best.attributes["run_id"]
    if config.training.data.val_split == val_split:
        return _Package(registry.package_model(checkpoint_path, folder, run_id=run_id), best, None)
    known, protocol = study.final_scores().get(best.number), final_protocol(config.training, store, val_split)
    if known is None:
        package = registry.package_model(checkpoint_path, folder, run_id=run_id)
        print(f"scoring the winner, trial {best.number}, on {val_split}", flush=True)
        scores = final_scores(str(package), config.training, store, val_split)
        study.note_final_scores(best.number, scores.to_dict())
    else:
        scores = Scores.from_dict(known)
    require_same_protocol(scores.protocol, protocol)
    package = registry.package_model(checkpoint_path, folder, run_id=run_id, scores=scores)
    return _Package(package, best, scores)


def _conclude(
    config: SearchConfig,
    study: Study,
    store: Store,
    run_id: str,
    package: _Package | None,
    *,
    num_trained: int,
) -> SearchResult:
    """Register the best model, draw the pictures, and complete the study's run."""
    training, uri = config.training, tracking.resolve_uri(config.training.tracking)
    folder = Path(training.tracking.storage_dir) / study.name
    leaderboard = study.leaderboard()
    picture = draw_study(
        study.trials(), title=f"study {study.name}", rung_epochs=study.rungs, path=folder / "study.png"
    )
    result = SearchResult(
        study=study.name,
        leaderboard=leaderboard,
        best=None if package is None else package.trial,
        run_id=run_id,
        tracking_uri=uri,
        num_trained=num_trained,
        study_picture=picture,
        baseline=trainer.baseline(training, store),
    )
    if package is not None:
        result = _with_model(result, package, training, store, folder / "panel.png")
    if package is not None and package.final_scores is not None:
        of_split = override(training, {"data.val_split": package.final_scores.protocol.split})
        result = replace(
            result,
            final_scores=package.final_scores,
            final_baseline=trainer.baseline(of_split, store),
            num_final_readings=len(study.final_scores()),
        )
    tags = {"segfleet.num_trials": str(len(leaderboard)), "segfleet.model_version": result.model_version}
    spent = ledger.ledger(study.trials(), training.workers.num_workers)
    artifacts = _write_report(config, study, store, result, package)
    with contextlib.closing(tracking.RunWriter(uri, run_id, _spool_dir(config))) as writer:
        writer.log_text(leaderboard_table(leaderboard) + "\n", "leaderboard.txt")
        writer.log_text(ledger.ledger_table(spent) + "\n", "ledger.txt")
        writer.log_metrics(
            {"ledger/reserved_s": spent[-1].reserved, "ledger/useful_s": spent[-1].useful},
            step=len(leaderboard),
        )
        for path in artifacts:
            writer.log_artifact(path, "pictures" if path.suffix == ".png" else "")
        if result.best is not None:
            writer.log_metrics({"best_miou": result.best.miou}, step=len(leaderboard))
        if result.final_scores is not None:
            writer.log_metrics({"best_val_miou": result.final_scores.miou}, step=len(leaderboard))
            writer.log_text(json.dumps(result.final_scores.to_dict(), indent=1) + "\n", "val_scores.json")
            tags |= {
                name.replace("protocol", "val_protocol"): text
                for name, text in protocol_tags(result.final_scores.protocol).items()
            }
    tracking.end_run(
        uri,
        run_id,
        status="FINISHED" if result.best is not None else "FAILED",
        tags=tags,
        spool_dir=_spool_dir(config),
    )
    return result


def _write_report(
    config: SearchConfig, study: Study, store: Store, result: SearchResult, package: _Package | None
) -> list[Path]:
    """Write the page of the search and what it shows; return all files."""
    folder = result.study_picture.parent
    files = [result.study_picture]
    pictures = {"mIoU of every trial": result.study_picture}
    comparison = study.comparison()
    about: dict[str, Any] = {}
    if comparison is not None:
        title = f"mIoU after epoch {comparison.epoch}, which {comparison.num_trials} trials reached"
        slices = draw_slices(comparison.points, title=title, path=folder / "settings.png")
        interactive = folder / "interactive.html"
        interactive.write_text(interactive_plots(comparison, f"study {study.name}"), encoding="utf-8")
        files += [slices, interactive]
        pictures["mIoU over each setting"] = slices
        about = {
            "importances": importances(comparison),
            "compared_epoch": comparison.epoch,
            "num_compared": comparison.num_trials,
        }
    if result.panel_path is not None:
        files.append(result.panel_path)
        pictures["Image, label, prediction and error of the best model"] = result.panel_path
    scores = None if package is None else package.final_scores or registry.load_package(package.path).scores
    facts = {
        "best trial": "none completed"
        if result.best is None
        else f"{result.best.number}, mIoU {result.best.miou:.4f} ({result.baseline})",
        "data": f"{store.manifest.name}, digest {store.digest[:16]}",
        "trials were scored on": str(training_protocol(config.training, store.digest)),
        "MLflow run": f"{result.run_id} at {tracking.shown(result.tracking_uri)}",
        "time": _spent(ledger.ledger(study.trials(), config.training.workers.num_workers)[-1]),
        "trials": f"{len(result.leaderboard)}, by {config.sampler} and {config.scheduler}",
    }
    if result.final_scores is not None:
        facts["on the official validation split"] = (
            f"mIoU {result.final_scores.miou:.4f} ({result.final_baseline}), {result.final_scores.protocol}"
        )
        facts["that split was read"] = f"{result.num_final_readings}x, never by a trial"
    commands = []
    if result.model_version:
        facts["model"] = f"{result.model_version}, alias {', '.join(result.aliases) or 'none'}"
        name = config.training.tracking.registered_model_name
        commands = [
            f"python jobs/promote.py --name {name} --store {config.training.data.store}",
            f"python jobs/predict.py --model {result.model_version} --input PICTURES --output predictions",
        ]
    page = write_page(
        folder / "report.html",
        result.leaderboard,
        SearchFacts(
            study=study.name,
            facts=facts,
            class_iou=scores.class_iou if scores is not None else {},
            pictures=pictures,
            commands=commands,
            **about,
        ),
    )
    return [*files, page]


def _spent(total: ledger.Entry) -> str:
    share = f" ({total.useful / total.reserved:.0%})" if total.reserved else ""
    return (
        f"{total.reserved:.0f} worker-seconds reserved, {total.useful:.0f} of them useful{share}, "
        f"{total.redone:.0f} done again after a death (ledger.txt)"
    )


def _spool_dir(config: SearchConfig) -> Path:
    """Return where the study's own run keeps what the tracking server has not got yet."""
    return Path(config.training.tracking.storage_dir) / config.study / "spool"


def _with_model(
    result: SearchResult, package: _Package, training: TrainingConfig, store: Store, panel_path: Path
) -> SearchResult:
    """Return `result` with the packaged model registered, where a name is given, and pictured."""
    name = training.tracking.registered_model_name
    if name:
        run_id = package.trial.attributes["run_id"]
        version = registry.register(result.tracking_uri, name, package.path, run_id=run_id)
        aliases = registry.find_version(result.tracking_uri, name, str(version)).aliases
        result = replace(result, model_version=f"models:/{name}/{version}", aliases=tuple(sorted(aliases)))
    scores = package.final_scores
    split = store.split(training.data.val_split if scores is None else scores.protocol.split)
    labelled = split.labelled()
    indices = sorted({labelled[at * len(labelled) // NUM_PANEL_IMAGES] for at in range(NUM_PANEL_IMAGES)})
    model = registry.load_package(package.path)
    rows = [(split.image(index), split.label(index), model.predict(split.image(index))) for index in indices]
    panel(rows, model.class_table, [split.name(index) for index in indices]).save(panel_path)
    return replace(result, panel_path=panel_path)


def _execute(config: SearchConfig, study: Study, store: Store, parent_run_id: str) -> int:
    """Run the trials that are left on the connected cluster and return how many that were."""
    waiting = study.unfinished()
    num_trials = len(waiting) + study.num_left()
    if num_trials == 0:
        print(f"study {study.name}: all {study.num_wanted} trials are finished, nothing to train", flush=True)
        return 0
    num_concurrent = cluster.max_concurrent_trials(config.training)
    if config.max_concurrent_trials:
        num_concurrent = min(num_concurrent, config.max_concurrent_trials)
    print(
        f"study {study.name}: {num_trials} of {study.num_wanted} trials to train ({len(waiting)} resumed), "
        f"{num_concurrent} at a time, {config.training.workers.num_workers} workers each",
        flush=True,
    )
    ray_dir = (
        Path(config.training.tracking.storage_dir).resolve() / study.name / f"ray-{uuid.uuid4().hex[:8]}"
    )
    execution = _Execution(config, study, store, parent_run_id, ray_dir / "groups")
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
            name="tune",
            storage_path=str(ray_dir),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=MAX_DRIVER_FAILURES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    try:
        tuner.fit()
    finally:
        execution.close()
        shutil.rmtree(ray_dir, ignore_errors=True)
    return num_trials


class _Execution:
    """What happens to the study, the runs and the terminal when Tune's trials begin, report and end."""

    def __init__(
        self, config: SearchConfig, study: Study, store: Store, parent_run_id: str, groups_path: Path
    ) -> None:
        self._config = config
        self._groups_path = groups_path
        self._groups: dict[str, ActorHandle] = {}
        self._free: list[str] = []
        self._study = study
        self._store = store
        self._parent_run_id = parent_run_id
        self._settings: dict[int, dict[str, str]] = {}
        self._attempts: dict[int, list[ledger.Attempt]] = {}
        self._best: dict[int, float] = {}
        self._pruned: dict[int, str] = {}

    def next_proposal(self) -> Proposal | None:
        return self._study.ask() if self._study.num_left() else None

    def begin(self, proposal: Proposal) -> dict[str, Any] | None:
        """Open the trial's run and return what `_run_trial` needs; None where its point cannot be trained."""
        number, name = proposal.number, _trial_name(self._study, proposal.number)
        try:
            config = override(
                self._config.training,
                {**proposal.changes, "tracking.run_name": name, "tracking.registered_model_name": ""},
            )
            fitted(config, self._store.class_table.num_classes)
        except InputError as error:  # settings that are possible one by one, but not together
            self._study.finish(number, "refused", str(error))
            print(f"trial {number} refused: {error}", flush=True)
            return None
        run_id = tracking.open_run(
            config.tracking,
            run_name=name.replace("/", "-"),
            key=f"{self._study.key}/{number}",
            parent_run_id=self._parent_run_id,
            tags={
                "segfleet.kind": "trial",
                "segfleet.study": self._study.name,
                "segfleet.trial": str(number),
                **protocol_tags(training_protocol(config, self._store.digest)),
            },
            params=_params(config),
        )
        _log_dataset(config, self._store, run_id)
        self._study.note(number, {"run_id": run_id})
        point = ", ".join(
            f"{path.split('.')[-1]} {_short(value)}" for path, value in proposal.changes.items()
        )
        print(f"trial {number} {'goes on' if proposal.is_resumed else 'starts'}: {point}", flush=True)
        known = self._study.trials()[number].attributes.get(ledger.ATTEMPTS, [])
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

    def close(self) -> None:
        """End the groups of workers, and what they train."""
        for actor in self._groups.values():
            groups.close(actor)

    def _free_group(self) -> str:
        """Return a group of workers that no trial has, started if need be."""
        if not self._free:
            name, actor = groups.start(self._config.training, self._groups_path)
            self._groups[name] = actor
            self._free.append(name)
        return self._free.pop()

    def report(self, number: int, result: dict[str, Any]) -> bool:
        """Store what a trial reported and return whether it stops."""
        if "miou" not in result or not math.isfinite(result["miou"]):
            return False
        self._see(number, result)
        self._catch_up(number, result["history"][:-1])
        epoch, miou = int(result["epoch"]), float(result["miou"])
        decision = self._study.report(number, epoch=epoch, miou=miou)
        if miou >= self._best.get(number, -1.0) and result.get("checkpoint_path"):
            self._best[number] = miou
            self._study.note(number, {"checkpoint_path": result["checkpoint_path"], "best_epoch": epoch})
        print(f"trial {number} epoch {epoch}: mIoU {miou:.4f} - {decision.reason}", flush=True)
        if decision.stop:
            self._pruned[number] = decision.reason
        return decision.stop

    def _see(self, number: int, result: dict[str, Any] | None = None) -> None:
        """Note that the trial gave a sign of life."""
        self._attempts[number] = ledger.seen(self._attempts[number], time.time(), result)
        self._study.note(number, {ledger.ATTEMPTS: self._attempts[number]})

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
        reason, detail = self._why(number, result or {}, error=error)
        self._see(number)
        self._study.finish(number, reason, detail)
        _end_run(self._config.training, settings["name"], settings["run_id"], reason, detail)
        print(f"trial {number} {reason}: {detail}", flush=True)

    def _leave_group(self, settings: dict[str, str], *, error: bool) -> None:
        """Have the workers leave the trial, and keep them for another unless something is wrong with them."""
        name = settings["group"]
        if error:
            groups.close(self._groups.pop(name))
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
        while proposal := self._waiting.pop(0) if self._waiting else self._execution.next_proposal():
            settings = self._execution.begin(proposal)
            if settings is not None:
                self._number_of[trial_id] = proposal.number
                return settings
        return Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
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
        stop = self._execution.report(trial.config["number"], result)
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)


def complete_runs(config: SearchConfig, study: Study, parent_run_id: str) -> None:
    """End the runs of trials that the study has ended before this process died, or another did."""
    unended = tracking.unended_runs(config.training.tracking, parent_run_id)
    for trial in study.trials():
        run_id = trial.attributes.get("run_id")
        if trial.reason != "running" and run_id in unended:
            _end_run(config.training, _trial_name(study, trial.number), run_id, trial.reason, trial.detail)
            print(
                f"trial {trial.number} {trial.reason}: its run, left open by a dead process, is ended",
                flush=True,
            )


def _end_run(training: TrainingConfig, name: str, run_id: str, reason: str, detail: str) -> None:
    """Send what the spool of a trial still holds and write down in its run why it ended."""
    tracking.end_run(
        tracking.resolve_uri(training.tracking),
        run_id,
        status="FAILED" if reason in ("failed", "lost") else "FINISHED",
        tags={"segfleet.reason": reason, "segfleet.detail": detail},
        spool_dir=trainer.spool_dir(training, name),
    )


def _trial_name(study: Study, number: int) -> str:
    return f"{study.name}/trial_{number:04d}"


def _log_dataset(training: TrainingConfig, store: Store, run_id: str) -> None:
    data = training.data
    tracking.log_dataset(
        tracking.resolve_uri(training.tracking),
        run_id,
        name=store.manifest.name,
        digest=store.digest,
        source=data.store,
        splits={split: store.manifest.num_images(split) for split in (data.train_split, data.val_split)},
    )


def _params(config: TrainingConfig | SearchConfig) -> dict[str, Any]:
    """Return what MLflow shows as parameters: everything but where results go."""
    return {path: value for path, value in flat(config).items() if "tracking." not in path}


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

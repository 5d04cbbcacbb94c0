"""What is left of a search when its trials have ended: the best model, the report, and the study's own run."""

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pspnet.manifest import SELECTION
from pspnet.pictures import panel
from pspnet.store import Store
from segfleet import ledger, registry, tracking, tracking_server, trainer
from segfleet.config import TrainingConfig
from segfleet.final_score import final_protocol, final_scores
from segfleet.finals import CONFIDENCE, Finalist, finals_table, standing
from segfleet.importance import draw_parallel, importances, interactive_plots
from segfleet.override import override
from segfleet.package import load_package, package_model
from segfleet.protocol import Protocol, protocol_tags, require_same_protocol, training_protocol
from segfleet.run_writer import RunWriter, end_run, ship_spool
from segfleet.scores import Scores
from segfleet.search_config import SearchConfig
from segfleet.search_page import SearchFacts, write_page
from segfleet.search_report import (
    draw_finals,
    draw_front,
    draw_importances,
    draw_slices,
    draw_study,
    leaderboard_table,
)
from segfleet.secret import masked
from segfleet.spool import unsent_runs
from segfleet.study import Study, TrialRecord

NUM_PANEL_IMAGES = 6


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found."""

    study: str
    leaderboard: list[TrialRecord]
    best: TrialRecord | None
    """The winner: of the finalists where there are any, else the complete trial with the highest mIoU; None where none
    completed."""

    run_id: str
    """MLflow run of the study, the parent of the trials' runs."""

    tracking_uri: str
    num_trained: int
    """Trainings of this call, those of finalists included; 0 where the search was finished before."""

    study_picture: Path
    front: frozenset[int] = frozenset()
    """Trials on the front of mIoU and cost, where the objective has cost."""

    finalists: tuple[Finalist, ...] = ()
    """Trials that were trained again with other seeds, the winner first."""

    model_version: str = ""
    """models:/name/version, "" where none was registered."""

    aliases: tuple[str, ...] = ()
    protocol: Protocol
    """How the trials were scored."""

    baseline: str = ""
    """What the most frequent training class, predicted everywhere, scores on the images that scored the trials."""

    final_scores: Scores | None = None
    """The best trial's scores on the official validation split, where trials were scored on another."""

    final_baseline: str = ""
    num_final_readings: int = 0
    """How many trials were ever scored on the official validation split, after the search."""

    panel_path: Path | None = None
    """Picture of the best model: image | label | prediction | error for fixed validation images."""


@dataclass(frozen=True)
class Package:
    """The winner's model."""

    path: Path
    trial: TrialRecord
    """The trial of the search that won."""
    training: TrialRecord
    """The one whose model it is: the trial itself, or its best training as a finalist."""
    finalists: list[Finalist]
    final_scores: Scores | None
    """On the official validation split; None where the trials were scored on it."""


def package_winner(
    config: SearchConfig, study: Study, finals: Study | None, store: Store, val_split: str
) -> Package | None:
    """Package the winner's model, scored on the official validation split if it has not been yet."""
    finalists = standing(study, finals)
    best = finalists[0].trial if finalists else study.best()
    if best is None:
        return None
    training, holder = (finalists[0].best, finals) if finalists else (best, study)
    assert holder is not None
    folder = Path(config.training.tracking.storage_dir) / study.name / "model"
    checkpoint_path, run_id = training.attributes["checkpoint_path"], training.attributes["run_id"]
    if config.training.data.val_split == val_split:
        path = package_model(checkpoint_path, folder, run_id=run_id)
        return Package(path, best, training, finalists, None)
    known = holder.final_scores().get(training.number)
    protocol = final_protocol(config.training, store, val_split)
    if known is None:
        package = package_model(checkpoint_path, folder, run_id=run_id)
        print(f"scoring the winner, trial {best.number}, on {val_split}", flush=True)
        scores = final_scores(str(package), config.training, store, val_split)
        holder.note_final_scores(training.number, scores.to_dict())
    else:
        scores = Scores.from_dict(known)
    require_same_protocol(scores.protocol, protocol)
    package = package_model(checkpoint_path, folder, run_id=run_id, scores=scores)
    return Package(package, best, training, finalists, scores)


def conclude(
    config: SearchConfig,
    study: Study,
    finals: Study | None,
    store: Store,
    run_id: str,
    package: Package | None,
    *,
    num_trained: int,
) -> SearchResult:
    """Register the best model, draw the pictures, and complete the study's run."""
    studies = [study] if finals is None else [study, finals]
    training, uri = config.training, tracking_server.resolve_uri(config.training.tracking)
    folder = Path(training.tracking.storage_dir) / study.name
    leaderboard = study.leaderboard()
    picture = draw_study(
        study.trials(), title=f"study {study.name}", rung_epochs=study.rungs, path=folder / "study.png"
    )
    result = SearchResult(
        study=study.name,
        leaderboard=leaderboard,
        best=None if package is None else package.trial,
        front=frozenset(study.front()),
        finalists=() if package is None else tuple(package.finalists),
        num_final_readings=sum(len(it.final_scores()) for it in studies),
        run_id=run_id,
        tracking_uri=uri,
        num_trained=num_trained,
        study_picture=picture,
        protocol=training_protocol(training, store.digest),
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
        )
    tags = {
        "mlflow.note.content": _described(result),
        "segfleet.num_trials": str(len(leaderboard)),
        "segfleet.model_version": result.model_version,
        **tracking.outcome_name(
            f"study {study.name}",
            f"{len(leaderboard)} trials, "
            + ("none complete" if result.best is None else f"best {result.best.miou:.4f}"),
        ),
    }
    spent = ledger.ledger(
        [trial for it in studies for trial in it.trials()],
        training.workers.num_workers,
        {name: times for it in studies for name, times in it.groups.items()},
    )
    artifacts = _write_report(config, study, store, result, package, spent)
    with contextlib.closing(RunWriter(uri, run_id, spool_dir(config))) as writer:
        writer.log_text(leaderboard_table(leaderboard, result.front) + "\n", "leaderboard.txt")
        writer.log_text(ledger.ledger_table(spent) + "\n", "ledger.txt")
        writer.log_metrics(
            {"ledger/reserved_s": spent[-1].reserved, "ledger/useful_s": spent[-1].useful},
            step=len(leaderboard),
        )
        for path in artifacts:
            writer.log_artifact(path, "pictures" if path.suffix == ".png" else "")
        if result.best is not None:
            writer.log_metrics({"best_miou": result.best.miou}, step=len(leaderboard))
        if result.finalists:
            writer.log_text(finals_table(result.finalists) + "\n", "finalists.txt")
            first = result.finalists[0]
            writer.log_metrics(
                {"winner/mean_miou": first.mean, "winner/low_miou": first.low}, step=len(leaderboard)
            )
        if result.final_scores is not None:
            writer.log_metrics({"best_val_miou": result.final_scores.miou}, step=len(leaderboard))
            writer.log_text(json.dumps(result.final_scores.to_dict(), indent=1) + "\n", "val_scores.json")
            tags |= {
                name.replace("protocol", "val_protocol"): text
                for name, text in protocol_tags(result.final_scores.protocol).items()
            }
    for unsent_run_id, spool in unsent_runs(folder).items():  # ended while the server was away
        ship_spool(uri, unsent_run_id, spool)
    end_run(
        uri,
        run_id,
        status="FINISHED" if result.best is not None else "FAILED",
        tags=tags,
        spool_dir=spool_dir(config),
    )
    return result


def _write_report(
    config: SearchConfig,
    study: Study,
    store: Store,
    result: SearchResult,
    package: Package | None,
    spent: list[ledger.Entry],
) -> list[Path]:
    """Write the page of the search and what it shows; return all files."""
    folder = result.study_picture.parent
    files = [result.study_picture]
    pictures = {"mIoU of every trial": result.study_picture}
    comparison = study.comparison()
    about: dict[str, Any] = {}
    if comparison is not None:
        title = f"mIoU after epoch {comparison.epoch:.4g}, which {comparison.num_trials} trials reached"
        slices = draw_slices(comparison.points, title=title, path=folder / "settings.png")
        interactive = folder / "interactive.html"
        interactive.write_text(interactive_plots(comparison, f"study {study.name}"), encoding="utf-8")
        parallel = draw_parallel(comparison, title=title, path=folder / "parallel.png")
        files += [slices, parallel, interactive]
        pictures["mIoU over each setting"] = slices
        pictures["Each trial through its settings"] = parallel
        found = importances(comparison)
        if found:
            shares = draw_importances(
                found, title="which settings matter (fANOVA)", path=folder / "importance.png"
            )
            files.append(shares)
            pictures["Share of each setting"] = shares
        about = {
            "importances": found,
            "compared_epoch": comparison.epoch,
            "num_compared": comparison.num_trials,
        }
    if result.front:
        front = draw_front(
            result.leaderboard, result.front, title=f"study {study.name}", path=folder / "front.png"
        )
        files.append(front)
        pictures["mIoU and cost: the front"] = front
    if result.finalists:
        finals_picture = draw_finals(result.finalists, path=folder / "finalists.png")
        files.append(finals_picture)
        pictures["Finalists"] = finals_picture
    if result.panel_path is not None:
        files.append(result.panel_path)
        pictures["Image, label, prediction and error of the best model"] = result.panel_path
    scores = None if package is None else package.final_scores or load_package(package.path).scores
    facts = {
        "best trial": "none completed" if result.best is None else described_winner(result),
        "data": f"{store.manifest.name}, digest {store.digest[:16]}",
        "trials were scored on": str(result.protocol),
        "MLflow run": f"{result.run_id} at {masked(result.tracking_uri)}",
        "time": _spent(spent[-1]),
        "trials": f"{len(result.leaderboard)}, by {config.sampler} and {config.scheduler}",
    }
    if result.final_scores is not None:
        facts["on the official validation split"] = (
            f"mIoU {result.final_scores.miou:.4f} ({result.final_baseline}), {result.final_scores.protocol}"
        )
    if config.training.data.val_split == SELECTION:
        facts["the official validation split was read"] = (
            f"{result.num_final_readings}x after the search, 0x during it"
        )
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
            tables=({"Finalists in numbers": finals_table(result.finalists)} if result.finalists else {})
            | {"Where the time went": ledger.ledger_table(spent)},
            front=result.front,
            commands=commands,
            **about,
        ),
    )
    return [*files, page]


def described_winner(result: SearchResult) -> str:
    """Return the winner and its score in a line."""
    assert result.best is not None
    text = f"{result.best.number}: mIoU {result.best.miou:.4f} ({result.baseline})"
    if not result.finalists:
        return text
    first = result.finalists[0]
    return (
        f"{text}; with {len(first.trainings)} other seeds {first.mean:.4f} in the mean, {CONFIDENCE:.0%} sure of "
        f"{first.low:.4f}"
    )


def _described(result: SearchResult) -> str:
    """Return what the tracking server's page says of the study's run at first sight."""
    varied = dict.fromkeys(path for trial in result.leaderboard for path in trial.changes)
    text = f"Search of {len(result.leaderboard)} trials over {', '.join(varied)}."
    return (
        f"{text} No trial completed."
        if result.best is None
        else f"{text} Best: trial {described_winner(result)}."
    )


def _spent(total: ledger.Entry) -> str:
    share = f" ({total.useful / total.reserved:.0%})" if total.reserved else ""
    return (
        f"{total.reserved:.0f} worker-seconds reserved, {total.useful:.0f} of them useful{share}, "
        f"{total.redone:.0f} done again after a death (ledger.txt)"
    )


def spool_dir(config: SearchConfig) -> Path:
    """Return where the study's own run keeps what the tracking server has not got yet."""
    return Path(config.training.tracking.storage_dir) / config.study / "spool"


def _with_model(
    result: SearchResult, package: Package, training: TrainingConfig, store: Store, panel_path: Path
) -> SearchResult:
    """Return `result` with the packaged model registered, where a name is given, and pictured."""
    name = training.tracking.registered_model_name
    if name:
        run_id = package.training.attributes["run_id"]
        uri = result.tracking_uri
        version = tracking_server.patiently(lambda: registry.register(uri, name, package.path, run_id=run_id))
        found = tracking_server.patiently(lambda: registry.find_version(uri, name, str(version)))
        aliases = found.aliases
        result = replace(result, model_version=f"models:/{name}/{version}", aliases=tuple(sorted(aliases)))
    scores = package.final_scores
    split = store.split(training.data.val_split if scores is None else scores.protocol.split)
    labelled = split.labelled()
    indices = sorted({labelled[at * len(labelled) // NUM_PANEL_IMAGES] for at in range(NUM_PANEL_IMAGES)})
    model = load_package(package.path)
    rows = [(split.image(index), split.label(index), model.predict(split.image(index))) for index in indices]
    panel(rows, model.class_table, [split.name(index) for index in indices]).save(panel_path)
    return replace(result, panel_path=panel_path)

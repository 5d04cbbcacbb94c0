"""A search: `run_search` brings a study to its number of trials, packages the winner and reports."""

import contextlib
import hashlib
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from pspnet.errors import InputError
from pspnet.sizes import sides
from segfleet import cluster, lease, registry, tracking, tracking_server, trainer
from segfleet.conclusion import SearchResult, conclude, described_winner, package_winner, spool_dir
from segfleet.config_json import to_json, without_passwords
from segfleet.faults import fault
from segfleet.final_score import split_for_trials
from segfleet.finals import finals_table, plan_finals
from segfleet.override import override
from segfleet.protocol import protocol_tags, training_protocol
from segfleet.run_writer import RunWriter, killed_when_interrupted
from segfleet.search_config import SearchConfig
from segfleet.search_report import ended_badly, leaderboard_table
from segfleet.secret import masked
from segfleet.space import dimensions, narrowed
from segfleet.study import Study, exists, repair
from segfleet.trials import log_dataset, shown_params, train_trials


def run_search(config: SearchConfig) -> SearchResult:
    """Bring the study to `config.num_trials` trials and return what it knows.

    Raises InputError, before anything is made, for a store, a tracking server or resources that are not there, and
    HeldError where another process works on the study.
    """
    config = replace(config, training=trainer.resolve(config.training))
    asked, val_split = config, config.training.data.val_split
    varied = dimensions(narrowed(config.space, config.training, config.narrow), config.training)
    if "optim.aux_loss_weight" not in [dimension.path for dimension in varied]:
        print("optim.aux_loss_weight is not searched: model.has_aux_head is False", flush=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cluster.joined(config.training))
        trainer.check_data(config.training)
        config = split_for_trials(config, trainer.open_store(config.training))
        training = config.training
        for crop_size in sorted(config.space.crop_sizes, key=sides):
            store = trainer.check_data(override(training, {"data.crop_size": crop_size}))
        tracking_uri = tracking_server.resolve_uri(training.tracking)
        tracking_server.check_server(tracking_uri)
        if training.tracking.registered_model_name:
            registry.check_name(training.tracking.registered_model_name)
        folder = Path(training.tracking.storage_dir) / _name(config)
        stack.enter_context(lease.held(folder, f"study {_name(config)}"))
        repair(replace(config, study=_name(config)))
        stack.enter_context(cluster.connect(training.tracking.storage_dir, has_dashboard=True))
        study = _study(config, store.digest)
        config = study.config
        run_id = tracking.open_run(
            training.tracking,
            run_name=f"study {study.name}",
            key=study.key,
            parent_run_id=None,
            tags={"segfleet.kind": "study", **protocol_tags(training_protocol(training, store.digest))},
            params=shown_params(config),
        )
        nested = partial(tracking.unended_runs, training.tracking, run_id)
        with killed_when_interrupted(tracking_uri, run_id, nested):
            log_dataset(training, store, run_id)
            with contextlib.closing(RunWriter(tracking_uri, run_id, spool_dir(config))) as writer:
                writer.log_text(to_json(without_passwords(asked)), "config.json")
            num_trained = train_trials(config, study, store, run_id)
            finals = plan_finals(config, study, store.digest)
            if finals is not None:
                num_trained += train_trials(config, finals, store, run_id, word="final")
            fault("search.trained")
            package = package_winner(config, study, finals, store, val_split)
            fault("search.packaged")
            return conclude(config, study, finals, store, run_id, package, num_trained=num_trained)


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
    child = Study(replace(whole, space=space, study=_name(config)), store_digest=store_digest)
    num_inherited = child.inherit(parent)
    print(
        f"study {child.name}: the part {', '.join(config.narrow)} of {parent.name}, begun with {num_inherited} of its "
        f"{len(parent.trials())} trials",
        flush=True,
    )
    return child


def _name(config: SearchConfig) -> str:
    """Return the name of the study to search in."""
    if not config.narrow:
        return config.study
    part = hashlib.sha256(json.dumps(sorted(config.narrow)).encode()).hexdigest()[:6]
    return f"{config.study}-{part}"


def print_search(result: SearchResult) -> int:
    """Print the leaderboard and where the best model is; return the exit code, 1 where no trial completed."""
    print(f"\nLeaderboard of study {result.study} ({result.num_trained} trainings by this call)\n")
    print(leaderboard_table(result.leaderboard, result.front))
    if result.front:
        print(
            f"\n* none is better and as cheap, or cheaper and as good: {', '.join(map(str, sorted(result.front)))}"
        )
    print(f"\nstudy picture  {result.study_picture}")
    print(f"report         {result.study_picture.with_name('report.html')}")
    print(f"MLflow run     {result.run_id} at {masked(result.tracking_uri)}")
    for sentence in ended_badly(result.leaderboard):
        print(f"{'error' if result.best is None else 'warning'}: {sentence}", file=sys.stderr)
    if result.best is None:
        print("\nNo trial completed; the last column says why. Nothing was registered.")
        return 1
    if result.finalists:
        print(f"\nFinalists, trained again with other seeds\n\n{finals_table(result.finalists)}\n")
    print(f"best trial     {described_winner(result)}")
    print(f"scored on      {result.protocol}")
    if result.final_scores is not None:
        print(
            f"validation     mIoU {result.final_scores.miou:.4f} ({result.final_baseline}), "
            f"{result.final_scores.protocol}; read {result.num_final_readings}x, never by a trial"
        )
    if result.model_version:
        print(f"model version  {result.model_version}, alias {', '.join(result.aliases) or 'none'}")
    print(f"panel          {result.panel_path}")
    return 0

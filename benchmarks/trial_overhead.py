"""What does a trial cost beside its steps? Ours against the way of Ray's documentation, one after the other.

The documented way: a Tune function trainable that builds a TorchTrainer for each trial, reports passed on by
TuneReportCallback. Ours: jobs' own search, which trains one trial after another in workers that are kept. Both run the
same training loop in two DDP workers (gloo) on one local Ray cluster, on equal pictures; ours tracks to MLflow as well.
The last line of output is JSON.

    python benchmarks/trial_overhead.py --quick
    python benchmarks/trial_overhead.py --write benchmarks/README.md
"""

import contextlib
import io
import json
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from ray import tune
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from reporting import cell, parser_of, record, versions

from segfleet.checkpoint import newest_good
from segfleet.cluster import connect
from segfleet.config import TrainingConfig
from segfleet.config_json import to_json
from segfleet.ingest import ingest
from segfleet.override import override
from segfleet.presets import tiny
from segfleet.search import run_search
from segfleet.search_config import SearchConfig, SpaceConfig
from segfleet.sources.cityscapes import cityscapes_source
from segfleet.sources.demo import draw_demo
from segfleet.worker import Task, train_worker

NUM_EPOCHS = 6
CROP_SIZE = 33


def main() -> None:
    """Measure, print the table, and end with one line of JSON."""
    parser = parser_of(__doc__, quick="2 trials, 1 round: two minutes, most of them Ray's")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    num_trials, num_rounds = (2, 1) if options.quick else (options.trials, options.rounds)
    with tempfile.TemporaryDirectory(prefix="trials-") as folder, connect(folder, has_dashboard=True):
        root = Path(folder)
        draw_demo(root / "scenes", num_train=8, num_val=2, size=(96, 64))
        ingest(cityscapes_source(str(root / "scenes")), root / "store", selection_fraction=0.0)
        rounds = []
        for number in range(num_rounds):
            of_round = {}
            for way, run in (("stock", _stock), ("ours", _ours)):
                here = root / f"{way}-{number}"
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    trials = run(_config(root / "store", here), num_trials)
                of_round[way] = _measured(trials, num_trials)
                print(f"round {number + 1} of {num_rounds}, {way}: {of_round[way]}", flush=True)
            rounds.append(of_round)
    text = _table(rounds) + f"\n\n- {num_rounds} rounds of {num_trials} trials each way, {versions()}"
    record(text, "trial_overhead", options.write)
    print(
        json.dumps(
            {
                "trial_s": round(median(item["ours"]["between"] for item in rounds), 2),
                "stock_trial_s": round(median(item["stock"]["between"] for item in rounds), 2),
                "epoch_s": round(median(item["ours"]["epoch"] for item in rounds), 3),
                "stock_epoch_s": round(median(item["stock"]["epoch"] for item in rounds), 3),
                "report_s": round(median(item["ours"]["report"] for item in rounds), 4),
            }
        )
    )


def _config(store: Path, storage_dir: Path) -> TrainingConfig:
    return override(
        tiny(),
        {
            "data.store": str(store),
            "data.crop_size": CROP_SIZE,
            "schedule.num_epochs": NUM_EPOCHS,
            "schedule.max_iterations_per_epoch": 1,
            "tracking.storage_dir": str(storage_dir),
            "tracking.tracking_uri": f"sqlite:///{storage_dir}.db",
        },
    )


def _stock(config: TrainingConfig, num_trials: int) -> list[Path]:
    """Search as the documentation of Ray says; return the folders of the trials."""
    storage = Path(config.tracking.storage_dir)

    def trial(settings: dict[str, Any]) -> None:
        name = uuid.uuid4().hex[:8]
        trained = override(config, {"optim.base_lr": settings["base_lr"]})
        task = Task(
            config_json=to_json(trained),
            run_dir=str(storage / "trials" / name),
            run_id="",
            tracking_uri="",
            attempt="1",
        )
        TorchTrainer(
            train_worker,
            train_loop_config=asdict(task),
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name=name, storage_path=str(storage / "train"), callbacks=[TuneReportCallback()]
            ),
        ).fit()

    tune.Tuner(
        tune.with_resources(trial, {"memory": 1.0}),
        param_space={"base_lr": tune.loguniform(1e-3, 1e-1)},
        tune_config=tune.TuneConfig(num_samples=num_trials, max_concurrent_trials=1),
        run_config=tune.RunConfig(name="tune", storage_path=str(storage / "tune"), verbose=0),
    ).fit()
    return sorted((storage / "trials").iterdir())


def _ours(config: TrainingConfig, num_trials: int) -> list[Path]:
    """Search by `run_search`; return the folders of the trials."""
    search = SearchConfig(
        training=config,
        space=SpaceConfig(crop_sizes=(CROP_SIZE,)),
        study="ours",
        num_trials=num_trials,
        scheduler="none",
        sampler="random",
        score_trials_on="val",
        max_concurrent_trials=1,
    )
    run_search(search)
    return sorted((Path(config.tracking.storage_dir) / "ours").glob("trial_*"))


def _measured(trials: Sequence[Path], num_trials: int) -> dict[str, float]:
    """Return the seconds from a trial's last checkpoint to the begin of the next, and of an epoch."""
    assert len(trials) == num_trials, trials
    begun = sorted((path / "config.json").stat().st_mtime for path in trials)
    ended = sorted(max(file.stat().st_mtime for file in path.glob("checkpoints/*/*")) for path in trials)
    between = [start - end for start, end in zip(begun[1:], ended[:-1], strict=True)]
    of_epoch = [(end - start) / NUM_EPOCHS for start, end in zip(begun, ended, strict=True)]
    reports = [_last_report(path) for path in trials]
    return {
        "between": round(median(between), 3),
        "epoch": round(median(of_epoch), 3),
        "report": round(median(reports), 4),
    }


def _last_report(trial: Path) -> float:
    """Return for how many seconds the last report but one held the training up."""
    checkpoint = newest_good(trial / "checkpoints")
    assert checkpoint is not None, trial
    return float(checkpoint.state["metrics"]["report_wait_s"])


def _table(rounds: Sequence[dict[str, dict[str, float]]]) -> str:
    lines = [
        "| way | from the end of a trial to the begin of the next, s | times shorter "
        "| an epoch of one iteration, its checkpoint and its report, s | a report alone, s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for way, name in (("stock", "a TorchTrainer for each trial"), ("ours", "**workers that are kept**")):
        ratio = cell([item["stock"]["between"] / item[way]["between"] for item in rounds])
        between = median(item[way]["between"] for item in rounds)
        epoch = median(item[way]["epoch"] for item in rounds)
        report = median(item[way]["report"] for item in rounds)
        lines.append(f"| {name} | {between:.3g} | {ratio} | {epoch:.3g} | {report:.2g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Laws of the whole search, through the job that people run: killed and run again it is one search."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import psutil
import pytest
from mlflow import MlflowClient

from pspnet.labels import NYUV2_13
from pspnet.manifest import FIT, SELECTION
from pspnet.store import Store, publish_store, write_shard
from segfleet import registry
from segfleet.checkpoint import load_checkpoint
from segfleet.config import TrainingConfig
from segfleet.config_json import from_json, load_config
from segfleet.evaluation import evaluate_model
from segfleet.final_score import split_for_trials
from segfleet.finals import plan_finals, standing
from segfleet.override import override
from segfleet.protocol import Protocol, training_protocol
from segfleet.scores import Scores
from segfleet.search_config import SearchConfig
from segfleet.selection import choose_selection
from segfleet.study import Study

pytestmark = [
    pytest.mark.slow,
    # MLflow 3.17 uses what SQLAlchemy 2.1 deprecates
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
]
REPOSITORY = Path(__file__).parents[2]
NUM_TRIALS = 4
NUM_SEEDS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """A store of random pictures beside which everything else of the search lies."""
    path = tmp_path_factory.mktemp("search")
    (path / "aside").mkdir()
    (path / "runs").mkdir()
    shutil.copy(empty_database, path / "runs")
    splits, names, counts = {}, [], []
    for split, count in (("train", 10), ("val", 3)):
        rng = np.random.default_rng(count)
        samples = []
        for number in range(count):
            label = np.kron(rng.integers(0, 3, (4, 6), dtype=np.uint8), np.ones((12, 12), dtype=np.uint8))
            samples.append(
                (f"{split}{number}", np.repeat(label[..., None] * 80, 3, axis=2).astype(np.uint8), label)
            )
        if split == "train":
            names = [name for name, _, _ in samples]
            counts = [np.bincount(label.ravel(), minlength=14).tolist() for _, _, label in samples]
        splits[split] = [write_shard(path / "aside" / f"{split}.arrow", samples, num_classes=13)]
    publish_store(
        path / "aside",
        path / "store",
        name="patches",
        class_table=NYUV2_13,
        splits=splits,
        source={},
        selection=choose_selection(names, counts, fraction=0.2),
    )
    return path


def command(folder: Path) -> list[str]:
    flags = {
        "--preset": "tiny",
        "--data.store": folder / "store",
        "--tracking.storage-dir": folder / "runs",
        "--tracking.registered-model-name": "pspnet-patches",
        "--study": "patches",
        "--num-trials": NUM_TRIALS,
        "--workers.num-workers": 1,
        "--schedule.num-epochs": 3,
        "--data.crop-size": 41,
        "--space.crop-sizes": 41,
        "--num-finalists": 2,
        "--num-seeds": NUM_SEEDS,
        "--max-concurrent-trials": 1,
    }
    return [
        sys.executable,
        "jobs/tune_cityscapes.py",
        *(str(word) for item in flags.items() for word in item),
    ]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    return kept | {"PYTHONUNBUFFERED": "1"}


def test_killed_and_run_again_it_is_one_search_and_a_finished_one_trains_nothing(folder: Path) -> None:
    log = folder / "first.log"
    with log.open("w") as out:
        first = subprocess.Popen(command(folder), cwd=REPOSITORY, env=environment(), stdout=out, stderr=out)
    deadline = time.monotonic() + 600
    while "trial 1 epoch 1" not in log.read_text() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert first.poll() is None, log.read_text()[-3000:]
    assert "trial 1 epoch 1" in log.read_text(), log.read_text()[-3000:]
    cluster = psutil.Process(first.pid).children(recursive=True)
    workers = [process for process in cluster if "RayTrainWorker" in process.name()]
    assert workers
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    _, alive = psutil.wait_procs(cluster, timeout=30)
    for process in alive:  # Ray's two agents outlive a raylet whose driver was killed
        process.kill()
    assert not {process.pid for process in workers} & {process.pid for process in alive}
    was_ended = is_ended(folder, trial=1)

    second = subprocess.run(
        command(folder), cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=800
    )
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-2000:]
    assert "trial 0 starts" not in second.stdout
    assert "View detailed results" not in second.stdout  # of a folder of Ray Tune that is removed
    assert ("trial 1 goes on" in second.stdout) != was_ended

    leave_open(folder, trial=2)  # as a process does that dies before it has told the tracking server
    third = subprocess.run(
        command(folder), cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert third.returncode == 0, third.stderr[-2000:]
    assert "nothing to train" in third.stdout
    table = re.compile(r"^rank .*?\n\n", re.S | re.M)
    assert table.findall(third.stdout) == table.findall(second.stdout) != []
    version = re.compile(r"model version +(\S+),")
    assert version.findall(third.stdout) == version.findall(second.stdout) == ["models:/pspnet-patches/1"]
    validation = re.compile(r"^validation .*", re.M)
    assert validation.findall(third.stdout) == validation.findall(second.stdout) != []
    assert "read 1x, never by a trial" in validation.findall(third.stdout)[0]


def leave_open(folder: Path, *, trial: int) -> None:
    uri = f"sqlite:///{folder / 'runs' / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    wanted = f"tags.`segfleet.trial` = '{trial}' and tags.`segfleet.kind` = 'trial'"
    (run,) = client.search_runs([experiment.experiment_id], wanted)
    client.update_run(run.info.run_id, status="RUNNING")


def test_study_runs_and_registry_agree_afterwards(folder: Path) -> None:
    uri = f"sqlite:///{folder / 'runs' / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if run.data.tags["segfleet.kind"] == "study"]
    trials = {
        run.data.tags["segfleet.trial"]: run for run in runs if run.data.tags["segfleet.kind"] == "trial"
    }
    finalists = [run for run in runs if run.data.tags["segfleet.kind"] == "finalist"]
    assert len(parents) == 1
    assert sorted(trials) == [str(number) for number in range(NUM_TRIALS)]
    assert len(runs) == NUM_TRIALS + len(finalists) + 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    nested = [*trials.values(), *finalists]
    assert {run.data.tags["mlflow.parentRunId"] for run in nested} == {parents[0].info.run_id}

    config = from_json(SearchConfig, client_text(folder, client, parents[0].info.run_id))
    store = Store.open(config.training.data.store)
    config = split_for_trials(config, store)
    study = Study(config, store_digest=store.digest)
    records = study.trials()
    assert {record.reason for record in records} <= {"complete", "pruned"}
    for record in records:
        run = trials[str(record.number)]
        history = client.get_metric_history(run.info.run_id, "val/miou")
        assert {point.step: point.value for point in history} == record.miou_by_epoch
        assert len(history) == len(record.miou_by_epoch)
        assert run.data.tags["segfleet.reason"] == record.reason
        stored = load_config(
            TrainingConfig, folder / "runs" / "patches" / f"trial_{record.number:04d}" / "config.json"
        )
        assert (stored.data.train_split, stored.data.val_split) == (FIT, SELECTION)
        protocol = training_protocol(stored, store.digest)
        assert run.data.tags["segfleet.protocol_digest"] == protocol.digest
        assert run.data.tags["segfleet.protocol"] == str(protocol)
        assert stored == override(
            config.training,
            record.changes
            | {"tracking.run_name": stored.tracking.run_name, "tracking.registered_model_name": ""},
        )

    chosen = [record for record in study.leaderboard() if record.reason == "complete"][:2]
    finals = plan_finals(config, study, store.digest)
    assert finals is not None
    assert finals.num_left() == 0
    assert sorted(run.data.tags["segfleet.finalist_of"] for run in finalists) == sorted(
        str(record.number) for record in chosen for _ in range(NUM_SEEDS)
    )
    seeds = {record.number: record.changes["schedule.seed"] for record in finals.trials()}
    assert set(seeds.values()) == {1, 2}
    for run in finalists:
        assert run.data.params["schedule.seed"] == str(seeds[int(run.data.tags["segfleet.trial"])])
    winner = standing(study, finals)[0]
    best = winner.best
    assert best.miou == max(record.miou for record in winner.trainings)
    model = registry.fetch("models:/pspnet-patches@champion", tracking_uri=uri, device="cpu")
    assert study.final_scores() == {}
    assert model.info["scores"] == finals.final_scores()[best.number]
    protocol = Protocol(store_digest=store.digest, split="val")
    assert Scores.from_dict(model.info["scores"]) == evaluate_model(model, store, protocol).scores
    assert model.info["scores"]["miou"] != best.miou
    assert parents[0].data.tags["segfleet.val_protocol_digest"] == protocol.digest
    assert parents[0].data.tags["segfleet.protocol_digest"] != protocol.digest
    weights = load_checkpoint(best.attributes["checkpoint_path"]).model_state
    assert all(np.array_equal(model.network.state_dict()[name], tensor) for name, tensor in weights.items())


def is_ended(folder: Path, *, trial: int) -> bool:
    """Return whether the study holds the end of a trial, as Optuna reads it."""
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "runs" / "patches" / "study.journal"))
    storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name="patches", storage=storage).trials[trial].state.is_finished()


def client_text(folder: Path, client: MlflowClient, run_id: str) -> str:
    from mlflow.artifacts import load_text

    return load_text(f"{client.get_run(run_id).info.artifact_uri}/config.json")

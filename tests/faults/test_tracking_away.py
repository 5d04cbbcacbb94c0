"""Rows D1, D2, D3: a tracking server that dies, is locked, or whose answers are lost costs not a point."""

import functools
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from segfleet import tracking, tracking_server
from segfleet.config import TrackingConfig, TrainingConfig
from segfleet.package import package_model
from segfleet.registry import MODEL_ID_TAG, aliases_of, fetch, register
from segfleet.run_writer import RunWriter, end_run
from segfleet.spool import unsent_runs
from tests.faults.oracles import history
from tests.faults.proxy import lossy_proxy
from tests.faults.studies import Search, Trials, search_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's with SQLAlchemy 2.1
]
LONG = pytest.mark.faults_long

Recorded = Callable[[str, object], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("away")


def new_search(config: TrainingConfig, folder: Path, name: str, uri: str) -> Search:
    settings: dict[str, object] = {
        "training.tracking.tracking_uri": uri,
        "training.tracking.experiment_name": name,
    }
    return Search(search_config(config, folder / name, settings), folder / name)


@pytest.mark.fault("D1", "the MLflow server killed in the midst of a search")
@pytest.mark.parametrize("seconds", [20, pytest.param(0, marks=LONG), pytest.param(60, marks=LONG)])
def test_a_killed_server_costs_no_point(
    config: TrainingConfig,
    folder: Path,
    undisturbed: Trials,
    server: Any,
    record_property: Recorded,
    seconds: float,
) -> None:
    """The trials are so short that one ends and the next begins meanwhile: it waits for its run."""
    search = new_search(config, folder, f"killed-{seconds}", server.uri)
    process = search.start()
    search.wait_for(process, "trial 0 starts")
    server.kill()
    time.sleep(seconds)
    server.start()
    started = time.monotonic()
    process.join()
    record_property("recovery_s", time.monotonic() - started)
    assert process.exitcode == 0, search.log()
    search.end_leftovers(may_be_left=False)
    assert search.outcome() == undisturbed
    assert unsent_runs(search.folder) == {}


@pytest.mark.fault("D2", "MLflow's database locked in the midst of a search")
@pytest.mark.parametrize("seconds", [pytest.param(5, marks=LONG), pytest.param(60, marks=LONG)])
def test_a_locked_database_costs_no_point(
    config: TrainingConfig, folder: Path, undisturbed: Trials, record_property: Recorded, seconds: float
) -> None:
    path = folder / f"locked-{seconds}.db"
    search = new_search(config, folder, f"locked-{seconds}", f"sqlite:///{path}")
    process = search.start()
    search.wait_for(process, "trial 0 starts")
    connection = sqlite3.connect(path, isolation_level=None, timeout=60)
    connection.execute("BEGIN EXCLUSIVE")
    time.sleep(seconds)
    connection.execute("ROLLBACK")
    connection.close()
    started = time.monotonic()
    process.join()
    record_property("recovery_s", time.monotonic() - started)
    assert process.exitcode == 0, search.log()
    search.end_leftovers(may_be_left=False)
    assert search.outcome() == undisturbed
    assert unsent_runs(search.folder) == {}


@pytest.fixture(scope="module")
def packages(write_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models."""
    folder = tmp_path_factory.mktemp("packages")
    return [
        package_model(write_checkpoint(folder / f"epoch_000{seed}", seed=seed), folder / f"package-{seed}")
        for seed in (1, 2)
    ]


@pytest.mark.fault("D3", "answers lost after the server did as it was asked")
@pytest.mark.parametrize("num_lost", [1, pytest.param(2, marks=LONG)])
def test_a_lost_answer_makes_nothing_twice(
    server: Any, packages: list[Path], tmp_path: Path, num_lost: int
) -> None:
    """One is made up for by MLflow's client, which asks again; the loss of two, by whoever uses it."""
    name = f"lost-{num_lost}"
    config = TrackingConfig(tracking_uri=server.uri, experiment_name=name, storage_dir=str(tmp_path))
    with lossy_proxy(server.port, num_lost=num_lost) as proxy:
        lossy = replace(config, tracking_uri=proxy.uri)
        run_ids = {
            tracking_server.patiently(
                lambda: tracking.open_run(
                    lossy,
                    run_name="run",
                    key=name,
                    parent_run_id=None,
                    tags={"a": "b"},
                    params={f"p{number}": number for number in range(150)},
                )
            )
            for _ in range(2)
        }
        (run_id,) = run_ids
        tracking_server.patiently(
            lambda: tracking.log_dataset(
                proxy.uri, run_id, name="patches", digest="5" * 64, source="here", splits={"train": 1}
            )
        )
        writer = RunWriter(proxy.uri, run_id, tmp_path / "spool")
        for step in range(3):
            writer.log_metrics({"loss": 1 / (step + 1), "val/miou": step / 4}, step=step)
            assert writer.flush(60)
        writer.log_text("text", "folder/text.txt")
        writer.close(60)
        while not end_run(
            proxy.uri, run_id, status="FINISHED", tags={"c": "d"}, spool_dir=tmp_path / "spool"
        ):
            assert unsent_runs(tmp_path)
        versions = [
            tracking_server.patiently(
                functools.partial(register, proxy.uri, name, package, run_id=run_of_model)
            )
            for package, run_of_model in zip(packages, (run_id, ""), strict=True)
        ]
        assert max(proxy.lost.values()) == num_lost
        print(sorted(proxy.lost.items()))
        assert sum("runs/" in kind for kind in proxy.lost) >= 5
        assert any("model-versions/create" in kind for kind in proxy.lost)
    client = tracking_server.client(server.uri)
    experiment = client.get_experiment_by_name(name)
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.status) == (run_id, "FINISHED")
    assert len(found.data.params) == 150
    found_points = history(server.uri, run_id)
    of_model = {f"registered/{name}" for name in ("miou", "mean_accuracy", "pixel_accuracy")}
    assert {key for key, _ in found_points if key.startswith("registered/")} == of_model
    assert {point: value for point, value in found_points.items() if point[0] not in of_model} == {
        (key, step): value
        for step in range(3)
        for key, value in (("loss", 1 / (step + 1)), ("val/miou", step / 4))
    }
    assert len(found.inputs.dataset_inputs) == 1
    assert [path.path for path in client.list_artifacts(run_id, "folder")] == ["folder/text.txt"]
    registered = client.search_model_versions(f"name='{name}'")
    assert sorted(int(version.version) for version in registered) == sorted(versions)
    assert len(versions) == len(packages)
    assert aliases_of(server.uri, name) == {"champion": versions[0], "challenger": versions[1]}
    for version in registered:
        assert client.get_logged_model(version.tags[MODEL_ID_TAG]).status == "READY"
        fetch(f"models:/{name}/{version.version}", tracking_uri=server.uri)

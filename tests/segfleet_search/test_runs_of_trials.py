"""Law: the runs agree with the study, wherever a process died."""

import shutil
from pathlib import Path

import pytest

from segfleet import tracking, tracking_server
from segfleet.override import override
from segfleet.presets import search_preset
from segfleet.search_config import SearchConfig
from segfleet.study import Study
from segfleet.trials import complete_runs

pytestmark = pytest.mark.filterwarnings(
    "ignore::sqlalchemy.exc.SADeprecationWarning"  # MLflow 3.17 uses what SQLAlchemy 2.1 deprecates
)


@pytest.fixture
def config(tmp_path: Path, empty_database: Path) -> SearchConfig:
    shutil.copy(empty_database, tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    folders = {"training.tracking.storage_dir": str(tmp_path), "training.tracking.tracking_uri": uri}
    return override(search_preset("demo"), folders | {"study": "s"})


def test_runs_of_trials_that_the_study_ended_are_ended_and_no_others(config: SearchConfig) -> None:
    """A process that dies after the study has a trial's end, and before the tracking server has it."""
    study = Study(config, store_digest="d")
    parent, stranger = open_run(config, "parent", None), open_run(config, "stranger", None)
    runs = []
    for reason in ("pruned", "lost", None):
        trial = study.ask()
        runs.append(open_run(config, f"trial {trial.number}", parent))
        study.note(trial.number, {"run_id": runs[-1]})
        if reason is not None:
            study.finish(trial.number, reason, f"why {reason}")
    assert states(config, parent, stranger, *runs) == ["RUNNING"] * 5

    complete_runs(config, study, parent)
    assert states(config, parent, stranger, *runs) == ["RUNNING", "RUNNING", "FINISHED", "FAILED", "RUNNING"]
    tags = tracking_server.client(config.training.tracking.tracking_uri).get_run(runs[0]).data.tags
    assert (tags["segfleet.reason"], tags["segfleet.detail"]) == ("pruned", "why pruned")
    assert tracking.unended_runs(config.training.tracking, parent) == {runs[2]}


def open_run(config: SearchConfig, name: str, parent: str | None) -> str:
    return tracking.open_run(
        config.training.tracking, run_name=name, key=name, parent_run_id=parent, tags={}, params={}
    )


def states(config: SearchConfig, *run_ids: str) -> list[str]:
    client = tracking_server.client(config.training.tracking.tracking_uri)
    return [client.get_run(run_id).info.status for run_id in run_ids]

"""Law: a point that cannot be trained is refused before it costs a worker, with its reason in the study."""

from pathlib import Path

import pytest
from ray import tune
from ray.train._internal.storage import _get_ray_train_session_dir

from pspnet.store import Store
from segfleet import cluster, tracking, tracking_server, trials
from segfleet.config import TrainingConfig
from segfleet.override import override
from segfleet.search_config import SearchConfig, SpaceConfig
from segfleet.study import Study
from tests.segfleet_runtime.conftest import config, store_path

__all__ = ["config", "store_path"]

pytestmark = pytest.mark.filterwarnings(
    "ignore::sqlalchemy.exc.SADeprecationWarning"  # MLflow 3.17 uses what SQLAlchemy 2.1 deprecates
)


def test_what_cannot_fit_into_memory_is_refused_and_what_can_is_begun(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = override(
        config,
        {"workers.memory_gib": 0.25, "tracking.tracking_uri": f"sqlite:///{tmp_path / 'mlflow.db'}"},
    )
    search = SearchConfig(
        training=training,
        space=SpaceConfig(crop_sizes=(33, 1025)),
        sampler="grid",
        grid_points=1,
        num_trials=2,
    )
    study = Study(search, store_digest="d")
    started: list[str] = []

    def start(training: TrainingConfig, path: Path) -> tuple[str, None]:
        started.append(str(path))
        return "group", None

    monkeypatch.setattr("segfleet.groups.start", start)
    parent = tracking.open_run(
        training.tracking, run_name="study", key="s", parent_run_id=None, tags={}, params={}
    )
    execution = trials._Execution(search, study, Store.open(training.data.store), parent, tmp_path / "groups")
    begun = {}
    for _ in range(2):
        proposal = study.ask()
        begun[proposal.changes["data.crop_size"]] = (proposal.number, execution.begin(proposal))
    number, settings = begun[1025]
    assert settings is None
    assert study.trials()[number].reason == "refused"
    assert "must fit in workers.memory_gib 0.25" in study.trials()[number].detail
    number, settings = begun[33]
    assert settings is not None
    assert study.trials()[number].reason == "running"
    assert len(started) == 1
    client = tracking_server.client(training.tracking.tracking_uri)
    run = client.get_run(study.trials()[number].attributes["run_id"])
    assert run.data.tags["mlflow.note.content"].startswith(f"Trial {number} of study pspnet: base_lr 0.001, ")
    assert run.data.tags["mlflow.parentRunId"] == parent


@pytest.mark.slow
def test_of_a_search_nothing_stays_in_ray_s_session(tmp_path: Path) -> None:
    """Tune copies its files there for each trial, and keeps them as long as the cluster lives."""
    ray_dir = tmp_path / "study" / "ray-0123"
    with cluster.connect(tmp_path / "runs"):
        session = Path(_get_ray_train_session_dir())
        run_config = tune.RunConfig(name=ray_dir.name, storage_path=str(ray_dir), verbose=0)
        tune.Tuner(lambda config: {"miou": 0.5}, run_config=run_config).fit()
        assert [path for path in session.rglob("*") if path.is_file()]
        trials._remove_files_of(ray_dir)
        assert [path for path in session.rglob("*") if path.is_file()] == []
    assert not ray_dir.exists()

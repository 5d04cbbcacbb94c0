"""Rows E2 and E3: a trial is asked for once, whoever dies before it trains; one that does not fit is tried once."""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.trial import TrialState

from pspnet.store import Store
from segfleet import lease, tracking, tracking_server, trials
from segfleet import study as study_module
from segfleet.config import TrainingConfig
from segfleet.config_json import from_json, to_json
from segfleet.outcome import read_outcome
from segfleet.override import override
from segfleet.place import Place
from segfleet.search_config import SearchConfig
from segfleet.study import Study, repair
from segfleet.worker import Task, execute
from tests.faults.processes import run
from tests.faults.studies import search_config
from tests.segfleet_runtime.test_training import task_of
from tests.segfleet_search.test_study import num_late_ooms

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's with SQLAlchemy 2.1
]
NUM_TRIALS = 4

Recorded = Callable[[str, object], None]


def begin_all(config_json: str) -> None:
    """As a search does, up to where the first worker would start."""
    config = from_json(SearchConfig, config_json)
    folder = Path(config.training.tracking.storage_dir)
    store = Store.open(config.training.data.store)
    with lease.held(folder / config.study, f"study {config.study}"):
        repair(config)
        study = Study(config, store_digest=store.digest)
        execution = trials._Execution(config, study, store, parent_run(config, study), folder / "groups")
        execution._free_group = lambda: "no workers"  # type: ignore[method-assign]
        for proposal in study.unfinished():
            execution.begin(proposal)
        while study.num_left():
            execution.begin(study.ask())


def parent_run(config: SearchConfig, study: Study) -> str:
    return tracking.open_run(
        config.training.tracking, run_name="study", key=study.key, parent_run_id=None, tags={}, params={}
    )


@pytest.mark.fault("E3", "SIGKILL between ask and first save, ten times")
def test_a_trial_that_was_asked_for_is_neither_lost_nor_asked_for_again(
    config: TrainingConfig, tmp_path: Path, record_property: Recorded
) -> None:
    search = override(search_config(config, tmp_path / "killed", {}), {"num_trials": NUM_TRIALS})
    for fault in (
        "study.asked:kill:1",
        "study.drawn:kill:1",
        "trial.opened:kill:1",
        "trial.noted:kill:1",
        "study.asked:kill:1",
        "study.drawn:kill:2",
        "trial.opened:kill:2",
        "trial.noted:kill:3",
        "study.drawn:kill:4",
        "trial.opened:kill:4",
    ):
        assert run(begin_all, to_json(search), fault=fault) == -9
    started = time.monotonic()
    assert run(begin_all, to_json(search)) == 0
    record_property("recovery_s", time.monotonic() - started)
    clean = override(search_config(config, tmp_path / "clean", {}), {"num_trials": NUM_TRIALS})
    assert run(begin_all, to_json(clean)) == 0

    digest = Store.open(config.data.store).digest
    study, other = Study(search, store_digest=digest), Study(clean, store_digest=digest)
    assert [(trial.number, trial.reason) for trial in study.trials()] == [
        (number, "running") for number in range(NUM_TRIALS)
    ]
    assert [trial.changes for trial in study.trials()] == [trial.changes for trial in other.trials()]
    uri = tracking_server.resolve_uri(search.training.tracking)
    client = tracking_server.client(uri)
    parent = parent_run(search, study)
    experiment = client.get_experiment_by_name(search.training.tracking.experiment_name)
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {parent, *(str(trial.attributes["run_id"]) for trial in study.trials())}
    assert len(runs) == NUM_TRIALS + 1
    for trial in study.trials():
        run_of_trial = runs[str(trial.attributes["run_id"])]
        assert run_of_trial.data.tags["segfleet.trial"] == str(trial.number)
        assert {name: run_of_trial.data.params[name] for name in trial.changes} == {
            name: str(value) for name, value in trial.changes.items()
        }


def execute_with_little_memory(task: Task) -> None:
    """Train where the process may map 3 GB more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 3 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        execute(task, Place(), report=lambda _: None)
    except Exception:  # recorded before it was raised: what counts is the record
        sys.exit(3)


@pytest.mark.fault("E2", "a crop that needs more memory than there is")
def test_what_does_not_fit_is_tried_once(config: TrainingConfig, tmp_path: Path) -> None:
    small, large = (override(config, {"data.crop_size": size}) for size in (33, 2049))
    assert run(execute_with_little_memory, task_of(small, tmp_path / "small")) == 0
    task = task_of(large, tmp_path / "large")
    assert run(execute_with_little_memory, task) == 3
    outcome = read_outcome(tmp_path / "large", task.attempt)
    assert outcome is not None
    assert (outcome.reason, "\n" in outcome.message) == ("oom", False)
    assert "lower data.crop_size" in outcome.message
    said = (tmp_path / "large" / "progress.log").read_text()
    assert run(execute_with_little_memory, task) == 0  # the group that Ray starts in place of the failed one
    assert (tmp_path / "large" / "progress.log").read_text() == said
    assert json.loads((tmp_path / "large" / "outcome.json").read_text())["reason"] == "oom"


@pytest.mark.fault("E2", "sizes above some do not fit: what the sampler learns of 100 trials")
def test_what_does_not_fit_is_proposed_less_and_less(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among the last 40, fewer than half as many as where the sampler does not hear of them."""
    search = search_config(config, tmp_path / "search", {})
    learnt = sum(num_late_ooms(search, seed) for seed in range(2))
    monkeypatch.setitem(study_module._STATE_OF, "oom", TrialState.FAIL)
    unheard = sum(num_late_ooms(search, seed + 100) for seed in range(2))
    assert 2 * learnt < unheard, (learnt, unheard)

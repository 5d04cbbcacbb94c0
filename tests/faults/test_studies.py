"""Rows A6, B1 to B4: whoever dies in a search, and how often, the same command ends it as if nobody had."""

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from segfleet import lease
from segfleet.config import TrainingConfig
from tests.faults.studies import NUM_TRIALS, Search, Trials, holder, search_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's with SQLAlchemy 2.1
]
LONG = pytest.mark.faults_long

Recorded = Callable[[str, object], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


def new_search(config: TrainingConfig, folder: Path, name: str) -> Search:
    return Search(search_config(config, folder / name, {}), folder / name)


def resume(search: Search, record_property: Recorded, *, fault: str = "") -> int:
    """Submit again; how long it takes until a trial goes on, or the search ends, is its recovery."""
    started = time.monotonic()
    code = search.run(fault=fault)
    record_property("recovery_s", time.monotonic() - started)
    return code


@pytest.mark.fault("B1", "SIGKILL of the search's driver, submitted again each time")
@pytest.mark.parametrize(
    ("faults", "pauses_s"),
    [
        (("study.reasoned:kill:2",), (0,)),  # after two reports, of which the better one is not heard again
        pytest.param(
            (
                "study.asked:kill:1",
                "study.drawn:kill:1",
                "trial.opened:kill:1",
                "trial.noted:kill:1",
                "trial.reported:kill:1",
                "trial.reported:kill:2",
                "study.reasoned:kill:1",
                "trial.finished:kill:1",
                "search.trained:kill:1",
                "search.packaged:kill:1",
            ),
            (0, 20, 60),
            marks=LONG,
            id="ten",
        ),
    ],
)
def test_a_killed_search_is_completed_by_the_same_command(
    config: TrainingConfig,
    folder: Path,
    undisturbed: Trials,
    record_property: Recorded,
    faults: tuple[str, ...],
    pauses_s: tuple[float, ...],
) -> None:
    search = new_search(config, folder, f"killed-{len(faults)}")
    for number, fault in enumerate(faults):
        assert search.run(fault=fault) == -9, search.log()
        assert not search.fault_file.exists()
        time.sleep(pauses_s[number % len(pauses_s)])
    assert resume(search, record_property) == 0, search.log()
    assert search.outcome() == undisturbed
    search.assert_none_was_begun_after_its_end()


@pytest.mark.fault("B2", "the same study submitted twice at once")
@pytest.mark.faults_long
def test_the_second_says_who_holds_the_study_and_leaves_the_first_alone(
    config: TrainingConfig, folder: Path, undisturbed: Trials
) -> None:
    search = new_search(config, folder, "twice")
    first = search.start()
    pid = holder(search, first)["pid"]
    assert pid == first.pid
    rival = Search(search.config, folder / "rival")
    assert rival.run() == lease.EXIT_CODE
    said = f"error: .*study faulted is held by process {pid} on {re.escape(socket.gethostname())} since "
    assert re.search(said, rival.log())
    assert "Traceback" not in rival.log()
    first.join()
    assert first.exitcode == 0, search.log()
    search.end_leftovers(may_be_left=False)
    assert search.outcome() == undisturbed


def cut(path: Path, *, share: float = 0.5) -> None:
    """Keep the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


@pytest.mark.fault("B4", "Ray's snapshots and all state files cut short")
def test_cut_files_are_set_aside_and_named(
    config: TrainingConfig, folder: Path, undisturbed: Trials, record_property: Recorded
) -> None:
    search = new_search(config, folder, "cut")
    assert search.run(fault="trial.reported:kill:3") == -9, search.log()
    trials = sorted(search.study_dir.glob("trial_*"))
    assert len(trials) == 2
    of_ray = [path for path in search.study_dir.glob("ray-*/**/*") if path.is_file() and path.stat().st_size]
    assert of_ray
    for path in of_ray:
        cut(path)
    journal = search.study_dir / "study.journal"
    journal.write_bytes(journal.read_bytes()[:-5])
    cut(search.study_dir / lease.FILE)
    (trials[0] / "outcome.json").write_text("{")
    (search.study_dir / "study.journal.lock").symlink_to(journal)
    cut_spools = [path for path in trials[1].glob("spool/*.points.jsonl") if path.stat().st_size]
    for path in cut_spools:
        path.write_bytes(path.read_bytes()[:-5])
    assert cut_spools
    assert resume(search, record_property) == 0, search.log()
    outcome = search.outcome()
    assert outcome == undisturbed
    search.assert_none_was_begun_after_its_end()
    assert re.search(
        r"study\.journal ended in the midst of a line.* set aside as study\.journal\.damaged-1", search.log()
    )


@pytest.mark.fault("A6", "SIGKILL of a process that drives a trial")
@pytest.mark.faults_long
@pytest.mark.parametrize(
    ("fault", "is_resumed"), [("trial.heard:kill:2", False), ("group.held:kill:2", True)]
)
def test_a_trial_goes_on_without_its_driver(
    config: TrainingConfig, folder: Path, undisturbed: Trials, fault: str, is_resumed: bool
) -> None:
    """Tune's process of the trial only passes on what the workers do; the group's actor takes its workers along."""
    search = new_search(config, folder, fault.partition(":")[0])
    assert search.run(fault=fault) == 0, search.log()
    assert not search.fault_file.exists()
    assert search.outcome() == undisturbed
    search.assert_none_was_begun_after_its_end()
    said = [path.read_text() for path in search.study_dir.glob("trial_*/progress.log")]
    assert len(said) == NUM_TRIALS
    assert any("resumed after epoch" in text for text in said) == is_resumed


@contextlib.contextmanager
def cluster_of_its_own() -> Iterator[Cluster]:
    """A head with two CPUs, which no process of this test is connected to.

    Without a token: `ray.init` of an earlier test may have left one in the environment, which searches do not have.
    """
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("RAY_AUTH_")]:
            environment.delenv(name)
        cluster = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 2})
        try:
            yield cluster
        finally:
            cluster.shutdown()


@pytest.mark.fault("B3", "the Ray head killed, a new cluster, submitted again")
@pytest.mark.faults_long
def test_of_a_lost_cluster_only_the_storage_is_needed(
    config: TrainingConfig, folder: Path, undisturbed: Trials, record_property: Recorded
) -> None:
    search = new_search(config, folder, "head")
    with cluster_of_its_own() as cluster:
        process = search.start(address=cluster.address)
        search.wait_for(process, "trial 1 starts")
        assert cluster.head_node is not None
        cluster.remove_node(cluster.head_node, allow_graceful=False)
        process.join()
    assert process.exitcode != 0, search.log()
    search.end_leftovers(may_be_left=True)
    with cluster_of_its_own() as cluster:
        started = time.monotonic()
        process = search.start(address=cluster.address)
        process.join()
        record_property("recovery_s", time.monotonic() - started)
    assert process.exitcode == 0, search.log()
    assert search.outcome() == undisturbed
    search.assert_none_was_begun_after_its_end()

"""An interruption stays one, whatever a library makes of it."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow.entities import RunTag
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine.default import DefaultDialect

from segfleet import run_writer, tracking, tracking_server, trials
from segfleet.cli import run_job
from segfleet.config import TrackingConfig
from segfleet.interruption import known_interruption, terminable
from segfleet.run_writer import killed_when_interrupted

pytestmark = pytest.mark.usefixtures("heeds_ctrl_c")


def interrupted_when_the_lock_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask a study for a trial while Ctrl-C comes at the one moment at which Optuna raises something else."""
    study = optuna.create_study(storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))))
    unlink = os.unlink

    def unlink_and_interrupt(name: str) -> None:
        unlink(name)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr("optuna.storages.journal._file.os.unlink", unlink_and_interrupt)
        study.ask()


def test_an_error_in_a_librarys_tidying_up_is_the_interruption_that_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[tuple[str, str]] = []

    def end_run(uri: str, run_id: str, *, status: str, tags: dict[str, str]) -> bool:
        ended.append((run_id, status))
        return True

    monkeypatch.setattr(run_writer, "end_run", end_run)

    def job() -> None:
        with killed_when_interrupted("uri", "of the study", lambda: ["of a trial"]):
            interrupted_when_the_lock_is_given_up(tmp_path / "journal", monkeypatch)

    with pytest.raises(SystemExit) as left:
        run_job(job)
    assert left.value.code == 130
    assert ended == [("of a trial", "KILLED"), ("of the study", "KILLED")]
    assert capsys.readouterr().err == "interrupted; the same command goes on from here\n"


@pytest.mark.parametrize("method", ["suggest", "on_trial_complete", "on_trial_result"])
def test_tune_is_told_of_an_interruption_and_not_of_the_error_that_it_would_take_for_a_trials(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Execution:
        """Meets Optuna's lock at each of Tune's questions."""

        def next_proposal(self) -> None:
            interrupted_when_the_lock_is_given_up(tmp_path / "journal", monkeypatch)

        def end(self, *_: Any, **named: Any) -> None:
            self.next_proposal()

        def report(self, *_: Any) -> None:
            self.next_proposal()

    searcher = trials._StudySearcher(Execution(), [])  # type: ignore[arg-type]
    searcher._number_of["a"] = 0
    scheduler = trials._StudyScheduler(Execution())  # type: ignore[arg-type]
    trial = type("Trial", (), {"config": {"number": 0}})
    calls = {
        "suggest": lambda: searcher.suggest("a"),
        "on_trial_complete": lambda: searcher.on_trial_complete("a"),
        "on_trial_result": lambda: scheduler.on_trial_result(None, trial, {}),
    }
    with pytest.raises(KeyboardInterrupt), terminable():
        _but_not_an_error(calls[method])


def _but_not_an_error(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception as error:  # as Ray Tune does around on_trial_complete
        pytest.fail(f"Tune would go on after {error!r}")  # no Exception: it is heard outside


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_got_lost_is_raised_at_the_next_occasion(number: signal.Signals) -> None:
    def lose() -> None:
        with contextlib.suppress(KeyboardInterrupt):  # as what a destructor raises is
            os.kill(os.getpid(), number)

    def job(begun: list[str]) -> None:
        lose()
        begun.append("first")
        with known_interruption():
            begun.append("second")
        begun.append("third")

    begun: list[str] = []
    with pytest.raises(SystemExit) as left:
        run_job(lambda: job(begun))
    assert left.value.code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert begun == ["first", "second"]

    another: list[str] = []
    with pytest.raises(SystemExit) as left:
        run_job(lambda: another.append("all"))
    assert left.value.code == 0


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's with SQLAlchemy 2.1
def test_a_statement_that_was_interrupted_does_not_keep_the_end_from_being_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked = TrackingConfig(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_id = tracking.open_run(tracked, run_name="a", key="a", parent_run_id=None, tags={}, params={})
    client = tracking_server.client(tracked.tracking_uri)
    client.log_batch(run_id, tags=[RunTag(f"tag{number}", "value") for number in range(9)])
    execute = DefaultDialect.do_execute

    def execute_and_interrupt(self: DefaultDialect, cursor: Any, *arguments: Any) -> None:
        execute(self, cursor, *arguments)
        if "FROM tags" in arguments[0]:  # many rows, of which none is fetched yet
            monkeypatch.undo()
            os.kill(os.getpid(), signal.SIGINT)

    def job() -> None:
        with killed_when_interrupted(tracked.tracking_uri, run_id):
            monkeypatch.setattr(DefaultDialect, "do_execute", execute_and_interrupt)
            client.get_run(run_id)

    with pytest.raises(SystemExit) as left:
        run_job(job)
    assert left.value.code == 130
    assert client.get_run(run_id).info.status == "KILLED"


def test_a_job_that_cannot_go_on_does_not_say_that_it_would(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run_job(lambda: os.kill(os.getpid(), signal.SIGINT), goes_on=False)
    assert left.value.code == 130
    assert capsys.readouterr().err == "interrupted; the same command begins anew\n"


def test_sigterm_raises_until_one_is_heard_and_then_does_not_disturb_the_tidying_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []

    def end_run(*_: Any, **__: Any) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        said.append("ended")
        return True

    monkeypatch.setattr(run_writer, "end_run", end_run)

    def job() -> None:
        with killed_when_interrupted("uri", "a run"):
            with contextlib.suppress(KeyboardInterrupt):  # as what a destructor raises is
                os.kill(os.getpid(), signal.SIGTERM)
            said.append("lost")
            os.kill(os.getpid(), signal.SIGTERM)
            said.append("lost again")

    with pytest.raises(SystemExit) as left:
        run_job(job)
    assert left.value.code == 143
    assert said == ["lost", "ended"]


def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with terminable():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_any_other_error_stays_what_it_is() -> None:
    def fail() -> None:
        try:
            raise ValueError("another")
        except ValueError:
            raise FileNotFoundError("one") from None

    with pytest.raises(FileNotFoundError, match="one"), known_interruption():
        fail()

"""An interruption stays one, whatever a library makes of it."""

import os
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from segfleet import run_writer
from segfleet.cli import run_job
from segfleet.interruption import known_interruption
from segfleet.run_writer import killed_when_interrupted


def interrupted_when_the_lock_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask a study for a trial while Ctrl-C comes at the one moment at which Optuna raises something else."""
    study = optuna.create_study(storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))))
    unlink = os.unlink

    def unlink_and_interrupt(name: str) -> None:
        unlink(name)
        raise KeyboardInterrupt

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


def test_any_other_error_stays_what_it_is() -> None:
    def fail() -> None:
        try:
            raise ValueError("another")
        except ValueError:
            raise FileNotFoundError("one") from None

    with pytest.raises(FileNotFoundError, match="one"), known_interruption():
        fail()

"""Laws of the places where a study is kept: journal, SQLite and a real PostgreSQL server hold the same search."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from pspnet.errors import InputError
from segfleet.override import override
from segfleet.ports import free_ports
from segfleet.presets import search_preset
from segfleet.search_config import SearchConfig
from segfleet.study import Study, TrialRecord, exists

NUM_TRIALS = 9
PASSWORD = "hunter2"


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    changes = {
        "training.tracking.storage_dir": str(tmp_path),
        "training.schedule.num_epochs": 4,
        "min_epochs": 1,
        "reduction_factor": 2,
        "num_startup_trials": 3,
        "num_trials": NUM_TRIALS,
    }
    return override(search_preset("demo"), changes)


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server on this machine that wants a password; its address."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    tools = shutil.which("initdb", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, found)]))
    if tools is None:
        pytest.skip("needs PostgreSQL's initdb and pg_ctl")
    folder = tmp_path_factory.mktemp("postgresql")
    owner: dict[str, str] = {}
    if os.geteuid() == 0:  # it does not run as root
        owner = {"user": "nobody"}
        for parent in (folder, *folder.parents):
            if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
        shutil.chown(folder, "nobody")
    secret = folder / "password"
    secret.write_text(PASSWORD)
    secret.chmod(0o644)
    (port,) = free_ports(1, "127.0.0.1")
    data, log = str(folder / "data"), (folder / "log").open("wb")
    make = [tools, "-D", data, "-U", "me", "-A", "scram-sha-256", f"--pwfile={secret}", "-E", "UTF8", "-N"]
    subprocess.run(make, check=True, stdout=log, stderr=log, cwd=folder, **owner)  # type: ignore[call-overload]
    serve = [
        str(Path(tools).with_name("postgres")),
        "-D",
        data,
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
        "-k",
        "",
        "-F",
    ]
    process = subprocess.Popen(serve, stdout=log, stderr=log, cwd=folder, **owner)  # type: ignore[call-overload]
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as asked:
                if asked.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"postgresql://me:{PASSWORD}@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # at SIGTERM it waits for its clients to go
        process.wait(30)
        log.close()


def as_text(trials: list[TrialRecord]) -> list[str]:
    """Return all that is known of each trial: a database keeps no order of its attributes, and NaN is not itself."""
    return [json.dumps(asdict(trial), sort_keys=True) for trial in trials]


def searched(config: SearchConfig) -> list[TrialRecord]:
    """Search by a script; every third trial a new process, as it were, goes on with the study."""
    for number in range(NUM_TRIALS):
        if number % 3 == 0:
            study = Study(config, store_digest="d")
        proposal = study.ask()
        study.note(proposal.number, {"run_id": f"run {number}", "class_iou": [0.5, None]})
        for epoch in range(1, 5):
            weight = float(proposal.changes["optim.aux_loss_weight"])
            decision = study.report(number, epoch=epoch, miou=0.1 * epoch + 0.1 * weight)
            if decision.stop:
                study.finish(number, "pruned", decision.reason)
                break
        else:
            study.finish(number, "complete", "4 epochs", cost_s=12.5)
    study.note_groups({"0": [1.0, 2.5]})
    again = Study(config, store_digest="d")
    assert (again.num_left(), again.unfinished(), again.groups) == (0, [], {"0": [1.0, 2.5]})
    return again.trials()


def test_every_storage_holds_the_same_search(config: SearchConfig, tmp_path: Path, postgresql: str) -> None:
    journal = searched(config)
    assert {trial.reason for trial in journal} == {"pruned", "complete"}
    for url in (f"sqlite:///{tmp_path / 'study.db'}", postgresql):
        stored = replace(config, study_storage=url)
        assert not exists(stored)
        assert as_text(searched(stored)) == as_text(journal)
        assert exists(stored)
        other = override(stored, {"training.optim.momentum": 0.5})
        with pytest.raises(InputError, match=r"training\.optim\.momentum: 0\.9 there, 0\.5 here"):
            Study(other, store_digest="d")


def test_optunas_own_tools_open_the_journal(config: SearchConfig, tmp_path: Path) -> None:
    """As optuna-dashboard and `optuna.load_study` do, without anything of ours."""
    trials = searched(config)
    (path,) = tmp_path.rglob("study.journal")
    study = optuna.load_study(study_name=config.study, storage=JournalStorage(JournalFileBackend(str(path))))
    assert [trial.state.name == "COMPLETE" for trial in study.trials] == [
        trial.reason == "complete" for trial in trials
    ]
    best = max((trial for trial in trials if trial.reason == "complete"), key=lambda trial: trial.miou)
    assert (study.best_trial.number, study.best_value) == (best.number, best.miou)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://me:hunter2@127.0.0.1:1/none", r"must be a database that answers"),
        ("sqlite:////nowhere/at/all.db", r"must be a database that answers.*unable to open"),
        ("nothing", r"must be a database that answers"),
        ("mysql+nodriver://me:hunter2@h/d", r"must be a database that answers"),
        ("oracle://me:hunter2@h/d", r"needs the database's driver"),
    ],
)
def test_a_database_that_is_not_there_is_refused_without_its_password(
    config: SearchConfig, url: str, said: str
) -> None:
    with pytest.raises(InputError, match=said) as refused:
        Study(replace(config, study_storage=url), store_digest="d")
    assert PASSWORD not in str(refused.value)


def test_a_wrong_password_is_refused_without_showing_it(config: SearchConfig, postgresql: str) -> None:
    url = re.sub(PASSWORD, "guess42", postgresql)
    with pytest.raises(InputError, match="password authentication failed") as refused:
        Study(replace(config, study_storage=url), store_digest="d")
    assert "guess42" not in str(refused.value)

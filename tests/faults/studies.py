"""A search of three small trials in a process of its own, and what it leaves."""

import contextlib
import json
import os
import re
import shutil
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from pspnet.store import Store
from segfleet import lease, tracking_server
from segfleet.cli import run_job
from segfleet.config import TrainingConfig
from segfleet.config_json import from_json, to_json
from segfleet.final_score import split_for_trials
from segfleet.override import override
from segfleet.presets import search_preset
from segfleet.search_config import SearchConfig
from segfleet.study import Study, TrialRecord
from tests.faults import processes
from tests.faults.oracles import History, files_aside, history, weights

NUM_TRIALS = 3
STUDY = "faulted"


def search_config(training: TrainingConfig, folder: Path, changes: dict[str, object]) -> SearchConfig:
    """Three trials of two epochs on one worker, one at a time, in `folder`, with a database as empty as theirs."""
    (folder / "runs").mkdir(parents=True)
    shutil.copy(Path(training.tracking.storage_dir) / "mlflow.db", folder / "runs")
    training = override(training, {"schedule.num_epochs": 2, "tracking.storage_dir": str(folder / "runs")})
    config = replace(search_preset("demo"), training=training, study=STUDY, num_trials=NUM_TRIALS)
    settings = {"max_concurrent_trials": 1, "space.crop_sizes": (33, 41), "scheduler": "none"}
    return override(config, settings | changes)


@dataclass
class Trials:
    """Everything that one search is compared with another by."""

    trials: dict[int, tuple[str, dict[str, object], dict[int, float]]]
    """O: reason, point and mIoUs of each."""
    weights: dict[int, dict[str, str]]
    """W."""
    history: dict[int, History]
    """M."""
    best: dict[int, str]
    """Which checkpoint of each counts."""


@dataclass
class Search:
    """The searches of one study, one after another."""

    config: SearchConfig
    folder: Path
    logs: list[str] = field(default_factory=list)
    seen: set[psutil.Process] = field(default_factory=set)
    """Every process that a search of these ever started."""

    @property
    def fault_file(self) -> Path:
        """Where the fault is written that the next process is to meet."""
        return self.folder / "fault"

    @property
    def study_dir(self) -> Path:
        """The study's folder."""
        return Path(self.config.training.tracking.storage_dir) / self.config.study

    def start(self, *, fault: str = "", address: str = "") -> BaseProcess:
        """Start a process that searches on the cluster at `address`, or one of its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if fault:
            self.fault_file.write_text(fault)
        else:
            self.fault_file.unlink(missing_ok=True)
        log = self.folder / f"{len(self.logs)}.log"
        log.touch()
        self.logs.append(str(log))
        process = processes.start(
            _search, to_json(self.config), str(log), address, fault=f"@{self.fault_file}"
        )
        threading.Thread(target=self._watch, args=(process,), daemon=True).start()
        return process

    def _watch(self, process: BaseProcess) -> None:
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(process.pid)
            while root.is_running():
                self.seen.update(root.children(recursive=True))
                time.sleep(0.2)

    def wait_for(self, process: BaseProcess, said: str) -> None:
        """Wait until the search prints something."""
        while said not in self.log():
            assert process.is_alive(), self.log()
            time.sleep(0.05)

    def run(self, *, fault: str = "") -> int:
        """Search in a process and return its exit code; of one that was killed, what Ray leaves is ended."""
        process = self.start(fault=fault)
        process.join()
        assert process.exitcode is not None
        self.end_leftovers(may_be_left=process.exitcode < 0)
        return process.exitcode

    def log(self, number: int = -1) -> str:
        """Return what a process printed."""
        return Path(self.logs[number]).read_text()

    def end_leftovers(self, *, may_be_left: bool) -> None:
        """End Ray's agents, which outlive a driver that was killed; of one that was not, nothing may be left."""
        deadline = time.monotonic() + 60
        while (left := self.processes()) and time.monotonic() < deadline:
            if may_be_left and all(_is_agent(process) for process in left):
                break
            time.sleep(0.2)
        names = [" ".join(process.cmdline()[:4]) for process in left]
        assert not left or (may_be_left and all(_is_agent(process) for process in left)), names
        for process in left:
            process.kill()
        psutil.wait_procs(left)

    def processes(self) -> list[psutil.Process]:
        """Return the processes of these searches that live."""
        alive = []
        for process in list(self.seen):
            with contextlib.suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
        return alive

    def outcome(self) -> Trials:
        """Return what the study, its runs and its folders hold; O and M fail here where something is double."""
        records = self.records()
        assert [record.number for record in records] == list(range(NUM_TRIALS))
        uri = tracking_server.resolve_uri(self.config.training.tracking)
        client = tracking_server.client(uri)
        experiment = client.get_experiment_by_name(self.config.training.tracking.experiment_name)
        runs = client.search_runs([experiment.experiment_id])
        assert {run.info.status for run in runs} == {"FINISHED"}
        kinds = sorted(run.data.tags["segfleet.kind"] for run in runs)
        assert kinds == ["study"] + NUM_TRIALS * ["trial"]
        run_ids = {record.number: str(record.attributes["run_id"]) for record in records}
        trial_runs = {run.info.run_id for run in runs if run.data.tags["segfleet.kind"] == "trial"}
        assert set(run_ids.values()) == trial_runs
        aside = files_aside(self.study_dir) + [str(path) for path in self.study_dir.glob("ray-*")]
        assert not aside, aside
        return Trials(
            trials={
                record.number: (record.reason, record.changes, record.miou_by_epoch) for record in records
            },
            weights={
                record.number: weights(self.study_dir / f"trial_{record.number:04d}") for record in records
            },
            history={number: history(uri, run_id) for number, run_id in run_ids.items()},
            best={record.number: Path(record.attributes["checkpoint_path"]).name for record in records},
        )

    def records(self) -> list[TrialRecord]:
        """Return the study's trials."""
        store = Store.open(self.config.training.data.store)
        return Study(split_for_trials(self.config, store), store_digest=store.digest).trials()

    def assert_none_was_begun_after_its_end(self) -> None:
        """No finished trial is trained again, by any of the processes."""
        text = "\n".join(Path(log).read_text() for log in self.logs)
        for number in range(NUM_TRIALS):
            said = re.findall(rf"^trial {number} (starts|goes on|complete|pruned|failed|lost)\b", text, re.M)
            ends = [at for at, word in enumerate(said) if word not in ("starts", "goes on")]
            assert said.count("starts") <= 1, said
            assert not ends or ends == [len(said) - 1], said


def holder(search: Search, process: BaseProcess) -> dict[str, object]:
    """Wait until the study is held and return by whom."""
    path = search.study_dir / lease.FILE
    while True:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return dict(json.loads(path.read_text()))
        assert process.is_alive(), search.log()
        time.sleep(0.05)


def _is_agent(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        command = " ".join(process.cmdline())
        return "agent" in command.lower() or not command
    return True


def _search(config_json: str, log: str, address: str) -> None:
    os.environ.pop("RAY_ADDRESS", None)
    if address:
        os.environ["RAY_ADDRESS"] = address
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["search"]
    from segfleet.search import print_search, run_search

    run_job(lambda: print_search(run_search(from_json(SearchConfig, config_json))))

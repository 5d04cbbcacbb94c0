"""Processes that a fault may end, forked from one that has imported everything already."""

import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from segfleet.faults import VARIABLE
from segfleet.place import Place
from segfleet.worker import Task, train

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "tests.faults.processes",
        "segfleet.search",
        "segfleet.promotion_record",
        "mlflow.store.tracking.sqlalchemy_store",
        "mlflow.store.model_registry.sqlalchemy_store",
    ]
)


def start(target: Callable[..., object], *arguments: Any, fault: str = "") -> BaseProcess:
    """Start `target` in a process of its own under the fault."""
    process = _context.Process(target=_under, args=(fault, target, arguments))
    process.start()
    return process


def run(target: Callable[..., object], *arguments: Any, fault: str = "") -> int:
    """Run `target` in a process of its own under the fault; return its exit code, -9 if it was killed."""
    process = start(target, *arguments, fault=fault)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def train_in_process(task: Task, *, fault: str = "", max_file_bytes: int = 0) -> int:
    """Train in a process of its own; the reports and when they came go to <run_dir>/reports.jsonl."""
    return run(_train, task, max_file_bytes, fault=fault)


def reports(task: Task) -> list[dict[str, Any]]:
    """Return what the trainings in `train_in_process` reported, in order."""
    path = Path(task.run_dir) / "reports.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _train(task: Task, max_file_bytes: int) -> None:
    if max_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    Path(task.run_dir).mkdir(parents=True, exist_ok=True)

    def report(metrics: Mapping[str, Any]) -> None:
        with (Path(task.run_dir) / "reports.jsonl").open("a") as file:
            file.write(json.dumps({"at": time.time(), **metrics}) + "\n")

    train(task, Place(), report=report)


def _under(fault: str, target: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    if fault:
        os.environ[VARIABLE] = fault
    else:
        os.environ.pop(VARIABLE, None)
    target(*arguments)

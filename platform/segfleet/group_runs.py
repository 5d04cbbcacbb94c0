"""The Ray Train runs of a group: started anew where a worker died."""

import shutil
import uuid
from pathlib import Path
from typing import Any

from segfleet import trainer
from segfleet.config import TrainingConfig
from segfleet.config_json import from_json
from segfleet.group_workers import serve
from segfleet.outcome import read_outcome, record_outcome
from segfleet.worker import Task


class Runs:
    """The runs whose workers ask the actor `group` for tasks."""

    def __init__(self, config_json: str, storage_path: str, group: str) -> None:
        self._config = from_json(TrainingConfig, config_json)
        self._storage_path, self._group = storage_path, group

    @property
    def max_failures(self) -> int:
        """How often a task is tried again after a worker died."""
        return self._config.workers.max_failures

    def run(self) -> Exception | None:
        """Serve the group until it has no more tasks, or a worker dies; return what was raised."""
        name = uuid.uuid4().hex[:12]
        try:
            trainer.train_run(
                self._config,
                serve,
                {"group": self._group},
                name=name,
                storage_path=self._storage_path,
                max_failures=0,
            ).fit()
        except Exception as error:  # whatever it is, whoever waits for the task must hear of it
            return error
        finally:
            shutil.rmtree(Path(self._storage_path) / name, ignore_errors=True)
        return None

    def result_of(self, task: dict[str, Any]) -> dict[str, Any] | None:
        """Return how the task ended, or None while it has not."""
        outcome = read_outcome(task["run_dir"], task["attempt"])
        if outcome is None:
            return None
        return {} if outcome.reason == "complete" else {"outcome": outcome.reason, "detail": outcome.message}

    def may_pass(self, task: dict[str, Any], error: Exception | None) -> bool:
        """Whether another run may do better at the task that this error ended: not where memory ran out."""
        return trainer.outcome_of(error, Task(**task)).reason != "oom"

    def fail(self, task: dict[str, Any], error: Exception | None) -> None:
        """Record that the task ended with its last run."""
        record_outcome(task["run_dir"], trainer.outcome_of(error, Task(**task)))

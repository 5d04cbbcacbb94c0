"""How often a group tries a task whose workers died: as often as another try may do better."""

from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
import ray.exceptions
from ray.train.v2.api.exceptions import WorkerGroupError

from segfleet import groups, trainer
from segfleet.config_json import to_json
from segfleet.override import override
from segfleet.presets import tiny


@pytest.mark.parametrize(
    ("death", "num_tries", "reason"),
    [
        (ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."), 1, "oom"),
        (ray.exceptions.WorkerCrashedError(), 3, "lost"),
    ],
)
def test_a_worker_killed_for_its_memory_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: Exception, num_tries: int, reason: str
) -> None:
    config = override(tiny(), {"workers.max_failures": 2, "tracking.storage_dir": str(tmp_path)})
    run = mock.Mock()
    run.fit.side_effect = WorkerGroupError("a worker died", {0: death})
    monkeypatch.setattr(trainer, "train_run", lambda *_, **__: run)
    group = groups.Group(to_json(config), str(tmp_path), "a group")
    group.train(asdict(trainer.new_task(config, name="a", run_id="", attempt="1")))
    _, event = group.next_event(-1)
    group.close()
    assert (event["outcome"], run.fit.call_count) == (reason, num_tries)

"""Which changes of a configuration are another training."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pspnet.errors import InputError
from segfleet.checkpoint import Checkpoint
from segfleet.config_json import to_json
from segfleet.continuation import check_same_training
from segfleet.override import override
from segfleet.presets import tiny

LIMITED = {"workers.memory_gib": 1.0, "schedule.accumulation_steps": 2}


@pytest.mark.parametrize(
    ("before", "now", "is_refused"),
    [
        (LIMITED, {"workers.memory_gib": 4.0}, False),
        (LIMITED, {}, False),
        ({}, LIMITED, False),
        ({}, {"schedule.accumulation_steps": 2}, True),
        (LIMITED, {"workers.memory_gib": 4.0, "schedule.num_epochs": 9}, True),
    ],
)
def test_steps_that_a_limit_on_memory_chose_do_not_bind_a_run(
    before: dict[str, Any], now: dict[str, Any], is_refused: bool
) -> None:
    base = override(tiny(), {"workers.num_workers": 1})
    state = {"config": json.loads(to_json(override(base, before))), "store_digest": "d"}
    checkpoint = Checkpoint(Path("a/checkpoints/epoch_0001"), {}, {}, {}, state)
    store: Any = SimpleNamespace(digest="d")
    if not is_refused:
        check_same_training(override(base, now), store, checkpoint)
        return
    with pytest.raises(InputError, match=next(path for path in now if path.startswith("schedule."))):
        check_same_training(override(base, now), store, checkpoint)

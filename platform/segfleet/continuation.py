"""Whether a checkpoint is of the training that is to go on with it."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pspnet.errors import InputError
from pspnet.store import Store
from segfleet.checkpoint import Checkpoint
from segfleet.config import TrainingConfig
from segfleet.config_json import from_json
from segfleet.override import differences


def check_same_training(config: TrainingConfig, store: Store, checkpoint: Checkpoint) -> None:
    """Raise InputError where the checkpoint belongs to another training; other workers make no other one.

    Nor do other accumulation steps where workers.memory_gib chose them: they follow from the workers.
    """
    stored = from_json(TrainingConfig, json.dumps(checkpoint.state["config"]))
    left_out = {"data.store", "data.num_prefetch_threads"}
    if stored.workers.memory_gib or config.workers.memory_gib:
        left_out.add("schedule.accumulation_steps")
    changes = {
        path: value
        for path, value in differences(stored, config).items()
        if not path.startswith(("tracking.", "workers.")) and path not in left_out
    }
    if checkpoint.state["store_digest"] != store.digest:
        changes["data.store"] = (
            f"the store {config.data.store} as it is now ({_store_difference(store, checkpoint.state)})"
        )
    if changes:
        listed = ", ".join(f"{path} = {value}" for path, value in sorted(changes.items()))
        raise InputError(
            f"A run must go on with the configuration it began with, but {checkpoint.path.parent.parent} was "
            f"trained without {listed}. Give another --tracking.run-name, or delete that folder."
        )


def _store_difference(store: Store, state: Mapping[str, Any]) -> str:
    """Return what of a store is not as it was when the checkpoint with this state was written."""
    found = [f"digest {store.digest[:16]}, then {state['store_digest'][:16]}"]
    then = state["class_table"]["classes"]
    changed = [info["name"] for info in store.class_table.to_dict()["classes"] if info not in then]
    changed += [
        info["name"]
        for info in then
        if info["name"] not in {other.name for other in store.class_table.classes}
    ]
    if changed:
        found.append(f"other classes: {', '.join(changed[:5])}")
    for name, now in (("mean", store.mean), ("std", store.std)):
        if list(now) != list(state[name]):
            found.append(f"{name} of the training images {_rounded(now)}, then {_rounded(state[name])}")
    if len(found) == 1:
        found.append(
            "the same classes and the same mean and std of the training images: other labels or splits"
        )
    return "; ".join(found)


def _rounded(values: Iterable[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)

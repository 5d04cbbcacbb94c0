"""Everything a resume needs, in one folder that appears whole or not at all and is verified before it is read.

epoch_0003/
  model.safetensors      weights and buffers, as they are evaluated and packaged
  trained.safetensors    only where those are an average: weights and buffers as they are trained on
  optimizer.safetensors  the tensors of the optimizer's state, keyed "<parameter number>/<name>"
  state.json             the rest: configuration, architecture, epoch, iteration, metrics, the optimizer's numbers
  manifest.json          size and sha256 of the others

The folder `part` beside them holds the same of an epoch that is not over, where there was a reason to expect that the
training would be cut off; it goes when the epoch's own checkpoint is there.
"""

import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from pspnet.errors import InputError
from pspnet.json_values import parse_json, shown, typed
from segfleet.faults import fault, halves

FORMAT = 1
MODEL_FILE = "model.safetensors"
TRAINED_FILE = "trained.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
PART_FOLDER = "part"
ASIDE_PREFIX = ".aside-"
NUM_NEWEST = 2
"""Checkpoints that are kept beside the best one."""
_EPOCH = re.compile(r"epoch_[0-9]{1,18}")
_STATE = {
    "config": dict[str, Any],
    "architecture": dict[str, Any],
    "class_table": dict[str, Any],
    "mean": list[float],
    "std": list[float],
    "store_digest": str,
    "epoch": int,
    "iteration": int,
    "metrics": dict[str, Any],
    "useful_s": float,
    "scaler": dict[str, float],
    "part": dict[str, float | list[float] | dict[str, float]],
}


class DamagedCheckpointError(InputError):
    """A checkpoint's files are not what its manifest says."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` read: all tensors are on the CPU."""

    path: Path
    model_state: dict[str, Tensor]
    trained_state: dict[str, Tensor]
    """Where training goes on from: `model_state`, unless that is an average."""
    optimizer_state: dict[str, Any]
    state: dict[str, Any]
    """config, architecture, class_table, mean, std, store_digest, epoch, iteration, metrics."""


def save_checkpoint(
    folder: str | Path,
    *,
    model_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Any],
    state: Mapping[str, Any],
    trained_state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint aside, sync it and rename it to `folder`, in place of an older one there.

    `trained_state` is given where `model_state` is an average of it.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f"{ASIDE_PREFIX}{folder.name}-{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    fault("checkpoint.opened")
    try:
        tensors, numbers = _split_optimizer_state(optimizer_state)
        text = json.dumps(finite({**state, "optimizer": numbers}), indent=1, allow_nan=False)
        contents = {
            MODEL_FILE: safetensors.torch.save(_contiguous(model_state)),
            OPTIMIZER_FILE: safetensors.torch.save(_contiguous(tensors)),
            STATE_FILE: text.encode(),
        }
        if trained_state is not None:
            contents[TRAINED_FILE] = safetensors.torch.save(_contiguous(trained_state))
        files = {name: _written(aside / name, content) for name, content in contents.items()}
        fault("checkpoint.files")
        manifest = json.dumps({"format": FORMAT, "files": files}, indent=1)
        _written(aside / MANIFEST_FILE, manifest.encode())
        _sync_folder(aside)
        fault("checkpoint.manifest")
        _replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fault("checkpoint.saved")
    return folder


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Return the checkpoint in `folder`; InputError where there is none or a byte differs from its manifest."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"A checkpoint must be a folder, but there is none at {folder}. "
            "A training prints its checkpoint's path; they lie in <storage_dir>/<run>/checkpoints/."
        )
    contents = _verified(folder)
    try:
        state = typed(dict[str, Any], parse_json(contents[STATE_FILE], "It"), "It")
        tensors = safetensors.torch.load(contents[OPTIMIZER_FILE])
        return Checkpoint(
            path=folder,
            model_state=safetensors.torch.load(contents[MODEL_FILE]),
            trained_state=safetensors.torch.load(contents.get(TRAINED_FILE, contents[MODEL_FILE])),
            optimizer_state=_join_optimizer_state(tensors, state.pop("optimizer")),
            state=_checked_state(state),
        )
    except (ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        # Whoever wrote it gave it digests that fit.
        raise DamagedCheckpointError(
            f"A checkpoint must be as a training wrote it, but {folder} is not ({shown(error)}). "
            "Use another checkpoint of the run."
        ) from error


def newest_good(checkpoints_dir: str | Path, *, say: Callable[[str], None] = print) -> Checkpoint | None:
    """Return the newest checkpoint that passes its verification; `say` tells of each that was passed over."""
    for folder in sorted(checkpoint_folders(checkpoints_dir), reverse=True):
        try:
            return load_checkpoint(folder)
        except DamagedCheckpointError as error:
            say(f"passed over a damaged checkpoint: {error}")
    return None


def newest_part(
    checkpoints_dir: str | Path, whole: Checkpoint | None, *, say: Callable[[str], None] = print
) -> Checkpoint | None:
    """Return the good checkpoint of an epoch's part, if there is one and training got further with it than `whole`."""
    folder = Path(checkpoints_dir) / PART_FOLDER
    if not folder.is_dir():
        return None
    try:
        part = load_checkpoint(folder)
    except DamagedCheckpointError as error:
        say(f"passed over a damaged checkpoint: {error}")
        return None
    return part if whole is None or part.state["iteration"] > whole.state["iteration"] else None


def checkpoint_path(checkpoints_dir: str | Path, epoch: int) -> Path:
    """Return the folder of the checkpoint that is written after `epoch` epochs."""
    return Path(checkpoints_dir) / f"epoch_{epoch:04d}"


def checkpoint_folders(checkpoints_dir: str | Path) -> list[Path]:
    """Return the folders of the checkpoints there, oldest first."""
    found = [path for path in Path(checkpoints_dir).glob("epoch_*") if _EPOCH.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("_")[1]))


def best_checkpoint(checkpoints_dir: str | Path) -> Path | None:
    """Return the checkpoint with the highest validation mIoU (the newest of equals)."""
    return max(reversed(checkpoint_folders(checkpoints_dir)), key=_miou, default=None)


def space_warning(checkpoints_dir: str | Path, checkpoint_bytes: int) -> str:
    """Return what to say where a training's checkpoints will not fit on their disk; "" where they will.

    At most there are the newest ones, the best, and the one that is being written.
    """
    folder, num_checkpoints = Path(checkpoints_dir), NUM_NEWEST + 2
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    needed = num_checkpoints * checkpoint_bytes - there
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if free >= needed:
        return ""
    return (
        f"storage: {num_checkpoints} checkpoints of {checkpoint_bytes / 2**30:.2f} GiB need {needed / 2**30:.2f} GiB, "
        f"but {folder} has {free / 2**30:.2f} GiB free. Free some, or set tracking.storage_dir to a disk that has more."
    )


def retain(checkpoints_dir: str | Path, *, num_newest: int = NUM_NEWEST) -> None:
    """Delete all checkpoints but the newest ones and the best, those of parts, and what dead writers left."""
    kept = {*checkpoint_folders(checkpoints_dir)[-num_newest:], best_checkpoint(checkpoints_dir)}
    for folder in [*checkpoint_folders(checkpoints_dir), *Path(checkpoints_dir).glob(PART_FOLDER)]:
        if folder not in kept:
            aside = folder.parent / f"{ASIDE_PREFIX}old-{uuid.uuid4().hex[:8]}"
            os.rename(folder, aside)
    for left in Path(checkpoints_dir).glob(ASIDE_PREFIX + "*"):
        shutil.rmtree(left, ignore_errors=True)


def finite(value: Any) -> Any:
    """Return `value` with None for each float that JSON cannot hold (NaN of a class that does not occur)."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _miou(folder: Path) -> float:
    try:
        value = parse_json((folder / STATE_FILE).read_bytes(), "It")["metrics"]["miou"]
        return -1.0 if value is None else typed(float, value, "miou")
    except (OSError, ValueError, KeyError, TypeError):
        return -1.0


def _verified(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file, all read once and all as the manifest says."""
    try:
        manifest = parse_json((folder / MANIFEST_FILE).read_bytes(), "It")
        files = typed(dict[str, dict[str, int | str]], manifest["files"], "files")
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(
            f"A checkpoint must have a readable {MANIFEST_FILE}, but {folder} has none ({shown(error)}). "
            "Use another checkpoint of the run."
        ) from error
    if version != FORMAT or set(files) - {TRAINED_FILE} != {MODEL_FILE, OPTIMIZER_FILE, STATE_FILE}:
        raise DamagedCheckpointError(
            f"A checkpoint must be of format {FORMAT}, but {folder} is of format {shown(version)} with the files "
            f"{shown(', '.join(sorted(files)))}. Read it with the version of segfleet that wrote it."
        )
    contents = {}
    for name, expected in files.items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise DamagedCheckpointError(
                f"{folder / name} must be readable, but is not: {error.strerror}. Use another checkpoint of the run."
            ) from error
        if _described(content) != expected:
            raise DamagedCheckpointError(
                f"{folder / name} must have the {shown(expected.get('size'))} bytes and the sha256 of its manifest, "
                f"but its {len(content)} bytes differ. Use another checkpoint of the run."
            )
        contents[name] = content
    return contents


def _described(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _checked_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return `state`; InputError where what is common to the checkpoints of trainings is of another type."""
    for name in state.keys() & _STATE.keys():
        typed(_STATE[name], state[name], name)
    return state


def _written(path: Path, content: bytes) -> dict[str, Any]:
    """Write and sync the file; return its entry in the manifest."""
    with path.open("wb") as file:
        first, rest = halves("checkpoint.file", content)
        if first:
            file.write(first)
            file.flush()
            fault("checkpoint.file")
        file.write(rest)
        file.flush()
        os.fsync(file.fileno())
    return _described(content)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(aside: Path, folder: Path) -> None:
    """Rename `aside` to `folder`; an older folder there is moved away first and then deleted."""
    old = None
    if folder.exists():
        old = folder.parent / f"{ASIDE_PREFIX}old-{uuid.uuid4().hex[:8]}"
        os.rename(folder, old)
        fault("checkpoint.moved")
    os.rename(aside, folder)
    _sync_folder(folder.parent)
    fault("checkpoint.renamed")
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as safetensors stores them: on the CPU, without strides."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _split_optimizer_state(optimizer_state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of `torch.optim.Optimizer.state_dict()`, and the rest as JSON values."""
    tensors = {
        f"{key}/{name}": value for key, name, value in _entries(optimizer_state) if isinstance(value, Tensor)
    }
    others = [
        [key, name, value] for key, name, value in _entries(optimizer_state) if not isinstance(value, Tensor)
    ]
    return tensors, {"others": others, "param_groups": optimizer_state["param_groups"]}


def _join_optimizer_state(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for path, tensor in tensors.items():
        key, name = path.split("/", 1)
        state.setdefault(int(key), {})[name] = tensor
    for key, name, value in typed(list[list[Any]], numbers["others"], "others"):
        state.setdefault(int(key), {})[name] = value
    return {"state": state, "param_groups": numbers["param_groups"]}


def _entries(optimizer_state: Mapping[str, Any]) -> Iterator[tuple[int, str, Any]]:
    for key, values in optimizer_state["state"].items():
        for name, value in values.items():
            yield key, name, value

"""How an attempt at a training ended: the reason, whether another try may do better, and the record of it."""

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import ray.exceptions

from pspnet.errors import InputError
from pspnet.exhaustion import is_out_of_memory
from pspnet.training_stats import DivergedError
from segfleet.secret import masked
from segfleet.torsos import set_aside

Reason = Literal["complete", "pruned", "diverged", "oom", "refused", "failed", "lost"]

OUTCOME_FILE = "outcome.json"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended."""

    attempt: str
    reason: Reason
    message: str = ""
    detail: str = ""
    """The traceback of a defect."""


def read_outcome(run_dir: str | Path, attempt: str) -> Outcome | None:
    """Return how the attempt ended, or None while it has not; a damaged record is set aside."""
    path = Path(run_dir) / OUTCOME_FILE
    try:
        outcome = Outcome(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            set_aside(path, str(error))
        return None
    return outcome if outcome.attempt == attempt else None


def record_outcome(run_dir: str | Path, outcome: Outcome) -> None:
    """Store how an attempt ended; the first record of an attempt stays."""
    if read_outcome(run_dir, outcome.attempt) is None:
        write_atomically(Path(run_dir) / OUTCOME_FILE, json.dumps(asdict(outcome), indent=1).encode())


def reason_of(error: Exception) -> Reason | None:
    """Return the reason with which a training ends for good, or None where another try may do better.

    RuntimeError and OSError are what a peer's death, a broken connection or a full disk look like: a RuntimeError where
    it is of a kind of its own (as torch.distributed's), or names what may pass.
    """
    if isinstance(error, AgreedError):
        return error.reason
    if isinstance(error, InputError):
        return "refused"
    if isinstance(error, DivergedError):
        return "diverged"
    if is_out_of_memory(error):
        return "oom"
    if type(error) is RuntimeError and not _PASSING.search(str(error)):
        return "failed"  # shapes that do not fit, and the like: what torch raises for a defect
    if isinstance(error, RuntimeError | OSError | ray.exceptions.RayError):
        return None
    return "failed"


_PASSING = re.compile(
    "gloo|nccl|ucc|cuda|cudnn|cublas|driver|connect|socket|network|peer|rank|tcp|rendezvous|store|worker|process|thread"
    "|time.?d? ?out|abort|interrupt|busy|unavailable|shared memory|shm|disk|no space|quota|file",
    re.IGNORECASE,
)
"""Of a RuntimeError that another try may not meet: devices, other processes, the network, storage."""


def message_of(error: Exception) -> str:
    """Return an error in one line, with its type where it is not meant for people."""
    if isinstance(error, InputError | DivergedError | AgreedError):
        return str(error)
    if isinstance(error, ray.exceptions.RayTaskError):  # a remote traceback: its last line is the error
        return str(error).strip().splitlines()[-1]
    line = masked(f"{type(error).__name__}: {error}".splitlines()[0])
    return f"{line} {_MEMORY_REMEDY}" if is_out_of_memory(error) else line


_MEMORY_REMEDY = (
    "Raise schedule.accumulation_steps or set workers.memory_gib (the global batch stays), set workers.recompute, "
    "lower data.crop_size."
)


class StoppedError(Exception):
    """Who hears the reports ended the training: every worker raises it from the same report."""


class AgreedError(Exception):
    """An error that every worker of the group raises together."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def write_atomically(path: Path, content: bytes) -> None:
    """Write and sync the file aside and rename it: at any moment there is the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)

"""Named places in the program where a test may let it die, halt, fail or wait.

They do nothing unless SEGFLEET_FAULT says so: "<point>:<kind>" or "<point>:<kind>:<n>", the n-th time the process
comes there (the first, if n is not given); several are divided by commas. "@<file>" stands for what that file says:
whoever acts first renames it to <file>.acted, so that it happens once among many processes. The kinds are
  kill        SIGKILL to this process
  stop        SIGSTOP to this process
  terminate   SIGTERM to this process
  raise       a FaultError
  sleep=<s>   wait so many seconds
"""

import collections
import contextlib
import os
import signal
import time
from pathlib import Path

from pspnet.errors import InputError

VARIABLE = "SEGFLEET_FAULT"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "terminate": signal.SIGTERM}
POINTS = (
    "training.step",  # an iteration is done
    "checkpoint.opened",  # an empty folder aside
    "checkpoint.file",  # half of a file is written
    "checkpoint.files",  # all files but the manifest
    "checkpoint.manifest",  # all files
    "checkpoint.moved",  # an older checkpoint of that name is moved away
    "checkpoint.renamed",  # in place, the older one not yet deleted
    "checkpoint.saved",
    "trial.heard",  # Tune's process of a trial has a report, Tune not yet
    "group.held",  # the group's actor holds a report that nobody has heard
    "study.asked",  # a trial without settings
    "study.drawn",  # settings that nobody but Optuna knows
    "study.reasoned",  # why the trial ended, not that it did
    "trial.opened",  # an MLflow run that the study does not know
    "trial.noted",  # a run without a training
    "trial.reported",  # a report that the study has, and its trial not yet
    "trial.finished",  # ended in the study, not in its run
    "run.trained",  # a training ended, not its run
    "search.trained",  # all trials ended, no winner packaged
    "search.packaged",  # not registered
    "spool.line",  # half of a line is written
    "spool.written",
    "spool.sent",  # the server has it, the spool does not know
    "registry.uploaded",  # an MLflow model without a version
    "registry.named",  # a registered model without a version
    "registry.version",  # a version without an alias
    "registry.challenger",  # a challenger, no champion yet
    "promotion.held",  # the right to decide is held, nothing is written
    "promotion.tagged",  # tags of the versions say so, the alias does not
    "promotion.moved",  # the alias is moved, the history does not know
    "promotion.recorded",
)


class FaultError(Exception):
    """What a fault of the kind "raise" raises."""


_times: collections.Counter[str] = collections.Counter()


def fault(point: str) -> None:
    """Do what SEGFLEET_FAULT says of this point; nothing where it says nothing."""
    text = _text()
    if not text:
        return
    assert point in POINTS, point
    _times[point] += 1
    for name, kind, number in map(_parsed, text.split(",")):
        if name == point and number == _times[point] and _is_ours():
            _act(point, kind)


def halves(point: str, content: bytes) -> tuple[bytes, bytes]:
    """Return `content` in two parts between which `point` lies: the first is empty where no fault is set."""
    is_set = point in _text()
    middle = len(content) // 2 if is_set else 0
    return content[:middle], content[middle:]


def _text() -> str:
    text = os.environ.get(VARIABLE, "")
    if not text.startswith("@"):
        return text
    with contextlib.suppress(FileNotFoundError):
        return Path(text[1:]).read_text()
    return ""


def _is_ours() -> bool:
    """Whether this process is the one that acts: of a file, the first that takes it."""
    text = os.environ[VARIABLE]
    if not text.startswith("@"):
        return True
    with contextlib.suppress(FileNotFoundError):
        os.rename(text[1:], text[1:] + ".acted")
        os.utime(text[1:] + ".acted")
        return True
    return False


def _parsed(text: str) -> tuple[str, str, int]:
    name, _, rest = text.strip().partition(":")
    kind, _, number = rest.partition(":")
    is_known = kind in (*SIGNALS, "raise") or kind.removeprefix("sleep=").replace(".", "", 1).isdigit()
    if name not in POINTS or not is_known or not (number or "1").isdigit():
        raise InputError(
            f"{VARIABLE} must be <point>:<kill, stop, terminate, raise or sleep=seconds>:<n>, but got {text!r}. "
            f"The points are {', '.join(POINTS)}."
        )
    return name, kind, int(number or 1)


def _act(point: str, kind: str) -> None:
    if kind == "raise":
        raise FaultError(point)
    if kind.startswith("sleep="):
        time.sleep(float(kind.removeprefix("sleep=")))
        return
    os.kill(os.getpid(), SIGNALS[kind])

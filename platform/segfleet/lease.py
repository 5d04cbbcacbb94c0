"""The right to work in a folder, held by one process at a time: a dead one's is taken over.

<folder>/lease.json says who holds it: host, process, since when, and a beat that its thread counts up. On one host,
and on storage whose locks work, the kernel's lock on that file decides, and ends with the process however it ends.
Where a holder on another host is named (NFS without locks lets both have one), its beat is watched for WATCH_S: one
that goes on is alive. No clocks are compared.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pspnet.errors import InputError

FILE = "lease.json"
BEAT_S = 5.0
WATCH_S = 20.0
EXIT_CODE = 4
"""What a job ends with where another process holds what it wants."""


class HeldError(InputError):
    """Another process, which lives, holds the folder."""


@contextlib.contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Hold `folder` for this process, for `what` ("study nyu"); HeldError, naming the holder, where another does."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(descriptor, path, what)
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "id": uuid.uuid4().hex,
        }
        _write(descriptor, holder | {"beat": 0})
        is_over = threading.Event()
        thread = threading.Thread(
            target=_beat, args=(descriptor, holder, what, is_over), name="lease", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
            if _read(descriptor).get("id") == holder["id"]:
                os.ftruncate(descriptor, 0)  # the file stays: whoever waits for its lock has it open
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path, what: str) -> None:
    has_locks = _locked(descriptor, path, what)
    holder = _read(descriptor)
    if holder and (not has_locks or holder.get("host") != socket.gethostname()):
        _check_beat(holder, path, what)
        _locked(
            descriptor, path, what
        )  # whoever reads the file by its name gives up the lock of this process


def _locked(descriptor: int, path: Path, what: str) -> bool:
    """Take the kernel's lock; False where the storage has none. Other than flock's, no child process inherits it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise _refusal(_read(descriptor), path, what) from error
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return False
    return True


def _check_beat(holder: dict[str, Any], path: Path, what: str) -> None:
    """Raise HeldError where `holder`, whom the file names, gives a sign of life within WATCH_S."""
    print(
        f"{what} was held by {_named(holder)}: waiting up to {WATCH_S:.0f} s for a sign of life", flush=True
    )
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, WATCH_S / 10))
        # Opened anew: NFS shows what other hosts wrote only then.
        now = _parsed(path.read_bytes())
        if not now:
            return
        if now != holder:
            raise _refusal(now, path, what)
    print(f"{what} is taken over: its holder gave none", flush=True)


def _beat(descriptor: int, holder: dict[str, Any], what: str, is_over: threading.Event) -> None:
    """Count up; a holder that slept so long that another took over ends, as if it were interrupted."""
    beat = 0
    while not is_over.wait(BEAT_S):
        with contextlib.suppress(OSError):
            found = _read(descriptor)
            if found.get("id", holder["id"]) != holder["id"]:
                print(f"error: {what} was taken over by {_named(found)}", file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)
            beat += 1
            _write(descriptor, holder | {"beat": beat})


def _refusal(holder: dict[str, Any], path: Path, what: str) -> HeldError:
    return HeldError(
        f"A folder is worked in by one process at a time, but {what} is held by {_named(holder)} ({path}). "
        "Wait until that one is done, end it, or give another name."
    )


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _write(descriptor: int, holder: dict[str, Any]) -> None:
    """Write in one call and in place: the lock is on this file, not on its name."""
    content = json.dumps(holder).encode()
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))


def _read(descriptor: int) -> dict[str, Any]:
    return _parsed(os.pread(descriptor, 4096, 0))


def _parsed(content: bytes) -> dict[str, Any]:
    """Return who holds it; nobody where the file is empty or a torso."""
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}

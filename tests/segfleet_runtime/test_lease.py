"""Laws of the lease: one holder, named to the second; a dead one's is taken over."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from segfleet import lease
from segfleet.lease import HeldError, held

_context = multiprocessing.get_context("forkserver")


def hold(folder: Path, inside: Any, line: Any) -> None:
    """Say that the folder is held, until the other end of the line is closed."""
    inside.close()
    with held(folder, "study s"):
        line.send("held")
        with contextlib.suppress(EOFError):
            line.recv()


@pytest.fixture
def other(tmp_path: Path) -> Any:
    """A process that holds the folder."""
    mine, line = _context.Pipe()
    process = _context.Process(target=hold, args=(tmp_path, mine, line))
    process.start()
    line.close()
    assert mine.recv() == "held"
    yield SimpleNamespace(process=process, pid=process.pid, line=mine)
    mine.close()
    process.join()


def test_the_second_hears_who_holds_it_and_may_when_the_first_is_done(tmp_path: Path, other: Any) -> None:
    with (
        pytest.raises(
            HeldError, match=f"study s is held by process {other.pid} on {socket.gethostname()} since 20"
        ),
        held(tmp_path, "study s"),
    ):
        pytest.fail("held twice")
    other.line.close()
    other.process.join()
    assert other.process.exitcode == 0
    with held(tmp_path, "study s"):
        assert json.loads((tmp_path / lease.FILE).read_text())["pid"] == os.getpid()


def test_a_killed_one_s_is_taken_over_at_once(
    tmp_path: Path, other: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    os.kill(other.pid, signal.SIGKILL)
    other.process.join()
    assert json.loads((tmp_path / lease.FILE).read_text())["pid"] == other.pid
    with held(tmp_path, "study s"):
        pass
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("lives", [False, True])
def test_of_a_holder_on_another_host_the_beat_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lives: bool
) -> None:
    """The kernel's lock is free, as on NFS that knows no locks."""
    monkeypatch.setattr(lease, "WATCH_S", 1.0)
    path = tmp_path / lease.FILE
    holder = {"host": "elsewhere", "pid": 7, "since": "yesterday", "id": "a", "beat": 1}
    path.write_text(json.dumps(holder))
    thread = threading.Timer(0.3, lambda: path.write_text(json.dumps(holder | {"beat": 2})))
    if lives:
        thread.start()
        with (
            pytest.raises(HeldError, match="process 7 on elsewhere since yesterday"),
            held(tmp_path, "study s"),
        ):
            pass
        thread.join()
        return
    with held(tmp_path, "study s"):
        # The look at the file by its name gave up the lock: it was taken again.
        process = _context.Process(target=hold, args=(tmp_path, *_context.Pipe()))
        process.start()
        process.join()
        assert process.exitcode == 1
    assert "taken over" in capsys.readouterr().out


def test_the_beat_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    with held(tmp_path, "study s"):
        descriptor = os.open(tmp_path / lease.FILE, os.O_RDONLY)  # left open: closing it gives up the lock
        while lease._read(descriptor).get("beat", 0) < 3:
            time.sleep(0.01)
    assert os.fstat(descriptor).st_size == 0
    os.close(descriptor)

"""What runs record, kept on disk until the server has it: written and synced line by line, read back, checked.

spool/
  <run id>.points.jsonl   one line a call of `RunWriter.log_metrics`: step, timestamp in ms, values
  <run id>.files.jsonl    one line a file or text, whose copy lies in files/ until it is sent
  <run id>.….sent         how many bytes of that file the server has
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pspnet.errors import InputError
from pspnet.json_values import parse_json, typed
from segfleet.faults import fault, halves
from segfleet.torsos import set_aside

Status = Literal["FINISHED", "FAILED", "KILLED"]

_ENTRIES = (
    {"step": int, "timestamp": int, "values": dict[str, float]},
    {"status": Status, "timestamp": int, "tags": dict[str, Any]},
    {"file": str, "artifact_dir": str},
)
"""Fields of the entries of a spool: points, the end of a run, a file."""


class Channel:
    """A file of JSON lines that is only ever appended to, and how far the server has it."""

    def __init__(self, folder: Path, run_id: str, kind: str) -> None:
        self.folder = folder
        self._run_id = run_id
        self._path = folder / f"{run_id}.{kind}.jsonl"
        self._sent_path = folder / f"{run_id}.{kind}.sent"
        self._unwritten = b""
        self._said = False

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write and sync one line; what a full disk refuses is kept in memory for the next call."""
        self._unwritten += json.dumps(entry).encode() + b"\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                if self._ends_torn():
                    self._unwritten = b"\n" + self._unwritten
                first, rest = halves("spool.line", self._unwritten)
                if first:
                    file.write(first)
                    file.flush()
                    fault("spool.line")
                file.write(rest)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if not self._said:
                print(f"tracking: the spool {self._path} cannot be written ({error.strerror})", flush=True)
            self._said = True
            return
        self._unwritten, self._said = b"", False
        fault("spool.written")

    def append_file(self, path: Path, artifact_dir: str) -> None:
        """Keep a copy of the file at `path` and note where it goes."""
        self._append_copy(path.name, artifact_dir, lambda copy: shutil.copyfile(path, copy))

    def append_text(self, text: str, name: str, artifact_dir: str) -> None:
        """Keep `text` as a file and note where it goes."""
        self._append_copy(name, artifact_dir, lambda copy: copy.write_text(text))

    def entries(self) -> list[dict[str, Any]]:
        """Return all entries that were ever written."""
        return [entry for entry, _ in self._read(0)]

    def unsent(self) -> list[tuple[dict[str, Any], int]]:
        """Return the entries that the server lacks, each with the position after it."""
        return self._read(self._sent())

    def has_unsent(self) -> bool:
        """Whether the server lacks an entry."""
        return bool(self.unsent())

    def mend(self) -> bool:
        """Name what is damaged, and send all again where the file lost what the server has; return whether it is whole.

        A dead writer's torso stays, in a line of its own that nobody reads: another writer may be appending.
        """
        is_whole = True
        with contextlib.suppress(OSError):  # nothing there, or nothing that can be read: `append` says so
            if self._ends_torn():
                print(
                    f"tracking: {self._path} ended in the midst of a line, which is passed over", flush=True
                )
                is_whole = False
            if self._sent() > self._path.stat().st_size:
                set_aside(
                    self._sent_path, f"it says {self._sent()} bytes were sent, {self._path.name} has fewer"
                )
                is_whole = False
        return is_whole

    def mark_sent(self, position: int) -> None:
        """Note that the server has everything before `position`."""
        aside = self._sent_path.with_name(f"{self._sent_path.name}-{uuid.uuid4().hex[:8]}")
        aside.write_text(str(position))
        os.replace(aside, self._sent_path)

    def _append_copy(self, name: str, artifact_dir: str, make: Callable[[Path], object]) -> None:
        copy = self.folder / "files" / uuid.uuid4().hex / name
        try:
            copy.parent.mkdir(parents=True)
            make(copy)
        except OSError as error:
            print(f"tracking: {name} cannot be kept for the run ({error.strerror})", flush=True)
            return
        self.append({"file": str(copy.relative_to(self.folder)), "artifact_dir": artifact_dir})

    def _sent(self) -> int:
        try:
            position = int(self._sent_path.read_text())
        except OSError:
            return 0
        except ValueError as error:
            with contextlib.suppress(FileNotFoundError):
                set_aside(self._sent_path, str(error))
            return 0
        return position if position >= 0 else 0

    def _ends_torn(self) -> bool:
        """Whether a writer died in the middle of its line."""
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"

    def _read(self, start: int) -> list[tuple[dict[str, Any], int]]:
        try:
            with self._path.open("rb") as file:
                if start >= file.seek(0, os.SEEK_END):  # a damaged mark may lie where no file can reach
                    return []
                file.seek(start)
                content = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return []
        found, position = [], start
        *lines, _ = content.split(b"\n")  # what follows the last end of line is still being written
        for line in lines:
            position += len(line) + 1
            entry = _entry(line)
            if entry is not None:
                found.append((entry, position))
        return found


def unsent_runs(storage_dir: str | Path) -> dict[str, Path]:
    """Return the spool folder of each run below `storage_dir` of which the server lacks something."""
    found = {}
    for path in sorted(Path(storage_dir).rglob("*.points.jsonl")) + sorted(
        Path(storage_dir).rglob("*.files.jsonl")
    ):
        run_id, kind, _ = path.name.rsplit(".", 2)
        if Channel(path.parent, run_id, kind).has_unsent():
            found[run_id] = path.parent
    return found


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return the entry of a spool in this line; None for the torn line of a writer that died, and for any other."""
    try:
        entry: dict[str, Any] = typed(dict[str, Any], parse_json(line, "It"), "It")
        fields = next(fields for fields in _ENTRIES if fields.keys() <= entry.keys())
        for name, hint in fields.items():
            typed(hint, entry[name], name)
    except (InputError, StopIteration):
        return None
    entry = {name: entry[name] for name in fields}  # of one kind, whatever else the line says
    if "file" in entry and not _is_copy(entry["file"], entry["artifact_dir"]):
        return None
    return entry


def _is_copy(file: str, artifact_dir: str) -> bool:
    """Whether a file's names are what `Channel` writes: the copy is sent, and then its folder is deleted."""
    parts = file.split("/")
    is_ours = len(parts) == 3 and parts[0] == "files" and "" not in parts
    return (
        is_ours and not {".", ".."} & {*parts, *artifact_dir.split("/")} and "\0" not in file + artifact_dir
    )

"""Copies on a node's own disk of shards that lie elsewhere: one for all processes, verified, bounded.

cache/
  <sha256>.arrow      a verified copy, read-only; mtime is VERIFIED_NS, atime its last use
  <sha256>.part       a copy under way, as large as it will be
  locks/<sha256>      held (flock) by the process that copies it
  locks/room          held while room is made for another copy

Who uses a copy holds a shared flock on it, which ends with the process, however that ends. The oldest copies that
nobody holds go first when room is needed. A copy whose time of change is not VERIFIED_NS was touched since it was
verified: it is verified again.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pspnet.errors import InputError
from pspnet.location import Location, is_on_network


class NoRoomError(InputError):
    """The copies do not fit on this node."""


Say = Callable[[str], None]
When = Literal["auto", "always", "never"]
FOLDER_VARIABLE, SIZE_VARIABLE, WHEN_VARIABLE = "SEGFLEET_CACHE_DIR", "SEGFLEET_CACHE_GIB", "SEGFLEET_CACHE"
DEFAULT_FOLDER, DEFAULT_GIB = "~/.cache/segfleet/shards", 100.0
VERIFIED_NS = 1_000_000_000_000_000_000
POLL_S, SAY_EVERY_S = 0.05, 5.0
READ_ATTEMPTS = 4


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file that lies elsewhere, as its manifest describes it."""

    location: Location
    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class HeldFile:
    """A copy that stays for as long as `descriptor` is open."""

    path: Path
    descriptor: int


@dataclass(frozen=True, kw_only=True)
class NodeCache:
    """A folder of copies of at most `max_bytes` in all."""

    folder: Path
    max_bytes: int
    when: When = "auto"
    """"auto" copies what lies in object storage or on a network file system, "always" every store, "never" none."""

    @classmethod
    def from_environment(cls) -> "NodeCache":
        """Return the cache that SEGFLEET_CACHE_DIR, SEGFLEET_CACHE_GIB and SEGFLEET_CACHE describe."""
        size, when = os.environ.get(SIZE_VARIABLE, ""), os.environ.get(WHEN_VARIABLE, "") or "auto"
        try:
            gib = float(size) if size else DEFAULT_GIB
        except ValueError:
            gib = 0.0
        if not 0 < gib < float("inf"):
            raise InputError(
                f"{SIZE_VARIABLE} must be a positive number of GiB, but got {size!r}. {DEFAULT_GIB:g} is the default."
            )
        if when not in get_args(When):
            raise InputError(f"{WHEN_VARIABLE} must be one of {', '.join(get_args(When))}, but got {when!r}.")
        folder = Path(os.environ.get(FOLDER_VARIABLE, "") or DEFAULT_FOLDER).expanduser().absolute()
        return cls(folder=folder, max_bytes=int(gib * 2**30), when=when)  # type: ignore[arg-type]

    def is_for(self, location: Location) -> bool:
        """Return whether shards at `location` are copied; InputError where they must be, but may not."""
        if not location.is_local:
            if self.when == "never":
                raise InputError(
                    f"A store that is read in place must be a folder, but {location.text} is none, and "
                    f"{WHEN_VARIABLE} is never. Set it to auto."
                )
            return True
        return self.when == "always" or (self.when == "auto" and is_on_network(location.path))

    def hold(self, files: Sequence[RemoteFile], say: Say) -> list[HeldFile]:
        """Return a verified copy of each file, held, in their order; those that are missing are copied.

        Processes of one node that ask at the same time share the work: each copies what no other is copying.
        Raises NoRoomError where the files do not fit, InputError where they are not what their manifest says,
        ConnectionError where they cannot be read.
        """
        with self._checked_folder():
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        needed = sum({file.sha256: file.num_bytes for file in files}.values())
        if needed > self.max_bytes:
            raise NoRoomError(
                f"{SIZE_VARIABLE} must have room for the shards in use, which are {needed / 2**30:.2f} GiB, but is "
                f"{self.max_bytes / 2**30:.2f}. Raise it, or ingest with --format tiles, a quarter as large."
            )
        held: dict[str, HeldFile] = {}
        start = os.getpid() % max(1, len(files))
        pending = [*files[start:], *files[:start]]  # processes begin at different shards
        last_said = time.monotonic()
        try:
            while pending:
                left = []
                for file in pending:
                    one = held.get(file.sha256) or self._hold(file) or self._copy(file, say)
                    if one is None:
                        left.append(file)
                    else:
                        held[file.sha256] = one
                    if time.monotonic() - last_said > SAY_EVERY_S:
                        last_said = time.monotonic()
                        say(f"{file.location.text}: {len(held)} of {len(files)} shards are on this node")
                if len(left) == len(pending):
                    time.sleep(POLL_S)  # others are copying them
                pending = left
        except BaseException:
            for one in held.values():
                os.close(one.descriptor)
            raise
        return [held[file.sha256] for file in files]

    def _hold(self, file: RemoteFile) -> HeldFile | None:
        """Hold the copy if there is one that was verified and not touched since."""
        path = self._path(file)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        status = os.fstat(descriptor)
        if status.st_nlink and status.st_mtime_ns == VERIFIED_NS and status.st_size == file.num_bytes:
            os.utime(descriptor, ns=(time.time_ns(), VERIFIED_NS))
            return HeldFile(path, descriptor)
        os.close(descriptor)
        return None

    def _copy(self, file: RemoteFile, say: Say) -> HeldFile | None:
        """Copy, verify and hold a file; None where another process is at it."""
        with _locked(self.folder / "locks" / file.sha256, wait=False) as is_ours:
            if not is_ours:
                return None
            if found := self._hold(file):
                return found
            if (path := self._path(file)).exists():
                say(f"{path} was changed since it was verified: copied again from {file.location.text}")
                path.unlink()
            for attempt in range(READ_ATTEMPTS):
                part = self._reserve(file)
                try:
                    found_digest = _copy_to(part, file)
                except ConnectionError:
                    part.unlink()
                    if attempt + 1 == READ_ATTEMPTS:
                        raise
                    time.sleep(2**attempt / 2)
                    continue
                except OSError as error:
                    part.unlink(missing_ok=True)
                    raise NoRoomError(
                        f"The disk of {self.folder} must have room for the shards, but a copy could not be written "
                        f"({error}). Free some, or set {FOLDER_VARIABLE} to a folder on a larger disk."
                    ) from error
                if found_digest == file.sha256:
                    return self._publish(part, path)
                part.unlink()
            raise InputError(
                f"A shard must be the one that its manifest names, but {file.location.text}/{file.name} has the "
                f"sha256 {found_digest[:16]}…, not {file.sha256[:16]}…. Copy the store there again with "
                "jobs/copy_store.py."
            )

    def _publish(self, part: Path, path: Path) -> HeldFile:
        descriptor = os.open(part, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.fchmod(descriptor, 0o444)
        os.utime(descriptor, ns=(time.time_ns(), VERIFIED_NS))
        os.rename(part, path)
        return HeldFile(path, descriptor)

    def _reserve(self, file: RemoteFile) -> Path:
        """Return an empty file of the copy's size, for which room was made."""
        part = self.folder / f"{file.sha256}.part"
        part.unlink(missing_ok=True)
        with self._checked_folder(), _locked(self.folder / "locks" / "room", wait=True):
            self._make_room(file.num_bytes)
            with part.open("wb") as stream:
                stream.truncate(file.num_bytes)
        return part

    def _make_room(self, num_bytes: int) -> None:
        for abandoned in self.folder.glob("*.part"):
            with _locked(self.folder / "locks" / abandoned.stem, wait=False) as is_free:
                if is_free:
                    abandoned.unlink()
        parts = [part.stat() for part in self.folder.glob("*.part")]
        copies = sorted(
            (path.stat().st_atime_ns, path, path.stat().st_size) for path in self.folder.glob("*.arrow")
        )
        used = sum(part.st_size for part in parts) + sum(size for *_, size in copies)
        promised = sum(part.st_size - part.st_blocks * 512 for part in parts)
        for _, path, size in copies:
            if used + num_bytes <= self.max_bytes and self._free_bytes() - promised >= num_bytes:
                return
            if _removed_unless_held(path):
                used -= size
        if used + num_bytes > self.max_bytes:
            raise NoRoomError(
                f"{SIZE_VARIABLE} must have room for the shards in use on this node, but of "
                f"{self.max_bytes / 2**30:.2f} GiB in {self.folder} {used / 2**30:.2f} are in use and "
                f"{num_bytes / 2**30:.2f} more are needed. Raise it, or end what else reads there."
            )
        if self._free_bytes() - promised < num_bytes:
            raise NoRoomError(
                f"The disk of {self.folder} must have {num_bytes / 2**30:.2f} GiB free for a shard, but has "
                f"{max(0, self._free_bytes() - promised) / 2**30:.2f}. Free some, or set {FOLDER_VARIABLE} to a "
                "folder on a larger disk."
            )

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _path(self, file: RemoteFile) -> Path:
        return self.folder / f"{file.sha256}.arrow"

    @contextlib.contextmanager
    def _checked_folder(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise NoRoomError(
                f"{FOLDER_VARIABLE} must be a folder that can be written to, but {self.folder} is none ({error}). "
                "Set it to another."
            ) from error


def _copy_to(part: Path, file: RemoteFile) -> str:
    """Copy the file's bytes, at most those promised, and return their digest."""
    digest, num_bytes = hashlib.sha256(), 0
    with part.open("r+b") as stream:
        for chunk in file.location.chunks(file.name):
            num_bytes += len(chunk)
            if num_bytes > file.num_bytes:
                return "more bytes than promised"
            digest.update(chunk)
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _removed_unless_held(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        path.unlink()
        return True
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock file at `path` meanwhile; yields whether it was had, which waiting always is."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)

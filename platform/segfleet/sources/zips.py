"""Files inside zip archives, read in place: `ARCHIVE.zip!folder/member.png` stands where a path does.

Only the name travels to the cluster's workers; each process opens the archive when it first reads from it.
"""

import functools
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

from pspnet.errors import InputError

MARK = ".zip!"
MAX_BYTES = 1_000_000_000
"""A file that is larger, or a member that declares more, is refused before it is read."""
MAX_MEMBERS = 500_000
"""An archive of more is refused before they are listed, which takes half a kilobyte each."""
SHORTEST_ENTRY = 46 + 1
_END, _END_64 = b"PK\x05\x06", b"PK\x06\x06"


def member_names(archive: Path) -> list[str]:
    """Return the names of the files in an archive; InputError where it is damaged."""
    return _open(archive).namelist()


def read_bytes(path: str | Path) -> bytes:
    """Return a whole file, or a whole member of an archive, whose checksum is verified."""
    archive, found, member = str(path).partition(MARK)
    if not found:
        num_bytes = Path(path).stat().st_size
        if num_bytes > MAX_BYTES:
            raise InputError(
                f"A file must be of at most {MAX_BYTES} bytes, but {path} has {num_bytes}. Divide it."
            )
        return Path(path).read_bytes()
    file = _open(Path(archive + ".zip"))
    try:
        info = file.getinfo(member)
        if info.file_size > MAX_BYTES or info.flag_bits & 1:
            raise InputError(
                f"A file in an archive must be unencrypted and of at most {MAX_BYTES} bytes, but {path} is not "
                f"({info.file_size} bytes). Unpack the archive yourself."
            )
        with file.open(info) as stream:
            # Not file.read(info): that inflates as much as there is, whatever the archive declares.
            content = stream.read(info.file_size + 1)
        if len(content) != info.file_size:
            raise EOFError(f"it declares {info.file_size} bytes and has others")
        return content
    except InputError:
        raise
    except Exception as error:  # whatever a damaged archive makes zipfile and its decompressors raise
        raise InputError(
            f"A file in an archive must be whole, but {path} is not: {error}. Download the archive again."
        ) from error


def stamps(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Return size and time of change of files that hold many pairs, for the description of their source."""
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(paths)}


def _open(archive: Path) -> zipfile.ZipFile:
    try:
        status = archive.stat()
        return _opened(archive, status.st_size, status.st_mtime_ns, os.getpid())
    except InputError:
        raise
    except Exception as error:  # as above
        raise InputError(
            f"An archive must be a whole zip file, but {archive} cannot be read: {error}. Download it again."
        ) from error


@functools.lru_cache(maxsize=8)
def _opened(archive: Path, _size: int, _changed_ns: int, _process: int) -> zipfile.ZipFile:
    """Open an archive once a process: a forked child that shared the parent's file would move its position."""
    num_members = _num_members(archive)
    if num_members > MAX_MEMBERS:
        raise InputError(
            f"An archive must have at most {MAX_MEMBERS} files, but {archive} has {num_members}. Unpack it yourself."
        )
    return zipfile.ZipFile(archive)


def _num_members(archive: Path) -> int:
    """Return how many entries the directory of an archive can have by its size; zipfile reads all of them."""
    with archive.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2**16 - 100))
        tail = file.read()
    end, end_64 = tail.rfind(_END), tail.rfind(_END_64)
    if end < 0:
        return 0  # no archive, which zipfile says
    directory_bytes = int.from_bytes(tail[end + 12 : end + 16], "little")
    if end_64 >= 0 and directory_bytes == 0xFFFFFFFF:
        directory_bytes = int.from_bytes(tail[end_64 + 40 : end_64 + 48], "little")
    return directory_bytes // SHORTEST_ENTRY

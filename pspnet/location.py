"""Where a store lies: a folder, or s3://, gs:// and what else pyarrow.fs knows. Bytes in, bytes out."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from pspnet.errors import InputError

CHUNK_BYTES = 8 << 20
SCHEMES = ("s3", "gs", "abfs", "abfss", "hdfs", "file")
_NETWORK_FILESYSTEMS = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "ceph", "beegfs", "gpfs", "glusterfs", "9p", "afs"),
    *(
        "fuse.sshfs",
        "fuse.s3fs",
        "fuse.gcsfuse",
        "fuse.mount-s3",
        "fuse.glusterfs",
        "fuse.ceph",
        "fuse.juicefs",
    ),
)


@dataclass(frozen=True)
class Location:
    """A folder on a file system of pyarrow."""

    text: str
    """As the user wrote it: an absolute path or a URI."""
    filesystem: Any
    path: str
    """As the file system knows it."""

    @classmethod
    def parse(cls, text: str | Path) -> "Location":
        """Return the folder that `text` names; InputError for a URI that pyarrow.fs cannot open."""
        text = str(text)
        if not is_uri(text):
            path = str(Path(text).expanduser().absolute())
            return cls(path, fs.LocalFileSystem(), path)
        parts = urlsplit(text)
        if parts.password is not None:
            raise InputError(
                f"A store's address must not hold a password, since addresses are recorded, but that of "
                f"{parts.scheme}://…@{parts.hostname}{parts.path} does. Give keys by the environment, such as "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or by the machine's role."
            )
        if parts.scheme not in SCHEMES:
            raise InputError(
                f"A store must be a folder or an address that begins with {', '.join(f'{s}://' for s in SCHEMES)}, "
                f"but got {text}. Mount other storage as a folder."
            )
        try:
            filesystem, path = fs.FileSystem.from_uri(text)
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"A store's address must be one that pyarrow.fs can open, but {text} is not ({error})."
            ) from error
        if isinstance(filesystem, fs.LocalFileSystem):
            return cls(path, filesystem, path)
        return cls(text, filesystem, path.rstrip("/"))

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine, mounted ones included."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    def exists(self, file: str) -> bool:
        """Return whether there is such a file in the folder."""
        info = self._checked(lambda: self.filesystem.get_file_info(self._inside(file)), file)
        return bool(info.type == fs.FileType.File)

    def num_bytes(self, file: str) -> int:
        """Return the size of a file in the folder."""
        info = self._checked(lambda: self.filesystem.get_file_info(self._inside(file)), file)
        return int(info.size or 0)

    def chunks(self, file: str) -> Iterator[bytes]:
        """Yield the bytes of a file in the folder; ConnectionError where they cannot be read."""
        stream = self._checked(lambda: self.filesystem.open_input_stream(self._inside(file)), file)
        with stream:
            while chunk := self._checked(lambda: stream.read(CHUNK_BYTES), file):
                yield chunk

    def sha256(self, file: str) -> str:
        """Return the digest of the bytes of a file in the folder."""
        digest = hashlib.sha256()
        for chunk in self.chunks(file):
            digest.update(chunk)
        return digest.hexdigest()

    def write(self, file: str, chunks: Iterable[bytes]) -> str:
        """Write a file in the folder, which is made, whole or not at all, and return the sha256 of its bytes."""
        if self.is_local:
            Path(self.path).mkdir(parents=True, exist_ok=True)
        aside = f".{file}.part" if self.is_local else file  # an object appears when it is whole
        digest = hashlib.sha256()

        def copy() -> None:
            with self.filesystem.open_output_stream(self._inside(aside)) as stream:
                for chunk in chunks:
                    digest.update(chunk)
                    stream.write(chunk)
            if aside != file:
                self.filesystem.move(self._inside(aside), self._inside(file))

        self._checked(copy, file)
        return digest.hexdigest()

    def _inside(self, file: str) -> str:
        return f"{self.path}/{file}"

    def _checked(self, action: Any, file: str) -> Any:
        try:
            return action()
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise ConnectionError(
                f"{self.text}/{file} could not be read or written ({reason}). Check the address, the network and "
                "the rights of this machine."
            ) from error


def is_uri(text: str | Path) -> bool:
    """Return whether this is scheme://… and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(text)) is not None


def is_on_network(path: str | Path) -> bool:
    """Return whether a folder lies on a network file system, as the kernel's table of mounts says."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return False
    resolved, best, kind = Path(path).resolve(), Path("/"), ""
    for line in lines:
        before, _, after = line.partition(" - ")
        mounted = Path(before.split()[4].replace("\\040", " "))
        if resolved.is_relative_to(mounted) and len(mounted.parts) >= len(best.parts):
            best, kind = mounted, after.split()[0]
    return kind in _NETWORK_FILESYSTEMS

"""Files of ours that were cut short, by a full disk or a power cut: set aside, named, and gone on without."""

import os
from pathlib import Path


def set_aside(path: Path, why: str) -> Path:
    """Move the file at `path` out of the way, say so, and return where it is."""
    aside = _free(path)
    os.replace(path, aside)
    print(f"{path} is damaged ({why}): set aside as {aside.name}", flush=True)
    return aside


def keep_whole_lines(path: Path) -> None:
    """Cut from a file of lines what a writer that died left of its last one; a copy of that is set aside."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    whole, newline, torso = content.rpartition(b"\n")
    if not torso:
        return
    aside = _free(path)
    aside.write_bytes(torso)
    with path.open("r+b") as file:
        file.truncate(len(whole) + len(newline))
        os.fsync(file.fileno())
    print(
        f"{path} ended in the midst of a line: its {len(torso)} bytes are set aside as {aside.name}",
        flush=True,
    )


def _free(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return aside

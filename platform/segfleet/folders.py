"""Folders for results, tried before anything is computed for them."""

import os
from pathlib import Path

from pspnet.errors import InputError


def writable_folder(path: str | Path, setting: str) -> Path:
    """Return the folder, made if it is not there; InputError that names the setting where one cannot write to it."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(folder, os.W_OK)
    except OSError:  # a file of that name, or a parent that is closed
        is_writable = False
    if not is_writable:
        raise InputError(
            f"{setting} must be a folder one can write to, but {folder} is not. Give another folder."
        )
    return folder

"""Which code a run is of: its commit, and the versions of what decides the numbers."""

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

UNKNOWN = "unknown"
VERSIONS_OF = ("torch", "torchvision", "ray", "optuna", "mlflow", "pyarrow", "numpy", "pillow", "safetensors")


def commit() -> tuple[str, bool]:
    """Return the commit this code is at and whether it differs from it; ("", False) where that is not known.

    SEGFLEET_COMMIT, taken where a job is submitted (the cluster gets no .git), goes first: "<sha>" or
    "<sha>-dirty".
    """
    given = os.environ.get("SEGFLEET_COMMIT", "")
    if given:
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    return _commit_of_checkout(Path(__file__).parent)


def origin_tags() -> dict[str, str]:
    """Return which code this is: its commit, the job, the versions that decide the numbers."""
    sha, is_dirty = commit()
    tags = {f"version.{name}": version_of(name) for name in VERSIONS_OF} | {
        "version.python": platform.python_version(),
        "segfleet.commit": sha or UNKNOWN,
        "segfleet.dirty": str(is_dirty).lower() if sha else UNKNOWN,
        "mlflow.source.name": Path(sys.argv[0]).name or "python",
        "mlflow.source.type": "JOB",
    }
    return tags | ({"mlflow.source.git.commit": sha} if sha else {})


def environment_text() -> str:
    """Return the Python, the host's kind and the version of every installed package."""
    sha, is_dirty = commit()
    lines = [
        f"python=={platform.python_version()}",
        f"platform=={platform.platform()}",
        f"commit=={sha or 'unknown'}{'-dirty' if is_dirty else ''}",
        *(f"{name}=={version}" for name, version in _packages() if name),
    ]
    return "\n".join(lines) + "\n"


@functools.cache
def _packages() -> list[tuple[str, str]]:
    found = importlib.metadata.distributions()
    return sorted({((each.metadata["Name"] or "").lower()): each.version for each in found}.items())


def version_of(package: str) -> str:
    """Return the installed version of a package, "absent" where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def _commit_of_checkout(folder: Path) -> tuple[str, bool]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no") != ""
    except (OSError, subprocess.SubprocessError):
        return "", False

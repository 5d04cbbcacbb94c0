"""End the servers that jobs/demo.py started, by their recorded process ids, and nothing else."""

from dataclasses import dataclass
from pathlib import Path

from segfleet import services
from segfleet.cli import parse_options, run_job


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which demo."""

    folder: Path = Path("demo")
    """Folder that was given to jobs/demo.py. Images, store, runs and models stay in it."""


def main() -> None:
    """Say of each server whether it was ended now or had ended before."""
    options = parse_options(Options, description=__doc__ or "")
    with services.exclusive(options.folder):
        sentences = services.end_all(options.folder)
    print("\n".join(sentences) or f"Nothing to end: no server is recorded in {options.folder}.")


if __name__ == "__main__":
    run_job(main)

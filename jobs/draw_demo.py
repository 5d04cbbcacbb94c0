"""Draw the demo data set: street scenes with labels, in the folder layout of Cityscapes."""

import os
from dataclasses import dataclass
from pathlib import Path

from segfleet.cli import parse_options, run_job
from segfleet.sources.demo import draw_demo


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is drawn, and where."""

    root: Path = Path("demo/cityscapes")
    """Folder that gets leftImg8bit/ and gtFine/; a new one, or one that holds an earlier demo."""

    num_train: int = 96
    """Scenes to train on."""

    num_val: int = 24
    """Scenes to validate on, from other (invented) cities."""

    width: int = 512
    """Pixels across."""

    height: int = 256
    """Pixels down."""

    seed: int = 0
    """Another seed draws other streets."""

    num_processes: int = len(os.sched_getaffinity(0))
    """Processes that draw; the scenes do not depend on it."""


def main() -> None:
    """Draw, and print how many scenes there are."""
    options = parse_options(
        Options,
        description="Draw street scenes and their labels, for trying everything without a data set. Folders, names and "
        "label ids are those of Cityscapes: jobs/ingest_cityscapes.py reads them. What is there already is kept, so an "
        "interrupted drawing goes on; other settings replace the earlier scenes.",
    )
    report = draw_demo(
        options.root,
        num_train=options.num_train,
        num_val=options.num_val,
        size=(options.width, options.height),
        seed=options.seed,
        num_processes=options.num_processes,
    )
    print(
        f"{report.root}: drew {report.num_drawn} scenes, kept {report.num_kept}, removed {report.num_removed} files"
    )


if __name__ == "__main__":
    run_job(main, goes_on=False)

"""Ingest Cityscapes from its official folders into a store that training reads."""

from dataclasses import dataclass

from segfleet.cli import parse_options, run_job
from segfleet.ingest import ingest, summary
from segfleet.sources.cityscapes import cityscapes_source


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to ingest, and where to."""

    root: str
    """Folder with leftImg8bit and gtFine in it."""

    store: str
    """Folder of the store, made by this job."""

    overwrite: bool = False
    """Replace a store of other data at that place."""


def main() -> None:
    """Ingest, and print what the store holds."""
    options = parse_options(Options, description=__doc__)
    print(summary(ingest(cityscapes_source(options.root), options.store, overwrite=options.overwrite)))


if __name__ == "__main__":
    run_job(main)

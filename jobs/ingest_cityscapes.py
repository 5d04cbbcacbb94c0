"""Ingest Cityscapes, from its official folders or zip archives, into a store that training reads."""

from dataclasses import dataclass

from pspnet.manifest import ShardFormat
from segfleet.cli import parse_options, run_job
from segfleet.ingest import ingest, summary
from segfleet.selection import DEFAULT_FRACTION
from segfleet.sources.cityscapes import TrainLabels, cityscapes_source


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to ingest, and where to."""

    root: str
    """Folder with leftImg8bit and gtFine in it, or with leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip."""

    store: str
    """Folder of the store, made by this job."""

    train_labels: TrainLabels = "fine"
    """coarse takes train and train_extra with the labels of gtCoarse; val has those of gtFine in any case."""

    format: ShardFormat = "raw"
    """raw: read fastest, 4 bytes a pixel; tiles: lossless and no larger than PNG, three milliseconds more a crop."""

    skip_bad: int = 0
    """So many pairs with problems may be left out; more, and no store is made."""

    selection_fraction: float = DEFAULT_FRACTION
    """Share of train that searches measure on instead of val: whole cities or clips where names show them; 0: none."""

    overwrite: bool = False
    """Replace a store of other data at that place."""


def main() -> None:
    """Ingest, and print what the store holds."""
    options = parse_options(Options, description=__doc__)
    source = cityscapes_source(options.root, train_labels=options.train_labels)
    report = ingest(
        source,
        options.store,
        overwrite=options.overwrite,
        skip_bad=options.skip_bad,
        selection_fraction=options.selection_fraction,
        shard_format=options.format,
    )
    print(summary(report))


if __name__ == "__main__":
    run_job(main)

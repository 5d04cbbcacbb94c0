"""Ingest NYU Depth V2, from the official .mat file or from exported pictures, into a store that training reads."""

from dataclasses import dataclass
from typing import Literal

from pspnet.manifest import ShardFormat
from segfleet.cli import parse_options, run_job
from segfleet.ingest import ingest, summary
from segfleet.selection import DEFAULT_FRACTION
from segfleet.sources.nyuv2 import nyuv2_source


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to ingest, and where to."""

    store: str
    """Folder of the store, made by this job."""

    mat: str = ""
    """nyu_depth_v2_labeled.mat."""

    splits: str = ""
    """splits.mat; empty looks for it beside --mat."""

    mapping: str = ""
    """classMapping40.mat or a CSV with raw_id and class40_id; empty looks for classMapping40.mat beside --mat."""

    root: str = ""
    """Instead of --mat: folder of exported pictures with images/, labels40/ and nyuv2_splits.json."""

    num_classes: Literal[40, 13] = 40
    """The 40 classes of Gupta et al. or the 13 of Couprie et al."""

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
    source = nyuv2_source(
        mat=options.mat,
        splits=options.splits,
        mapping=options.mapping,
        root=options.root,
        num_classes=options.num_classes,
    )
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

"""Ingest a folder of one's own images and labels into a store that training reads.

Layouts that are recognised: train/ with trainannot/ and val/ with valannot/ (CamVid's); images/train with
labels/train and images/val with labels/val; images/ with labels/ (then give --val-share). Others are named by
--images and --labels-dir, relative to --root, with {split} for train and val.
"""

from dataclasses import dataclass

from segfleet.cli import parse_options, run_job
from segfleet.ingest import ingest, summary
from segfleet.selection import DEFAULT_FRACTION
from segfleet.sources.folder import LabelKind, folder_source


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to ingest, and where to."""

    root: str
    """Folder of the images and labels; an image a.jpg belongs to the label a.png."""

    store: str
    """Folder of the store, made by this job."""

    classes: str = ""
    """Class table, a CSV with the columns id, name, r, g, b; empty for ROOT/classes.csv."""

    images: str = ""
    """Folder of the images, for example "pictures/{split}"."""

    labels_dir: str = ""
    """Folder of the labels, for example "masks/{split}"."""

    labels: LabelKind = "ids"
    """Whether the pixels of a label are ids (grey values, palette indices) or class colours."""

    val_share: float = 0.0
    """Share of the pairs that is held out for validation where there is no folder val."""

    skip_bad: int = 0
    """So many pairs with problems may be left out; more, and no store is made."""

    selection_fraction: float = DEFAULT_FRACTION
    """Share of train that searches measure on instead of val: whole cities or clips where names show them; 0: none."""

    overwrite: bool = False
    """Replace a store of other data at that place."""


def main() -> None:
    """Ingest, and print what the store holds."""
    options = parse_options(Options, description=__doc__)
    source = folder_source(
        options.root,
        classes=options.classes,
        images=options.images,
        labels=options.labels_dir,
        label_kind=options.labels,
        val_share=options.val_share,
    )
    report = ingest(
        source,
        options.store,
        overwrite=options.overwrite,
        skip_bad=options.skip_bad,
        selection_fraction=options.selection_fraction,
    )
    print(summary(report))


if __name__ == "__main__":
    run_job(main)

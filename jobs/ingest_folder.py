"""Ingest a folder of one's own images and labels into a store that training reads.

Layouts that are recognised: train/ with trainannot/ and val/ with valannot/ (CamVid's); images/train with
labels/train and images/val with labels/val; images/ with labels/ (then give --val-share). Others are named by
--images and --labels-dir, relative to --root, with {split} for train and val.
"""

from dataclasses import dataclass

from segfleet.cli import parse_options, run_job
from segfleet.ingest import ingest, summary
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
    print(summary(ingest(source, options.store, overwrite=options.overwrite)))


if __name__ == "__main__":
    run_job(main)

"""Ingest a folder of one's own images and labels into a store that training reads.

Layouts that are recognised: train/ with trainannot/ and val/ with valannot/ (CamVid's); images/train with
labels/train and images/val with labels/val; images/ with labels/. For --labels labelme the JSON files may also lie
beside the images; for --labels coco it is annotations/train.json (or instances_train.json) with train/ or
images/train/, train/_annotations.coco.json, or annotations.json with images/. Others are named by --images and
--labels-dir, relative to --root, with {split} for train and val.

Where no folder says what val is, one of these does: --val-share, --val-fraction with --group-pattern, or --train-list
with --val-list.
"""

from dataclasses import dataclass

from pspnet.manifest import ShardFormat
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
    """Class table, a CSV with the columns id, name, r, g, b; empty for ROOT/classes.csv, or COCO's categories."""

    images: str = ""
    """Folder of the images, for example "pictures/{split}"."""

    labels_dir: str = ""
    """Folder of the labels, for example "masks/{split}"; of COCO the file, "annotations/instances_{split}2017.json"."""

    labels: LabelKind = "ids"
    """Pixels that are ids (grey values, palette indices) or class colours; LabelMe's files, or COCO's."""

    background: str = ""
    """Class of pixels that nobody annotated in LabelMe's or COCO's files; empty ignores them."""

    val_share: float = 0.0
    """Chance of each image to be held out for validation, by a hash of its name: more images move no other."""

    val_fraction: float = 0.0
    """Share of the images that is held out for validation in whole groups, drawn by --seed."""

    group_pattern: str = ""
    """Regular expression of a whole name whose parentheses say its group: '(.*)_\\d+' keeps drive1_0001 and
    drive1_0002 on one side; empty makes each image its own group."""

    seed: int = 0
    """Another seed draws other groups."""

    train_list: str = ""
    """File with the names of the training images, one a line; what is in no list is left out."""

    val_list: str = ""
    """File with the names of the validation images."""

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
    source = folder_source(
        options.root,
        classes=options.classes,
        images=options.images,
        labels=options.labels_dir,
        label_kind=options.labels,
        background=options.background,
        val_share=options.val_share,
        train_list=options.train_list,
        val_list=options.val_list,
        val_fraction=options.val_fraction,
        group_pattern=options.group_pattern,
        seed=options.seed,
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

"""Make a model package of a PSPNet checkpoint of github.com/hszhao/semseg or github.com/open-mmlab/mmsegmentation.

jobs/evaluate.py and jobs/predict.py take the package as --model FOLDER; a training begins with the same file by
--model.weights FILE.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from segfleet.cli import parse_options, run_job
from segfleet.import_checkpoint import class_table_of, import_checkpoint


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which checkpoint, of what, and where the package goes."""

    checkpoint: Path
    """File of theirs (.pth or .safetensors)."""

    output: Path
    """Folder of the package, made by this job; an older package there is replaced."""

    classes: str = "cityscapes"
    """What it was trained on: cityscapes, nyuv2_40, nyuv2_13, or a classes.csv in the order of its logits."""

    crop_size: int | str | None = None
    """Side of the crops it was trained on, or HEIGHTxWIDTH. Only where it is not known: a file of mmsegmentation does
    not say it, or one of semseg is of other data than Cityscapes (19 classes: 713)."""

    bin_sizes: tuple[int, ...] = (1, 2, 3, 6)
    """Grids of its pyramid pooling."""

    align_corners: Literal["stored", "yes", "no"] = "stored"
    """Whether mmsegmentation trained it with align_corners; stored: as the file itself says."""


def main() -> None:
    """Print where the package is and what it holds."""
    options = parse_options(Options, description=__doc__ or "")
    folder = import_checkpoint(
        options.checkpoint,
        options.output,
        class_table=class_table_of(options.classes),
        crop_size=options.crop_size,
        bin_sizes=options.bin_sizes,
        align_corners=None if options.align_corners == "stored" else options.align_corners == "yes",
    )
    print(f"{options.checkpoint} packaged into {folder}; see {folder / 'README.md'}")


if __name__ == "__main__":
    run_job(main, goes_on=False)

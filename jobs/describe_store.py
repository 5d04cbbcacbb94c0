"""Print what a store holds, and draw its class histogram and a contact sheet of its images and labels."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from pspnet.errors import InputError
from pspnet.store import Store
from segfleet.cli import parse_options, run_job
from segfleet.description import describe_store, draw_class_histogram, draw_contact_sheet


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which store, and where the pictures go."""

    store: tyro.conf.Positional[str]
    """Folder or address of the store."""

    output: str = ""
    """Folder of the two pictures; empty for the one that holds the store, or this one if it lies elsewhere."""

    num_images: int = 6
    """Images of each split on the contact sheet."""


def main() -> None:
    """Describe, draw, and print where the pictures are."""
    options = parse_options(Options, description=__doc__)
    if options.num_images < 1:
        raise InputError(f"--num-images must be 1 or more, but got {options.num_images}. 6 is usual.")
    store = Store.open(options.store)
    place = store.location
    beside = Path(place.path).parent if place.is_local else Path.cwd()
    folder = Path(options.output).expanduser().absolute() if options.output else beside
    folder.mkdir(parents=True, exist_ok=True)
    print(describe_store(store))
    print()
    print(f"class histogram {draw_class_histogram(store, folder / f'{place.name}-classes.png')}")
    sheet = folder / f"{place.name}-sheet.png"
    print(f"contact sheet {draw_contact_sheet(store, sheet, num_images=options.num_images)}")


if __name__ == "__main__":
    run_job(main, goes_on=False)

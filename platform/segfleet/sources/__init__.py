"""Raw data of each kind: one module a source, each giving the same `Source` to `segfleet.ingest`."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pspnet.labels import ClassTable


@dataclass(frozen=True, order=True)
class Pair:
    """An image and its label, as a source finds them."""

    split: str
    name: str
    image: str
    """Path of the image, or its index in a file of many."""
    label: str | None
    """Path of the label; None for an image without one."""
    annotation: str = field(default="", repr=False)
    """What a file of many images says of this one, as JSON: so a worker need not read it all."""
    group: str = ""
    """What it is taken with, such as its scene, where the name does not begin with that."""


@dataclass(frozen=True)
class Listing:
    """What a source holds, and what it left out."""

    pairs: list[Pair]
    notes: list[str]
    """One line a thing that was left out, such as images without a label."""


class Source(Protocol):
    """Raw data of one kind; picklable, because the cluster's workers read it."""

    @property
    def name(self) -> str:
        """Name of the data set."""

    @property
    def class_table(self) -> ClassTable:
        """What the ids of its labels mean."""

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of the source: its kind, where it is, how it is read."""

    def listing(self) -> Listing:
        """Return its pairs, sorted by split and name; InputError where there is nothing to read."""

    def read(self, pair: Pair) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the image, uint8 (h, w, 3), and its ids, integers (h, w); InputError names what is wrong."""

"""What a store says of itself: class table, splits, shards, the cut of train, one digest of all content."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from pspnet.errors import InputError
from pspnet.labels import ClassTable

FORMAT = 1
MANIFEST_FILE = "manifest.json"
FIT, SELECTION = "fit", "selection"
VIEWS = (FIT, SELECTION)
"""The two parts of train, where the manifest cuts it."""
ShardFormat = Literal["raw", "tiles"]


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One Arrow file of a store: what it holds, summed exactly, so that shards add up in any order."""

    file: str
    num_images: int
    num_labelled: int
    num_pixels: int
    channel_sums: list[int]
    """Sum of red, green and blue over all pixels."""
    channel_square_sums: list[int]
    class_counts: list[int]
    """Pixels of each train id; the last entry counts the ignored ones."""
    sizes: dict[str, int]
    """Images of each size, "height x width"."""
    digest: str
    """sha256 over names, sizes and pixels in their order."""
    format: ShardFormat = "raw"
    """How the pixels are stored."""
    num_bytes: int = 0
    """Size of the file; 0 where the store is from before this was recorded."""
    file_digest: str = ""
    """sha256 of the file, by which a copy of it is verified."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The images of train that searches measure on instead of val; fixed when the store is made."""

    fraction: float
    """Share of train that was asked for."""
    rule: str
    """What was kept together: "group" (the part of the name that a city or clip shares) or "name" (nothing)."""
    groups: list[str]
    """The cities or clips that were chosen, by the rule "group"."""
    indices: list[int]
    """Indices into train, ascending."""
    class_counts: list[int]
    """Pixels of each train id in these images; the last entry counts the ignored ones."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store says of itself."""

    name: str
    class_table: ClassTable
    splits: dict[str, list[ShardInfo]]
    mean: tuple[float, ...]
    """Mean of red, green and blue over the training images, 0 to 255."""
    std: tuple[float, ...]
    source: dict[str, Any] = field(default_factory=dict)
    """Where the images came from, and how they were read."""
    selection: Selection | None = None
    """The cut of train into fit and selection; None where train is not cut."""
    left_out: list[str] = field(default_factory=list)
    """What is wrong with each pair of the source that the store lacks, because --skip-bad allowed it."""

    @cached_property
    def digest(self) -> str:
        """One digest of all content and of the cut of train: equal stores have equal ones, whoever wrote them."""
        content = [
            self.class_table.digest_text,
            *(f"{name}:{shard.digest}" for name, shard in self._shards()),
        ]
        if self.selection is not None:
            content.append(f"selection:{self.selection.indices}")
        return hashlib.sha256("\n".join(content).encode()).hexdigest()

    @property
    def split_names(self) -> list[str]:
        """The splits on disk and, where train is cut, fit and selection."""
        return [*self.splits, *(VIEWS if self.selection is not None else ())]

    def indices(self, split: str) -> list[int] | None:
        """Return the indices into train that fit or selection is; None for a split that is whole on disk."""
        if split in self.splits or self.selection is None or split not in VIEWS:
            return None
        if split == SELECTION:
            return self.selection.indices
        return sorted(set(range(self.num_images("train"))) - set(self.selection.indices))

    def num_images(self, split: str) -> int:
        """Return how many images the split has."""
        indices = self.indices(split)
        return sum(shard.num_images for shard in self.splits[split]) if indices is None else len(indices)

    def num_unlabelled(self, split: str) -> int:
        """Return how many images of the split have no label; for fit and selection, those of train."""
        shards = self.splits["train" if self.indices(split) is not None else split]
        return sum(shard.num_images - shard.num_labelled for shard in shards)

    def largest_side(self, split: str) -> int:
        """Return the longest side of the split's images in pixels; for fit and selection, of train's."""
        shards = self.splits["train" if self.indices(split) is not None else split]
        return max(int(side) for shard in shards for size in shard.sizes for side in size.split(" x "))

    def class_counts(self, split: str) -> list[int]:
        """Return the pixels of each train id in the split; the last entry counts the ignored ones."""
        if self.indices(split) is None:
            shards = self.splits[split]
            return [sum(counts) for counts in zip(*(shard.class_counts for shard in shards), strict=True)]
        assert self.selection is not None
        chosen = self.selection.class_counts
        if split == SELECTION:
            return chosen
        return [count - part for count, part in zip(self.class_counts("train"), chosen, strict=True)]

    def _shards(self) -> list[tuple[str, ShardInfo]]:
        return [(name, shard) for name in sorted(self.splits) for shard in self.splits[name]]

    def to_json(self) -> str:
        """Return the manifest as JSON."""
        return json.dumps(
            {
                "format": FORMAT,
                "digest": self.digest,
                "name": self.name,
                "mean": self.mean,
                "std": self.std,
                "source": self.source,
                "selection": None if self.selection is None else asdict(self.selection),
                "left_out": self.left_out,
                "class_table": self.class_table.to_dict(),
                "splits": {name: [asdict(shard) for shard in shards] for name, shards in self.splits.items()},
            },
            indent=1,
        )


def read_manifest(content: bytes, where: str) -> Manifest:
    """Return the manifest with this content, from `where`; InputError where it is damaged or of another format."""
    try:
        values = json.loads(content)
        version = values["format"]
        if version == FORMAT:
            manifest = Manifest(
                name=values["name"],
                class_table=ClassTable.from_dict(values["class_table"]),
                splits={
                    name: [ShardInfo(**shard) for shard in shards]
                    for name, shards in values["splits"].items()
                },
                mean=tuple(map(float, values["mean"])),
                std=tuple(map(float, values["std"])),
                source=values["source"],
                selection=Selection(**values["selection"]) if values.get("selection") else None,
                left_out=values.get("left_out", []),
            )
            if manifest.digest != values["digest"]:
                raise InputError(
                    f"The manifest of a store must be as it was written, but the digest in {where} is not that of its "
                    "shards. Ingest the data again."
                )
            return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"The manifest of a store must be the JSON that ingest wrote, but {where} is not ({error!r}). "
            "Ingest the data again."
        ) from error
    raise InputError(
        f"A store must be of format {FORMAT}, but {where} is of format {version}. Ingest the data again."
    )

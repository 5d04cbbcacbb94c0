"""What a store says of itself: class table, splits, shards, the cut of train, one digest of all content."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from pspnet.errors import InputError
from pspnet.json_values import parse_json, read_record, shown, typed
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
        values = parse_json(content, "It")
        if not isinstance(values, dict) or "format" not in values:
            raise InputError("It has no format.")
        if values["format"] == FORMAT:
            manifest = _manifest(values)
            if manifest.digest != values.get("digest"):
                raise InputError("Its digest is not that of its shards.")
            return manifest
    except InputError as error:
        raise InputError(
            f"The manifest of a store must be as ingest wrote it, but {where} is not. {error} "
            "Ingest the data again."
        ) from error
    raise InputError(
        f"A store must be of format {FORMAT}, but {where} is of format {shown(values['format'])}. "
        "Ingest the data again."
    )


def _manifest(values: dict[str, Any]) -> Manifest:
    splits = typed(dict[str, list[Any]], values.get("splits"), "splits")
    manifest = Manifest(
        name=typed(str, values.get("name"), "name"),
        class_table=ClassTable.from_dict(typed(dict[str, Any], values.get("class_table"), "class_table")),
        splits={
            name: [read_record(ShardInfo, shard, f"a shard of {shown(name)}") for shard in shards]
            for name, shards in splits.items()
        },
        mean=typed(tuple[float, ...], values.get("mean"), "mean"),
        std=typed(tuple[float, ...], values.get("std"), "std"),
        source=typed(dict[str, Any], values.get("source"), "source"),
        selection=read_record(Selection, values["selection"], "selection")
        if values.get("selection")
        else None,
        left_out=typed(list[str], values.get("left_out", []), "left_out"),
    )
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise InputError where the parts do not fit together, or a shard's file is not one of the store's folder."""

    def require(ok: bool, rule: str, value: object) -> None:
        if not ok:
            raise InputError(f"{rule}, but got {shown(value)}.")

    num_counts = manifest.class_table.num_classes + 1
    for name, shards in manifest.splits.items():
        require(
            name not in VIEWS or manifest.selection is None, "A split must not be train's cut as well", name
        )
        require(bool(shards), "A split must have a shard", name)
        for shard in shards:
            file = shard.file
            is_plain = not set(file) & {"/", "\\", "\0", ":"} and file.strip(".") != ""
            require(is_plain, "A shard's file must be a name in the store's folder", file)
            is_digest = re.fullmatch("([0-9a-f]{64})?", shard.file_digest) is not None
            require(is_digest, "The digest of a file must be 64 hexadecimal digits", shard.file_digest)
            require(
                0 <= shard.num_labelled <= shard.num_images,
                "A shard has as many labels as images or fewer",
                file,
            )
            require(
                min(shard.num_pixels, shard.num_bytes, *shard.class_counts) >= 0, "Counts are 0 or more", file
            )
            require(
                len(shard.class_counts) == num_counts, "A shard must count each class and the ignored", file
            )
            require(
                len(shard.channel_sums) == len(shard.channel_square_sums) == 3,
                "Three channels are summed",
                file,
            )
            for size in shard.sizes:
                sides = size.split(" x ")
                require(len(sides) == 2 and all(map(_is_side, sides)), "Sizes are HEIGHT x WIDTH", size)
            require(sum(shard.sizes.values()) == shard.num_images, "Each image of a shard has a size", file)
    require(len(manifest.mean) == len(manifest.std) == 3, "mean and std have three values", manifest.std)
    require(min(manifest.std) > 0, "std must be positive", manifest.std)
    cut = manifest.selection
    if cut is not None:
        require("train" in manifest.splits, "A selection is cut from train", sorted(manifest.splits))
        in_train = range(manifest.num_images("train"))
        is_within = not cut.indices or (cut.indices[0] in in_train and cut.indices[-1] in in_train)
        ascends = all(first < second for first, second in pairwise(cut.indices))
        require(is_within and ascends, "A selection's indices ascend within train", cut.indices)
        require(len(cut.class_counts) == num_counts, "A selection must count each class", cut.class_counts)


def _is_side(text: str) -> bool:
    return text.isascii() and text.isdecimal() and 0 < len(text) <= 9 and int(text) > 0

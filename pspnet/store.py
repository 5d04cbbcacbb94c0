"""The ingested data set on disk: Arrow IPC shards of raw uint8 pixels, memory-mapped, and a manifest.

store/
  manifest.json          class table, splits, counts, mean, std, source, one digest of all content
  train-00000.arrow …    one record batch an image: name, height, width, image bytes, label bytes (train ids)

A window of an image is a strided copy of just its bytes; nothing is decoded after ingest.

The manifest may cut the split train in two, by indices: `selection`, which searches measure their trials on, and
`fit`, the rest. Both are views of the shards of train, which keeps meaning all of it; the official validation images
are then left to the one measurement at the end.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pspnet.errors import InputError
from pspnet.labels import IGNORE_INDEX, ClassTable

FORMAT = 1
MANIFEST_FILE = "manifest.json"
FIT, SELECTION = "fit", "selection"
VIEWS = (FIT, SELECTION)
"""The two parts of train, where the manifest cuts it."""

_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("image", pa.large_binary(), nullable=False),
        pa.field("label", pa.large_binary()),
    ]
)


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


class Store:
    """An ingested data set, open for reading."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Return the store in the folder `path`; InputError where there is none, or one of another format."""
        path = Path(path)
        if not (path / MANIFEST_FILE).is_file():
            raise InputError(
                f"data.store must be the folder of an ingested data set, but there is no {MANIFEST_FILE} in {path}. "
                "Make one with jobs/ingest_cityscapes.py, jobs/ingest_nyuv2.py or jobs/ingest_folder.py."
            )
        return cls(path, _read_manifest(path / MANIFEST_FILE))

    @property
    def class_table(self) -> ClassTable:
        """The classes."""
        return self.manifest.class_table

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of red, green and blue over the training images, 0 to 255."""
        return self.manifest.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of red, green and blue over the training images."""
        return self.manifest.std

    @property
    def digest(self) -> str:
        """One digest of all content."""
        return self.manifest.digest

    def split(self, name: str) -> "Split":
        """Return the split of that name, or fit or selection; InputError names those that there are."""
        if name not in self.manifest.split_names:
            raise InputError(
                f"A split must be one of the store's, but {self.path} has no split {name!r}. "
                f"There are: {', '.join(sorted(self.manifest.split_names))}."
            )
        indices = self.manifest.indices(name)
        return Split(
            self.path, name, self.manifest.splits[name if indices is None else "train"], indices=indices
        )


@dataclass(frozen=True)
class _Place:
    """Where one image lies in its mapped shard."""

    name: str
    height: int
    width: int
    image: np.ndarray
    label: np.ndarray | None


class Split:
    """The images of one split, memory-mapped, in the order of the ingest; with `indices` only those."""

    def __init__(
        self, path: Path, name: str, shards: Sequence[ShardInfo], *, indices: Sequence[int] | None = None
    ) -> None:
        self._name = name
        places = [place for shard in shards for place in _map_shard(path / shard.file)]
        self._places = places if indices is None else [places[index] for index in indices]

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        """Return the name of an image."""
        return self._places[index].name

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        return self._places[index].height, self._places[index].width

    def image(self, index: int) -> np.ndarray:
        """Return a read-only view of an image, uint8 (h, w, 3)."""
        return self._places[index].image

    def label(self, index: int) -> np.ndarray | None:
        """Return a read-only view of the train ids, uint8 (h, w), or None where the image has no label."""
        return self._places[index].label

    def window(
        self, index: int, *, top: int, left: int, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return copies of the window's pixels, (height, width, 3) and (height, width), that lies in the image."""
        place, rows, columns = self._part(index, top, left, height, width)
        label = None if place.label is None else place.label[rows, columns].copy()
        return place.image[rows, columns].copy(), label

    def label_window(self, index: int, *, top: int, left: int, height: int, width: int) -> np.ndarray | None:
        """Return a copy of the window's train ids, uint8 (height, width), alone: no byte of the image is read."""
        place, rows, columns = self._part(index, top, left, height, width)
        return None if place.label is None else place.label[rows, columns].copy()

    def _part(self, index: int, top: int, left: int, height: int, width: int) -> tuple[_Place, slice, slice]:
        place = self._places[index]
        if not (0 <= top <= top + height <= place.height and 0 <= left <= left + width <= place.width):
            raise ValueError(
                f"A window must lie in its image, but rows {top} to {top + height}, columns {left} to {left + width} "
                f"do not lie in {place.name} of {place.height} x {place.width}."
            )
        return place, slice(top, top + height), slice(left, left + width)


def write_shard(
    path: Path, samples: Iterable[tuple[str, np.ndarray, np.ndarray | None]], *, num_classes: int
) -> ShardInfo:
    """Write (name, image uint8 (h, w, 3), train ids uint8 (h, w) or None) to one Arrow file, whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    digest = hashlib.sha256()
    num_images = num_labelled = num_pixels = 0
    sums, square_sums = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    counts = np.zeros(256, dtype=np.int64)
    sizes: dict[str, int] = {}
    with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        for name, image, label in samples:
            height, width = image.shape[:2]
            assert image.dtype == np.uint8, image.dtype
            assert image.shape == (height, width, 3), image.shape
            assert label is None or (label.dtype == np.uint8 and label.shape == (height, width))
            pixels = np.ascontiguousarray(image).tobytes()
            train_ids = None if label is None else np.ascontiguousarray(label).tobytes()
            writer.write_batch(
                pa.record_batch([[name], [height], [width], [pixels], [train_ids]], schema=_SCHEMA)
            )
            digest.update(f"{name}\0{height}\0{width}\0{label is not None}\0".encode())
            digest.update(pixels)
            digest.update(train_ids or b"")
            values = np.arange(256, dtype=np.int64)
            for channel in range(3):
                histogram = np.bincount(image[..., channel].ravel(), minlength=256)
                sums[channel] += int(histogram @ values)
                square_sums[channel] += int(histogram @ values**2)
            if label is not None:
                counts += np.bincount(label.ravel(), minlength=256)
                num_labelled += 1
            sizes[f"{height} x {width}"] = sizes.get(f"{height} x {width}", 0) + 1
            num_images += 1
            num_pixels += height * width
    os.replace(aside, path)
    return ShardInfo(
        file=path.name,
        num_images=num_images,
        num_labelled=num_labelled,
        num_pixels=num_pixels,
        channel_sums=sums.tolist(),
        channel_square_sums=square_sums.tolist(),
        class_counts=[*counts[:num_classes].tolist(), int(counts[IGNORE_INDEX])],
        sizes=sizes,
        digest=digest.hexdigest(),
    )


def publish_store(
    aside: Path,
    path: Path,
    *,
    name: str,
    class_table: ClassTable,
    splits: Mapping[str, Sequence[ShardInfo]],
    source: Mapping[str, Any],
    selection: Selection | None = None,
    left_out: Sequence[str] = (),
) -> Manifest:
    """Complete the shards in the folder `aside` with their manifest and rename it to `path`, which must not exist.

    Mean and standard deviation are those of the split train, or of all images where there is none.
    """
    shards = splits.get("train") or [shard for shards in splits.values() for shard in shards]
    num_pixels = max(1, sum(shard.num_pixels for shard in shards))
    mean = [sum(shard.channel_sums[channel] for shard in shards) / num_pixels for channel in range(3)]
    squares = [
        sum(shard.channel_square_sums[channel] for shard in shards) / num_pixels for channel in range(3)
    ]
    std = [max(1.0, (square - value**2) ** 0.5) for square, value in zip(squares, mean, strict=True)]
    manifest = Manifest(
        name=name,
        class_table=class_table,
        splits={split: list(infos) for split, infos in splits.items()},
        mean=tuple(mean),
        std=tuple(std),
        source=dict(source),
        selection=selection,
        left_out=list(left_out),
    )
    (aside / MANIFEST_FILE).write_text(manifest.to_json() + "\n")
    for file in aside.iterdir():
        _sync(file)
    _sync(aside)
    os.rename(aside, path)
    _sync(path.parent)
    return manifest


def remove_store(path: Path) -> None:
    """Remove a store; a folder that is none is left alone."""
    if (path / MANIFEST_FILE).is_file():
        shutil.rmtree(path)


def _map_shard(path: Path) -> list[_Place]:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(
            f"A store must hold the shards that its manifest names, but {path} cannot be read ({error}). "
            "Ingest the data again."
        ) from error
    places = []
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        names, heights, widths, images, labels = batch.columns
        for row in range(batch.num_rows):
            height, width = heights[row].as_py(), widths[row].as_py()
            image = _value(images, row)
            label = None if not labels[row].is_valid else _value(labels, row)
            if image.size != height * width * 3 or (label is not None and label.size != height * width):
                raise InputError(
                    f"A shard must hold whole images, but {path} does not. Ingest the data again."
                )
            places.append(
                _Place(
                    name=names[row].as_py(),
                    height=height,
                    width=width,
                    image=image.reshape(height, width, 3),
                    label=None if label is None else label.reshape(height, width),
                )
            )
    return places


def _value(column: pa.Array, row: int) -> np.ndarray:
    """Return a view of one binary value; `column[row].as_buffer()` would copy it."""
    _, offsets_buffer, values_buffer = column.buffers()
    start, end = np.frombuffer(offsets_buffer, dtype=np.int64)[column.offset + row : column.offset + row + 2]
    return np.frombuffer(values_buffer, dtype=np.uint8)[start:end]


def _read_manifest(path: Path) -> Manifest:
    try:
        values = json.loads(path.read_text())
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
                    f"The manifest of a store must be as it was written, but the digest in {path} is not that of its "
                    "shards. Ingest the data again."
                )
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"The manifest of a store must be the JSON that ingest wrote, but {path} is not ({error!r}). "
            "Ingest the data again."
        ) from error
    raise InputError(
        f"A store must be of format {FORMAT}, but {path.parent} is of format {version}. Ingest the data again."
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The ingested data set on disk: Arrow IPC shards of pixels, memory-mapped, and a manifest.

store/
  manifest.json          class table, splits, counts, mean, std, source, one digest of all content
  train-00000.arrow …    one record batch an image: name, height, width, image bytes, label bytes (train ids)

In a shard of the format `raw` a window is a strided copy of just its bytes; nothing is decoded after ingest. In one of
the format `tiles`, a quarter as large, the tiles that the window touches are decoded: see tiles.py. A store's digest is
that of its pixels, whatever their format.

The manifest may cut the split train in two, by indices: `selection`, which searches measure their trials on, and
`fit`, the rest. Both are views of the shards of train, which keeps meaning all of it; the official validation images
are then left to the one measurement at the end.

A store may lie elsewhere, s3://… or gs://… or on a network file system: then a split reads copies of its shards on
the node's own disk, see node_cache.py.
"""

import hashlib
import os
import shutil
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa
from PIL import Image

from pspnet import tiles
from pspnet.errors import InputError
from pspnet.json_values import shown
from pspnet.labels import IGNORE_INDEX, ClassTable
from pspnet.location import Location
from pspnet.manifest import MANIFEST_FILE, Manifest, Selection, ShardFormat, ShardInfo, read_manifest
from pspnet.node_cache import NodeCache, NoRoomError, RemoteFile, Say

_FORMAT_KEY = b"segfleet.format"
"""Of the shards' metadata; a shard without it is raw."""
_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("image", pa.large_binary(), nullable=False),
        pa.field("label", pa.large_binary()),
    ]
)


class Store:
    """An ingested data set, open for reading."""

    def __init__(self, location: Location, manifest: Manifest, cache: NodeCache, say: Say) -> None:
        self.location = location
        self.manifest = manifest
        self._cache, self._say = cache, say

    @classmethod
    def open(cls, location: str | Path, *, cache: NodeCache | None = None, say: Say = print) -> "Store":
        """Return the store in a folder or at an address; InputError where there is none, or of another format.

        Only the manifest is read. Where its shards must be copied first, `split` does so, into `cache` (by default
        what the environment says), and tells `say` of it.
        """
        place = Location.parse(location)
        if not place.exists(MANIFEST_FILE):
            raise InputError(
                f"data.store must be an ingested data set, but there is no {MANIFEST_FILE} in {place.text}. "
                "Make one with jobs/ingest_cityscapes.py, jobs/ingest_nyuv2.py or jobs/ingest_folder.py."
            )
        content = b"".join(place.chunks(MANIFEST_FILE))
        manifest = read_manifest(content, f"{place.text}/{MANIFEST_FILE}")
        return cls(place, manifest, cache or NodeCache.from_environment(), say)

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
        self.check_split(name)
        indices = self.manifest.indices(name)
        shards = self.manifest.splits[name if indices is None else "train"]
        in_place = [(Path(self.location.path) / shard.file, shard) for shard in shards]
        if not self._cache.is_for(self.location):
            return Split(name, in_place, indices=indices)
        try:
            held = self._cache.hold([self._remote(shard) for shard in shards], self._say)
        except NoRoomError as error:
            if not self.location.is_local or self._cache.when == "always":
                raise
            self._say(f"note: {self.location.text} is read over the network. {error}")
            return Split(name, in_place, indices=indices)
        copies = [(file.path, shard) for file, shard in zip(held, shards, strict=True)]
        split = Split(name, copies, indices=indices)
        for descriptor in {file.descriptor for file in held}:
            weakref.finalize(split, os.close, descriptor)
        return split

    def check_split(self, name: str) -> None:
        """Raise InputError, naming those that there are, where the store has no split of that name."""
        if name not in self.manifest.split_names:
            raise InputError(
                f"A split must be one of the store's, but {self.location.text} has no split {name!r}. "
                f"There are: {', '.join(sorted(self.manifest.split_names))}."
            )

    def num_bytes(self) -> int:
        """Return what all shards take on disk."""
        shards = [shard for of_split in self.manifest.splits.values() for shard in of_split]
        return sum(shard.num_bytes or self.location.num_bytes(shard.file) for shard in shards)

    def _remote(self, shard: ShardInfo) -> RemoteFile:
        if not shard.file_digest:
            raise InputError(
                f"A store that lies elsewhere must have the digests of its files in its manifest, but "
                f"{self.location.text} was ingested before there were any. Ingest the data again."
            )
        return RemoteFile(
            location=self.location, name=shard.file, num_bytes=shard.num_bytes, sha256=shard.file_digest
        )


@dataclass(frozen=True)
class _Place:
    """Where one image lies in its mapped shard."""

    name: str
    height: int
    width: int
    image: np.ndarray
    """uint8: the pixels (height, width, 3), or their tiles (bytes,)."""
    label: np.ndarray | None
    is_tiled: bool

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width


class Split:
    """The images of one split, memory-mapped, in the order of the ingest; with `indices` only those."""

    def __init__(
        self, name: str, shards: Sequence[tuple[Path, ShardInfo]], *, indices: Sequence[int] | None = None
    ) -> None:
        self._name = name
        places = [place for path, info in shards for place in _map_shard(path, info)]
        self._places = places if indices is None else [places[index] for index in indices]

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        """Return the name of an image."""
        return self._places[index].name

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        return self._places[index].height, self._places[index].width

    def labelled(self) -> list[int]:
        """Return the indices of the images that have a label."""
        return [index for index, place in enumerate(self._places) if place.label is not None]

    def image(self, index: int) -> np.ndarray:
        """Return an image, uint8 (h, w, 3); of a raw shard a read-only view."""
        place = self._places[index]
        if not place.is_tiled:
            return place.image
        image = np.empty((*place.size, 3), dtype=np.uint8)
        self.read_window(index, top=0, left=0, image=image, label=None)
        return image

    def label(self, index: int) -> np.ndarray | None:
        """Return the train ids, uint8 (h, w), or None where the image has no label; of a raw shard a read-only view."""
        place = self._places[index]
        if not place.is_tiled or place.label is None:
            return place.label
        label = np.empty(place.size, dtype=np.uint8)
        tiles.decode_into(label, place.label, size=place.size, top=0, left=0, what=place.name)
        return label

    def has_label(self, index: int) -> bool:
        """Return whether the image has a label."""
        return self._places[index].label is not None

    def window(
        self, index: int, *, top: int, left: int, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return copies of the window's pixels, (height, width, 3) and (height, width), that lies in the image."""
        image = np.empty((height, width, 3), dtype=np.uint8)
        label = np.empty((height, width), dtype=np.uint8) if self.has_label(index) else None
        self.read_window(index, top=top, left=left, image=image, label=label)
        return image, label

    def label_window(self, index: int, *, top: int, left: int, height: int, width: int) -> np.ndarray | None:
        """Return a copy of the window's train ids alone, (height, width): no byte of the image is read."""
        if not self.has_label(index):
            return None
        label = np.empty((height, width), dtype=np.uint8)
        self.read_window(index, top=top, left=left, image=None, label=label)
        return label

    def read_window(
        self, index: int, *, top: int, left: int, image: np.ndarray | None, label: np.ndarray | None
    ) -> None:
        """Copy the pixels from row `top` and column `left` on to `image`, (h, w, 3), the train ids to `label`, (h, w).

        Either is left out where it is None, and `label` where the image has none.
        """
        place = self._places[index]
        height, width = next(out.shape[:2] for out in (image, label) if out is not None)
        if not (0 <= top <= top + height <= place.height and 0 <= left <= left + width <= place.width):
            raise ValueError(
                f"A window must lie in its image, but rows {top} to {top + height}, columns {left} to {left + width} "
                f"do not lie in {place.name} of {place.height} x {place.width}."
            )
        rows, columns = slice(top, top + height), slice(left, left + width)
        for out, pixels in ((image, place.image), (label, place.label)):
            if out is None or pixels is None:
                continue
            if place.is_tiled:
                tiles.decode_into(out, pixels, size=place.size, top=top, left=left, what=place.name)
            else:
                np.copyto(out, pixels[rows, columns])


class Sample(NamedTuple):
    """What a shard holds of one picture."""

    name: str
    image: np.ndarray
    """uint8 (h, w, 3)."""
    label: np.ndarray | None
    """Train ids, uint8 (h, w)."""
    image_digest: str = ""
    """`pixel_digest` of the image, where it is known."""
    label_digest: str = ""


def pixel_digest(pixels: np.ndarray | None) -> str:
    """Return the sha256 of the shape and the values of an image or a label; "" for none."""
    if pixels is None:
        return ""
    digest = hashlib.sha256(str(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def write_shard(
    path: Path,
    samples: Iterable[Sample | tuple[str, np.ndarray, np.ndarray | None]],
    *,
    num_classes: int,
    shard_format: ShardFormat = "raw",
) -> ShardInfo:
    """Write samples, or (name, image, label or None), to one Arrow file, whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    digest = hashlib.sha256()
    num_images = num_labelled = num_pixels = 0
    sums, square_sums = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    counts = np.zeros(256, dtype=np.int64)
    sizes: dict[str, int] = {}
    schema = _SCHEMA.with_metadata({_FORMAT_KEY: shard_format})
    with _HashedFile(aside) as file, pa.ipc.new_file(file, schema) as writer:
        for name, image, label, *digests in samples:
            height, width = image.shape[:2]
            assert image.dtype == np.uint8, image.dtype
            assert image.shape == (height, width, 3), image.shape
            assert label is None or (label.dtype == np.uint8 and label.shape == (height, width))
            columns = [
                _one(name.encode(), pa.string()),
                _one(height, pa.int32()),
                _one(width, pa.int32()),
                _one(_stored(image, shard_format), pa.large_binary()),
                _one(None if label is None else _stored(label, shard_format), pa.large_binary()),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            image_digest, label_digest = digests or (pixel_digest(image), pixel_digest(label))
            digest.update(f"{name}\0{image_digest}\0{label_digest}\0".encode())
            histograms = np.reshape(Image.fromarray(image).histogram(), (3, 256))
            sums += histograms @ np.arange(256)
            square_sums += histograms @ np.arange(256) ** 2
            if label is not None:
                counts += Image.fromarray(label).histogram()
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
        format=shard_format,
        num_bytes=file.num_bytes,
        file_digest=file.digest.hexdigest(),
    )


class _HashedFile:
    """A new file whose bytes are hashed on their way, so that nobody reads them again for that."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, data: bytes) -> None:
        self.digest.update(data)
        self.num_bytes += len(data)
        self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self.num_bytes

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "_HashedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stored(pixels: np.ndarray, shard_format: ShardFormat) -> bytes | np.ndarray:
    return tiles.encode(pixels) if shard_format == "tiles" else np.ascontiguousarray(pixels)


def _one(value: bytes | np.ndarray | int | None, of_type: pa.DataType) -> pa.Array:
    """Return an array of one value; `pa.array` would copy the pixels, and import pandas to do so."""
    if isinstance(value, int):
        return pa.Array.from_buffers(of_type, 1, [None, pa.py_buffer(np.array([value], dtype=np.int32))])
    offset_type = np.int64 if of_type == pa.large_binary() else np.int32
    num_bytes = 0 if value is None else len(value) if isinstance(value, bytes) else value.nbytes
    buffers = [
        pa.py_buffer(b"\0") if value is None else None,
        pa.py_buffer(np.array([0, num_bytes], dtype=offset_type)),
        pa.py_buffer(b"" if value is None else value),
    ]
    return pa.Array.from_buffers(of_type, 1, buffers)


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


def _map_shard(path: Path, info: ShardInfo) -> list[_Place]:
    """Return where the images of a shard lie; InputError where the file is not the one that the manifest describes."""
    try:
        places = _places(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"A store must hold the shards that its manifest names, but {path} cannot be read ({shown(error)}). "
            "Ingest the data again."
        ) from error
    num_bytes = path.stat().st_size
    if len(places) != info.num_images or num_bytes != (info.num_bytes or num_bytes):
        raise InputError(
            f"A shard must be as it was ingested, but {path} has {len(places)} images in {num_bytes} bytes and its "
            f"manifest says {info.num_images} in {info.num_bytes or num_bytes}. Ingest the data again."
        )
    return places


def _places(path: Path) -> list[_Place]:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    if not reader.schema.equals(_SCHEMA):
        raise InputError(
            f"A shard must have the columns of a store, but {path} has not. Ingest the data again."
        )
    shard_format = (reader.schema.metadata or {}).get(_FORMAT_KEY, b"raw").decode()
    if shard_format not in get_args(ShardFormat):
        raise InputError(
            f"A shard must be of the format {' or '.join(get_args(ShardFormat))}, but {path} is of the format "
            f"{shard_format!r}. Read it with a newer version, or ingest the data again."
        )
    places = []
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        batch.validate(full=True)
        names, heights, widths, images, labels = batch.columns
        for row in range(batch.num_rows):
            height, width = heights[row].as_py(), widths[row].as_py()
            image = _value(images, row)
            label = None if not labels[row].is_valid else _value(labels, row)
            if shard_format == "raw":
                is_whole = image.size == height * width * 3 and (
                    label is None or label.size * 3 == image.size
                )
            else:
                size = (height, width)
                is_whole = all(it is None or tiles.has_every_tile(it, size) for it in (image, label))
            if min(height, width) < 1 or not is_whole:
                raise InputError(
                    f"A shard must hold whole images, but {path} does not. Ingest the data again."
                )
            if shard_format == "raw":
                image = image.reshape(height, width, 3)
                label = None if label is None else label.reshape(height, width)
            places.append(
                _Place(names[row].as_py(), height, width, image, label, is_tiled=shard_format == "tiles")
            )
    return places


def _value(column: pa.Array, row: int) -> np.ndarray:
    """Return a view of one binary value; `column[row].as_buffer()` would copy it."""
    _, offsets_buffer, values_buffer = column.buffers()
    start, end = np.frombuffer(offsets_buffer, dtype=np.int64)[column.offset + row : column.offset + row + 2]
    return np.frombuffer(values_buffer, dtype=np.uint8)[start:end]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

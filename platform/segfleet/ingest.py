"""From a source to a store: every pair read, checked and decoded once, in parallel on the cluster where there is one.

The store appears whole or not at all. Shards are written aside, in a folder named after the source and the store:
an ingest that was killed goes on there, and the result has the same bytes on any number of workers.
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from pspnet.errors import InputError
from pspnet.store import MANIFEST_FILE, Manifest, ShardInfo, Store, publish_store, remove_store, write_shard
from segfleet.progress import tracked
from segfleet.sources import Pair, Source

IMAGES_PER_SHARD = 16
MAX_LISTED = 50


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What an ingest did."""

    path: Path
    manifest: Manifest
    notes: list[str]
    is_new: bool
    """False where the store was there already, of the same source."""
    seconds: float


@dataclass(frozen=True)
class _Task:
    """One shard to write."""

    split: str
    number: int
    pairs: tuple[Pair, ...]

    @property
    def file(self) -> str:
        return f"{self.split}-{self.number:05d}.arrow"


def ingest(source: Source, store_path: str | Path, *, overwrite: bool = False) -> IngestReport:
    """Make the store of `source` at `store_path` and return what it holds.

    Runs as Ray tasks where RAY_ADDRESS is set or Ray is initialised, else in this process. Raises InputError that
    lists every pair that cannot be used, and then leaves no store behind; also where `store_path` holds the store
    of something else, unless `overwrite`.
    """
    started = time.monotonic()
    store_path = Path(store_path).expanduser().absolute()
    listing = source.listing()
    fingerprint = _fingerprint(source, listing.pairs)
    if store_path.exists() and not (store_path / MANIFEST_FILE).exists():
        raise InputError(
            f"--store must be a folder that does not exist yet, or a store, but {store_path} is neither. "
            "Give another path."
        )
    if store_path.exists():
        store = Store.open(store_path)
        if store.manifest.source.get("fingerprint") == fingerprint:
            seconds = time.monotonic() - started
            return IngestReport(
                path=store_path, manifest=store.manifest, notes=listing.notes, is_new=False, seconds=seconds
            )
        if not overwrite:
            raise InputError(
                f"--store must not be a store of other data, but {store_path} holds {store.manifest.name} of "
                f"{store.manifest.source.get('root', store.manifest.source)}, or its files have changed since. "
                "Give another path, or --overwrite True."
            )
    aside = store_path.parent / f".{store_path.name}.ingest-{fingerprint[:12]}"
    aside.mkdir(parents=True, exist_ok=True)
    tasks = _tasks(listing.pairs)
    splits: dict[str, list[ShardInfo]] = {}
    problems: list[str] = []
    for task, (info, found) in zip(tasks, _executed(source, aside, tasks), strict=True):
        problems += found
        if info is not None:
            splits.setdefault(task.split, []).append(info)
    if problems:
        shutil.rmtree(aside)
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise InputError(
            f"{len(problems)} of {len(listing.pairs)} pairs cannot be used, and no store was made:\n  "
            + "\n  ".join(problems[:MAX_LISTED])
            + more
        )
    for note in aside.glob("*.json"):
        note.unlink()
    if overwrite:
        remove_store(store_path)
    manifest = publish_store(
        aside,
        store_path,
        name=source.name,
        class_table=source.class_table,
        splits=splits,
        source=source.describe() | {"fingerprint": fingerprint},
    )
    return IngestReport(
        path=store_path,
        manifest=manifest,
        notes=listing.notes,
        is_new=True,
        seconds=time.monotonic() - started,
    )


def summary(report: IngestReport) -> str:
    """Return what a person wants to know of a new store, one fact a line."""
    manifest = report.manifest
    lines = [f"note: {note}" for note in report.notes[:MAX_LISTED]]
    if len(report.notes) > MAX_LISTED:
        lines.append(f"note: and {len(report.notes) - MAX_LISTED} more")
    done = f"ingested in {report.seconds:.1f} s" if report.is_new else "was there already, of the same files"
    lines.append(f"store {report.path}: {done}")
    for split in manifest.splits:
        counts = manifest.class_counts(split)
        shares = np.array(counts) / max(1, sum(counts))
        largest = np.argsort(-shares[:-1], kind="stable")[:3]
        named = ", ".join(
            f"{manifest.class_table.class_names[index]} {shares[index]:.1%}" for index in largest
        )
        lines.append(f"  {split}: {manifest.num_images(split)} images; {named}; ignored {shares[-1]:.1%}")
    lines.append(f"  {manifest.class_table.num_classes} classes, digest {manifest.digest[:16]}")
    return "\n".join(lines)


def _tasks(pairs: Sequence[Pair]) -> list[_Task]:
    tasks = []
    for split, found in itertools.groupby(sorted(pairs), key=lambda pair: pair.split):
        of_split = tuple(found)
        for number, start in enumerate(range(0, len(of_split), IMAGES_PER_SHARD)):
            tasks.append(_Task(split, number, of_split[start : start + IMAGES_PER_SHARD]))
    return tasks


def _executed(
    source: Source, aside: Path, tasks: Sequence[_Task]
) -> Iterator[tuple[ShardInfo | None, list[str]]]:
    """Yield the result of each task in order, computed on the cluster or here."""
    name = f"ingest {source.name}, shards"
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        for task in tracked(tasks, name):
            yield _write(source, aside, task)
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    remote = ray.remote(num_cpus=1)(_write)
    shared_source = ray.put(source)
    futures = [remote.remote(shared_source, aside, task) for task in tasks]
    for future in tracked(futures, name):
        yield ray.get(future)


def _write(source: Source, aside: Path, task: _Task) -> tuple[ShardInfo | None, list[str]]:
    """Write one shard unless it is there, and return what it holds, or the problems of its pairs."""
    note = aside / f"{task.file}.json"
    if note.is_file() and (aside / task.file).is_file():
        return ShardInfo(**json.loads(note.read_text())), []
    samples: list[tuple[str, np.ndarray, np.ndarray | None]] = []
    problems: list[str] = []
    for pair in task.pairs:
        try:
            samples.append((pair.name, *_checked(source, pair)))
        except InputError as error:
            problems.append(str(error))
    if problems:
        return None, problems
    info = write_shard(aside / task.file, samples, num_classes=source.class_table.num_classes)
    beside = note.with_suffix(".aside")
    beside.write_text(json.dumps(asdict(info)))
    os.replace(beside, note)
    return info, []


def _checked(source: Source, pair: Pair) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the image and train ids of a pair that belong together; InputError names what is wrong."""
    image, ids = source.read(pair)
    if ids is None:
        return image, None
    if ids.shape != image.shape[:2]:
        raise InputError(
            f"An image and its label must have one size, but {pair.image} is {image.shape[1]} x {image.shape[0]} and "
            f"{pair.label} is {ids.shape[1]} x {ids.shape[0]} (width x height). Replace one or remove the pair."
        )
    return image, source.class_table.train_id_of(ids, where=str(pair.label))


def _fingerprint(source: Source, pairs: Sequence[Pair]) -> str:
    """Return a digest that differs where the source, its files' names, sizes or times of change do."""
    digest = hashlib.sha256(json.dumps(source.describe(), sort_keys=True).encode())
    digest.update(source.class_table.digest_text.encode())
    for pair in sorted(pairs):
        digest.update(json.dumps([pair.split, pair.name, _stamp(pair.image), _stamp(pair.label)]).encode())
    described: dict[str, Any] = source.describe()
    for path in (described.get("mat"), described.get("splits"), described.get("mapping")):
        digest.update(json.dumps(_stamp(path)).encode())
    return digest.hexdigest()


def _stamp(path: str | None) -> list[Any]:
    if path is None or not os.path.isfile(path):
        return [path]
    status = os.stat(path)
    return [path, status.st_size, status.st_mtime_ns]

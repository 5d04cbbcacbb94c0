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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from pspnet.errors import InputError
from pspnet.json_values import parse_json, read_record, typed
from pspnet.manifest import MANIFEST_FILE, SELECTION, VIEWS, Manifest, ShardFormat, ShardInfo
from pspnet.store import Sample, Store, publish_store, remove_store, write_shard
from segfleet.checks import Finding, PairFacts, check_pair, compare_pairs, from_json, to_json
from segfleet.ingest_report import MAX_WARNINGS_ON_SCREEN, Report, table, write_report
from segfleet.interruption import kept_sigterm
from segfleet.progress import tracked
from segfleet.selection import DEFAULT_FRACTION, check_fraction, choose_selection
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
    found: Report | None = None
    """What the checks found, with the paths of the written report; None where nothing was read."""


@dataclass(frozen=True)
class _Task:
    """One shard to write."""

    split: str
    number: int
    pairs: tuple[Pair, ...]
    shard_format: ShardFormat
    left_out: frozenset[str] = frozenset()
    """Names of pairs that can be read but not be used beside the others."""

    @property
    def file(self) -> str:
        return f"{self.split}-{self.number:05d}.arrow"


@dataclass(frozen=True)
class _Written:
    """What became of one task; kept beside the shard, so that a killed ingest reads no pair twice."""

    info: ShardInfo | None
    """None where no pair of the task can be used; then there is no file."""
    facts: list[PairFacts] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)


def ingest(
    source: Source,
    store_path: str | Path,
    *,
    overwrite: bool = False,
    skip_bad: int = 0,
    selection_fraction: float = DEFAULT_FRACTION,
    shard_format: ShardFormat = "raw",
) -> IngestReport:
    """Make the store of `source` at `store_path` and return what it holds.

    Runs as Ray tasks where RAY_ADDRESS is set or Ray is initialised, else in this process. All that is wrong with any
    pair is written to STORE-report.html and STORE-report.json beside the store. Up to `skip_bad` pairs with problems
    are left out, and the manifest says so; where there are more, InputError lists them and no store is left behind.
    InputError also where `store_path` holds the store of something else, unless `overwrite`.
    """
    started = time.monotonic()
    check_fraction(selection_fraction)
    if skip_bad < 0:
        raise InputError(f"--skip-bad must be 0 or more, but got {skip_bad}. 0 leaves no pair out.")
    store_path = Path(store_path).expanduser().absolute()
    listing = source.listing()
    fingerprint = _fingerprint(source, listing.pairs)
    there = _store_there(store_path, fingerprint, overwrite, skip_bad, selection_fraction, shard_format)
    if there is not None:
        manifest, notes = there
        return IngestReport(
            path=store_path,
            manifest=manifest,
            notes=listing.notes + notes,
            is_new=False,
            seconds=time.monotonic() - started,
        )
    aside = store_path.parent / f".{store_path.name}.ingest-{fingerprint[:12]}"
    aside.mkdir(parents=True, exist_ok=True)
    tasks = _tasks(listing.pairs, shard_format)
    written = list(_executed(source, aside, tasks))
    problems = [problem for item in written for problem in item.problems]
    between, warnings = compare_pairs([facts for item in written for facts in item.facts])
    problems += between
    bad = {(problem.split, problem.name) for problem in problems}
    found = write_report(
        source,
        listing.pairs,
        store_path,
        problems=problems,
        warnings=warnings,
        facts=[facts for item in written for facts in item.facts if (facts.split, facts.name) not in bad],
        is_refused=len(bad) > skip_bad or len(bad) == len(listing.pairs),
    )
    if found.is_refused:
        shutil.rmtree(aside)
        allowed = f", more than --skip-bad {skip_bad} allows" if skip_bad else ""
        raise InputError(
            f"{len(bad)} of {len(listing.pairs)} pairs cannot be used{allowed}, and no store was made:\n"
            f"{table(problems)}\n"
            f"All of them, with pictures: {found.html_path}\nAs data: {found.json_path}\n"
            f"Mend or remove them, or leave them out: --skip-bad {len(bad)}."
        )
    if between:
        tasks = [_without(task, between) for task in tasks]
        written = list(_executed(source, aside, tasks))
    splits: dict[str, list[ShardInfo]] = {}
    for task, item in zip(tasks, written, strict=True):
        if item.info is not None:
            splits.setdefault(task.split, []).append(item.info)
    train = [facts for item in written for facts in item.facts if facts.split == "train"]
    selection = None
    if not set(VIEWS) & splits.keys():
        selection = choose_selection(
            [facts.name for facts in train],
            [facts.class_counts for facts in train],
            fraction=selection_fraction,
            groups_of={pair.name: pair.group for pair in listing.pairs if pair.split == "train"},
        )
    shards = {info.file for infos in splits.values() for info in infos}
    for file in aside.iterdir():  # notes, and what a writer that was killed has left half done
        if file.name not in shards:
            file.unlink()
    if overwrite:
        remove_store(store_path)
    manifest = publish_store(
        aside,
        store_path,
        name=source.name,
        class_table=source.class_table,
        splits=splits,
        source=source.describe() | {"fingerprint": fingerprint},
        selection=selection,
        left_out=_left_out(problems),
    )
    return IngestReport(
        path=store_path,
        manifest=manifest,
        notes=listing.notes,
        is_new=True,
        seconds=time.monotonic() - started,
        found=found,
    )


def summary(report: IngestReport) -> str:
    """Return what a person wants to know of a new store, one fact a line."""
    manifest = report.manifest
    lines = [f"note: {note}" for note in report.notes[:MAX_LISTED]]
    if len(report.notes) > MAX_LISTED:
        lines.append(f"note: and {len(report.notes) - MAX_LISTED} more")
    if report.found is not None and report.found.problems:
        lines += ["left out, because --skip-bad allows it:", table(report.found.problems)]
    if report.found is not None and report.found.warnings:
        lines += ["worth a look:", table(report.found.warnings, max_lines=MAX_WARNINGS_ON_SCREEN)]
    done = f"ingested in {report.seconds:.1f} s" if report.is_new else "was there already, of the same files"
    lines.append(f"store {report.path}: {done}")
    if report.found is not None:
        lines.append(f"report {report.found.html_path}")
    for split in manifest.split_names:
        counts = manifest.class_counts(split)
        shares = np.array(counts) / max(1, sum(counts))
        largest = np.argsort(-shares[:-1], kind="stable")[:3]
        named = ", ".join(
            f"{manifest.class_table.class_names[index]} {shares[index]:.1%}" for index in largest
        )
        lines.append(f"  {split}: {manifest.num_images(split)} images; {named}; ignored {shares[-1]:.1%}")
    lines += _selection_lines(manifest)
    lines.append(f"  {manifest.class_table.num_classes} classes, digest {manifest.digest[:16]}")
    return "\n".join(lines)


def _selection_lines(manifest: Manifest) -> list[str]:
    if manifest.selection is None:
        return []
    cut = manifest.selection
    kept = f"whole groups {', '.join(cut.groups)}" if cut.rule == "group" else "single images by name"
    lines = [f"  selection is cut from train: {kept}"]
    lacking = [
        name
        for name, here, all_ in zip(
            manifest.class_table.class_names,
            manifest.class_counts(SELECTION)[:-1],
            manifest.class_counts("train")[:-1],
            strict=True,
        )
        if all_ and not here
    ]
    return [*lines, f"  selection lacks {', '.join(lacking)}"] if lacking else lines


def _store_there(
    path: Path,
    fingerprint: str,
    overwrite: bool,
    skip_bad: int,
    fraction: float,
    shard_format: ShardFormat,
) -> tuple[Manifest, list[str]] | None:
    """Return the manifest and notes of a store of the same files, or None; InputError where it is not to be used."""
    if not path.exists():
        return None
    if not (path / MANIFEST_FILE).exists():
        raise InputError(
            f"--store must be a folder that does not exist yet, or a store, but {path} is neither. "
            "Give another path."
        )
    manifest = Store.open(path).manifest
    same_files = manifest.source.get("fingerprint") == fingerprint
    cut_with = 0.0 if manifest.selection is None else manifest.selection.fraction
    is_cut_as_asked = cut_with == fraction or _num_train(manifest) < 2
    found_format = next((info.format for infos in manifest.splits.values() for info in infos), shard_format)
    if overwrite:
        is_cut_as_asked = is_cut_as_asked and found_format == shard_format
        is_as_asked = same_files and is_cut_as_asked and len(manifest.left_out) <= skip_bad
        return (manifest, []) if is_as_asked else None
    if not same_files:
        raise InputError(
            f"--store must not be a store of other data, but {path} holds {manifest.name} of "
            f"{manifest.source.get('root', manifest.source)}, or its files have changed since. "
            "Give another path, or --overwrite True."
        )
    if found_format != shard_format:
        raise InputError(
            f"--format must be that of the store, but {path} is {found_format} and got {shard_format}. Give --format "
            f"{found_format}, another path, or --overwrite True."
        )
    if len(manifest.left_out) > skip_bad:
        raise InputError(
            f"--skip-bad must allow what the store lacks, but {path} was made without {len(manifest.left_out)} bad "
            f"pairs and --skip-bad is {skip_bad}. Give --skip-bad {len(manifest.left_out)}, or mend the pairs."
        )
    if manifest.selection is not None and not is_cut_as_asked:
        raise InputError(
            f"--selection-fraction must be that of the store, but {path} was cut with {cut_with} and got {fraction}. "
            f"Give {cut_with}, or --overwrite True to cut it anew."
        )
    if not is_cut_as_asked:
        return manifest, ["the store has no selection split; --overwrite True makes it anew with one"]
    return manifest, []


def _num_train(manifest: Manifest) -> int:
    return manifest.num_images("train") if "train" in manifest.splits else 0


def _left_out(problems: Sequence[Finding]) -> list[str]:
    """Return one line for each pair that has problems."""
    texts: dict[str, list[str]] = {}
    for problem in problems:
        texts.setdefault(f"{problem.split}/{problem.name}", []).append(problem.text)
    return [f"{pair}: {' '.join(found)}" for pair, found in texts.items()]


def _without(task: _Task, problems: Sequence[Finding]) -> _Task:
    names = {problem.name for problem in problems if problem.split == task.split}
    return replace(task, left_out=frozenset(pair.name for pair in task.pairs) & names)


def _tasks(pairs: Sequence[Pair], shard_format: ShardFormat) -> list[_Task]:
    tasks = []
    for split, found in itertools.groupby(sorted(pairs), key=lambda pair: pair.split):
        of_split = tuple(found)
        for number, start in enumerate(range(0, len(of_split), IMAGES_PER_SHARD)):
            tasks.append(_Task(split, number, of_split[start : start + IMAGES_PER_SHARD], shard_format))
    return tasks


def _executed(source: Source, aside: Path, tasks: Sequence[_Task]) -> Iterator[_Written]:
    """Yield the result of each task in order, computed on the cluster or here."""
    name = f"ingest {source.name}, shards"
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        for task in tracked(tasks, name):
            yield _write(source, aside, task)
        return
    if not ray.is_initialized():
        with kept_sigterm():
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
    remote = ray.remote(num_cpus=1)(_write)
    shared_source = ray.put(source)
    futures = [remote.remote(shared_source, aside, task) for task in tasks]
    for future in tracked(futures, name):
        yield ray.get(future)


def _write(source: Source, aside: Path, task: _Task) -> _Written:
    """Write the shard of the pairs that can be used, unless it is there, and return what it holds and what is bad."""
    note = aside / f"{task.file}.json"
    done = _read_note(note, task)
    if done is not None:
        return done
    samples: list[Sample] = []
    facts: list[PairFacts] = []
    problems: list[Finding] = []
    for pair in task.pairs:
        if pair.name in task.left_out:
            continue
        usable, found = check_pair(source, pair)
        problems += found
        if usable is not None:
            image, label, of_pair = usable
            samples.append(Sample(pair.name, image, label, of_pair.image_digest, of_pair.label_digest))
            facts.append(of_pair)
    note.unlink(missing_ok=True)
    info = None
    if samples:
        num_classes = source.class_table.num_classes
        info = write_shard(
            aside / task.file, samples, num_classes=num_classes, shard_format=task.shard_format
        )
    else:
        (aside / task.file).unlink(missing_ok=True)
    beside = note.with_suffix(".aside")
    values = {
        "left_out": sorted(task.left_out),
        "info": None if info is None else asdict(info),
        "facts": [asdict(item) for item in facts],
        "problems": to_json(problems),
    }
    beside.write_text(json.dumps(values))
    os.replace(beside, note)
    return _Written(info, facts, problems)


def _read_note(note: Path, task: _Task) -> _Written | None:
    """Return what an ingest that was killed has written of this very task."""
    if not note.is_file():
        return None
    try:
        values = typed(dict[str, Any], parse_json(note.read_bytes(), "It"), "It")
        info = None if values["info"] is None else read_record(ShardInfo, values["info"], "info")
        facts = [read_record(PairFacts, item, "facts") for item in values["facts"]]
        problems = from_json(values["problems"])
        is_same = values["left_out"] == sorted(task.left_out)
    except (
        InputError,
        KeyError,
        TypeError,
    ):  # cut by a machine that lost its power, or of an earlier version
        return None
    if info is not None:
        shard = note.parent / task.file
        num_bytes = shard.stat().st_size if shard.is_file() else -1
        is_same = is_same and info.format == task.shard_format and num_bytes == info.num_bytes
    return _Written(info, facts, problems) if is_same else None


def _fingerprint(source: Source, pairs: Sequence[Pair]) -> str:
    """Return a digest that differs where the source, its files' names, sizes or times of change do."""
    digest = hashlib.sha256(json.dumps(source.describe(), sort_keys=True).encode())
    digest.update(source.class_table.digest_text.encode())
    for pair in sorted(pairs):
        parts = [pair.split, pair.name, _stamp(pair.image), _stamp(pair.label)]
        digest.update(json.dumps([*parts, pair.group] if pair.group else parts).encode())
    described: dict[str, Any] = source.describe()
    for path in (described.get("mat"), described.get("splits"), described.get("mapping")):
        digest.update(json.dumps(_stamp(path)).encode())
    return digest.hexdigest()


def _stamp(path: str | None) -> list[Any]:
    if path is None or not os.path.isfile(path):
        return [path]
    status = os.stat(path)
    return [path, status.st_size, status.st_mtime_ns]

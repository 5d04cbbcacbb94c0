"""Which pairs are train and which are val, where the folders do not say it: lists, a hash of the name, or groups."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pspnet.errors import InputError
from segfleet.sources import Listing, Pair
from segfleet.sources.annotations import listed

MAX_LIST_BYTES = 100_000_000


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """How the pairs of the split train are divided; without any setting they stay as they are."""

    train_list: str = ""
    """File with the names of the training images, one a line."""
    val_list: str = ""
    """File with the names of the validation images."""
    val_share: float = 0.0
    """Chance that a pair becomes val, by a hash of its name: more images move no other."""
    val_fraction: float = 0.0
    """Share of the images that becomes val, in whole groups."""
    group_pattern: str = ""
    """Regular expression of a whole name; its groups in parentheses say which names belong together."""
    seed: int = 0
    """Another seed draws other groups."""

    def __post_init__(self) -> None:
        for flag, value in (("--val-share", self.val_share), ("--val-fraction", self.val_fraction)):
            if not 0 <= value < 1:
                raise InputError(f"{flag} must be in [0, 1), but got {value}. A tenth is usual: 0.1.")
        if bool(self.train_list) != bool(self.val_list):
            raise InputError("--train-list and --val-list must be given together, but only one of them was.")
        given = [
            flag
            for flag, value in (
                ("--train-list", self.train_list),
                ("--val-share", self.val_share),
                ("--val-fraction", self.val_fraction),
            )
            if value
        ]
        if len(given) > 1:
            raise InputError(
                f"One rule must divide the images, but got {' and '.join(given)}. Give one of them."
            )
        if self.group_pattern and not self.val_fraction:
            raise InputError(
                f"--group-pattern divides by groups, but got {self.group_pattern!r} without --val-fraction. "
                "Add --val-fraction 0.2."
            )
        if self.group_pattern and self._pattern.groups == 0:
            raise InputError(
                f"--group-pattern must have a group in parentheses, but got {self.group_pattern!r}. "
                r"For drive1_0001 and drive1_0002, '(.*)_\d+' is the drive."
            )

    def __bool__(self) -> bool:
        return bool(self.train_list or self.val_share or self.val_fraction)

    def describe(self) -> dict[str, Any]:
        """Return the settings that are not the default, for the description of a source."""
        values = {name: getattr(self, name) for name in type(self).__dataclass_fields__}
        return {name: value for name, value in values.items() if value}

    def divided(self, pairs: Sequence[Pair]) -> Listing:
        """Return the pairs with their splits, and notes of what was chosen and what was left out."""
        train = [pair for pair in pairs if pair.split == "train"]
        others = [pair for pair in pairs if pair.split != "train"]
        notes: list[str] = []
        if self.train_list:
            train, notes = self._by_lists(train)
        elif self.val_share:
            val = {pair.name for pair in train if _chance(pair.name) < self.val_share}
            train = _marked(train, val)
            if not 0 < len(val) < len(train):
                raise InputError(
                    f"--val-share must leave images for train and for val, but {self.val_share} makes {len(val)} of "
                    f"{len(train)} images val. Give --val-fraction {self.val_share}, which counts."
                )
        elif self.val_fraction:
            group_of = self._group_of(pair.name for pair in train)
            groups = chosen_groups(group_of, fraction=self.val_fraction, seed=self.seed)
            val = {name for name, group in group_of.items() if group in groups}
            train = _marked(train, val)
            what = "groups" if self.group_pattern else "images"
            notes.append(
                f"val is {len(val)} of {len(train)} images, {len(groups)} of {len(set(group_of.values()))} {what} "
                f"(seed {self.seed}): {listed(groups)}"
            )
        return Listing(sorted([*train, *others]), notes)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        try:
            return re.compile(self.group_pattern or "(.*)", re.DOTALL)
        except re.error as error:
            raise InputError(
                f"--group-pattern must be a regular expression, but {self.group_pattern!r} is none: {error}."
            ) from error

    def _group_of(self, names: Iterable[str]) -> dict[str, str]:
        """Return the group of each name; InputError names those that have none."""
        found = {name: self._pattern.fullmatch(name) for name in names}
        alone = sorted(name for name, match in found.items() if match is None)
        if alone:
            raise InputError(
                f"--group-pattern must match every whole name (without ending), but {self.group_pattern!r} does not "
                f"match {listed(alone)}. Widen it, or take these images out."
            )
        return {
            name: "/".join(part or "" for part in match.groups()) for name, match in found.items() if match
        }

    def _by_lists(self, pairs: Sequence[Pair]) -> tuple[list[Pair], list[str]]:
        by_name = {pair.name: pair for pair in pairs} | {Path(pair.image).name: pair for pair in pairs}
        chosen: dict[str, dict[str, Pair]] = {}
        problems: list[str] = []
        for split, path in (("train", self.train_list), ("val", self.val_list)):
            names = _read_list(path)
            unknown = [name for name in names if name not in by_name]
            if unknown:
                problems.append(f"{path} names {listed(unknown)}, of which there is no image with a label")
            if not names:
                problems.append(f"{path} names nothing")
            chosen[split] = {by_name[name].name: by_name[name] for name in names if name in by_name}
        both = sorted(chosen["train"].keys() & chosen["val"].keys())
        if both:
            problems.append(f"both name {listed(both)}")
        if problems:
            raise InputError(
                "--train-list and --val-list must name images with labels, one a line and each in one list, but "
                f"{'; '.join(problems)}. Mend the lists."
            )
        found = [replace(pair, split=split) for split in chosen for pair in chosen[split].values()]
        left_out = sorted({pair.name for pair in pairs} - chosen["train"].keys() - chosen["val"].keys())
        return found, [f"in no list, left out: {name}" for name in left_out]


def chosen_groups(group_of: dict[str, str], *, fraction: float, seed: int) -> list[str]:
    """Return the groups that become val: drawn in the order of a seeded hash while they bring the share nearer.

    At least one group is val and one is train. The order of the names is of no effect.
    """
    sizes = Counter(group_of.values())
    if len(sizes) < 2:
        raise InputError(
            f"Images must be of two groups or more to be divided, but all {len(group_of)} are of {listed(sizes)}. "
            "Give a --group-pattern that tells them apart."
        )
    drawn = sorted(sizes, key=lambda group: (_chance(f"{seed}\0{group}"), group))
    wanted = fraction * len(group_of)
    chosen: list[str] = []
    count = 0
    for group in drawn:
        is_last_of_train = len(chosen) == len(sizes) - 1
        if abs(count + sizes[group] - wanted) < abs(count - wanted) and not is_last_of_train:
            chosen.append(group)
            count += sizes[group]
    return sorted(chosen or [min(drawn, key=lambda group: sizes[group])])


def _chance(text: str) -> float:
    """Return a number in [0, 1) that follows from the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _marked(pairs: Sequence[Pair], val: set[str]) -> list[Pair]:
    return [replace(pair, split="val" if pair.name in val else "train") for pair in pairs]


def _read_list(path: str) -> list[str]:
    """Return the names in a file, one a line, without empty lines and those that begin with #."""
    file = Path(path).expanduser()
    try:
        if file.stat().st_size > MAX_LIST_BYTES:
            raise InputError(
                f"A list must be a text of at most {MAX_LIST_BYTES} bytes, but {path} is larger."
            )
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"A list must be a readable text file, but {path} is not: {error}.") from error
    return [line for line in lines if line and not line.startswith("#")]

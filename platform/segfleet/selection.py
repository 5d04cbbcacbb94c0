"""The part of train that searches measure on: chosen once, when a store is made, from names and groups alone.

Whole cities, clips or scenes are held out where they are known, because frames of one drive are nearly alike.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from pspnet.errors import InputError
from pspnet.manifest import Selection

DEFAULT_FRACTION = 0.1
_SEED = "segfleet selection 1"


def choose_selection(
    names: Sequence[str],
    class_counts: Sequence[Sequence[int]],
    *,
    fraction: float,
    groups_of: Mapping[str, str] | None = None,
) -> Selection | None:
    """Return which of the training images `names` are for selection; None for fraction 0 or fewer than two images.

    Images of one group in `groups_of`, or else those whose names begin alike up to the first "_" or "-"
    (aachen_000000_000019, 0001TP_006690), stay together.
    Groups are taken in the order of a hash while that brings the number nearer to the fraction asked for. Where the
    nearest is not within a factor of two of it, or names show no groups, single images are taken in the order of a
    hash of their names. Either way the choice is the same in any order of `names`.
    """
    check_fraction(fraction)
    if fraction == 0 or len(names) < 2:
        return None
    wanted = max(1.0, fraction * len(names))
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[(groups_of or {}).get(name) or group_of(name)].append(name)
    chosen_groups = _chosen_groups({group: len(found) for group, found in groups.items()}, wanted)
    num_chosen = sum(len(groups[group]) for group in chosen_groups)
    by_group = len(groups) < len(names) and wanted / 2 <= num_chosen <= min(2 * wanted, len(names) / 2)
    if by_group:
        chosen = {name for group in chosen_groups for name in groups[group]}
    else:
        chosen = set(sorted(names, key=_rank)[: min(round(wanted), len(names) - 1)])
    indices = [index for index, name in enumerate(names) if name in chosen]
    return Selection(
        fraction=fraction,
        rule="group" if by_group else "name",
        groups=sorted(chosen_groups) if by_group else [],
        indices=indices,
        class_counts=[
            sum(counts) for counts in zip(*(class_counts[index] for index in indices), strict=True)
        ],
    )


def check_fraction(fraction: float) -> None:
    """Raise InputError for a fraction that leaves less to train on than to select on."""
    if not 0 <= fraction <= 0.5:
        raise InputError(
            f"--selection-fraction must be from 0 (no cut) to 0.5, but got {fraction}. A tenth is usual: 0.1."
        )


def group_of(name: str) -> str:
    """Return the city or clip that a name begins with; a name without "_" or "-" is its own group."""
    return re.split("[_-]", name, maxsplit=1)[0]


def _chosen_groups(sizes: dict[str, int], wanted: float) -> list[str]:
    """Return groups whose images are about as many as wanted."""
    chosen: list[str] = []
    total = 0
    for group in sorted(sizes, key=_rank):
        if abs(total + sizes[group] - wanted) < abs(total - wanted):
            chosen.append(group)
            total += sizes[group]
    return chosen


def _rank(name: str) -> str:
    return hashlib.sha256(f"{_SEED} {name}".encode()).hexdigest()

"""Where the time of a search went: every second that workers were reserved is useful, done again, or spent around.

Useful are the epochs of the training that a trial ended with, evaluation included, whoever computed them. Done again
are epochs that were reported and then lost, because the training went on from an earlier checkpoint. The rest is spent
around: workers that start, checkpoints that are written, reports that wait, an epoch that was cut off before its
report. A second of a trial is counted once for each of its workers, also for one that is missing for a while
(workers.min_workers). Of a driver that was killed, what came after its trials' last reports is not known, and not
counted. Between trials, workers are started, wait for the next one, and end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segfleet.study import FINALIST_OF, INHERITED_FROM, TrialRecord

ATTEMPTS = "attempts"
"""Attribute of a trial: when each attempt at it began, gave its last sign of life, and what it had done."""

Attempt = dict[str, float]


@dataclass(frozen=True)
class Entry:
    """Worker-seconds of one trial, of a finalist's training (its number behind an f), or of all."""

    name: str
    num_attempts: int
    reserved: float
    useful: float
    redone: float

    @property
    def around(self) -> float:
        """Reserved, but neither useful nor done again."""
        return self.reserved - self.useful - self.redone


def begun(attempts: Sequence[Attempt], now: float) -> list[Attempt]:
    """Return the attempts at a trial with one that begins now."""
    return [*attempts, {"begin": now, "last": now}]


def seen(attempts: Sequence[Attempt], now: float, report: Mapping[str, Any] | None = None) -> list[Attempt]:
    """Return the attempts after a sign of life of the last one, a report of its worker or its end."""
    newest = attempts[-1] | {"last": now}
    if report is not None and "useful_s" in report:
        start, useful = float(report["useful_s_at_start"]), float(report["useful_s"])
        before = newest.get("useful_s", _useful(attempts[:-1]))
        if newest.get("start_s") != start:  # the workers began anew, in this attempt or with it
            redone = newest.get("redone_s", 0.0) + max(0.0, before - start)
            newest |= {"start_s": start, "redone_s": redone}
        newest |= {"useful_s": useful}
    return [*attempts[:-1], newest]


def entry(trial: TrialRecord, num_workers: int) -> Entry:
    """Return where the time of a trial went; all zero for one of another study, or from before there was a ledger."""
    is_own = INHERITED_FROM not in trial.attributes
    attempts: Sequence[Attempt] = trial.attributes.get(ATTEMPTS, []) if is_own else []
    reserved = sum(attempt["last"] - attempt["begin"] for attempt in attempts)
    redone = sum(attempt.get("redone_s", 0.0) for attempt in attempts)
    useful = _useful(attempts)
    name = f"f{trial.number}" if FINALIST_OF in trial.attributes else str(trial.number)
    return Entry(name, len(attempts), *(num_workers * part for part in (reserved, useful, redone)))


def _useful(attempts: Sequence[Attempt]) -> float:
    """Return the useful seconds of the last attempt that reported."""
    return next((attempt["useful_s"] for attempt in reversed(attempts) if "useful_s" in attempt), 0.0)


def total(entries: Sequence[Entry]) -> Entry:
    """Return the sums."""
    return Entry(
        "all",
        sum(item.num_attempts for item in entries),
        sum(item.reserved for item in entries),
        sum(item.useful for item in entries),
        sum(item.redone for item in entries),
    )


def ledger(
    trials: Sequence[TrialRecord], num_workers: int, groups: Mapping[str, Sequence[float]] | None = None
) -> list[Entry]:
    """Return an entry for each trial, one for the time between them where `groups` is given, and their sum last.

    `groups` holds when each group of workers was asked for and when it was let go.
    """
    entries = [entry(trial, num_workers) for trial in trials]
    if groups:
        held = num_workers * sum(last - begin for begin, last in groups.values())
        between = held - sum(item.reserved for item in entries if item.num_attempts)
        entries.append(Entry("between", 0, max(0.0, between), 0.0, 0.0))
    return [*entries, total(entries)]


def ledger_table(entries: Sequence[Entry]) -> str:
    """Return the entries as a plain table."""
    rows: list[tuple[str, ...]] = [("trial", "attempts", "reserved", "useful", "redone", "around", "useful")]
    for item in entries:
        share = f"{item.useful / item.reserved:.0%}" if item.reserved else "-"
        seconds = (f"{part:.1f}" for part in (item.reserved, item.useful, item.redone, item.around))
        rows.append((item.name, str(item.num_attempts), *seconds, share))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(["Worker-seconds", *lines])

"""The best trials of a search trained again with other seeds: how much of a lead was luck.

The highest of many noisy scores flatters its trial. Finalists are therefore trained anew, as often each, scored on the
images that scored the trials, and compared by what these new trainings say alone. They are trials of a study of their
own beside the search's, and survive a restart as its trials do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

from scipy.special import stdtrit

from segfleet.search_config import SearchConfig
from segfleet.study import FINALIST_OF, Study, TrialRecord, repair

CONFIDENCE = 0.95
_SEED = "schedule.seed"


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A trial of the search and how its settings did with other seeds."""

    trial: TrialRecord
    """As the search had it."""

    trainings: list[TrialRecord]
    """With other seeds, ended for a reason of their own: a lost or failed one says nothing of the settings."""

    mean: float
    """Of the trainings' mIoU; one that did not complete leaves no model and counts as 0."""

    low: float
    """One-sided 95 % lower confidence bound of the mean; the mean itself where nothing tells the spread."""

    @property
    def best(self) -> TrialRecord:
        """The complete training with the highest mIoU."""
        return max((it for it in self.trainings if it.reason == "complete"), key=lambda it: it.miou)


def plan_finals(config: SearchConfig, study: Study, store_digest: str) -> Study | None:
    """Return the study of the finalists' trainings, those that are missing planned; None where none are wanted."""
    chosen = [trial for trial in study.leaderboard() if trial.reason == "complete"][: config.num_finalists]
    if not chosen:
        return None
    own = replace(config, study=f"{config.study}-finals", scheduler="none", extend=0, narrow=())
    repair(own)
    finals = Study(replace(own, num_trials=1), store_digest=store_digest)
    known = {(it.attributes[FINALIST_OF], it.attributes["seed"]) for it in finals.trials()}
    for seed in range(1, config.num_seeds + 1):
        for trial in chosen:
            if (trial.number, seed) not in known:
                finals.plan(
                    trial.changes,
                    {_SEED: config.training.schedule.seed + seed},
                    {FINALIST_OF: trial.number, "seed": seed},
                )
    return Study(replace(own, num_trials=len(finals.trials())), store_digest=store_digest)


def standing(study: Study, finals: Study | None) -> list[Finalist]:
    """Return the finalists that have a complete training, from the highest lower bound to the lowest."""
    if finals is None:
        return []
    trials = {trial.number: trial for trial in study.trials()}
    trainings: dict[int, list[TrialRecord]] = {}
    for training in finals.trials():
        if training.reason not in ("running", "failed", "lost"):
            trainings.setdefault(training.attributes[FINALIST_OF], []).append(training)
    trainings = {
        number: its for number, its in trainings.items() if any(it.reason == "complete" for it in its)
    }
    values = [[_score(it) for it in its] for its in trainings.values()]
    lows = lower_bounds(values)
    found = [
        Finalist(trial=trials[number], trainings=its, mean=mean(own), low=low)
        for (number, its), own, low in zip(trainings.items(), values, lows, strict=True)
    ]
    return sorted(found, key=lambda finalist: (-finalist.low, -finalist.mean, finalist.trial.number))


def lower_bounds(values: Sequence[Sequence[float]], confidence: float = CONFIDENCE) -> list[float]:
    """Return a one-sided lower confidence bound of the mean of each group.

    The spread is that of all groups together (one-way analysis of variance): a few seeds cannot tell a steady setting
    from a lucky one. Where no group has two values, the means themselves are returned.
    """
    means = [mean(group) for group in values]
    num_free = sum(len(group) - 1 for group in values)
    if num_free == 0:
        return means
    squares = sum((value - of) ** 2 for group, of in zip(values, means, strict=True) for value in group)
    quantile = float(stdtrit(num_free, confidence))
    return [
        of - quantile * math.sqrt(squares / num_free / len(group))
        for group, of in zip(values, means, strict=True)
    ]


def finals_table(finalists: Sequence[Finalist]) -> str:
    """Return the finalists as a plain table."""
    rows: list[tuple[str, ...]] = [("trial", "in the search", "mean", "lower bound", "mIoU of each seed")]
    for it in finalists:
        seeds = "  ".join(f"{_score(training):.4f}" for training in it.trainings)
        rows.append((str(it.trial.number), f"{it.trial.miou:.4f}", f"{it.mean:.4f}", f"{it.low:.4f}", seeds))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _score(training: TrialRecord) -> float:
    return training.miou if training.reason == "complete" else 0.0

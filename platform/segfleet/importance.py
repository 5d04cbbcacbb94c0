"""Which settings matter, from the trials of a study: fANOVA (Hutter et al., ICML 2014) with a bootstrap over trials.

Trials are pruned at different epochs, and mIoU rises with them. They are therefore compared where half of them got:
at the last epoch that at least half of the trials reached.
"""

import html
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import FrozenTrial

MIN_TRIALS = 6
"""Fewer say nothing."""
NUM_RESAMPLES = 40
_NUM_TREES = 32


@dataclass(frozen=True)
class Importance:
    """Share of a setting in the variance of the mIoU, with the middle 90 % over resampled trials."""

    name: str
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Trials and their mIoU at one epoch, as a study of Optuna's."""

    epoch: int
    study: optuna.Study

    @property
    def points(self) -> list[tuple[dict[str, Any], float]]:
        """The settings and the mIoU of each trial."""
        return [
            (dict(trial.params), float(trial.value or 0.0)) for trial in self.study.get_trials(deepcopy=False)
        ]

    @property
    def num_trials(self) -> int:
        """How many trials got there."""
        return len(self.study.get_trials(deepcopy=False))


def compared(trials: Sequence[FrozenTrial]) -> Comparison | None:
    """Return the trials at the last epoch that at least half of them reached; None where they are too few."""
    reached = [max(trial.intermediate_values) for trial in trials if trial.intermediate_values]
    if len(reached) < MIN_TRIALS:
        return None
    epoch = sorted(reached, reverse=True)[(len(reached) + 1) // 2 - 1]
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        value = _value_at(trial.intermediate_values, epoch)
        if value is not None:
            study.add_trial(_at_value(trial, value))
    return Comparison(epoch, study)


def importances(comparison: Comparison, *, seed: int = 0) -> list[Importance]:
    """Return the settings from the most to the least important; none where every trial has one mIoU."""
    trials = comparison.study.get_trials(deepcopy=False)
    shares = _shares(trials, seed)
    rng = np.random.default_rng(seed)
    resampled: dict[str, list[float]] = {name: [] for name in shares}
    for number in range(NUM_RESAMPLES if shares else 0):
        chosen = [trials[index] for index in rng.integers(0, len(trials), len(trials))]
        for name, share in _shares(chosen, seed + number).items():
            resampled[name].append(share)
    found = []
    for name, share in shares.items():
        low, high = np.percentile(resampled[name] or [share], [5, 95])
        found.append(Importance(name, share, float(low), float(high)))
    return sorted(found, key=lambda item: -item.share)


def interactive_plots(comparison: Comparison, title: str) -> str:
    """Return a page with Optuna's importance, parallel coordinates and slices, its scripts included."""
    from optuna import visualization
    from plotly.graph_objects import Figure

    figures: list[Figure] = [
        visualization.plot_parallel_coordinate(comparison.study, target_name="mIoU"),
        visualization.plot_slice(comparison.study, target_name="mIoU"),
    ]
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=number == 0) for number, figure in enumerate(figures)
    ]
    heading = html.escape(f"{title}: mIoU after epoch {comparison.epoch} of {comparison.num_trials} trials")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{heading}</title><h1>{heading}</h1>'
        + "".join(parts)
        + "</html>\n"
    )


def _shares(trials: Sequence[FrozenTrial], seed: int) -> dict[str, float]:
    study = optuna.create_study(direction="maximize")
    study.add_trials(list(trials))
    varied = {name for name in trials[0].params if len({trial.params[name] for trial in trials}) > 1}
    if not varied or len({trial.value for trial in trials}) < 2:
        return dict.fromkeys(trials[0].params, 0.0) if varied else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forests on few trials
        evaluator = FanovaImportanceEvaluator(n_trees=_NUM_TREES, seed=seed)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) if np.isfinite(share) else 0.0 for name, share in found.items()}


def _value_at(mious: Mapping[int, float], epoch: int) -> float | None:
    """Return the last value up to an epoch; None for a trial that did not get there."""
    if not mious or max(mious) < epoch:
        return None
    return mious[max(step for step in mious if step <= epoch)] if min(mious) <= epoch else None


def _at_value(trial: FrozenTrial, value: float) -> FrozenTrial:
    return optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, value=value)

"""Which settings matter, from the trials of a study: fANOVA (Hutter et al., ICML 2014) with a bootstrap over trials.

Trials are pruned at different epochs, and mIoU rises with them. They are therefore compared where half of them got:
at the last fidelity (pixels seen, in epochs of the base configuration) that at least half of the trials reached.
"""

import html
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
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
    """Trials and their mIoU at one fidelity, as a study of Optuna's."""

    epoch: float
    """Of the base configuration: where trials had seen as many pixels as it had after it."""
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


def compared(trials: Sequence[tuple[FrozenTrial, Mapping[float, float]]]) -> Comparison | None:
    """Return the trials, each given with its mIoU by fidelity, at the last one that at least half of them reached.

    None where they are too few.
    """
    reached = [max(mious) for _, mious in trials if mious]
    if len(reached) < MIN_TRIALS:
        return None
    epoch = sorted(reached, reverse=True)[(len(reached) + 1) // 2 - 1]
    study = optuna.create_study(direction="maximize")
    for trial, mious in trials:
        value = _value_at(mious, epoch)
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
    """Return a page with Optuna's history, parallel coordinates, slices and importance, its scripts included."""
    from optuna import visualization
    from plotly.graph_objects import Figure

    figures: list[Figure] = [
        visualization.plot_optimization_history(comparison.study, target_name="mIoU"),
        visualization.plot_parallel_coordinate(comparison.study, target_name="mIoU"),
        visualization.plot_slice(comparison.study, target_name="mIoU"),
    ]
    if len(comparison.study.best_params) > 1:
        figures.append(visualization.plot_param_importances(comparison.study, target_name="mIoU"))
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=number == 0) for number, figure in enumerate(figures)
    ]
    heading = html.escape(
        f"{title}: mIoU after epoch {comparison.epoch:.4g} of {comparison.num_trials} trials"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{heading}</title><h1>{heading}</h1>'
        + "".join(parts)
        + "</html>\n"
    )


def draw_parallel(comparison: Comparison, *, title: str, path: Path) -> Path:
    """Draw a line for each trial through its settings, coloured by its mIoU; return where the picture is."""
    from matplotlib import pyplot
    from matplotlib.figure import Figure
    from optuna.visualization.matplotlib import plot_parallel_coordinate

    pyplot.switch_backend("agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental, and of a setting with one value
        axes = plot_parallel_coordinate(comparison.study, target_name="mIoU")
    axes.set_title(title)
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.set_size_inches(11, 5)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _shares(trials: Sequence[FrozenTrial], seed: int) -> dict[str, float]:
    study = optuna.create_study(direction="maximize")
    study.add_trials(list(trials))
    varied = {name for name in trials[0].params if len({trial.params[name] for trial in trials}) > 1}
    if not varied or len({trial.value for trial in trials}) < 2:
        return dict.fromkeys(trials[0].params, 0.0) if varied else {}
    # Optuna's forests come with scikit-learn, a second of imports that the beginning of a search need not wait for.
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forests on few trials
        evaluator = FanovaImportanceEvaluator(n_trees=_NUM_TREES, seed=seed)
        found = get_param_importances(study, evaluator=evaluator)
    return {name: float(share) if np.isfinite(share) else 0.0 for name, share in found.items()}


def _value_at(mious: Mapping[float, float], epoch: float) -> float | None:
    """Return the last value up to a fidelity; None for a trial that did not get there."""
    if not mious or max(mious) < epoch:
        return None
    return mious[max(step for step in mious if step <= epoch)] if min(mious) <= epoch else None


def _at_value(trial: FrozenTrial, value: float) -> FrozenTrial:
    return optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, value=value)

"""Where a search looks next: Optuna's samplers, asked so that an answer follows from the seed and the trials alone."""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from segfleet.search_config import SearchConfig
from segfleet.space import Dimension


def sampler(
    config: SearchConfig, space: Sequence[Dimension], *, trials: Sequence[FrozenTrial], number: int
) -> optuna.samplers.BaseSampler:
    """Return the sampler whose proposal for trial `number` follows from the seed and the `trials` before it alone."""
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    if config.sampler == "grid":
        # Not Optuna's GridSampler: outside `optimize` its last point raises. In a fixed order, drawn once.
        points = list(itertools.product(*(dimension.grid(config.grid_points) for dimension in space)))
        order = np.random.default_rng(config.seed).permutation(len(points))
        point = points[order[number % len(points)]]
        return _fixed({dimension.name: value for dimension, value in zip(space, point, strict=True)}, seed)
    if config.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if config.sampler == "gp":
        process = optuna.samplers.GPSampler(seed=seed, n_startup_trials=config.num_startup_trials)
        if config.scheduler == "none":
            return process
        return _fixed(
            _proposed_by(process, space, [trial for trial in trials if trial.number < number]), seed
        )
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=config.num_startup_trials, multivariate=True, constant_liar=True
    )


def _fixed(point: dict[str, Any], seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():  # experimental since 2.4, and pinned
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.PartialFixedSampler(point, optuna.samplers.RandomSampler(seed=seed))


def _proposed_by(
    process: optuna.samplers.GPSampler, space: Sequence[Dimension], trials: Sequence[FrozenTrial]
) -> dict[str, Any]:
    """Return a Gaussian process's proposal where trials that were given up count with the best mIoU that they had.

    Optuna's counts complete trials only: where a scheduler gives up two of three, it draws at random three times as
    long as was asked for, and learns nothing from them. One without a value counts as the worst of the others.
    """
    distributions = {dimension.name: distribution(dimension) for dimension in space}
    told = optuna.create_study(direction="maximize", sampler=process)
    known = [trial for trial in trials if distributions.keys() <= trial.params.keys()]
    best = {trial.number: max(trial.intermediate_values.values(), default=None) for trial in known}
    worst = min((value for value in best.values() if value is not None), default=0.0)
    for trial in known:
        if trial.state == TrialState.FAIL:
            continue
        is_running = trial.state == TrialState.RUNNING
        value = best[trial.number]
        told.add_trial(
            optuna.trial.create_trial(
                state=trial.state if is_running else TrialState.COMPLETE,
                value=None if is_running else worst if value is None else value,
                params={name: trial.params[name] for name in distributions},
                distributions=distributions,
            )
        )
    asked = told.ask()
    return {dimension.name: suggested(asked, dimension) for dimension in space}


def suggested(trial: optuna.trial.Trial, dimension: Dimension) -> Any:
    """Return the trial's value in `dimension`, drawn now where it has none yet."""
    if dimension.kind == "choice":
        return trial.suggest_categorical(dimension.name, dimension.choices)
    is_log = dimension.kind == "log"
    if dimension.is_integer:
        return trial.suggest_int(dimension.name, int(dimension.low), int(dimension.high), log=is_log)
    return trial.suggest_float(dimension.name, dimension.low, dimension.high, log=is_log)


def distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    """Return the values of a dimension as Optuna has them."""
    if dimension.kind == "choice":
        return optuna.distributions.CategoricalDistribution(dimension.choices)
    is_log = dimension.kind == "log"
    if dimension.is_integer:
        return optuna.distributions.IntDistribution(int(dimension.low), int(dimension.high), log=is_log)
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=is_log)


def holds(values: optuna.distributions.BaseDistribution, value: Any) -> bool:
    """Whether a value is one of these."""
    if isinstance(values, optuna.distributions.CategoricalDistribution):
        return value in values.choices
    assert isinstance(values, optuna.distributions.IntDistribution | optuna.distributions.FloatDistribution)
    return bool(values.low <= value <= values.high)

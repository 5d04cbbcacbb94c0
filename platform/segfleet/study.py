"""The Optuna study: the one durable truth of a search.

It proposes points, holds every trial's state, reason, run and checkpoint, and decides which trial goes on (ASHA,
Li et al., MLSys 2020, algorithm 2, or the median rule of Vizier, Golovin et al., KDD 2017, section 3.2) from the
values that it stores, so that a restart forgets nothing.
"""

import itertools
import json
import math
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from pspnet.errors import InputError
from segfleet.config import SearchConfig, flat
from segfleet.importance import Comparison, compared
from segfleet.space import Dimension, dimensions

Reason = Literal["complete", "pruned", "diverged", "oom", "refused", "failed", "lost"]

MEDIAN_STARTUP_TRIALS = 5
"""Complete trials before the median rule prunes, as in Optuna."""

_STATE_OF: dict[str, TrialState] = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
    "oom": TrialState.PRUNED,
    "refused": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "lost": TrialState.FAIL,
}
"""What a reason is to Optuna. TPE ignores FAIL but learns from PRUNED that a point is worse than all complete ones."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A point to train: trial number and the changes for `override(base, changes)`."""

    number: int
    changes: dict[str, Any]
    is_resumed: bool


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a trial goes on, and why, with the numbers."""

    stop: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """What the study knows of one trial."""

    number: int
    changes: dict[str, Any]
    reason: str
    """"running", or why it ended (`Reason`)."""
    detail: str
    """The numbers behind the reason."""
    miou_by_epoch: dict[int, float]
    attributes: dict[str, Any]
    """run_id, checkpoint_path, class_iou, seconds: what the last report carried."""

    @property
    def miou(self) -> float:
        """The best mIoU that the trial reported; nan where it reported none."""
        return max(self.miou_by_epoch.values(), default=math.nan)

    @property
    def num_epochs(self) -> int:
        """The last epoch that the trial reported."""
        return max(self.miou_by_epoch, default=0)


def rungs(*, min_epochs: int, max_epochs: int, reduction_factor: int) -> list[int]:
    """Return the epochs at which ASHA compares: min_epochs * reduction_factor ** k, all before max_epochs."""
    epochs = []
    epoch = min_epochs
    while epoch < max_epochs:
        epochs.append(epoch)
        epoch *= reduction_factor
    return epochs


def decide_rung(value: float, others: Sequence[float], *, epoch: int, reduction_factor: int) -> Decision:
    """Return whether a trial with `value` at the rung of `epoch` stops, given what others had when they were there.

    The bar is the (1 - 1 / reduction_factor) quantile of the others, as in Ray Tune's AsyncHyperBandScheduler.
    """
    if not others:
        return Decision(stop=False, reason=f"first at the rung of epoch {epoch}, mIoU {value:.4f}")
    bar = float(np.percentile(others, (1 - 1 / reduction_factor) * 100))
    compared = f"mIoU {value:.4f} at the rung of epoch {epoch}, bar {bar:.4f} of {len(others)} others"
    return Decision(stop=value < bar, reason=compared)


def decide_median(study: optuna.Study, trial: optuna.trial.FrozenTrial, *, min_epochs: int) -> Decision:
    """Return whether the last report of `trial` stops it: Optuna's MedianPruner, in words.

    It stops where the trial's best value so far is below the median of the complete trials at the same epoch.
    """
    pruner = optuna.pruners.MedianPruner(n_startup_trials=MEDIAN_STARTUP_TRIALS, n_warmup_steps=min_epochs)
    epoch = max(trial.intermediate_values)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    others = [_mious(other)[epoch] for other in complete if epoch in other.intermediate_values]
    if epoch < min_epochs or len(complete) < MEDIAN_STARTUP_TRIALS or not others:
        return Decision(stop=False, reason=f"epoch {epoch} has too few complete trials to compare with")
    best = max(trial.intermediate_values.values())
    return Decision(
        stop=pruner.prune(study, trial),
        reason=f"best mIoU {best:.4f} up to epoch {epoch}, median {float(np.median(others)):.4f} of {len(others)} "
        "complete trials",
    )


_FINAL_SCORES = "final_scores_"
_INHERITED = "inherited_from"
"""Attribute of a trial that another study ran: its number there."""


def exists(config: SearchConfig) -> bool:
    """Return whether the study that `config` names has been begun."""
    if not config.study_storage and not _journal(config).is_file():
        return False
    return config.study in optuna.get_all_study_names(_storage(config))


class Study:
    """A named Optuna study for one search configuration and one data set."""

    def __init__(self, config: SearchConfig, *, store_digest: str) -> None:
        """Create the study or continue it. Raises InputError if the name holds another search."""
        self._config = config
        self._dimensions = dimensions(config.space, config.training)
        self._live: dict[int, optuna.trial.Trial] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            study_name=config.study,
            storage=_storage(config),
            sampler=_sampler(config, self._dimensions, number=0),
            pruner=optuna.pruners.NopPruner(),
            direction="maximize",
            load_if_exists=True,
        )
        self._join(_fingerprint(config, store_digest))
        self._num_at_start = self._num_own()

    @property
    def config(self) -> SearchConfig:
        """The search that the study is of."""
        return self._config

    @property
    def name(self) -> str:
        """Name of the study."""
        return self._config.study

    @property
    def key(self) -> str:
        """What ties MLflow runs to this study for ever: a deleted study begins new runs."""
        return f"study/{self.name}/{self._study.user_attrs['key']}"

    @property
    def rungs(self) -> list[int]:
        """Epochs at which ASHA compares; none for another scheduler."""
        if self._config.scheduler != "asha":
            return []
        return rungs(
            min_epochs=self._config.min_epochs,
            max_epochs=self._config.training.schedule.num_epochs,
            reduction_factor=self._config.reduction_factor,
        )

    def unfinished(self) -> list[Proposal]:
        """Return the trials that an earlier process began and did not end: they go on under the same number."""
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [
            Proposal(number=trial.number, changes=self._point(self._trial(trial.number)), is_resumed=True)
            for trial in running
        ]

    @property
    def num_wanted(self) -> int:
        """How many trials of its own the study is to have; a grid has no more than its points."""
        num_wanted = (
            self._num_at_start + self._config.extend if self._config.extend else self._config.num_trials
        )
        if self._config.sampler == "grid":
            sizes = [len(dimension.grid(self._config.grid_points)) for dimension in self._dimensions]
            num_wanted = min(num_wanted, math.prod(sizes))
        return num_wanted

    def num_left(self) -> int:
        """Return how many trials may still be asked for."""
        return max(0, self.num_wanted - self._num_own())

    def inherit(self, parent: "Study") -> int:
        """Take over the parent's ended trials that lie in this study's space, each once; return how many it has.

        They count as trials that the sampler and the scheduler know, not as trials of this study's own.
        """
        known = {trial.attributes.get(_INHERITED) for trial in self.trials()}
        distributions = {dimension.name: _distribution(dimension) for dimension in self._dimensions}
        scores = parent.final_scores()
        for trial in parent._study.get_trials(
            deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)
        ):
            if trial.number in known or not all(
                name in trial.params and _holds(distribution, trial.params[name])
                for name, distribution in distributions.items()
            ):
                continue
            detail = f"trial {trial.number} of {parent.name}: {trial.user_attrs.get('detail', '')}"
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=trial.state,
                    value=trial.value,
                    params={name: trial.params[name] for name in distributions},
                    distributions=distributions,
                    user_attrs=trial.user_attrs | {_INHERITED: trial.number, "detail": detail},
                    intermediate_values=trial.intermediate_values,
                )
            )
            if trial.number in scores:
                self.note_final_scores(len(self._study.get_trials(deepcopy=False)) - 1, scores[trial.number])
        return sum(_INHERITED in trial.attributes for trial in self.trials())

    def _num_own(self) -> int:
        return sum(_INHERITED not in trial.user_attrs for trial in self._study.get_trials(deepcopy=False))

    def ask(self) -> Proposal:
        """Propose a new point, and store it before anything trains."""
        number = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = _sampler(self._config, self._dimensions, number=number)
        trial = self._study.ask()
        self._live[trial.number] = trial
        return Proposal(number=trial.number, changes=self._point(trial), is_resumed=False)

    def note(self, number: int, attributes: Mapping[str, Any]) -> None:
        """Store JSON values beside a trial: its run, its checkpoint, its scores."""
        trial = self._trial(number)
        for key, value in attributes.items():
            trial.set_user_attr(key, value)

    def final_scores(self) -> dict[int, dict[str, Any]]:
        """Return the scores on the official validation split by trial: there are as many as it was read times."""
        return {
            int(name.removeprefix(_FINAL_SCORES)): scores
            for name, scores in self._study.user_attrs.items()
            if name.startswith(_FINAL_SCORES)
        }

    def note_final_scores(self, number: int, scores: Mapping[str, Any]) -> None:
        """Store, as JSON values, what an ended trial scored on the official validation split."""
        self._study.set_user_attr(f"{_FINAL_SCORES}{number}", dict(scores))

    def report(self, number: int, *, epoch: int, miou: float) -> Decision:
        """Store the mIoU of a trial after `epoch` epochs and decide whether it goes on."""
        recorded = _mious(self._study.get_trials(deepcopy=False)[number])
        if epoch not in recorded:
            self._trial(number).report(miou, step=epoch)
        stop = self._trial(number).user_attrs.get("stop", "")
        if stop or epoch in recorded:
            return Decision(stop=bool(stop), reason=stop or f"epoch {epoch} was decided before")
        if self._config.scheduler == "median":
            decision = decide_median(
                self._study,
                self._study.get_trials(deepcopy=False)[number],
                min_epochs=self._config.min_epochs,
            )
            if decision.stop:
                self.note(number, {"stop": decision.reason})
            return decision
        for rung in reversed(self.rungs):
            if epoch < rung or _value_at(recorded, rung) is not None:
                continue
            others = [
                value
                for trial in self._study.get_trials(deepcopy=False)
                if trial.number != number and (value := _value_at(_mious(trial), rung)) is not None
            ]
            decision = decide_rung(miou, others, epoch=rung, reduction_factor=self._config.reduction_factor)
            if decision.stop:
                self.note(number, {"stop": decision.reason})
            return decision
        return Decision(stop=False, reason=f"epoch {epoch} is no rung")

    def finish(self, number: int, reason: Reason, detail: str) -> None:
        """End a trial for good. Its value is its best mIoU, so that no trial counts for less by training on."""
        trial = self._trial(number)
        trial.set_user_attr("reason", reason)
        trial.set_user_attr("detail", detail)
        mious = _mious(self._study.get_trials(deepcopy=False)[number]).values()
        if reason == "complete":
            self._study.tell(number, max(mious))
        else:
            self._study.tell(number, state=_STATE_OF[reason])

    def trials(self) -> list[TrialRecord]:
        """Return all trials in the order of their numbers."""
        return [_record(trial) for trial in self._study.get_trials(deepcopy=False)]

    def comparison(self) -> Comparison | None:
        """Return the trials at an epoch that half of them reached, or None where they are too few."""
        return compared(self._study.get_trials(deepcopy=False))

    def leaderboard(self) -> list[TrialRecord]:
        """Return all trials: complete ones first, each group from the highest mIoU to the lowest."""
        return sorted(
            self.trials(),
            key=lambda trial: (trial.reason != "complete", -_or_minus_one(trial.miou), trial.number),
        )

    def best(self) -> TrialRecord | None:
        """Return the complete trial with the highest mIoU, or None where no trial is complete."""
        return next((trial for trial in self.leaderboard() if trial.reason == "complete"), None)

    def _trial(self, number: int) -> optuna.trial.Trial:
        if number not in self._live:
            stored = self._study.get_trials(deepcopy=False)[number]
            self._live[number] = optuna.trial.Trial(self._study, stored._trial_id)
        return self._live[number]

    def _point(self, trial: optuna.trial.Trial) -> dict[str, Any]:
        """Return the point of a trial; parameters that were not stored before a death are drawn now."""
        changes = {dimension.path: _suggested(trial, dimension) for dimension in self._dimensions}
        trial.set_user_attr("changes", changes)
        return changes

    def _join(self, fingerprint: dict[str, Any]) -> None:
        stored = self._study.user_attrs.get("fingerprint")
        if stored is None:
            self._study.set_user_attr("key", uuid.uuid4().hex)
            self._study.set_user_attr("fingerprint", fingerprint)
            return
        # settings that were added since had their defaults
        stored = _fingerprint(SearchConfig(), stored["store_digest"]) | stored
        differing = [key for key in stored | fingerprint if stored.get(key) != fingerprint.get(key)]
        if differing:
            lines = [f"  {key}: {stored.get(key)} there, {fingerprint.get(key)} here" for key in differing]
            raise InputError(
                f"A study is continued with the data, base configuration and space that it began with, but study "
                f"{self._config.study!r} differs:\n"
                + "\n".join(lines)
                + "\nGive another --study name, or the same "
                "settings as before."
            )


def _fingerprint(config: SearchConfig, store_digest: str) -> dict[str, Any]:
    """Return what must be equal for two calls to belong to one study, as JSON gives it back."""
    ends = (
        "study",
        "study_storage",
        "num_trials",
        "extend",
        "narrow",
        "max_concurrent_trials",
        "sampler",
        "num_startup_trials",
        "grid_points",
        "seed",
    )
    without = ("training.tracking.", "training.data.store", "training.workers.max_failures")
    settings = {
        path: value
        for path, value in flat(config).items()
        if path not in ends and not path.startswith(without)
    }
    stored: dict[str, Any] = json.loads(json.dumps(settings | {"store_digest": store_digest}))
    return stored


def _storage(config: SearchConfig) -> optuna.storages.BaseStorage | str:
    if config.study_storage:
        return config.study_storage
    path = _journal(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    return optuna.storages.JournalStorage(JournalFileBackend(str(path)))


def _journal(config: SearchConfig) -> Path:
    return Path(config.training.tracking.storage_dir) / config.study / "study.journal"


def _sampler(config: SearchConfig, space: Sequence[Dimension], *, number: int) -> optuna.samplers.BaseSampler:
    """Return the sampler whose proposal for trial `number` follows from the seed and the trials before it alone."""
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    if config.sampler == "grid":
        # Not Optuna's GridSampler: outside `optimize` its last point raises. In a fixed order, drawn once.
        points = list(itertools.product(*(dimension.grid(config.grid_points) for dimension in space)))
        order = np.random.default_rng(config.seed).permutation(len(points))
        point = points[order[number % len(points)]]
        fixed = {dimension.name: value for dimension, value in zip(space, point, strict=True)}
        with warnings.catch_warnings():  # experimental since 2.4, and pinned
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.PartialFixedSampler(fixed, optuna.samplers.RandomSampler(seed=seed))
    if config.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if config.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=config.num_startup_trials)
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=config.num_startup_trials, multivariate=True, constant_liar=True
    )


def _suggested(trial: optuna.trial.Trial, dimension: Dimension) -> Any:
    """Return the trial's value in `dimension`, drawn now where it has none yet."""
    if dimension.kind == "choice":
        return trial.suggest_categorical(dimension.name, dimension.choices)
    is_log = dimension.kind == "log"
    if dimension.is_integer:
        return trial.suggest_int(dimension.name, int(dimension.low), int(dimension.high), log=is_log)
    return trial.suggest_float(dimension.name, dimension.low, dimension.high, log=is_log)


def _distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    if dimension.kind == "choice":
        return optuna.distributions.CategoricalDistribution(dimension.choices)
    is_log = dimension.kind == "log"
    if dimension.is_integer:
        return optuna.distributions.IntDistribution(int(dimension.low), int(dimension.high), log=is_log)
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=is_log)


def _holds(distribution: optuna.distributions.BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(
        distribution, optuna.distributions.IntDistribution | optuna.distributions.FloatDistribution
    )
    return bool(distribution.low <= value <= distribution.high)


def _record(trial: optuna.trial.FrozenTrial) -> TrialRecord:
    attributes = dict(trial.user_attrs)
    return TrialRecord(
        number=trial.number,
        changes=attributes.pop("changes", {}),
        reason=attributes.pop("reason", "running"),
        detail=attributes.pop("detail", ""),
        miou_by_epoch=_mious(trial),
        attributes=attributes,
    )


def _mious(trial: optuna.trial.FrozenTrial) -> dict[int, float]:
    return dict(sorted(trial.intermediate_values.items()))


def _value_at(mious: Mapping[int, float], rung: int) -> float | None:
    """Return the first value at or after the rung's epoch."""
    return next((value for epoch, value in mious.items() if epoch >= rung), None)


def _or_minus_one(value: float) -> float:
    return -1.0 if math.isnan(value) else value

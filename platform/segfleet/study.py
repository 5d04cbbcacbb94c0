"""The Optuna study: the one durable truth of a search.

It proposes points, holds every trial's state, reason, run and checkpoint, and decides which trial goes on from the
values that it stores, so that a restart forgets nothing.
"""

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy.exc
import sqlalchemy.pool
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import LOCK_FILE_SUFFIX
from optuna.trial import TrialState

from pspnet.errors import InputError
from segfleet.faults import fault
from segfleet.importance import Comparison, compared
from segfleet.override import flat
from segfleet.proposals import distribution, holds, sampler, suggested
from segfleet.pruning import Decision, decide_median, decide_rung, epoch_weight, rungs, schedule_of, value_at
from segfleet.search_config import SearchConfig
from segfleet.secret import first_line, masked
from segfleet.space import dimensions
from segfleet.torsos import keep_whole_lines

Reason = Literal["complete", "pruned", "diverged", "oom", "refused", "failed", "lost"]

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
    epoch_weight: float = 1.0
    """Pixels that an epoch of it sees, relative to one of the base configuration."""
    cost_s: float = math.nan
    """Worker-seconds that its epochs took, those that had to be done again not counted."""

    @property
    def miou(self) -> float:
        """The best mIoU that the trial reported; nan where it reported none."""
        return max(self.miou_by_epoch.values(), default=math.nan)

    @property
    def num_epochs(self) -> int:
        """The last epoch that the trial reported."""
        return max(self.miou_by_epoch, default=0)


_FINAL_SCORES = "final_scores_"
FINALIST_OF = "finalist_of"
"""Attribute of a finalist's training: the number of its trial in the search."""
_ALSO = "also"
"""Attribute of a planned trial: what it changes beside its point of the space."""
_MIOUS = "mious"
"""Attribute of a trial whose mIoUs Optuna does not take: each by its epoch."""
_COST = "cost_s"
_GROUPS = "groups"
INHERITED_FROM = "inherited_from"
"""Attribute of a trial that another study ran: its number there."""


def exists(config: SearchConfig) -> bool:
    """Return whether the study that `config` names has been begun."""
    if not config.study_storage and not _journal(config).is_file():
        return False
    return config.study in optuna.get_all_study_names(_storage(config))


def repair(config: SearchConfig) -> None:
    """Mend what a process that died may have left of the study's journal: for whoever holds the study.

    A line that was not written to its end is set aside. InputError where a line before the last one is damaged.
    """
    if config.study_storage:
        return
    path = _journal(config)
    keep_whole_lines(path)
    lock = path.with_name(path.name + LOCK_FILE_SUFFIX)
    lock.unlink(missing_ok=True)  # Optuna would wait half a minute before it takes it for a dead one's
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        try:
            json.loads(line)
        except ValueError as error:
            raise InputError(
                f"A study's journal must hold one JSON object a line, but line {number} of {path} does not ({error}). "
                "Bring back a copy of the file, or give another --study name."
            ) from error


class Study:
    """A named Optuna study for one search configuration and one data set."""

    def __init__(self, config: SearchConfig, *, store_digest: str) -> None:
        """Create the study or continue it. Raises InputError if the name holds another search."""
        self._config = config
        self._dimensions = dimensions(config.space, config.training)
        self._live: dict[int, optuna.trial.Trial] = {}
        self._weights: dict[str, float] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            study_name=config.study,
            storage=_storage(config),
            sampler=optuna.samplers.RandomSampler(seed=config.seed),  # `ask` brings its own
            pruner=optuna.pruners.NopPruner(),
            directions=["maximize", "minimize"] if self._counts_cost else ["maximize"],
            load_if_exists=True,
        )
        self._join(_fingerprint(config, store_digest))
        self._num_at_start = self._num_own()

    @property
    def _counts_cost(self) -> bool:
        return self._config.objective == "quality,cost"

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
        """Epochs of the base configuration at which ASHA compares; none for another scheduler."""
        if self._config.scheduler != "asha":
            return []
        return rungs(
            min_epochs=self._min_epochs,
            max_epochs=self._config.training.schedule.num_epochs,
            reduction_factor=self._config.reduction_factor,
        )

    @property
    def _min_epochs(self) -> int:
        return self._config.min_epochs or max(1, self._config.training.schedule.num_epochs // 9)

    def unfinished(self) -> list[Proposal]:
        """Return the trials that an earlier process began and did not end: they go on under the same number."""
        proposals = []
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # Where a process died before it drew all settings, they are those that it would have drawn.
            self._study.sampler = self._sampler(trial.number)
            changes = self._point(self._trial(trial.number))
            proposals.append(Proposal(number=trial.number, changes=changes, is_resumed=True))
        return proposals

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
        known = {trial.attributes.get(INHERITED_FROM) for trial in self.trials()}
        distributions = {dimension.name: distribution(dimension) for dimension in self._dimensions}
        scores = parent.final_scores()
        for trial in parent._study.get_trials(
            deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)
        ):
            if trial.number in known or not all(
                name in trial.params and holds(values, trial.params[name])
                for name, values in distributions.items()
            ):
                continue
            detail = f"trial {trial.number} of {parent.name}: {trial.user_attrs.get('detail', '')}"
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=trial.state,
                    values=trial.values,
                    params={name: trial.params[name] for name in distributions},
                    distributions=distributions,
                    user_attrs=trial.user_attrs | {INHERITED_FROM: trial.number, "detail": detail},
                    intermediate_values=trial.intermediate_values,
                )
            )
            if trial.number in scores:
                self.note_final_scores(len(self._study.get_trials(deepcopy=False)) - 1, scores[trial.number])
        return sum(INHERITED_FROM in trial.attributes for trial in self.trials())

    def _num_own(self) -> int:
        """Return how many trials were asked for here."""
        return sum(
            INHERITED_FROM not in trial.user_attrs and trial.state != TrialState.WAITING
            for trial in self._study.get_trials(deepcopy=False)
        )

    def plan(
        self, changes: Mapping[str, Any], also: Mapping[str, Any], attributes: Mapping[str, Any]
    ) -> None:
        """Have `ask` return this point of the space next, with `also` changed beside it, before it proposes others."""
        params = {dimension.name: changes[dimension.path] for dimension in self._dimensions}
        self._study.enqueue_trial(params, user_attrs={**attributes, _ALSO: dict(also)})

    def ask(self) -> Proposal:
        """Propose a new point, and store it before anything trains."""
        number = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = self._sampler(number)
        trial = self._study.ask()
        fault("study.asked")
        self._live[trial.number] = trial
        return Proposal(number=trial.number, changes=self._point(trial), is_resumed=False)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Return the sampler whose proposal for trial `number` follows from the seed and the trials before it alone."""
        return sampler(
            self._config, self._dimensions, trials=self._study.get_trials(deepcopy=False), number=number
        )

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

    @property
    def groups(self) -> dict[str, list[float]]:
        """When each group of workers was asked for, and when it was let go or last heard of; seconds since 1970."""
        return dict(self._study.user_attrs.get(_GROUPS, {}))

    def note_groups(self, groups: Mapping[str, Sequence[float]]) -> None:
        """Store when groups were held, beside those of earlier calls."""
        self._study.set_user_attr(
            _GROUPS, self.groups | {name: list(times) for name, times in groups.items()}
        )

    def schedule_of(self, changes: Mapping[str, Any]) -> dict[str, int]:
        """Return the changes to the schedule by which a trial at this point sees as many pixels as any other."""
        return schedule_of(self._config.training, self._weight(changes))

    def report(self, number: int, *, epoch: int, miou: float) -> Decision:
        """Store the mIoU of a trial after `epoch` of its epochs and decide whether it goes on."""
        recorded = _mious(self._study.get_trials(deepcopy=False)[number])
        if epoch not in recorded:
            self._store(number, epoch, miou)
        stop = self._trial(number).user_attrs.get("stop", "")
        if stop or epoch in recorded:
            return Decision(stop=bool(stop), reason=stop or f"epoch {epoch} was decided before")
        decision = self._decide(number, epoch)
        if decision.stop:
            self.note(number, {"stop": decision.reason})
        return decision

    def _store(self, number: int, epoch: int, miou: float) -> None:
        trial = self._trial(number)
        if not self._counts_cost:
            trial.report(miou, step=epoch)
            return
        # Optuna takes no intermediate values where there are two objectives.
        trial.set_user_attr(_MIOUS, trial.user_attrs.get(_MIOUS, {}) | {str(epoch): miou})

    def _decide(self, number: int, epoch: int) -> Decision:
        """Decide on the newest value of a trial, after `epoch`."""
        trials = self._study.get_trials(deepcopy=False)
        weight = self._weight(trials[number].user_attrs["changes"])
        mious = [self._by_fidelity(trial) for trial in trials]
        own = mious[number]
        if self._config.scheduler == "median":
            complete = [it for it, trial in zip(mious, trials, strict=True) if trial.state.name == "COMPLETE"]
            return decide_median(own, complete, min_epochs=self._min_epochs)
        before = {seen: value for seen, value in own.items() if seen != epoch * weight}
        for rung in reversed(self.rungs):
            if value_at(own, rung) is None or value_at(before, rung) is not None:
                continue
            others = [
                value
                for it in mious[:number] + mious[number + 1 :]
                if (value := value_at(it, rung)) is not None
            ]
            decision = decide_rung(
                own[epoch * weight], others, epoch=rung, reduction_factor=self._config.reduction_factor
            )
            if weight == 1:
                return decision
            return replace(decision, reason=f"{decision.reason}, in pixels: its epoch {epoch}")
        return Decision(stop=False, reason="")  # no rung

    def _weight(self, changes: Mapping[str, Any]) -> float:
        if self._config.fidelity != "pixels":
            return 1.0
        point = repr(sorted(changes.items()))
        # a report looks at every trial, and a configuration takes a millisecond
        if point not in self._weights:
            self._weights[point] = epoch_weight(self._config.training, changes)
        return self._weights[point]

    def _by_fidelity(self, trial: optuna.trial.FrozenTrial) -> dict[float, float]:
        weight = self._weight(trial.user_attrs.get("changes", {}))
        return {epoch * weight: miou for epoch, miou in _mious(trial).items()}

    def finish(self, number: int, reason: Reason, detail: str, *, cost_s: float = math.nan) -> None:
        """End a trial for good. Its value is its best mIoU, so that no trial counts for less by training on.

        `cost_s` is what it took in useful worker-seconds, the second value where the objective has cost.
        """
        trial = self._trial(number)
        if math.isfinite(cost_s):
            trial.set_user_attr(_COST, cost_s)
        trial.set_user_attr("reason", reason)
        trial.set_user_attr("detail", detail)
        fault("study.reasoned")
        mious = _mious(self._study.get_trials(deepcopy=False)[number]).values()
        if reason == "complete":
            self._study.tell(number, [max(mious), cost_s] if self._counts_cost else max(mious))
        else:
            self._study.tell(number, state=_STATE_OF[reason])

    def trials(self) -> list[TrialRecord]:
        """Return all trials in the order of their numbers."""
        return [
            _record(trial, self._weight(trial.user_attrs.get("changes", {})))
            for trial in self._study.get_trials(deepcopy=False)
        ]

    def comparison(self) -> Comparison | None:
        """Return the trials at a fidelity that half of them reached, or None where they are too few."""
        trials = self._study.get_trials(deepcopy=False)
        return compared([(trial, self._by_fidelity(trial)) for trial in trials])

    def leaderboard(self) -> list[TrialRecord]:
        """Return all trials: complete ones first, each group from the highest mIoU to the lowest."""
        return sorted(
            self.trials(),
            key=lambda trial: (trial.reason != "complete", -_or_minus_one(trial.miou), trial.number),
        )

    def front(self) -> set[int]:
        """Return the complete trials than which none is better and as cheap, or cheaper and as good."""
        return {trial.number for trial in self._study.best_trials} if self._counts_cost else set()

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
        changes = {dimension.path: suggested(trial, dimension) for dimension in self._dimensions}
        changes |= trial.user_attrs.get(_ALSO, {})
        fault("study.drawn")
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
        "num_finalists",
        "num_seeds",
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


def _storage(config: SearchConfig) -> optuna.storages.BaseStorage:
    if config.study_storage:
        return _database(config.study_storage)
    path = _journal(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    return optuna.storages.JournalStorage(JournalFileBackend(str(path)))


def _database(url: str) -> optuna.storages.BaseStorage:
    try:
        # No pool: a search asks a few times a minute, and a connection that is kept is one that may be dead by then.
        return optuna.storages.RDBStorage(url, engine_kwargs={"poolclass": sqlalchemy.pool.NullPool})
    except ImportError as error:
        raise InputError(
            f"study_storage needs the database's driver, but for {masked(url)} there is none: "
            f"{first_line(error)}. For PostgreSQL: pip install 'segfleet[postgresql]'."
        ) from error
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise InputError(
            f"study_storage must be a database that answers, but {masked(url)} says: {first_line(error)}. "
            "Give sqlite:///FILE, postgresql://USER:PASSWORD@HOST/DATABASE, or nothing for a journal file."
        ) from error


def _journal(config: SearchConfig) -> Path:
    return Path(config.training.tracking.storage_dir) / config.study / "study.journal"


def _record(trial: optuna.trial.FrozenTrial, weight: float) -> TrialRecord:
    attributes = dict(trial.user_attrs)
    # Of a process that died before it ended the trial, the reason does not count: the trial goes on.
    reason, detail = attributes.pop("reason", "running"), attributes.pop("detail", "")
    is_ended = trial.state.is_finished()
    return TrialRecord(
        number=trial.number,
        changes=attributes.pop("changes", {}),
        reason=reason if is_ended else "running",
        detail=detail if is_ended else "",
        miou_by_epoch=_mious(trial),
        epoch_weight=weight,
        cost_s=attributes.pop(_COST, math.nan),
        attributes=attributes,
    )


def _mious(trial: optuna.trial.FrozenTrial) -> dict[int, float]:
    if _MIOUS in trial.user_attrs:
        return {int(epoch): miou for epoch, miou in trial.user_attrs[_MIOUS].items()}
    return dict(sorted(trial.intermediate_values.items()))


def _or_minus_one(value: float) -> float:
    return -1.0 if math.isnan(value) else value

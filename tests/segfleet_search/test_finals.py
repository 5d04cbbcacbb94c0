"""Laws of the finals: a lead that is luck is found out, and the bound holds as often as it says."""

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from segfleet.finals import Finalist, finals_table, lower_bounds, plan_finals, standing
from segfleet.override import override
from segfleet.presets import search_preset
from segfleet.search_config import SearchConfig
from segfleet.study import Reason, Study


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    changes = {"training.tracking.storage_dir": str(tmp_path), "study": "s", "scheduler": "none"}
    return replace(override(search_preset("demo"), changes), num_finalists=2, num_seeds=3, num_trials=5)


def searched(config: SearchConfig) -> Study:
    study = Study(config, store_digest="d")
    mious = {0: 0.2, 1: 0.5, 2: 0.4, 3: 0.45, 4: 0.1}
    for _ in range(study.num_left()):
        proposal = study.ask()
        study.report(proposal.number, epoch=1, miou=mious.get(proposal.number, 0.6))
        study.finish(proposal.number, "pruned" if proposal.number == 3 else "complete", "")
    return study


def trained(finals: Study, mious: dict[int, list[float]], reason: Reason = "complete") -> None:
    """End all planned trainings with each trial's next score."""
    for _ in range(finals.num_left()):
        proposal = finals.ask()
        trial = finals.trials()[proposal.number].attributes["finalist_of"]
        finals.report(proposal.number, epoch=1, miou=mious[trial].pop(0))
        finals.finish(proposal.number, reason, "")


def test_the_best_complete_trials_are_planned_once_with_each_seed(config: SearchConfig) -> None:
    study = searched(config)
    finals = plan_finals(config, study, "d")
    assert finals is not None
    planned = [finals.ask() for _ in range(2)]
    again = plan_finals(config, study, "d")  # after a death
    assert again is not None
    assert [proposal.changes for proposal in again.unfinished()] == [it.changes for it in planned]
    planned += [again.ask() for _ in range(again.num_left())]
    points = {number: study.trials()[number].changes for number in (1, 2)}
    assert [it.changes for it in planned] == [
        points[number] | {"schedule.seed": seed} for seed in (1, 2, 3) for number in (1, 2)
    ]
    longer = searched(replace(config, num_trials=6))  # a better trial: three trainings more
    more = plan_finals(config, longer, "d")
    assert more is not None
    assert (more.num_wanted, more.num_left()) == (9, 3)
    assert more.ask().changes == longer.trials()[5].changes | {"schedule.seed": 1}


def test_luck_does_not_win(config: SearchConfig) -> None:
    study = searched(config)
    finals = plan_finals(config, study, "d")
    assert finals is not None
    trained(finals, {1: [0.3, 0.32, 0.31], 2: [0.42, 0.38, 0.40]})
    found = standing(study, finals)
    assert [it.trial.number for it in found] == [2, 1]
    assert found[0].best.miou == 0.42
    assert found[0].mean == pytest.approx(0.4)
    assert found[0].low == pytest.approx(0.3805, abs=1e-4)
    lines = finals_table(found).splitlines()
    assert lines[1].split() == ["2", "0.4000", "0.4000", f"{found[0].low:.4f}", "0.4200", "0.3800", "0.4000"]


def test_a_training_that_leaves_no_model_counts_as_zero_and_a_lost_one_not_at_all(
    config: SearchConfig,
) -> None:
    def found(reason: Reason) -> list[Finalist]:
        other = replace(config, study=reason)
        study = searched(other)
        finals = plan_finals(replace(other, num_seeds=2), study, "d")
        assert finals is not None
        proposal = finals.ask()
        finals.report(proposal.number, epoch=1, miou=0.9)
        finals.finish(proposal.number, reason, "")
        trained(finals, {1: [0.5], 2: [0.4, 0.4]})
        return standing(study, finals)

    assert [(it.trial.number, it.mean) for it in found("diverged")] == [(2, 0.4), (1, 0.25)]
    assert [(it.trial.number, it.mean) for it in found("lost")] == [(1, 0.5), (2, 0.4)]


def test_without_finalists_there_are_none(config: SearchConfig) -> None:
    assert plan_finals(replace(config, num_finalists=0), searched(config), "d") is None
    assert standing(searched(config), None) == []


def test_the_bound_of_one_group_is_scipys() -> None:
    values = [0.31, 0.35, 0.30, 0.36]
    expected = stats.ttest_1samp(values, 0, alternative="greater").confidence_interval(0.95).low
    assert lower_bounds([values]) == pytest.approx([expected])
    assert lower_bounds([[0.3], [0.4]]) == [0.3, 0.4]


def test_the_bound_lies_below_the_truth_in_95_of_100() -> None:
    rng = np.random.default_rng(0)
    truths = [0.2, 0.5, 0.4]
    held = [
        low <= truth
        for _ in range(2000)
        for low, truth in zip(
            lower_bounds([rng.normal(truth, 0.02, 3).tolist() for truth in truths]), truths, strict=True
        )
    ]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_more_seeds_tighten_the_bound() -> None:
    values = [0.30, 0.32]
    rng = random.Random(0)
    others = [0.5 + rng.gauss(0, 0.01) for _ in range(6)]
    (few, _), (many, _) = lower_bounds([values, others]), lower_bounds([values * 3, others])
    assert few < many < 0.31
    assert all(math.isfinite(low) for low in (few, many))

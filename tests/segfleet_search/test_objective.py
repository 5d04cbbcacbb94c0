"""Laws of the search for quality and cost."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pspnet.errors import InputError
from segfleet.override import override
from segfleet.presets import search_preset
from segfleet.search_config import SearchConfig
from segfleet.search_report import draw_front, leaderboard_table
from segfleet.study import Study

COSTS = {0: (0.5, 100.0), 1: (0.4, 50.0), 2: (0.45, 120.0), 3: (0.3, 20.0), 4: (0.3, 30.0), 5: (0.6, 300.0)}


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    config = override(search_preset("demo"), {"training.tracking.storage_dir": str(tmp_path), "study": "s"})
    return replace(config, objective="quality,cost", scheduler="none", num_trials=12)


def searched(config: SearchConfig) -> Study:
    for number, (miou, cost_s) in COSTS.items():
        study = Study(config, store_digest="d")  # a new process each time
        assert study.ask().number == number
        study.report(number, epoch=1, miou=miou / 2)
        again = Study(config, store_digest="d")
        assert again.report(number, epoch=1, miou=0.99).reason == "epoch 1 was decided before"
        assert not again.report(number, epoch=2, miou=miou).stop
        again.finish(number, "complete", "2 epochs", cost_s=cost_s)
    return Study(config, store_digest="d")


def test_the_front_is_what_nothing_beats_in_both(config: SearchConfig, tmp_path: Path) -> None:
    study = searched(config)
    oom = study.ask()
    study.finish(oom.number, "oom", "too large")
    expected = {
        number
        for number, (miou, cost) in COSTS.items()
        if not any(a >= miou and b <= cost and (a, b) != (miou, cost) for a, b in COSTS.values())
    }
    assert study.front() == expected == {0, 1, 3, 5}
    assert [(it.miou_by_epoch, it.cost_s) for it in study.trials()[:2]] == [
        ({1: 0.25, 2: 0.5}, 100.0),
        ({1: 0.2, 2: 0.4}, 50.0),
    ]
    assert math.isnan(study.trials()[oom.number].cost_s)
    best = study.best()
    assert best is not None
    assert best.number == 5
    table = leaderboard_table(study.leaderboard(), study.front()).splitlines()
    assert [line.split()[4] for line in table[1:]] == ["300*", "100*", "120", "50*", "20*", "30", "-"]
    with Image.open(draw_front(study.trials(), study.front(), title="t", path=tmp_path / "f.png")) as picture:
        assert picture.width > 500


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_samplers_propose_for_both(config: SearchConfig, sampler: str) -> None:
    study = searched(override(config, {"sampler": sampler, "num_startup_trials": 3}))
    points = {str(study.ask().changes) for _ in range(2)}
    assert len(points) == 2


def test_a_child_takes_over_both_values(config: SearchConfig) -> None:
    parent = searched(config)
    child = Study(replace(config, study="t"), store_digest="d")
    assert child.inherit(parent) == len(COSTS)
    assert child.front() == parent.front()


def test_a_search_for_cost_gives_no_trial_up(config: SearchConfig) -> None:
    with pytest.raises(InputError, match=r"but got scheduler asha\. Give --scheduler none"):
        replace(config, scheduler="asha")


def test_a_search_for_quality_has_no_front_but_knows_the_cost(config: SearchConfig) -> None:
    study = Study(replace(config, objective="quality"), store_digest="d")
    number = study.ask().number
    study.report(number, epoch=1, miou=0.5)
    study.finish(number, "complete", "", cost_s=12.5)
    assert study.front() == set()
    assert study.trials()[0].cost_s == 12.5
    with pytest.raises(InputError, match="objective: quality there, quality,cost here"):
        Study(config, store_digest="d")

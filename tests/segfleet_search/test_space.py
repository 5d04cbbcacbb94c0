"""Laws of what a search varies: any setting by one notation, checked before anything starts; each sampler and
scheduler is the library's.
"""

import math
import random
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from pspnet.errors import InputError
from segfleet.override import override
from segfleet.presets import search_preset, training_preset
from segfleet.search_config import SearchConfig, SpaceConfig
from segfleet.space import dimensions, narrowed
from segfleet.study import Study

DECAY = "optim.weight_decay=log:1e-5..1e-3"
BACKBONE = "model.backbone=choice:resnet18,resnet50"


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    return override(
        search_preset("demo"),
        {"training.tracking.storage_dir": str(tmp_path), "training.workers.num_workers": 1, "study": "s"},
    )


def varied(config: SearchConfig, *also: str) -> SearchConfig:
    return replace(config, space=replace(config.space, also=also))


def test_any_setting_is_varied_within_its_limits(config: SearchConfig) -> None:
    config = varied(
        config, DECAY, BACKBONE, "data.rotate_degrees=linear:0..10", "schedule.global_batch_size=linear:8..12"
    )
    study = Study(replace(config, sampler="random"), store_digest="d")
    seen = [study.ask().changes for _ in range(20)]
    for changes in seen:
        override(config.training, changes)  # a trial's configuration: nothing is refused
        assert 1e-5 <= changes["optim.weight_decay"] <= 1e-3
        assert changes["model.backbone"] in ("resnet18", "resnet50")
        assert 0 <= changes["data.rotate_degrees"] <= 10
        assert changes["schedule.global_batch_size"] in range(8, 13)
    below = sum(changes["optim.weight_decay"] < 1e-4 for changes in seen)
    assert 4 <= below <= 16  # half of them on a log scale, one in eleven on a linear one


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("optim.decay=log:1e-5..1e-3", "there is no 'optim.decay'"),
        ("optim.weight_decay=log:0..1", "above 0 on a log scale"),
        ("optim.weight_decay=log:1e-3..1e-5", "low <= high"),
        ("optim.weight_decay=1e-3", "must be written"),
        ("optim.weight_decay=log:a..b", "must be written"),
        ("optim.momentum=linear:0..2", "momentum"),
        ("model.backbone=choice:resnet18,resnet18", "different values"),
        ("model.backbone=choice:resnet18,vgg", "vgg"),
        ("model.backbone=linear:1..2", "of a number"),
        ("schedule.num_epochs=linear:1..2", "compared on"),
        ("workers.num_workers=choice:1,2", "compared on"),
        ("optim.base_lr=log:1e-3..1", "always searched"),
    ],
)
def test_a_dimension_that_cannot_be_is_refused_by_name(config: SearchConfig, text: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        dimensions(varied(config, text).space, config.training)


def test_another_space_is_another_study(config: SearchConfig) -> None:
    Study(varied(config, DECAY), store_digest="d")
    Study(replace(varied(config, DECAY), sampler="random", seed=3), store_digest="d")
    with pytest.raises(InputError, match=r"space\.also"):
        Study(varied(config, BACKBONE), store_digest="d")


def test_a_grid_has_every_point_once_over_restarts(config: SearchConfig) -> None:
    config = replace(varied(config, BACKBONE), sampler="grid", grid_points=2, num_trials=100)
    num_points = 2 * 2 * len(config.space.crop_sizes) * 2
    found = []
    while (study := Study(config, store_digest="d")).num_left():
        proposal = study.ask()
        study.finish(proposal.number, "failed", "")
        found.append(tuple(proposal.changes.values()))
    assert len(found) == len(set(found)) == num_points


def test_ranges_of_a_grid_by_hand(config: SearchConfig) -> None:
    decay = dimensions(varied(config, DECAY).space, config.training)[-1]
    assert decay.grid(3) == pytest.approx([1e-5, 1e-4, 1e-3])
    batch = dimensions(varied(config, "schedule.global_batch_size=linear:8..11").space, config.training)[-1]
    assert batch.grid(9) == [8, 9, 10, 11]


def test_the_gaussian_process_proposes_after_its_random_trials(config: SearchConfig) -> None:
    config = replace(config, sampler="gp", num_startup_trials=2)
    study = Study(config, store_digest="d")
    for miou in (0.1, 0.4, 0.2):
        proposal = study.ask()
        study.report(proposal.number, epoch=1, miou=miou)
        study.finish(proposal.number, "complete", "")
    assert len({str(record.changes) for record in study.trials()}) == 3


def test_decisions_are_those_of_optunas_median_rule(config: SearchConfig, tmp_path: Path) -> None:
    config = replace(config, scheduler="median", num_trials=30, fidelity="epochs")
    study = Study(config, store_digest="d")
    reference = optuna.create_study(
        direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    )
    rng, num_stopped = random.Random(0), 0
    for _ in range(20):
        number, theirs = study.ask().number, reference.ask()
        values = [rng.random() for _ in range(4)]
        for epoch, miou in enumerate(values, start=1):
            decision = study.report(number, epoch=epoch, miou=miou)
            theirs.report(miou, epoch)
            assert decision.stop == theirs.should_prune()
            if decision.stop:
                break
        num_stopped += decision.stop
        study.finish(number, "pruned" if decision.stop else "complete", decision.reason)
        reference.tell(
            theirs,
            None if decision.stop else max(values),
            state=optuna.trial.TrialState.PRUNED if decision.stop else None,
        )
    assert 3 < num_stopped < 17


def test_without_a_scheduler_every_trial_goes_on(config: SearchConfig) -> None:
    study = Study(replace(config, scheduler="none"), store_digest="d")
    for miou in (0.9, 0.8, 0.1, 0.0):
        number = study.ask().number
        assert not study.report(number, epoch=1, miou=miou).stop
    assert study.rungs == []


def test_the_three_own_dimensions_are_those_of_the_space() -> None:
    config = search_preset("cityscapes_semseg_r50")
    own = dimensions(config.space, training_preset("cityscapes_semseg_r50"))
    assert [dimension.name for dimension in own] == ["base_lr", "aux_loss_weight", "crop_size"]
    assert own[2].choices == config.space.crop_sizes
    assert math.isnan(own[2].low)


def test_the_weight_of_an_auxiliary_loss_is_searched_only_where_there_is_one() -> None:
    base = override(training_preset("demo"), {"model.has_aux_head": False})
    assert [it.name for it in dimensions(SpaceConfig(), base)] == ["base_lr", "crop_size"]
    both = SpaceConfig(also=("model.has_aux_head=choice:True,False",))
    assert [it.name for it in dimensions(both, base)][1] == "aux_loss_weight"
    with pytest.raises(InputError, match=r"'aux_loss_weight'\. There are: base_lr, crop_size"):
        narrowed(SpaceConfig(), base, ["aux_loss_weight=0.1..0.2"])


def test_crops_of_a_search_may_be_rectangles_and_narrow_names_them_alike() -> None:
    base = training_preset("cityscapes_mmseg_r50_512x1024")
    space = SpaceConfig(crop_sizes=(473, "512x1024", "336x680"))
    assert dimensions(space, base)[2].choices == (473, "512x1024", "336x680")
    assert narrowed(space, base, ["crop_size=512x1024,473"]).crop_sizes == ("512x1024", 473)
    with pytest.raises(InputError, match="goes beyond"):
        narrowed(space, base, ["crop_size=713"])
    with pytest.raises(InputError, match="8k"):
        dimensions(space, training_preset("cityscapes_semseg_r50"))

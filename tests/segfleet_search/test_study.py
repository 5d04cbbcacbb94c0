"""Laws of the study: what it stores survives the process, and ASHA's decisions are Ray Tune's."""

import math
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from optuna.trial import TrialState
from ray.tune.schedulers.async_hyperband import _Bracket

from pspnet.errors import InputError
from segfleet import study as study_module
from segfleet.override import override
from segfleet.presets import search_preset
from segfleet.pruning import decide_rung, epoch_weight, rungs
from segfleet.search_config import SearchConfig, SpaceConfig
from segfleet.space import narrowed
from segfleet.study import Proposal, Study, repair


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    return override(
        search_preset("demo"),
        {
            "training.tracking.storage_dir": str(tmp_path),
            "study": "s",
            "min_epochs": 1,
            "reduction_factor": 3,
            "fidelity": "epochs",
        },
    )


def test_rungs_are_powers_of_the_reduction_factor_before_the_end() -> None:
    assert rungs(min_epochs=1, max_epochs=9, reduction_factor=3) == [1, 3]
    assert rungs(min_epochs=2, max_epochs=17, reduction_factor=2) == [2, 4, 8, 16]
    assert rungs(min_epochs=5, max_epochs=5, reduction_factor=2) == []


@pytest.mark.parametrize("reduction_factor", [2, 3, 4])
def test_decisions_are_those_of_ray_tunes_asha(config: SearchConfig, reduction_factor: int) -> None:
    config = replace(
        override(
            config,
            {"reduction_factor": reduction_factor, "training.schedule.num_epochs": 17},
        ),
        num_trials=12,
    )
    study = Study(config, store_digest="d")
    reference = _Bracket(1, 16, reduction_factor, 0, stop_last_trials=True)
    rng = random.Random(reduction_factor)
    alive = {study.ask().number: 0 for _ in range(12)}
    num_stopped = 0
    while alive:
        number = rng.choice(sorted(alive))
        alive[number] += 1
        epoch, miou = alive[number], rng.random()
        expected = reference.on_result(cast(Any, SimpleNamespace(trial_id=str(number))), epoch, miou)
        decision = study.report(number, epoch=epoch, miou=miou)
        assert decision.stop == (expected == "STOP"), (number, epoch, decision.reason)
        num_stopped += decision.stop
        if decision.stop or epoch == 16:
            study.finish(number, "pruned" if decision.stop else "complete", decision.reason)
            del alive[number]
    assert 0 < num_stopped < 12


def test_a_study_from_before_a_setting_was_added_goes_on_with_its_default(config: SearchConfig) -> None:
    study = Study(config, store_digest="d")
    stored = study._study.user_attrs["fingerprint"]
    older = {path: value for path, value in stored.items() if path != "training.data.photometric"}
    study._study.set_user_attr("fingerprint", older)
    Study(config, store_digest="d")
    with pytest.raises(InputError, match=r"training\.data\.photometric: False there, True here"):
        Study(override(config, {"training.data.photometric": True}), store_digest="d")


def test_a_new_process_finds_trials_rungs_and_reasons(config: SearchConfig) -> None:
    study = Study(config, store_digest="d")
    first, second, third = study.ask(), study.ask(), study.ask()
    study.report(first.number, epoch=1, miou=0.5)
    study.finish(first.number, "complete", "9 epochs")
    study.report(second.number, epoch=1, miou=0.1)
    study.finish(second.number, "pruned", "0.1 < 0.5")
    study.note(third.number, {"run_id": "r3"})

    again = Study(config, store_digest="d")
    assert [(t.number, t.reason, t.miou_by_epoch) for t in again.trials()] == [
        (0, "complete", {1: 0.5}),
        (1, "pruned", {1: 0.1}),
        (2, "running", {}),
    ]
    assert again.unfinished() == [replace(third, is_resumed=True)]
    assert again.trials()[2].attributes["run_id"] == "r3"
    assert again.num_left() == config.num_trials - 3
    assert again.report(third.number, epoch=1, miou=0.2).stop
    best = again.best()
    assert best is not None
    assert best.number == 0


def test_a_stopped_trial_stays_stopped_whatever_comes_later(config: SearchConfig) -> None:
    study = Study(config, store_digest="d")
    first, second = study.ask().number, study.ask().number
    study.report(first, epoch=1, miou=0.5)
    assert study.report(second, epoch=1, miou=0.1).stop
    late = study.report(second, epoch=3, miou=0.9)
    assert late.stop
    assert "rung of epoch 1" in late.reason
    assert study.trials()[second].miou_by_epoch == {1: 0.1, 3: 0.9}


def test_proposals_follow_from_seed_and_history_alone_and_never_repeat(
    config: SearchConfig, tmp_path: Path
) -> None:
    def points(storage_dir: str, *, restart: bool) -> list[dict[str, object]]:
        varied = override(config, {"training.tracking.storage_dir": storage_dir})
        study = Study(varied, store_digest="d")
        found = []
        for _ in range(6):
            if restart:
                study = Study(varied, store_digest="d")
            proposal = study.ask()
            study.report(proposal.number, epoch=1, miou=float(proposal.changes["optim.base_lr"]))
            study.finish(proposal.number, "complete", "")
            found.append(proposal.changes)
        return found

    one = points(str(tmp_path / "a"), restart=False)
    assert points(str(tmp_path / "b"), restart=True) == one
    assert len({str(point) for point in one}) == 6


def test_a_study_is_not_joined_by_another_search(config: SearchConfig) -> None:
    Study(config, store_digest="d")
    with pytest.raises(InputError, match="store_digest: d there, e here"):
        Study(config, store_digest="e")
    with pytest.raises(InputError, match=r"space\.crop_sizes"):
        Study(replace(config, space=SpaceConfig(crop_sizes=(33,))), store_digest="d")
    Study(replace(config, num_trials=99, seed=5), store_digest="d")


def test_the_bar_is_the_upper_quantile_by_hand() -> None:
    # others 0.1 0.2 0.3 0.4: the 2/3 quantile lies at position 2 of 0..3, which is 0.3
    assert decide_rung(0.29, [0.4, 0.1, 0.3, 0.2], epoch=1, reduction_factor=3).stop
    assert not decide_rung(0.31, [0.4, 0.1, 0.3, 0.2], epoch=1, reduction_factor=3).stop


def test_the_leaderboard_puts_complete_trials_first(config: SearchConfig) -> None:
    study = Study(config, store_digest="d")
    for miou, reason in ((0.3, "complete"), (0.9, "pruned"), (0.4, "complete")):
        number = study.ask().number
        study.report(number, epoch=1, miou=miou)
        study.finish(number, reason, "")  # type: ignore[arg-type]
    assert [trial.number for trial in study.leaderboard()] == [2, 0, 1]


def trained(study: Study, miou: float) -> int:
    number = study.ask().number
    study.report(number, epoch=1, miou=miou)
    study.finish(number, "complete", "1 epochs")
    return number


def test_trials_are_compared_where_they_have_seen_as_many_pixels(config: SearchConfig) -> None:
    """Crops of 129 (the base), 65 and 257: a quarter and four times the pixels an epoch, nearly."""
    space = replace(config.space, crop_sizes=(129, 65, 257))
    config = replace(config, space=space, sampler="grid", num_trials=27, fidelity="pixels")
    study = Study(config, store_digest="d")
    of_crop: dict[int, Proposal] = {}
    while len(of_crop) < 3:
        proposal = study.ask()
        of_crop.setdefault(proposal.changes["data.crop_size"], proposal)
    base, small, large = (of_crop[size] for size in (129, 65, 257))
    assert study.schedule_of(base.changes) == {}
    assert study.schedule_of(small.changes)["schedule.num_epochs"] == round(9 * 129**2 / 65**2) == 35
    assert study.schedule_of(large.changes)["schedule.num_epochs"] == round(9 * 129**2 / 257**2) == 2
    assert not study.report(base.number, epoch=1, miou=0.5).stop
    for epoch in (1, 2, 3):  # not yet the pixels of one epoch of the base: 4225 of 16641 each
        decision = study.report(small.number, epoch=epoch, miou=0.1)
        assert (decision.stop, decision.reason) == (False, "")
    decision = study.report(small.number, epoch=4, miou=0.1)
    assert decision.stop
    assert decision.reason.endswith("rung of epoch 1, bar 0.5000 of 1 others, in pixels: its epoch 4")
    decision = study.report(large.number, epoch=1, miou=0.2)  # the rung of 3 epochs at once
    assert not decision.stop
    assert decision.reason == "first at the rung of epoch 3, mIoU 0.2000, in pixels: its epoch 1"
    assert study.report(base.number, epoch=3, miou=0.1).stop
    weights = {trial.changes["data.crop_size"]: trial.epoch_weight for trial in study.trials()}
    assert weights == {129: 1.0, 65: 65**2 / 129**2, 257: 257**2 / 129**2}


def test_pixels_count_the_batch_only_where_the_iterations_are_limited(config: SearchConfig) -> None:
    base, larger = config.training, {"schedule.global_batch_size": 16}
    assert epoch_weight(base, larger) == 1
    assert epoch_weight(override(base, {"schedule.max_iterations_per_epoch": 5}), larger) == 2


def test_extend_adds_to_what_is_there_and_num_trials_is_the_total(config: SearchConfig) -> None:
    config = replace(config, num_trials=2)
    study = Study(config, store_digest="d")
    assert study.num_left() == 2
    for _ in range(2):
        trained(study, 0.5)
    assert Study(config, store_digest="d").num_left() == 0
    longer = Study(replace(config, extend=3), store_digest="d")
    assert (longer.num_wanted, longer.num_left()) == (5, 3)
    trained(longer, 0.5)
    assert (longer.num_wanted, longer.num_left()) == (5, 2)


def test_a_child_begins_with_the_parents_trials_in_its_part_of_the_space(config: SearchConfig) -> None:
    config = replace(config, num_trials=12)
    parent = Study(config, store_digest="d")
    for number in range(12):
        trained(parent, 0.3 + number / 100)
    running = parent.ask().number
    rates = [trial.changes["optim.base_lr"] for trial in parent.trials()]
    low, high = sorted(rates)[3], sorted(rates)[8]
    part = (f"base_lr={low}..{high}", f"crop_size={config.space.crop_sizes[0]}")
    space = narrowed(config.space, config.training, part)
    inside = [
        trial
        for trial in parent.trials()
        if trial.number != running
        and low <= trial.changes["optim.base_lr"] <= high
        and trial.changes["data.crop_size"] == config.space.crop_sizes[0]
    ]
    assert 0 < len(inside) < 6
    parent.note_final_scores(inside[0].number, {"miou": 0.25})
    child_config = replace(config, space=space, study="s-part", num_trials=4)
    child = Study(child_config, store_digest="d")
    assert child.inherit(parent) == len(inside)
    assert child.inherit(parent) == len(inside)
    found = child.trials()
    assert [trial.changes for trial in found] == [trial.changes for trial in inside]
    assert [trial.miou for trial in found] == [trial.miou for trial in inside]
    assert found[0].detail == f"trial {inside[0].number} of s: 1 epochs"
    assert child.final_scores() == {0: {"miou": 0.25}}
    assert child.num_left() == 4
    for _ in range(4):
        number = trained(child, 0.9)
        point = child.trials()[number].changes
        assert low <= point["optim.base_lr"] <= high
        assert point["data.crop_size"] == config.space.crop_sizes[0]
    assert child.num_left() == 0
    assert Study(child_config, store_digest="d").num_left() == 0
    assert child.best().number >= len(inside)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("lr=1e-3..1e-2", "narrow must name what the study varies, but got 'lr'"),
        ("base_lr=1e-9..1e-2", "goes beyond its"),
        ("base_lr=1e-2", "base_lr=1e-2"),
        ("crop_size=1001", "goes beyond its"),
        ("crop_size=wide", "a side or HEIGHTxWIDTH"),
        ("optim.weight_decay=1e-7..1e-3", "goes beyond its 1e-05 to 0.001"),
    ],
)
def test_what_is_no_part_of_the_space_is_refused(config: SearchConfig, part: str, said: str) -> None:
    space = replace(config.space, also=("optim.weight_decay=log:1e-5..1e-3",))
    with pytest.raises(InputError, match=re.escape(said)):
        narrowed(space, config.training, (part,))


def test_a_part_of_another_setting_keeps_its_scale(config: SearchConfig) -> None:
    space = replace(
        config.space, also=("optim.weight_decay=log:1e-5..1e-3", "model.backbone=choice:resnet18,resnet50")
    )
    part = narrowed(space, config.training, ("optim.weight_decay=1e-4..1e-3", "model.backbone=resnet18"))
    assert part.also == ("optim.weight_decay=log:1e-4..1e-3", "model.backbone=choice:resnet18")


def test_points_that_run_out_of_memory_are_learnt_to_be_avoided(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among the last 40 of 100 trials, fewer than half as many as where the sampler does not hear of them."""
    learnt = sum(num_late_ooms(config, seed) for seed in range(4))
    monkeypatch.setitem(study_module._STATE_OF, "oom", TrialState.FAIL)
    unheard = sum(num_late_ooms(config, seed + 100) for seed in range(4))
    assert 2 * learnt < unheard, (learnt, unheard)


def num_late_ooms(config: SearchConfig, seed: int) -> int:
    """Search where the larger a batch of pixels, the better, up to a limit above which it does not fit."""
    config = replace(
        config,
        study=f"s{seed}",
        seed=seed % 100,
        space=replace(config.space, crop_sizes=CROPS, also=(BATCHES,)),
    )
    study = Study(config, store_digest="d")
    ooms = []
    for _ in range(100):
        proposal = study.ask()
        crop, batch = proposal.changes["data.crop_size"], proposal.changes["schedule.global_batch_size"]
        ooms.append(crop**2 * batch > 593**2 * 16)
        if ooms[-1]:
            study.finish(proposal.number, "oom", "larger than the limit")
            continue
        distance = math.log10(proposal.changes["optim.base_lr"]) + 2
        study.report(
            proposal.number, epoch=1, miou=0.4 - 0.05 * distance**2 + 0.3 * crop / 801 + 0.005 * batch
        )
        study.finish(proposal.number, "complete", "")
    return sum(ooms[-40:])


CROPS = (257, 337, 417, 473, 593, 713, 801)
BATCHES = "schedule.global_batch_size=choice:8,16,32"


def test_a_journal_that_lost_its_end_goes_on_and_one_with_a_hole_is_named(
    config: SearchConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study(config, store_digest="d")
    study.finish(study.ask().number, "refused", "why")
    study.ask()
    path = Path(config.training.tracking.storage_dir) / "s" / "study.journal"
    whole = path.read_bytes()
    repair(config)
    assert path.read_bytes() == whole
    assert capsys.readouterr().out == ""
    path.write_bytes(whole[:-4])
    path.with_name("study.journal.lock").symlink_to(path)
    repair(config)
    assert "study.journal ended in the midst of a line" in capsys.readouterr().out
    torso = path.with_name("study.journal.damaged-1").read_bytes()
    assert path.read_bytes() + torso == whole[:-4]
    again = Study(config, store_digest="d")
    assert [trial.reason for trial in again.trials()] == ["refused", "running"]
    assert again.ask().number == 2
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"{\n", *lines[3:]]))
    with pytest.raises(InputError, match=r"line 3 of .*study\.journal does not"):
        repair(config)


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid", "gp"])
def test_settings_that_a_dead_process_did_not_draw_are_those_it_would_have_drawn(
    config: SearchConfig, sampler: str
) -> None:
    config = override(config, {"sampler": sampler, "num_startup_trials": 2, "num_trials": 6})
    whole = Study(config, store_digest="d")
    torn = Study(replace(config, study="torn"), store_digest="d")
    for number in range(6):
        expected = whole.ask()
        torn._study.sampler = torn._sampler(number)
        torn._study.ask()  # and dies
        torn = Study(replace(config, study="torn"), store_digest="d")
        (found,) = torn.unfinished()
        assert (found.number, found.changes) == (number, expected.changes)
        for study in (whole, torn):
            study.report(number, epoch=1, miou=0.1 * number)
            study.finish(number, "complete", "")

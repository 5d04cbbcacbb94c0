"""Laws of the configuration: one way to vary it, stored and loaded without loss, nonsense refused with a remedy."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspnet import backbones
from pspnet.data import num_iterations
from pspnet.errors import InputError
from pspnet.sizes import sides
from segfleet import config
from segfleet.cli import parse_search, parse_training
from segfleet.config import DataConfig, ModelConfig, OptimConfig, TrainingConfig
from segfleet.config_json import digest, from_json, load_config, to_json
from segfleet.memory import network_of
from segfleet.override import differences, flat, override
from segfleet.presets import PRESETS, search_preset, training_preset
from segfleet.search_config import SearchConfig


@pytest.mark.parametrize("name", PRESETS)
def test_a_stored_configuration_loads_to_an_equal_one(name: str, tmp_path: Path) -> None:
    training, search = training_preset(name), search_preset(name)
    assert from_json(TrainingConfig, to_json(training)) == training
    path = tmp_path / "config.json"
    path.write_text(to_json(search))
    assert load_config(SearchConfig, path) == search


RECIPES: dict[str, tuple[Any, ...]] = {
    "cityscapes_semseg_r50": (713, 37_000, 16, 0.01, 0.1, 0.0, 1e-4, 0.4, "resnet50", 512),
    "cityscapes_semseg_r101": (713, 37_000, 16, 0.01, 0.1, 0.0, 1e-4, 0.4, "resnet101", 512),
    "cityscapes_mmseg_r50_769": (769, 80_136, 8, 0.01, 0.01, 1e-4, 5e-4, 0.4, "resnet50", 512),
    "cityscapes_mmseg_r50_512x1024": ("512x1024", 80_136, 8, 0.01, 0.01, 1e-4, 5e-4, 0.4, "resnet50", 512),
    "cityscapes_paddle_r101": ("512x1024", 80_136, 8, 0.01, 0.01, 1e-5, 4e-5, 0.4, "timm:resnet101d", 1024),
    "nyuv2_r50": (473, 9_800, 16, 0.01, 0.1, 0.0, 1e-4, 0.4, "resnet50", 512),
    "folder_mobilenetv2": (257, 900, 8, 0.01, 0.1, 0.0, 1e-4, 0.4, "mobilenet_v2", 128),
    "camvid_mobilenetv2": (353, 2_250, 8, 0.01, 0.1, 0.0, 1e-4, 0.4, "mobilenet_v2", 128),
}
NUM_TRAIN_IMAGES = {"nyuv2_r50": 795, "folder_mobilenetv2": 367, "camvid_mobilenetv2": 367}
"""Others: the 2975 of Cityscapes. A folder is taken to be CamVid's."""


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_numbers_of_the_source_that_it_names(name: str) -> None:
    """In whole epochs. PaddleSeg's channels are its PSPNet's pp_out_channels; the last three are our own."""
    preset = training_preset(name)
    model, optim, schedule = preset.model, preset.optim, preset.schedule
    num_images = NUM_TRAIN_IMAGES.get(name, 2975)
    assert RECIPES[name] == (
        preset.data.crop_size,
        schedule.num_epochs * num_iterations(num_images, schedule.global_batch_size),
        schedule.global_batch_size,
        optim.base_lr,
        optim.base_lr * optim.head_lr_factor,
        optim.min_lr,
        optim.weight_decay,
        optim.aux_loss_weight,
        model.backbone,
        model.head_channels,
    )
    assert model.backbone_weights == "imagenet"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_it_is_from_what_is_published_what_it_costs_and_how_it_is_run(name: str) -> None:
    said = " ".join((PRESETS[name].__doc__ or "").split())
    assert re.search(r"github\.com/\w|\w et al\., |\(\S*pspnet\S*\.(py|ya?ml)[;)]", said)
    assert re.search(r"Published: (no|.*\d\d\.\d)", said)
    assert re.search(r"\((sliding window|whole image)[^)]*single scale|whole image, single scale", said)
    assert re.search(r"Cost: (not (measured|published)\b|published\b|\d)", said)
    assert ("Not reproduced here." in said) != ("Reached here: " in said)
    assert said.endswith(f"Command: python jobs/train_cityscapes.py --preset {name} --data.store STORE")


def test_override_is_what_one_would_write_by_hand() -> None:
    varied = override(
        training_preset("tiny"), {"optim.base_lr": 0.3, "data.crop_size": 97, "model.bin_sizes": [1, 2]}
    )
    assert varied.optim == OptimConfig(base_lr=0.3)
    assert varied.data == DataConfig(crop_size=97, min_scale=0.5, max_scale=1.0)
    assert varied.model == ModelConfig(backbone="resnet18", head_channels=32, bin_sizes=(1, 2))
    assert varied.schedule == training_preset("tiny").schedule


def test_a_crop_is_a_side_or_height_and_width_and_a_square_is_stored_as_its_side(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rectangle = parse_training(training_preset, "tiny", ["--data.crop-size", "65x129"], description="")
    assert rectangle == override(training_preset("tiny"), {"data.crop_size": "65x129"})
    assert from_json(TrainingConfig, to_json(rectangle)) == rectangle
    square = parse_training(training_preset, "tiny", ["--data.crop-size", "97x97"], description="")
    assert square == override(training_preset("tiny"), {"data.crop_size": 97})
    assert '"crop_size": 97,' in to_json(square)
    evenly = override(rectangle, {"model.align_corners": False, "data.crop_size": "64x129"})
    assert evenly.data.crop_size == "64x129"
    search = parse_search(search_preset, "tiny", ["--space.crop-sizes", "33", "33x65"], description="")
    assert search.space.crop_sizes == (33, "33x65")
    assert search_preset("cityscapes_mmseg_r50_512x1024").space.crop_sizes == (
        "336x680",
        "424x848",
        "512x1024",
    )


@pytest.mark.parametrize("name", PRESETS)
def test_every_crop_of_a_search_fits_the_output_stride_of_its_preset(name: str) -> None:
    search = search_preset(name)
    stride, is_even = search.training.model.output_stride, not search.training.model.align_corners
    for crop_size in search.space.crop_sizes:
        assert all((side - 1) % stride == 0 or (is_even and side % stride == 0) for side in sides(crop_size))


def test_the_backbones_of_the_configuration_are_those_of_the_model() -> None:
    assert config.BACKBONES == backbones.BACKBONES
    for name in (*backbones.BACKBONES, "timm:resnet18"):
        assert override(training_preset("tiny"), {"model.backbone": name}).model.backbone == name


def test_a_configuration_of_before_there_were_other_stems_and_norms_loads_to_what_it_was() -> None:
    stored = json.loads(to_json(training_preset("tiny")))
    for name in ("weights", "deep_stem", "deep_stem_channels", "contract_dilation", "norm", "align_corners"):
        del stored["model"][name]
    assert from_json(TrainingConfig, json.dumps(stored)) == training_preset("tiny")


def test_a_configuration_of_before_there_were_other_dilations_and_channels_loads_to_what_it_was() -> None:
    stored = json.loads(to_json(training_preset("tiny")))
    for name in ("dilations", "dilate_first_only", "branch_channels", "aux_channels"):
        del stored["model"][name]
    assert from_json(TrainingConfig, json.dumps(stored)) == training_preset("tiny")


@pytest.mark.parametrize(
    "changes",
    [
        {"dilations": [1, 1, 2, 4], "dilate_first_only": True, "output_stride": 32},
        {"backbone": "mobilenet_v2", "dilate_first_only": True, "branch_channels": 24, "aux_channels": 7},
        {"backbone": "mobilenet_v2", "dilations": [1, 1, 1, 2, 2, 4, 4], "output_stride": 32},
    ],
)
def test_dilations_and_channels_are_the_networks_that_is_built(changes: dict[str, Any]) -> None:
    model = override(
        training_preset("tiny"), {f"model.{name}": value for name, value in changes.items()}
    ).model
    architecture = network_of(model, 3).architecture
    assert architecture | changes == architecture


def test_flags_are_overrides() -> None:
    parsed = parse_training(
        training_preset,
        "demo",
        [
            "--preset",
            "tiny",
            "--optim.base-lr",
            "0.3",
            "--data.store=somewhere",
            "--model.has-aux-head",
            "False",
        ],
        description="",
    )
    changes = {"optim.base_lr": 0.3, "data.store": "somewhere", "model.has_aux_head": False}
    assert parsed == override(training_preset("tiny"), changes)
    assert differences(training_preset("tiny"), parsed) == changes


def test_a_search_takes_the_flags_of_its_training_by_the_same_names() -> None:
    parsed = parse_search(
        search_preset,
        "demo",
        ["--data.store", "x", "--num-trials", "9", "--space.crop-sizes", "33", "41"],
        description="",
    )
    changes = {"training.data.store": "x", "num_trials": 9, "space.crop_sizes": (33, 41)}
    assert parsed == override(search_preset("demo"), changes)


def test_print_config_prints_what_config_loads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_training(training_preset, "tiny", ["--optim.base-lr", "0.3", "--print-config"], description="")
    assert stopped.value.code == 0
    path = tmp_path / "config.json"
    path.write_text(capsys.readouterr().out)
    again = parse_training(training_preset, "demo", ["--config", str(path)], description="")
    assert again == override(training_preset("tiny"), {"optim.base_lr": 0.3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.crop_size": 700},
            r"data\.crop_size must be 8k \+ 1, or 8k .*but got 700\. The nearest are 697 and 705\.",
        ),
        ({"data.crop_size": 25}, r"at least 33.*but got 25"),
        ({"data.crop_size": "129x250"}, r"but got 129x250\. The nearest to 250 are 249 and 257"),
        (
            {"data.crop_size": "512x1024"},
            r"8k \+ 1 with .*but got 512x1024\. The nearest to 512 are 505 and 513; .*align_corners False",
        ),
        ({"data.crop_size": "wide"}, r"HEIGHTxWIDTH.*but got 'wide'"),
        ({"data.crop_size": 1.5}, r"data\.crop_size must be of type int or str, but got 1\.5"),
        ({"optim.base_lrr": 1.0}, r"no setting optim\.base_lrr\. Did you mean optim\.base_lr\?"),
        ({"optim.base_lr": "fast"}, r"optim\.base_lr must be of type float, but got 'fast'"),
        (
            {"optim.base_lr": float("nan")},
            r"optim\.base_lr must be a positive number .*but got nan\. Usual: 0\.01",
        ),
        ({"optim.base_lr": 1e38}, r"optim\.base_lr must be .*at most 1e\+30, but got 1e\+38\. Usual"),
        (
            {"optim.head_lr_factor": 1e31},
            r"optim\.head_lr_factor must be .*at most 1e\+30, but got 1e\+31\. Usual",
        ),
        (
            {"optim.base_lr": 1e20, "optim.head_lr_factor": 1e20},
            r"base_lr x optim\.head_lr_factor, the heads' rate, must be at most 1e\+31, but got 1e\+40\. Usual: 0\.1",
        ),
        (
            {"optim.weight_decay": 1e39},
            r"weight_decay must be .*at most 1e\+30, but got 1e\+39\. 0 turns it off",
        ),
        ({"optim.aux_loss_weight": float("inf")}, r"aux_loss_weight must be .*but got inf\. 0 turns it off"),
        ({"optim.min_lr": 0.02}, r"below optim\.base_lr 0\.01, but got 0\.02"),
        (
            {"optim.min_lr": 0.005, "optim.head_lr_factor": 0.1},
            r"below the heads' rate 0\.001 \(optim\.base_lr x optim\.head_lr_factor\), but got 0\.005\. mmseg",
        ),
        ({"optim.momentum": 1.0}, r"optim\.momentum must be in \[0, 1\)"),
        ({"model.backbone": "vgg"}, r"model\.backbone must be one of resnet18, .*but got 'vgg'"),
        ({"model.freeze_stages": 6}, r"freeze_stages must be 0 \(none\) to 5.*but got 6\. 0 trains"),
        (
            {"model.head_channels": 10**18},
            r"head_channels must be 1 to 10\*\*9, but got 10{18}\. The paper's is 512",
        ),
        ({"model.norm": "layer"}, r"model\.norm must be one of auto, batch, sync, group, but got 'layer'"),
        ({"model.norm": "sync"}, r"sync needs GPUs.*2 workers\. Use group"),
        ({"model.norm": "group", "model.backbone_weights": "imagenet"}, r"trained with BatchNorm"),
        (
            {"model.norm": "group", "model.freeze_batch_norm": "all"},
            r"freeze_batch_norm needs BatchNorm, but got all for model\.norm group.*Leave it out",
        ),
        (
            {"model.backbone": "timm:resnet18", "workers.recompute": True},
            r"workers\.recompute needs .*but got timm:resnet18\. Take one of resnet18",
        ),
        (
            {"model.weights": "a.pth", "model.backbone_weights": "b.pth"},
            r"got model\.backbone_weights b\.pth beside a\.pth",
        ),
        ({"model.backbone": "mobilenet_v2", "model.deep_stem": True}, r"of ResNets, but got mobilenet_v2"),
        (
            {"model.deep_stem_channels": 64},
            r"are of the deep stem, but got 64 for model\.deep_stem False\. Leave them out",
        ),
        (
            {"model.dilations": [1, 2]},
            r"4 numbers of 1 to 64, one for each stage of resnet18, or none.*got \(1, 2\)",
        ),
        (
            {"model.backbone": "mobilenet_v2", "model.dilations": [1, 1, 2, 4]},
            r"7 numbers .*of mobilenet_v2, or none, but got \(1, 1, 2, 4\)\. None takes those of the output stride",
        ),
        ({"model.dilations": [1, 1, 0, 1]}, r"4 numbers of 1 to 64.*got \(1, 1, 0, 1\)"),
        ({"model.dilations": [1, 1, 2, 65]}, r"4 numbers of 1 to 64.*got \(1, 1, 2, 65\)"),
        (
            {"model.backbone": "timm:resnet18", "model.dilations": [1, 1, 2, 4]},
            r"dilations are of resnet18, .*but got timm:resnet18, which timm dilates\. Leave them out",
        ),
        (
            {"model.backbone": "resnet50", "model.dilate_first_only": True},
            r"of resnet18, resnet34 and mobilenet_v2, but got resnet50\. Leave it out",
        ),
        (
            {"model.branch_channels": -1},
            r"branch_channels must be 0 to 10\*\*9, but got -1\. 0 takes the paper's",
        ),
        ({"model.aux_channels": 10**18}, r"aux_channels must be 0 to 10\*\*9, but got 10{18}\. 0 takes"),
        (
            {"model.branch_channels": 64, "model.bin_sizes": []},
            r"branch_channels are of the pyramid, but got 64 where there is none\. Leave them out",
        ),
        (
            {"model.aux_channels": 64, "model.has_aux_head": False},
            r"aux_channels are of the auxiliary head, but got 64 where there is none\. Leave them out",
        ),
        ({"model.has_aux_head": 1}, r"model\.has_aux_head must be of type bool"),
        ({"schedule.num_epochs": 2.5}, r"schedule\.num_epochs must be of type int"),
        ({"schedule.num_epochs": 0}, r"num_epochs must be at least 1, but got 0\. 1 is a single pass"),
        (
            {"schedule.global_batch_size": 0},
            r"global_batch_size must be at least 1, but got 0\. 16 is the paper's",
        ),
        ({"schedule.evaluate_every_epochs": -1}, r"must be at least 1, but got -1\. 1 evaluates after each"),
        ({"schedule.max_iterations_per_epoch": -1}, r"must be 0 or more, but got -1\. 0 trains whole epochs"),
        ({"schedule.seed": 2**31}, r"between 0 and 2\*\*31 - 1, but got 2147483648\. 0 is as good as any"),
        ({"workers.num_workers": 0}, r"num_workers must be at least 1, but got 0\. 1 trains in one process"),
        (
            {"workers.cpus_per_worker": 0},
            r"cpus_per_worker must be at least 1, but got 0\. 1 gives each a thread",
        ),
        (
            {"workers.memory_fit": [float("inf"), 0.0], "workers.memory_gib": 8.0},
            r"factor above 0 and GiB of 0 or more, both at most 1e\+30, but got \(inf, 0\.0\)\. 1 0 takes",
        ),
        ({"workers.memory_fit": [1e300, 0.0]}, r"both at most 1e\+30, but got \(1e\+300, 0\.0\)"),
        ({"workers.memory_fit": [1.0, float("nan")]}, r"but got \(1\.0, nan\)"),
        ({"workers.memory_gib": float("inf")}, r"memory_gib must be .*but got inf\. 0 predicts nothing"),
        ({"schedule.global_batch_size": 5}, r"multiple of workers\.num_workers.*The nearest are 4 and 6"),
        ({"data.min_scale": 3.0}, r"0 < min <= max"),
        (
            {"schedule.accumulation_steps": 4},
            r"must divide the 2 images that a worker has.*but got 4\. These do: 1, 2\.",
        ),
        ({"optim.max_gradient_norm": -1.0}, r"0 or a positive number .*but got -1\.0\. 0 turns it off"),
        ({"optim.warm_up_iterations": -1}, r"0 or more, but got -1"),
        ({"optim.warm_up_start": 0.0}, r"above 0 and at most 1, but got 0\.0"),
        ({"loss.label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), but got 1\.0"),
        ({"loss.ohem_threshold": -0.1}, r"ohem_threshold must be in \[0, 1\), but got -0\.1"),
        ({"loss.ohem_min_kept": 0}, r"ohem_min_kept must be at least 1, but got 0"),
        ({"loss.class_weights": [1.0, -1.0]}, r"class_weights must be 0 or positive"),
        (
            {"loss.class_weights": [1.0, 1e39]},
            r"class_weights must be .*at most 1e\+30, .*but got \(1\.0, 1e\+39\)",
        ),
        ({"loss.class_weights": [1.0], "loss.class_balance": "median"}, r"Give one of them"),
        ({"optim.ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), but got 1\.0"),
        ({"workers.compile": True, "workers.recompute": True}, r"Set one of them to False"),
        ({"workers.precision": "fp16"}, r"fp16 needs a GPU"),
        (
            {"workers.min_workers": 3},
            r"between 0 and workers\.num_workers \(2\), but got 3\. 0 waits for all",
        ),
        ({"workers.peak_tflops": -1.0}, r"at most 1e\+30, but got -1\.0\. 0 takes the table's"),
        ({"optim": 3}, r"optim is a group of settings"),
    ],
)
def test_nonsense_is_refused_with_rule_value_and_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        override(training_preset("tiny"), changes)


@given(
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(["auto", "batch", "group"]),
    st.data(),
)
def test_fewer_workers_take_no_larger_parts_and_leave_batch_norm_with_no_single_image(
    num_workers: int, steps: int, micro: int, use_gpu: bool, norm: str, data: st.DataObject
) -> None:
    """A single one it has where it has one with all workers too, and where it is synchronised or there is none."""

    def is_by_itself(num_workers: int) -> bool:
        return norm != "group" and not (use_gpu and norm == "auto" and num_workers > 1)

    whole = override(
        training_preset("tiny"),
        {
            "schedule.global_batch_size": num_workers * steps * micro,
            "schedule.accumulation_steps": steps,
            "workers.num_workers": num_workers,
            "workers.use_gpu": use_gpu,
            "model.norm": norm,
        },
    )
    assert whole.accumulation_steps_of(num_workers) == steps
    fewer = data.draw(st.integers(1, num_workers))
    parts = whole.accumulation_steps_of(fewer)
    batch = whole.schedule.global_batch_size
    shares = [len(range(rank, batch, fewer)) for rank in range(fewer)]
    smallest, largest = min(shares) // parts, -(-max(shares) // parts)
    needs_two = is_by_itself(fewer) and (micro > 1 or not is_by_itself(num_workers))
    assert smallest >= 1 + needs_two
    if largest > micro:  # with one part more, a part would be too small
        assert min(shares) // (parts + 1) < 1 + needs_two
    if not needs_two and micro > 1:
        assert largest <= micro


def test_an_elastic_group_that_is_down_to_one_gpu_trains_on_two_images_at_a_time() -> None:
    changes = {
        "workers.use_gpu": True,
        "workers.num_workers": 8,
        "workers.min_workers": 1,
        "schedule.global_batch_size": 8,
    }
    eight = override(training_preset("tiny"), changes)
    assert [eight.accumulation_steps_of(number) for number in (8, 4, 1)] == [1, 2, 4]
    sixteen = override(eight, {"schedule.global_batch_size": 16})
    assert sixteen.accumulation_steps_of(5) == 2  # parts of 2 and 1, for 4 and 3 images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tiniest"], "no preset 'tiniest'. There are: tiny"),
        (["--preset"], "--preset must be followed by a value"),
        (["--config", "/nowhere.json"], "/nowhere.json is not: No such file"),
        (["--config", "a", "--preset", "b"], "Give one of them"),
    ],
)
def test_flags_that_name_nothing_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_training(training_preset, "demo", arguments, description="")


def test_a_configuration_stored_before_a_setting_was_added_loads_with_its_default() -> None:
    values = json.loads(to_json(training_preset("tiny")))
    for name in ("photometric", "max_class_share", "class_uniform_share"):
        del values["data"][name]
    for group, names in {
        "schedule": ("accumulation_steps",),
        "model": ("freeze_stages", "freeze_batch_norm"),
        "optim": ("warm_up_iterations", "warm_up_start", "max_gradient_norm", "ema_decay"),
        "workers": ("recompute", "compile", "min_workers", "peak_tflops"),
    }.items():
        for name in names:
            del values[group][name]
    del values["loss"]
    assert from_json(TrainingConfig, json.dumps(values)) == training_preset("tiny")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_class_share", 0.0, r"above 0 and at most 1, but got 0\.0\. mmsegmentation uses 0\.75"),
        ("max_class_share", 75.0, r"above 0 and at most 1, but got 75\.0"),
        ("max_class_share", float("nan"), "above 0 and at most 1"),
        ("class_uniform_share", -0.1, r"between 0 and 1, but got -0\.1\. 0 turns it off"),
        ("class_uniform_share", 1.5, "between 0 and 1"),
        ("photometric", 1, "must be of type bool"),
    ],
)
def test_shares_that_are_none_are_refused(name: str, value: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        override(training_preset("tiny"), {f"data.{name}": value})


def test_an_unknown_flag_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_training(training_preset, "demo", ["--data.crop-sizee", "129"], description="")
    assert stopped.value.code == 2
    assert "--data.crop-size" in capsys.readouterr().err


def test_the_digest_follows_what_decides_the_result_and_not_where_it_goes() -> None:
    tiny = training_preset("tiny")
    assert digest(tiny) == digest(override(tiny, {"tracking.storage_dir": "elsewhere"}))
    assert digest(tiny) != digest(override(tiny, {"schedule.seed": 1}))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
        max_leaves=8,
    )
)
def test_hostile_json_is_a_plain_message_or_a_configuration(value: Any) -> None:
    with contextlib.suppress(InputError):
        assert isinstance(from_json(TrainingConfig, json.dumps(value)), TrainingConfig)


@given(
    st.dictionaries(
        st.sampled_from(sorted(flat(TrainingConfig()))),
        st.integers() | st.floats() | st.text() | st.lists(st.integers()),
        max_size=3,
    )
)
def test_override_gives_what_was_asked_or_refuses(changes: dict[str, Any]) -> None:
    """Where a float is stored, a whole number becomes the nearest."""
    try:
        varied = flat(override(TrainingConfig(), changes))
    except InputError:
        return
    for path, value in changes.items():
        kept, asked = (it if isinstance(it, list | tuple) else (it,) for it in (varied[path], value))
        nearest = [float(it) if isinstance(own, float) else it for own, it in zip(kept, asked, strict=True)]
        assert list(kept) == nearest

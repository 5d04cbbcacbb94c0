"""The preset cityscapes_semseg_r50 trains as semseg's own tool/train.py does: groups, rates, ranges and losses.

SEGFLEET_SEMSEG names a checkout of github.com/hszhao/semseg (4f274c3); OpenCV is in the extra "bench".
"""

import collections
import importlib
import importlib.util
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pspnet.data import ROTATE_PROBABILITY
from pspnet.model import PSPNet
from pspnet.optim import poly_factor, set_lr
from pspnet.published import read_published
from segfleet.memory import network_of
from segfleet.presets import training_preset
from tests.segfleet_config.recipe_steps import new_optimizer, steps_of

pytestmark = pytest.mark.slow

EPOCHS, ITERATIONS, BATCH, CROP = 10, 2, 8, 33
PRESET = training_preset("cityscapes_semseg_r50")


@pytest.fixture(scope="module")
def semseg() -> Iterator[Any]:
    """Their training script as a module, on the CPU: nothing of it is changed but where its tensors are."""
    root = os.environ.get("SEGFLEET_SEMSEG", "")
    if not (Path(root) / "tool" / "train.py").is_file():
        pytest.skip("SEGFLEET_SEMSEG names no checkout of github.com/hszhao/semseg")
    pytest.importorskip("cv2", reason="semseg needs OpenCV: install the extra bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        patch.setitem(sys.modules, "tensorboardX", mock.MagicMock())
        patch.setattr(collections, "Iterable", collections.abc.Iterable, raising=False)
        patch.setattr(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor)
        patch.setattr(nn.Module, "cuda", lambda module, *args: module)
        spec = importlib.util.spec_from_file_location("semseg_train", Path(root) / "tool" / "train.py")
        assert spec is not None
        assert spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        # Their counts of hits are only logged, and torch has no histogram of whole numbers on CPUs.
        counts = torch.ones(3)
        patch.setattr(script, "intersectionAndUnionGPU", lambda *args: (counts, counts, counts))
        patch.setattr(script, "get_logger", lambda: logging.getLogger("semseg"))
        yield script
    for name in [name for name in sys.modules if name.split(".")[0] in ("model", "util")]:
        del sys.modules[name]


class Record:
    """What their training did: what it read, from which weights, with which rates, and its losses."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.groups: list[list[tuple[set[str], float]]] = []
        self.losses: list[tuple[float, float]] = []
        self.transforms: list[Any] = []


def their_settings(semseg: Any, layers: int) -> Any:
    folder = Path(os.environ["SEGFLEET_SEMSEG"]) / "config" / "cityscapes"
    return semseg.config.load_cfg_from_cfg_file(str(folder / f"cityscapes_pspnet{layers}.yaml"))


@pytest.mark.parametrize("layers", [50, 101])
def test_every_setting_of_their_file_is_the_presets(semseg: Any, layers: int) -> None:
    theirs, preset = their_settings(semseg, layers), training_preset(f"cityscapes_semseg_r{layers}")
    data, optim, schedule = preset.data, preset.optim, preset.schedule
    ours = {
        "train_h": data.crop_size,
        "train_w": data.crop_size,
        "scale_min": data.min_scale,
        "scale_max": data.max_scale,
        "rotate_min": -data.rotate_degrees,
        "rotate_max": data.rotate_degrees,
        "epochs": schedule.num_epochs,
        "batch_size": schedule.global_batch_size,
        "train_gpu": list(range(preset.workers.num_workers)),
        "base_lr": optim.base_lr,
        "power": optim.power,
        "momentum": optim.momentum,
        "weight_decay": optim.weight_decay,
        "aux_weight": optim.aux_loss_weight,
    }
    assert {name: theirs[name] for name in ours} == ours
    assert preset.model.backbone == f"resnet{theirs.layers}"


def trained_by_semseg(semseg: Any, folder: Path, dtype: torch.dtype) -> Record:
    """Run their main_worker on random pictures; its arguments are their configuration file's, made small.

    Residual branches begin at scale 0.2: at 1 rounding grows several times larger with each step.
    """
    record = Record()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(ITERATIONS * BATCH, 3, CROP, CROP, generator=generator, dtype=dtype)
    targets = torch.randint(0, 19, (len(images), CROP, CROP), generator=generator)
    targets[:, :20] = 255
    targets[1, 30:] = 255
    arguments = their_settings(semseg, 50)
    # One worker: as main() has it for one GPU.
    arguments.update(distributed=False, multiprocessing_distributed=False, sync_bn=False, workers=0)
    arguments.update(epochs=EPOCHS, batch_size=BATCH, save_path=str(folder), save_freq=1000)

    def pictures(*, transform: Any, **others: Any) -> list[tuple[Tensor, Tensor]]:
        record.transforms += transform.segtransform
        return list(zip(images, targets, strict=True))

    def before(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        if not record.batches:
            record.weights = {key: value.clone() for key, value in module.state_dict().items()}
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        record.groups.append(
            [
                ({names[id(it)] for it in group["params"]}, group["lr"])
                for group in optimizers[-1].param_groups
            ]
        )
        torch.manual_seed(len(record.batches))  # for the dropout
        record.batches.append(inputs)

    def after(module: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        record.losses.append((outputs[1].item(), outputs[2].item()))

    optimizers: list[torch.optim.Optimizer] = []
    make_optimizer = torch.optim.SGD

    def sgd(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizers.append(make_optimizer(*args, **kwargs))
        return optimizers[-1]

    resnets = importlib.import_module("model.resnet")

    def in_one_process(network: nn.Module) -> nn.Module:
        network.to(dtype)
        network.register_forward_pre_hook(before)
        network.register_forward_hook(after)
        return network

    torch.manual_seed(7)
    resnet = resnets.resnet50(pretrained=False)
    for name, scale in resnet.named_parameters():
        if name.startswith("layer") and name.endswith("bn3.weight"):
            nn.init.constant_(scale, 0.2)
    with (
        warnings.catch_warnings(),
        mock.patch.object(resnets, "resnet50", return_value=resnet),
        mock.patch.object(torch.nn, "DataParallel", in_one_process),
        mock.patch.object(torch.optim, "SGD", sgd),
        mock.patch.object(semseg.dataset, "SemData", pictures),
    ):
        warnings.filterwarnings("ignore", "'pin_memory' argument is set", UserWarning)
        semseg.main_worker([0], 1, arguments)
    return record


def test_parameter_groups_and_the_rate_of_each_iteration_are_semsegs(training: tuple[Record, PSPNet]) -> None:
    record, ours = training
    optimizer = new_optimizer(ours, PRESET.optim)
    counts = [
        sum(len(names) for names, _ in record.groups[0][:5]),
        sum(len(n) for n, _ in record.groups[0][5:]),
    ]
    assert [len(group["params"]) for group in optimizer.param_groups] == counts
    assert all(name.startswith("layer") for names, _ in record.groups[0][:5] for name in names)
    for iteration, groups in enumerate(record.groups):
        set_lr(optimizer, poly_factor(iteration, EPOCHS * ITERATIONS, PRESET.optim.power))
        backbone, heads = (group["lr"] for group in optimizer.param_groups)
        assert [lr for _, lr in groups] == pytest.approx([backbone] * 5 + [heads] * 3, rel=1e-12)
    settings = {key: optimizer.defaults[key] for key in ("momentum", "weight_decay")}
    assert settings == {"momentum": 0.9, "weight_decay": 1e-4}


def test_of_200_iterations_more_their_rates_are_higher_by_a_hundredth_of_the_first_at_most() -> None:
    """185 iterations an epoch here, 186 there: what the preset's docstring says of it."""
    optim = PRESET.optim
    ours, theirs = (
        np.array([poly_factor(iteration, total, optim.power) for iteration in range(37_000)])
        for total in (37_000, 37_200)
    )
    higher = optim.base_lr * (theirs - ours)
    assert higher.min() == 0
    assert higher.max() == higher[-1] == pytest.approx(9.03e-5, rel=1e-3)


def test_the_ranges_of_the_augmentation_are_semsegs(training: tuple[Record, PSPNet]) -> None:
    scale, rotate, blur, flip, crop = training[0].transforms[:5]
    data = PRESET.data
    assert scale.scale == [data.min_scale, data.max_scale]
    assert scale.aspect_ratio is None
    assert (rotate.rotate, rotate.p) == ([-data.rotate_degrees, data.rotate_degrees], ROTATE_PROBABILITY)
    assert flip.p == data.flip_probability
    assert (crop.crop_h, crop.crop_w, crop.crop_type, crop.ignore_label) == (713, 713, "rand", 255)
    assert (data.crop_size, data.photometric, data.max_class_share) == (713, False, 1.0)
    picture = np.random.default_rng(0).random((9, 9, 3), np.float32)
    for chance, is_blurred in ((data.blur_probability - 1e-9, True), (data.blur_probability, False)):
        with mock.patch.object(random, "random", lambda chance=chance: chance):
            assert (not np.array_equal(blur(picture, None)[0], picture)) == is_blurred
    assert blur.radius == 5


@pytest.fixture(scope="module")
def training(semseg: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, PSPNet]:
    folder = tmp_path_factory.mktemp("semseg")
    record = trained_by_semseg(semseg, folder, torch.float32)
    return record, our_network(record, folder)


def our_network(record: Record, folder: Path) -> PSPNet:
    """Return the preset's network with their stem, as its docstring says that it is set, and their first weights."""
    torch.save(record.weights, folder / "initial.pth")
    published = read_published(folder / "initial.pth")
    model = network_of(replace(PRESET.model, deep_stem=True), 19)
    assert published.architecture | {"dropout": PRESET.model.dropout} == model.architecture
    model.load_state_dict(published.weights)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-12)])
def test_the_losses_of_twenty_steps_are_semsegs(
    semseg: Any, training: tuple[Record, PSPNet], tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    """From equal weights, batches and dropout, at each step: in fp32 rounding grows from step to step."""
    record = training[0] if dtype == torch.float32 else trained_by_semseg(semseg, tmp_path, dtype)
    model = our_network(record, tmp_path).to(dtype)
    steps = steps_of(model, record.batches, PRESET.optim, max_iterations=EPOCHS * ITERATIONS)
    losses = [(step.main_loss, step.aux_loss) for step in steps]
    assert len(losses) == len(record.losses) == EPOCHS * ITERATIONS
    print("relative differences", np.abs(np.array(losses) / np.array(record.losses) - 1).max(1))
    np.testing.assert_allclose(losses, record.losses, rtol=tolerance)

"""The presets cityscapes_mmseg_r50_… train as mmsegmentation's own code does: network, groups, rates, ranges, losses.

SEGFLEET_MMSEG is a folder from which mmseg 1.2, mmengine, mmcv-lite 2.1 and OpenCV can be imported; mmseg's
configuration files are a part of it where pip has installed it. Without them these laws are skipped.
"""

import contextlib
import copy
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pspnet import photometric
from pspnet.data import draw_sample, num_iterations
from pspnet.labels import IGNORE_INDEX
from pspnet.loss import segmentation_loss
from pspnet.model import PSPNet, PSPNetOutput
from pspnet.optim import poly_factor, set_lr
from pspnet.photometric import distort, draw_photometric
from pspnet.published import load_network_weights, read_published
from pspnet.sampling import NUM_REDRAWS, is_mixed
from pspnet.sizes import sides
from segfleet.config import LossConfig, TrainingConfig
from segfleet.memory import network_of
from segfleet.presets import training_preset
from tests.segfleet_config.recipe_steps import new_optimizer, steps_of

pytestmark = pytest.mark.slow

STEPS, BATCH, CLASSES = 20, 4, 19
NUM_TRAIN_IMAGES = 2975
CROPS = {"769x769": (33, 33), "512x1024": (40, 56)}
"""Their name of each crop, and the small one of these tests."""


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """Their folder, importable; mmcv's compiled operators, which PSPNet has no use for, are stand-ins."""
    folder = os.environ.get("SEGFLEET_MMSEG", "")
    if not (Path(folder) / "mmseg").is_dir():
        pytest.skip("SEGFLEET_MMSEG names no folder with mmseg, mmengine and mmcv-lite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, folder])
        patch.setitem(sys.modules, "mmcv.ops", mock.MagicMock())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for part in ("models", "datasets"):
                importlib.import_module(f"mmseg.{part}")
        yield Path(folder)


@contextlib.contextmanager
def their_scope() -> Iterator[Any]:
    """Give mmengine's registries; names are looked up in mmseg's first. Their warnings are theirs."""
    registries = importlib.import_module("mmengine.registry")
    with warnings.catch_warnings(), registries.DefaultScope.overwrite_default_scope("mmseg"):
        warnings.simplefilter("ignore")
        yield registries


@dataclass(frozen=True)
class Recipe:
    """A preset and the configuration file that it is after."""

    preset: TrainingConfig
    theirs: Any
    crop: tuple[int, int]

    def ours(self) -> PSPNet:
        """Return the preset's network with their stem, as its docstring says that it is set."""
        return network_of(replace(self.preset.model, deep_stem=True, deep_stem_channels=64), CLASSES)


@pytest.fixture(scope="module", params=CROPS)
def recipe(root: Path, request: pytest.FixtureRequest) -> Recipe:
    """Installed by pip their configuration files are a part of the package, in a checkout they lie beside it."""
    folders = [root / "mmseg" / ".mim" / "configs", root / "configs"]
    name = f"pspnet/pspnet_r50-d8_4xb2-80k_cityscapes-{request.param}.py"
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        pytest.skip(f"SEGFLEET_MMSEG has no {name} of mmsegmentation")
    with their_scope():
        theirs = importlib.import_module("mmengine.config").Config.fromfile(str(path))
    suffix = "769" if request.param == "769x769" else request.param
    return Recipe(training_preset(f"cityscapes_mmseg_r50_{suffix}"), theirs, CROPS[request.param])


def their_network(settings: Any) -> Any:
    """Build the network with random weights; in one process SyncBN is BatchNorm, by their own function.

    They begin with residual branches of scale 0, through which no dilation would show. With scale 1 rounding grows so
    fast that it is a ten-thousandth of the loss after six steps. 0.2 shows the one without the other.
    """
    settings = copy.deepcopy(settings.model)
    settings.pretrained = None
    torch.manual_seed(7)
    with their_scope() as registries:
        network = registries.MODELS.build(settings)
        network.init_weights()
        for name, scale in network.named_parameters():
            if name.startswith("backbone.layer") and name.endswith("bn3.weight"):
                nn.init.constant_(scale, 0.2)
        return importlib.import_module("mmengine.model").revert_sync_batchnorm(network)


def published(network: nn.Module, recipe: Recipe, path: Path) -> Path:
    """Save their network as their trainings do: weights with the text of the configuration."""
    torch.save({"meta": {"cfg": recipe.theirs.pretty_text}, "state_dict": network.state_dict()}, path)
    return path


def our_names(network: nn.Module, recipe: Recipe, path: Path) -> dict[str, str]:
    """Return this network's name of each of their tensors: each is written as its number, and found again."""
    state = network.state_dict()
    numbers = {
        key: torch.full((), number, dtype=value.dtype).expand(value.shape)
        for number, (key, value) in enumerate(state.items())
    }
    torch.save({"meta": {"cfg": recipe.theirs.pretty_text}, "state_dict": numbers}, path)
    keys = list(state)
    return {keys[int(value.flatten()[0])]: name for name, value in read_published(path).weights.items()}


def test_every_setting_of_their_file_is_the_presets(recipe: Recipe) -> None:
    theirs, preset = recipe.theirs, recipe.preset
    optim, model = preset.optim, preset.model
    assert theirs.optim_wrapper == {
        "type": "OptimWrapper",
        "optimizer": {
            "type": "SGD",
            "lr": optim.base_lr,
            "momentum": optim.momentum,
            "weight_decay": optim.weight_decay,
        },
        "clip_grad": None,
    }
    assert (optim.max_gradient_norm, optim.warm_up_iterations, optim.ema_decay) == (0, 0, 0)
    assert preset.loss == LossConfig()
    assert theirs.param_scheduler == [
        {
            "type": "PolyLR",
            "eta_min": optim.min_lr,
            "power": optim.power,
            "begin": 0,
            "end": 80_000,
            "by_epoch": False,
        }
    ]
    # Their file's name says 4xb2: four GPUs with two images each.
    assert preset.workers.num_workers == 4
    assert preset.per_worker_batch_size == theirs.train_dataloader.batch_size == 2
    assert theirs.train_cfg.max_iters == 80_000
    per_epoch = num_iterations(NUM_TRAIN_IMAGES, preset.schedule.global_batch_size)
    assert preset.schedule.num_epochs * per_epoch == 80_136
    for head, weight in (
        (theirs.model.decode_head, 1.0),
        (theirs.model.auxiliary_head, optim.aux_loss_weight),
    ):
        assert head.loss_decode == {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": weight}
        assert (head.align_corners, head.dropout_ratio) == (model.align_corners, model.dropout)
        assert head.norm_cfg.type == "SyncBN"
    assert model.norm == "auto"  # synchronised on GPUs
    assert (theirs.model.decode_head.channels, theirs.model.decode_head.pool_scales) == (
        model.head_channels,
        model.bin_sizes,
    )
    assert (theirs.model.backbone.depth, theirs.model.backbone.norm_eval) == (50, False)
    assert (model.backbone, model.freeze_stages, model.freeze_batch_norm) == ("resnet50", 0, "none")


def test_stem_apart_the_network_is_theirs_with_each_stride_and_dilation(
    recipe: Recipe, tmp_path: Path
) -> None:
    theirs, ours = their_network(recipe.theirs), recipe.ours()
    names = our_names(theirs, recipe, tmp_path / "names.pth")
    assert set(names.values()) == set(ours.state_dict())
    architecture = read_published(tmp_path / "names.pth").architecture
    assert architecture | {"dropout": recipe.preset.model.dropout} == ours.architecture

    def geometry(network: nn.Module) -> dict[str, tuple[Any, ...]]:
        return {
            f"{name}.weight": (part.kernel_size, part.stride, part.padding, part.dilation)
            for name, part in network.named_modules()
            if isinstance(part, nn.Conv2d)
        }

    found = {names[name]: sizes for name, sizes in geometry(theirs).items()}
    assert found == geometry(ours)
    dilations = {sizes[3] for name, sizes in found.items() if name.startswith("backbone.layer4")}
    assert dilations == {(1, 1), (2, 2), (4, 4)}  # the first block has half of the others'


def test_parameter_groups_are_theirs(recipe: Recipe, tmp_path: Path) -> None:
    """By the optimizer's constructor that their trainings use: one rate and one decay for all parameters."""
    theirs, ours = their_network(recipe.theirs), recipe.ours()
    with their_scope():
        wrapper = importlib.import_module("mmengine.optim").build_optim_wrapper(
            theirs, recipe.theirs.optim_wrapper
        )
    names = our_names(theirs, recipe, tmp_path / "names.pth")

    def groups(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[tuple[float, ...], set[str]]:
        named = {id(parameter): name for name, parameter in network.named_parameters()}
        found: dict[tuple[float, ...], set[str]] = {}
        for group in optimizer.param_groups:
            settings = tuple(float(group[key]) for key in ("lr", "momentum", "weight_decay", "dampening"))
            found.setdefault((*settings, group["nesterov"]), set()).update(
                named[id(parameter)] for parameter in group["params"]
            )
        return found

    expected = {
        settings: {names[name] for name in parameters}
        for settings, parameters in groups(wrapper.optimizer, theirs).items()
    }
    assert groups(new_optimizer(ours, recipe.preset.optim), ours) == expected
    assert expected == {(0.01, 0.9, 5e-4, 0.0, False): {name for name, _ in ours.named_parameters()}}


def test_the_rate_of_every_iteration_is_theirs(recipe: Recipe) -> None:
    """By mmengine's own schedule, which reaches its end one iteration before the training's: 79,999 of ours.

    The rates of the preset's 80,136 iterations (216 whole epochs) are higher than theirs, the last by 3.2e-5.
    """
    (schedule,) = recipe.theirs.param_scheduler
    theirs = torch.optim.SGD(
        [torch.zeros(1, requires_grad=True)], lr=recipe.theirs.optim_wrapper.optimizer.lr
    )
    with their_scope() as registries:
        scheduler = registries.PARAM_SCHEDULERS.build({**schedule, "optimizer": theirs})
    ours = new_optimizer(recipe.ours(), recipe.preset.optim)
    expected: list[float] = []
    rates: list[float] = []
    planned: list[float] = []
    for iteration in range(recipe.theirs.train_cfg.max_iters):
        expected.append(theirs.param_groups[0]["lr"])
        for iterations, found in ((79_999, rates), (80_136, planned)):
            set_lr(ours, poly_factor(iteration, iterations, recipe.preset.optim.power))
            backbone, heads = (group["lr"] for group in ours.param_groups)
            assert backbone == heads
            found.append(backbone)
        theirs.step()
        scheduler.step()
    higher = np.subtract(planned, expected)
    print("relative", np.abs(np.divide(rates, expected) - 1).max(), "higher", higher.max())
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
    assert -1e-15 < higher.min() < higher.max() == higher[-1] < 3.3e-5
    assert expected[-1] == pytest.approx(recipe.preset.optim.min_lr)


def their_transforms(recipe: Recipe) -> dict[str, Any]:
    with their_scope() as registries:
        pipeline = [
            registries.TRANSFORMS.build(step) for step in recipe.theirs.train_dataloader.dataset.pipeline
        ]
    return {type(step).__name__: step for step in pipeline}


def test_the_steps_of_the_augmentation_and_their_ranges_are_theirs(recipe: Recipe) -> None:
    steps, data = their_transforms(recipe), recipe.preset.data
    assert list(steps) == [
        "LoadImageFromFile",
        "LoadAnnotations",
        "RandomResize",
        "RandomCrop",
        "RandomFlip",
        "PhotoMetricDistortion",
        "PackSegInputs",
    ]
    assert steps["RandomResize"].ratio_range == (data.min_scale, data.max_scale)
    assert steps["RandomCrop"].crop_size == sides(data.crop_size)
    assert steps["RandomCrop"].cat_max_ratio == data.max_class_share
    assert (steps["RandomFlip"].prob, steps["RandomFlip"].direction) == (data.flip_probability, "horizontal")
    distortion = steps["PhotoMetricDistortion"]
    assert data.photometric
    assert distortion.brightness_delta == photometric.BRIGHTNESS_DELTA
    assert (distortion.contrast_lower, distortion.contrast_upper) == photometric.CONTRAST_RANGE
    assert (distortion.saturation_lower, distortion.saturation_upper) == photometric.SATURATION_RANGE
    assert distortion.hue_delta == photometric.HUE_DELTA
    assert (data.rotate_degrees, data.blur_probability, data.class_uniform_share) == (0, 0, 0)


def test_an_image_is_made_as_large_as_theirs_by_the_same_chance(recipe: Recipe) -> None:
    """To two pixels: they cut where we round, and the recipe of 769 begins from 2049x1025."""
    resize, data = their_transforms(recipe)["RandomResize"], recipe.preset.data
    image = np.zeros((1024, 2048), np.uint8)
    chances = np.full(7, 0.0)
    for chance in (0.0, 0.123, 0.5, 0.777, 1 - 1e-9):
        chances[0] = chance
        generator = mock.Mock(random=mock.Mock(return_value=chances))
        with (
            mock.patch.object(np.random, "random_sample", lambda chance=chance: chance),
            their_scope(),
        ):
            expected = resize({"img": image})["img_shape"]
        with mock.patch.object(np.random, "Generator", return_value=generator):
            sample = draw_sample(
                seed=0,
                epoch=0,
                position=0,
                index=0,
                size=image.shape,
                crop_size=data.crop_size,
                min_scale=data.min_scale,
                max_scale=data.max_scale,
                flip_probability=data.flip_probability,
                rotate_degrees=data.rotate_degrees,
                blur_probability=data.blur_probability,
            )
        assert np.abs(np.subtract(sample.scaled_size, expected)).max() <= 2


@pytest.mark.parametrize(
    "counts",
    [
        (100, 0, 0),
        (0, 0, 100),
        (75, 25, 0),
        (74, 26, 0),
        (60, 20, 20),
        (59, 20, 21),
        (30, 0, 70),
        (50, 50, 0),
    ],
)
def test_a_window_is_placed_anew_where_theirs_is(recipe: Recipe, counts: tuple[int, int, int]) -> None:
    """Pixels of two classes and ignored ones: they draw one place, or eleven, the last of which is taken unseen."""
    window = their_transforms(recipe)["RandomCrop"]
    target = np.repeat(np.array([3, 5, IGNORE_INDEX], np.uint8), counts).reshape(10, 10)
    with mock.patch.object(np.random, "randint", side_effect=np.random.randint) as drawn:
        window.crop_bbox({"img": target, "gt_seg_map": target})
    is_kept = is_mixed(np.array(counts[:2]), recipe.preset.data.max_class_share)
    assert drawn.call_count == 2 * (1 if is_kept else 1 + NUM_REDRAWS)


class Told:
    """Stands for numpy.random in their distortion: says what it is told, if it is asked in the ranges told."""

    def __init__(self, steps: photometric.Photometric) -> None:
        def step(value: float | None, *limits: float) -> list[tuple[tuple[float, ...], float]]:
            return [((2,), 0)] if value is None else [((2,), 1), (limits, value)]

        contrast = step(steps.contrast, *photometric.CONTRAST_RANGE)
        colours = step(steps.saturation, *photometric.SATURATION_RANGE)
        colours += step(steps.hue, -photometric.HUE_DELTA, photometric.HUE_DELTA)
        self.answers = step(steps.brightness, -photometric.BRIGHTNESS_DELTA, photometric.BRIGHTNESS_DELTA)
        self.answers += [((2,), int(steps.is_contrast_first))]
        self.answers += contrast + colours if steps.is_contrast_first else colours + contrast

    def uniform(self, *limits: float) -> float:
        expected, value = self.answers.pop(0)
        assert limits == expected
        return value

    randint = uniform


def test_a_distorted_window_is_theirs(recipe: Recipe) -> None:
    """Equal but for the colours, which OpenCV rounds to another level in a few values of ten thousand."""
    distortion = their_transforms(recipe)["PhotoMetricDistortion"]
    code = importlib.import_module("mmseg.datasets.transforms.transforms")
    generator = np.random.default_rng(0)
    differences = []
    for position in range(60):
        steps = draw_photometric(seed=0, epoch=0, position=position) or photometric.Photometric()
        image = generator.integers(0, 256, (64, 128, 3), np.uint8)
        told = Told(steps)
        with mock.patch.object(code, "random", told):
            expected = distortion({"img": np.ascontiguousarray(image[:, :, ::-1])})["img"][:, :, ::-1]
        assert told.answers == []
        found = distort(torch.from_numpy(image.transpose(2, 0, 1)), steps).byte().numpy().transpose(1, 2, 0)
        differences.append(np.abs(found.astype(int) - expected))
        if steps.saturation is None and steps.hue is None:
            assert differences[-1].max() == 0
    together = np.stack(differences)
    print("differ", np.count_nonzero(together) / together.size, "by", together.max())
    assert together.max() <= 3
    assert np.count_nonzero(together) < 1e-3 * together.size


@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_their_loss_is_divided_by_all_pixels_and_with_avg_non_ignore_it_is_ours(
    recipe: Recipe, avg_non_ignore: bool
) -> None:
    settings = {**recipe.theirs.model.decode_head.loss_decode, "avg_non_ignore": avg_non_ignore}
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, CLASSES, 24, 40, generator=generator, dtype=torch.float64)
    target = torch.randint(0, CLASSES, (2, 24, 40), generator=generator)
    target[:, :5] = target[1] = IGNORE_INDEX
    num_valid = 19 * 40
    with their_scope() as registries:
        theirs = registries.MODELS.build(settings)(logits, target, ignore_index=IGNORE_INDEX)
    ours = segmentation_loss(
        PSPNetOutput(logits, None), target, num_valid=num_valid, aux_loss_weight=0.0
    ).main
    # They add the smallest step of a float32 to what they divide by.
    divisor = (num_valid if avg_non_ignore else target.numel()) + torch.finfo(torch.float32).eps
    torch.testing.assert_close(theirs, ours * num_valid / divisor, rtol=1e-12, atol=0)


@dataclass
class Record:
    """What their training did: from which weights, what the network was given, rates and losses, final weights."""

    initial: Path
    batches: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)
    final: dict[str, Tensor] = field(default_factory=dict)


def pictures(crop: tuple[int, int], *, is_whole: bool) -> list[dict[str, Any]]:
    """Return two batches as their loader gives them: blue first, 0 to 255, fields in the colours of their classes."""
    structures = importlib.import_module("mmseg.structures")
    data = importlib.import_module("mmengine.structures").PixelData
    generator = torch.Generator().manual_seed(0)
    palette = torch.randint(0, 200, (CLASSES, 3), generator=generator)
    batches = []
    for _ in range(2):
        fields = torch.randint(0, CLASSES, (BATCH, 1, 3, 4), generator=generator)
        targets = nn.functional.interpolate(fields.float(), crop).long()
        noise = torch.randint(0, 56, (BATCH, 3, *crop), generator=generator)
        images = (palette[targets[:, 0]].permute(0, 3, 1, 2) + noise).byte()
        if not is_whole:
            targets[:, :, : crop[0] // 2] = IGNORE_INDEX
            targets[1, :, :, 30:] = IGNORE_INDEX
        samples = [structures.SegDataSample(gt_sem_seg=data(data=target)) for target in targets]
        batches.append({"inputs": list(images), "data_samples": samples})
    return batches


def trained_by_mmseg(
    recipe: Recipe, folder: Path, *, dtype: torch.dtype, num_steps: int, avg_non_ignore: bool
) -> Record:
    """Train by their train_step, OptimWrapper and schedule, the schedule of 80,000 iterations made one of STEPS."""
    settings = copy.deepcopy(recipe.theirs)
    settings.model.data_preprocessor.size = recipe.crop
    settings.param_scheduler[0].end = STEPS
    if avg_non_ignore:
        for head in (settings.model.decode_head, settings.model.auxiliary_head):
            head.loss_decode.avg_non_ignore = True
    network = their_network(settings)
    record = Record(published(network, recipe, folder / "initial.pth"))
    network.to(dtype)
    batches = pictures(recipe.crop, is_whole=not avg_non_ignore)

    def note(backbone: nn.Module, inputs: tuple[Tensor]) -> None:
        samples = batches[len(record.batches) % 2]["data_samples"]
        targets = torch.stack([sample.gt_sem_seg.data[0] for sample in samples])
        record.batches.append((inputs[0], targets))

    network.backbone.register_forward_pre_hook(note)
    with their_scope() as registries:
        wrapper = importlib.import_module("mmengine.optim").build_optim_wrapper(
            network, settings.optim_wrapper
        )
        scheduler = registries.PARAM_SCHEDULERS.build({**settings.param_scheduler[0], "optimizer": wrapper})
        for step in range(num_steps):
            record.rates += wrapper.get_lr()["lr"]
            torch.manual_seed(step)  # for the dropout
            losses = network.train_step(batches[step % 2], wrapper)
            record.losses.append((losses["decode.loss_ce"].item(), losses["aux.loss_ce"].item()))
            scheduler.step()
    record.final = read_published(published(network, recipe, folder / "final.pth")).weights
    return record


@pytest.mark.parametrize(
    ("dtype", "num_steps", "avg_non_ignore", "tolerance"),
    [
        (torch.float32, 2, False, 1e-6),
        (torch.float64, STEPS, False, 2e-10),
        (torch.float64, 3, True, 2e-10),
    ],
    ids=["fp32", "float64", "float64, ignored pixels"],
)
def test_the_losses_of_the_first_steps_are_theirs(
    recipe: Recipe,
    tmp_path: Path,
    dtype: torch.dtype,
    num_steps: int,
    avg_non_ignore: bool,
    tolerance: float,
) -> None:
    """From equal weights, batches and dropout; in float64 the weights after them, BatchNorm's statistics too."""
    record = trained_by_mmseg(
        recipe, tmp_path, dtype=dtype, num_steps=num_steps, avg_non_ignore=avg_non_ignore
    )
    ours, optim = recipe.ours(), recipe.preset.optim
    load_network_weights(ours, str(record.initial))
    steps = steps_of(ours.to(dtype), record.batches, optim, max_iterations=STEPS - 1)
    assert len(steps) == num_steps
    losses = [(step.main_loss, optim.aux_loss_weight * step.aux_loss) for step in steps]
    final = ours.state_dict()
    weights = [
        ((final[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)).item()
        for name, value in record.final.items()
        if value.is_floating_point()
    ]
    print("relative differences", np.abs(np.array(losses) / np.array(record.losses) - 1).max(1), max(weights))
    np.testing.assert_allclose([step.lr for step in steps], record.rates, rtol=1e-12)
    np.testing.assert_allclose(losses, record.losses, rtol=tolerance)
    if dtype == torch.float64:
        assert max(weights) < 1e-8

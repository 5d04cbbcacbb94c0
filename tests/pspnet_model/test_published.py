"""Checkpoints of semseg and mmsegmentation give here the logits that they give there, by their own code.

SEGFLEET_SEMSEG is a checkout of github.com/hszhao/semseg (4f274c3), SEGFLEET_MMSEG a folder from which mmseg 1.2,
mmengine and mmcv-lite can be imported; without them these laws are skipped.
"""

import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from pspnet.errors import InputError
from pspnet.model import PSPNet
from pspnet.published import load_network_weights, read_published
from pspnet.published_names import renamed

TOLERANCE = 1e-5
SIZES = [(65, 65), (121, 153), (97, 41)]


@pytest.fixture
def semseg(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Their modules `model.pspnet` and `model.resnet`, for the time of a test."""
    folder = os.environ.get("SEGFLEET_SEMSEG", "")
    if not (Path(folder) / "model" / "pspnet.py").is_file():
        pytest.skip("SEGFLEET_SEMSEG names no checkout of github.com/hszhao/semseg")
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module("model.pspnet")
    for name in [name for name in sys.modules if name == "model" or name.startswith("model.")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def mmseg() -> Iterator[Any]:
    """Their models; mmcv's compiled operators, which PSPNet has no use for, are stand-ins."""
    folder = os.environ.get("SEGFLEET_MMSEG", "")
    if not (Path(folder) / "mmseg").is_dir():
        pytest.skip("SEGFLEET_MMSEG names no folder with mmseg, mmengine and mmcv-lite")
    pytest.importorskip("cv2", reason="mmcv needs OpenCV: install the extra bench")
    sys.path.append(folder)
    sys.modules["mmcv.ops"] = mock.MagicMock()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield importlib.import_module("mmseg.models")
    del sys.modules["mmcv.ops"]
    sys.path.remove(folder)


def randomised(network: nn.Module) -> Any:
    """Random statistics and scales: with BatchNorm as it begins, mixed-up names of its parts would not show."""
    random = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            values = [torch.rand(module.num_features, generator=random) for _ in range(4)]
            state = {"weight": 0.5 + values[0], "bias": values[1] - 0.5}
            state |= {"running_mean": values[2] - 0.5, "running_var": 0.5 + values[3]}
            module.load_state_dict(state | {"num_batches_tracked": torch.tensor(7)})
    return network.eval()


def equal_logits(ours: PSPNet, theirs: Callable[[Tensor], Tensor], sizes: list[tuple[int, int]]) -> None:
    for size in sizes:
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected, logits = theirs(images), ours(images).logits
        assert logits.shape == expected.shape == (2, 19, *size)
        difference = (logits - expected).abs().max() / expected.abs().max()
        assert difference < TOLERANCE, f"{difference:.1e} at {size}"


def semseg_network(semseg: Any, layers: int = 50, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return randomised(semseg.PSPNet(layers=layers, classes=19, pretrained=False, **arguments))


@pytest.mark.parametrize("saved_as", ["their training", "alone", "safetensors"])
def test_semsegs_checkpoints_give_semsegs_logits(semseg: Any, tmp_path: Path, saved_as: str) -> None:
    theirs = semseg_network(semseg)
    path = tmp_path / "train_epoch_200.pth"
    if saved_as == "their training":
        # tool/train.py saves DataParallel's names with epoch and optimizer.
        state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
        torch.save({"epoch": 200, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, path)
    elif saved_as == "alone":
        torch.save(theirs.state_dict(), path)
    else:
        path = path.with_suffix(".safetensors")
        safetensors.torch.save_file(theirs.state_dict(), path)
    published = read_published(path)
    assert published.origin == "semseg"
    assert (published.architecture["backbone"], published.architecture["deep_stem_channels"]) == (
        "resnet50",
        128,
    )
    ours = PSPNet.from_architecture(published.architecture).eval()
    ours.load_state_dict(published.weights, strict=True)
    equal_logits(ours, theirs, SIZES)


def test_semsegs_plain_stem_too(semseg: Any, tmp_path: Path) -> None:
    """Their ResNet has both; their PSPNet takes the deep one, so that the layer is exchanged here."""
    theirs = semseg_network(semseg, layers=101)
    resnet = sys.modules["model.resnet"].resnet101(deep_base=False)
    theirs.layer0 = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
    theirs.layer1 = resnet.layer1
    torch.save(randomised(theirs).state_dict(), tmp_path / "plain.pth")
    published = read_published(tmp_path / "plain.pth")
    assert (published.architecture["backbone"], published.architecture["deep_stem"]) == ("resnet101", False)
    ours = PSPNet.from_architecture(published.architecture).eval()
    ours.load_state_dict(published.weights, strict=True)
    equal_logits(ours, theirs, [(65, 73)])


def test_semsegs_auxiliary_logits_are_ours(semseg: Any, tmp_path: Path) -> None:
    theirs = semseg_network(semseg)
    torch.save(theirs.state_dict(), tmp_path / "semseg.pth")
    published = read_published(tmp_path / "semseg.pth")
    ours = PSPNet.from_architecture(published.architecture).eval()
    ours.load_state_dict(published.weights)
    images = torch.randn(1, 3, 65, 73)
    with torch.no_grad():
        expected = theirs.aux(theirs.layer3(theirs.layer2(theirs.layer1(theirs.layer0(images)))))
        assert ours.aux_head is not None
        logits = ours.aux_head(ours.backbone(images).stage3)
    assert (logits - expected).abs().max() / expected.abs().max() < TOLERANCE


def mmseg_network(mmseg: Any, *, depth: int, stem: str, align_corners: bool) -> Any:
    """As configs/_base_/models/pspnet_r50-d8.py, SyncBN as BN."""
    norm = {"type": "BN", "requires_grad": True}
    common = {"norm_cfg": norm, "num_classes": 19, "dropout_ratio": 0.1, "align_corners": align_corners}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network: Any = nn.Module()
        network.backbone = getattr(mmseg, stem)(
            depth=depth, dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1), norm_cfg=norm, contract_dilation=True
        )
        network.decode_head = mmseg.decode_heads.PSPHead(
            in_channels=2048, in_index=3, channels=512, pool_scales=(1, 2, 3, 6), **common
        )
        network.auxiliary_head = mmseg.decode_heads.FCNHead(
            in_channels=1024, in_index=2, channels=256, num_convs=1, concat_input=False, **common
        )
    for head in (network.decode_head, network.auxiliary_head):
        nn.init.normal_(head.conv_seg.weight, std=0.01)
    return randomised(network)


def mmseg_logits(network: Any, images: Tensor, head: str = "decode_head") -> Tensor:
    """As EncoderDecoder.encode_decode: the head, then `resize` to the image."""
    wrappers = importlib.import_module("mmseg.models.utils.wrappers")
    part = getattr(network, head)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = part(network.backbone(images))
        return wrappers.resize(
            cells, size=images.shape[2:], mode="bilinear", align_corners=part.align_corners
        )


@pytest.mark.parametrize(
    ("depth", "stem", "align_corners", "sizes"),
    [
        (50, "ResNetV1c", False, [(64, 128), (65, 65), (101, 83)]),
        (50, "ResNetV1c", True, SIZES),
        (101, "ResNet", False, [(60, 75)]),
    ],
)
def test_mmsegmentations_checkpoints_give_mmsegmentations_logits(
    mmseg: Any, tmp_path: Path, depth: int, stem: str, align_corners: bool, sizes: list[tuple[int, int]]
) -> None:
    theirs = mmseg_network(mmseg, depth=depth, stem=stem, align_corners=align_corners)
    config = f"model = dict(decode_head=dict(type='PSPHead', align_corners={align_corners}))"
    meta = {"mmseg_version": "0.9.0", "config": config, "CLASSES": ("road",), "PALETTE": [[128, 64, 128]]}
    torch.save({"meta": meta, "state_dict": theirs.state_dict()}, tmp_path / "pspnet.pth")
    published = read_published(tmp_path / "pspnet.pth")
    assert published.origin == "mmsegmentation"
    assert published.architecture["deep_stem_channels"] == (64 if stem == "ResNetV1c" else 128)
    ours = PSPNet.from_architecture(published.architecture).eval()
    ours.load_state_dict(published.weights, strict=True)
    equal_logits(ours, lambda images: mmseg_logits(theirs, images), sizes)
    images = torch.randn(1, 3, *sizes[0])
    with torch.no_grad():
        assert ours.aux_head is not None
        cells = ours.aux_head(ours.backbone(images).stage3)
        expected = theirs.auxiliary_head(theirs.backbone(images))
    assert (cells - expected).abs().max() / expected.abs().max() < TOLERANCE


EVEN_SIZES = [(64, 128), (65, 65), (101, 83)]
COARSE_SIZES = [(192, 256), (161, 129), (101, 83)]
"""Whose cells at output stride 32 are more than one dilation."""

CONFIGURED: list[tuple[str, list[tuple[int, int]], dict[str, Any]]] = [
    (
        "pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024",
        EVEN_SIZES,
        {"backbone": "resnet18", "deep_stem": True, "contract_dilation": True, "dilate_first_only": True},
    ),
    (
        "pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-769x769",
        SIZES,
        {"backbone": "resnet18", "align_corners": True},
    ),
    (
        "pspnet/pspnet_r18b-d8_4xb2-80k_cityscapes-512x1024",
        EVEN_SIZES,
        {"deep_stem": False, "head_channels": 128},
    ),
    (
        "mobilenet_v2/mobilenet-v2-d8_pspnet_4xb2-80k_cityscapes-512x1024",
        EVEN_SIZES,
        {"backbone": "mobilenet_v2", "branch_channels": 512, "aux_channels": 256, "dilate_first_only": True},
    ),
    (
        "pspnet/pspnet_r50-d32_4xb2-80k_cityscapes-512x1024",
        COARSE_SIZES,
        {"backbone": "resnet50", "output_stride": 32, "dilations": [1, 1, 2, 4], "branch_channels": 0},
    ),
    ("pspnet/pspnet_r50b-d32_4xb2-80k_cityscapes-512x1024", COARSE_SIZES, {"deep_stem": False}),
]


def mmseg_configured(name: str) -> tuple[Any, str]:
    """Return the network of one of their configuration files, and its text as it lies beside their weights.

    Its weights keep the scale of what they take: through the small ones that it has at first no dilation of
    MobileNetV2 would show.
    """
    root = Path(os.environ["SEGFLEET_MMSEG"])
    folders = [root / "mmseg" / ".mim" / "configs", root / "configs"]
    path = next((folder / f"{name}.py" for folder in folders if (folder / f"{name}.py").is_file()), None)
    if path is None:
        pytest.skip(f"SEGFLEET_MMSEG has no {name}.py of mmsegmentation")
    registries = importlib.import_module("mmengine.registry")
    torch.manual_seed(0)
    with warnings.catch_warnings(), registries.DefaultScope.overwrite_default_scope("mmseg"):
        warnings.simplefilter("ignore")
        config = importlib.import_module("mmengine.config").Config.fromfile(str(path))
        text = config.pretty_text
        config.model.pretrained = None
        network: Any = registries.MODELS.build(config.model)
        # In one process SyncBN is BatchNorm, by their own function.
        network = importlib.import_module("mmengine.model").revert_sync_batchnorm(network)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return randomised(network), text


@pytest.mark.parametrize(("name", "sizes", "settings"), CONFIGURED)
def test_the_networks_of_mmsegmentations_configuration_files_give_their_logits(
    mmseg: Any, tmp_path: Path, name: str, sizes: list[tuple[int, int]], settings: dict[str, Any]
) -> None:
    theirs, text = mmseg_configured(name)
    torch.save({"meta": {"cfg": text}, "state_dict": theirs.state_dict()}, tmp_path / "pspnet.pth")
    published = read_published(tmp_path / "pspnet.pth")
    assert published.crop_size == (769 if "769" in name else "512x1024")
    assert published.architecture | settings == published.architecture
    ours = PSPNet.from_architecture(published.architecture).eval()
    ours.load_state_dict(published.weights, strict=True)
    equal_logits(ours, lambda images: mmseg_logits(theirs, images), sizes)
    assert ours.aux_head is not None
    for size in sizes:
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            cells = ours.aux_head(ours.backbone(images).stage3)
            expected = theirs.auxiliary_head(theirs.backbone(images))
        difference = (cells - expected).abs().max() / expected.abs().max()
        assert difference < TOLERANCE, f"{difference:.1e} at {size}"


# What follows needs no code of others: a network of ours under their names.


def small() -> PSPNet:
    torch.manual_seed(0)
    return randomised(
        PSPNet(19, backbone="resnet50", head_channels=16, deep_stem=True, deep_stem_channels=64)
    )


def as_semseg(network: PSPNet) -> dict[str, Tensor]:
    numbers = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6, "bn3": 7}
    parts = {"conv": 0, "norm": 1, "classifier": 4}
    state = {}
    for key, value in network.state_dict().items():
        part, name, rest = key.split(".", 2)
        if part == "backbone":
            state[f"layer0.{numbers[name]}.{rest}" if name in numbers else f"{name}.{rest}"] = value
        elif name == "branches":
            branch, index, what = rest.split(".")
            state[f"ppm.features.{branch}.{int(index) + 1}.{what}"] = value
        else:
            state[f"{'cls' if part == 'head' else 'aux'}.{parts[name]}.{rest}"] = value
    return state


def as_mmsegmentation(network: PSPNet) -> dict[str, Tensor]:
    stem = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6, "bn3": 7}
    if not network.architecture["deep_stem"]:
        stem = {}
    heads = {"head": "decode_head", "aux_head": "auxiliary_head"}
    parts = {
        ("head", "conv"): "bottleneck.conv",
        ("head", "norm"): "bottleneck.bn",
        ("aux_head", "conv"): "convs.0.conv",
        ("aux_head", "norm"): "convs.0.bn",
    }
    state = {}
    for key, value in network.state_dict().items():
        part, name, rest = key.split(".", 2)
        if part == "backbone":
            state[f"backbone.stem.{stem[name]}.{rest}" if name in stem else key] = value
        elif name == "branches":
            branch, index, what = rest.split(".")
            kind = ("conv", "bn")[int(index)]
            state[f"decode_head.psp_modules.{branch}.1.{kind}.{what}"] = value
        else:
            state[f"{heads[part]}.{parts.get((part, name), 'conv_seg')}.{rest}"] = value
    features = [key for key in state if key.startswith("backbone.features.")]
    return {names: state.pop(key) for key, names in zip(features, mobilenet_names(), strict=False)} | state


def mobilenet_names() -> list[str]:
    """Of the backbone's tensors there, in their order: layer1 to layer7 are the stages of the paper's table 2."""
    modules = ["conv1"]
    for stage, num_blocks in enumerate((1, 2, 3, 4, 3, 3, 1), start=1):
        for block in range(num_blocks):
            modules += [f"layer{stage}.{block}.conv.{layer}" for layer in range(2 if stage == 1 else 3)]
    tensors = ["conv.weight"]
    tensors += [
        f"bn.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    return [f"backbone.{module}.{tensor}" for module in modules for tensor in tensors]


def test_the_parts_of_their_mobilenet_have_the_names_of_ours_in_the_same_order() -> None:
    ours = [key for key in PSPNet(2, backbone="mobilenet_v2").state_dict() if key.startswith("backbone.")]
    assert [renamed(name, "mmsegmentation") for name in mobilenet_names()] == ours
    for foreign in ("backbone.layer2.2.conv.0.conv.weight", "backbone.layer1.0.conv.2.bn.weight"):
        assert renamed(foreign, "mmsegmentation") not in ours


SEVERAL_LINES = """backbone=dict(
    dilations=(
        1,
        1,
        2,
        4,
    ),
    strides=(
        1,
        2,
        2,
        2,
    ))"""
"""As mmengine 0.10.7 writes tuples."""


@pytest.mark.parametrize(
    ("said", "output_stride", "dilations", "contract"),
    [
        ("type='EncoderDecoder'", 8, [], True),
        ("dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1)", 8, [], True),
        ("dilations=(1, 1, 1, 2), strides=(1, 2, 2, 1)", 16, [], True),
        ("dilations=(1, 1, 1, 1), strides=(1, 2, 2, 2)", 32, [], True),
        ("'dilations': [1, 1, 2, 4], 'strides': [1, 2, 2, 2]", 32, [1, 1, 2, 4], True),
        (SEVERAL_LINES, 32, [1, 1, 2, 4], True),
        ("strides=(1, 2, 1, 1)", 8, [1, 1, 1, 1], True),
        ("dilations=(1, 1, 2, 4)", 32, [1, 1, 2, 4], True),
        ("contract_dilation=False, dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1)", 8, [], False),
    ],
)
def test_strides_and_dilations_are_those_of_the_stored_configuration(
    tmp_path: Path, said: str, output_stride: int, dilations: list[int], contract: bool
) -> None:
    """Which of the two is absent is none: their backbone's defaults."""
    state = as_mmsegmentation(PSPNet(2, backbone="resnet18", head_channels=4))
    torch.save({"state_dict": state, "meta": {"config": f"align_corners=True, {said}"}}, tmp_path / "r18.pth")
    architecture = read_published(tmp_path / "r18.pth").architecture
    expected = {"backbone": "resnet18", "dilate_first_only": True, "contract_dilation": contract}
    expected |= {"output_stride": output_stride, "dilations": dilations}
    assert architecture | expected == architecture


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("strides=(2, 2, 2, 2)", r"one of the strides \(1, 2, 1, 1\) .* with strides \(2, 2, 2, 2\) and"),
        (
            "strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), dilations=(1, 6)",
            r"dilations \(1, 1, 2, 4\) \(1, 6\)",
        ),
        (
            "strides=(1, 2, 1, 1), dilations=(1, 1, 2)",
            r"dilations must be 4 numbers of 1 to 64, .*got \(1, 1, 2\)",
        ),
        (f"strides=(1, 2, 1, 1), dilations=(1, 1, 2, {'9' * 5000})", "dilations must be 4 numbers"),
    ],
)
def test_strides_and_dilations_of_no_network_here_are_refused(
    tmp_path: Path, said: str, message: str
) -> None:
    state = as_mmsegmentation(PSPNet(2, backbone="resnet18", head_channels=4))
    torch.save({"state_dict": state, "meta": {"config": f"align_corners=True, {said}"}}, tmp_path / "r18.pth")
    with pytest.raises(InputError, match=message):
        read_published(tmp_path / "r18.pth")


def test_blocks_of_no_network_are_refused_with_those_there_are(tmp_path: Path) -> None:
    """semseg has no network of basic blocks."""
    network = PSPNet(2, backbone="resnet18", head_channels=4)
    fewer = {key: value for key, value in as_mmsegmentation(network).items() if "layer2.1." not in key}
    for state, message in (
        (fewer, "mmsegmentation with resnet18, .*mobilenet_v2, but .* 2 1 2 2 basic"),
        (as_semseg(network), "semseg with resnet50, resnet101, resnet152, but .* 2 2 2 2 basic"),
    ):
        torch.save({"state_dict": state}, tmp_path / "other.pth")
        with pytest.raises(InputError, match=message):
            read_published(tmp_path / "other.pth", align_corners=True)


def test_every_key_that_does_not_fit_is_named(tmp_path: Path) -> None:
    state = as_semseg(small())
    del state["cls.1.running_mean"]
    state["psa.weight"] = torch.zeros(1)
    state["layer2.0.conv1.weight"] = torch.zeros(128, 256, 3, 3)
    torch.save(state, tmp_path / "foreign.pth")
    with pytest.raises(InputError) as error:
        read_published(tmp_path / "foreign.pth")
    for part in (
        "1 missing: head.norm.running_mean",
        "1 unexpected: psa.weight",
        "backbone.layer2.0.conv1.weight (128, 256, 3, 3) for (128, 256, 1, 1)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"fc.weight": torch.zeros(2)}, r"semseg \(cls\.0\.weight\).*its names are fc\.weight"),
        ({"state_dict": {"epoch": 3}}, "tensors by their names"),
        ({}, "tensors by their names"),
        (
            {"cls.0.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)},
            "1 0 0 0 basic or other blocks",
        ),
    ],
)
def test_what_is_no_pspnet_of_theirs_is_refused(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(InputError, match=message):
        read_published(tmp_path / "other.pth")


def test_a_checkpoint_that_would_run_code_is_refused_unread(tmp_path: Path) -> None:
    class Shell:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"state_dict": {"cls.0.weight": Shell()}}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="cannot be read"):
        read_published(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_align_corners_of_mmsegmentation_must_be_known(tmp_path: Path) -> None:
    state = {"decode_head.bottleneck.conv.weight": torch.zeros(1)}
    for meta in ({}, {"config": "a=dict(align_corners=True), b=dict(align_corners=False)"}):
        torch.save({"state_dict": state, "meta": meta}, tmp_path / "mmseg.pth")
        with pytest.raises(InputError, match=r"given with align_corners.*True for crops of 769"):
            read_published(tmp_path / "mmseg.pth")


def test_a_training_begins_with_the_weights_of_a_whole_network(tmp_path: Path) -> None:
    """From their names and from ours, into the network that is configured; another one is refused by its settings."""
    source = small()
    torch.save({"state_dict": as_semseg(source)}, tmp_path / "theirs.pth")
    torch.save(source.state_dict(), tmp_path / "ours.pth")
    for name in ("theirs.pth", "ours.pth"):
        model = PSPNet.from_architecture(source.architecture)
        load_network_weights(model, str(tmp_path / name))
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    other = PSPNet.from_architecture(
        source.architecture | {"num_classes": 7, "deep_stem": False, "align_corners": False}
    )
    with pytest.raises(
        InputError,
        match=r"num_classes 19, model\.deep_stem True, model\.align_corners True, and configured is 7, False, False",
    ):
        load_network_weights(other, str(tmp_path / "theirs.pth"))
    with pytest.raises(InputError, match=r"of another shape: .*head\.classifier\.weight"):
        load_network_weights(
            PSPNet.from_architecture(source.architecture | {"num_classes": 7}), str(tmp_path / "ours.pth")
        )


def test_what_mmengine_wrote_while_it_trained_is_refused_with_what_is_then_to_be_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    theirs = types.ModuleType("mmengine")
    history = type("HistoryBuffer", (), {"__module__": "mmengine"})
    theirs.HistoryBuffer = history  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mmengine", theirs)
    torch.save({"state_dict": {}, "message_hub": history()}, tmp_path / "iter_80000.pth")
    with pytest.raises(
        InputError, match=r"mmengine wrote it.*needs --align-corners yes or no, and --crop-size"
    ):
        read_published(tmp_path / "iter_80000.pth")

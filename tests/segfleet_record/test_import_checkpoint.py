"""A checkpoint of others as a package predicts what the network does, through the jobs as a person calls them."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pspnet.errors import InputError, MissingPackageError
from pspnet.inference import predict
from pspnet.labels import CITYSCAPES, NYUV2_40, ClassInfo, ClassTable
from pspnet.model import PSPNet
from pspnet.published import IMAGENET_MEAN, IMAGENET_STD
from segfleet.building import new_model
from segfleet.import_checkpoint import import_checkpoint
from segfleet.override import override, replaced
from segfleet.package import load_package
from segfleet.presets import training_preset
from tests.pspnet_model.test_published import as_mmsegmentation, as_semseg

ROOT = Path(__file__).parents[2]
BACKBONE = "backbone=dict(dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1))"
CONFIG = f"""
crop_size = (512, 1024)
model = dict({BACKBONE}, decode_head=dict(align_corners=False))
train_pipeline = [dict(type='RandomCrop', crop_size=(512, 1024), cat_max_ratio=0.75)]
"""
"""Such as mmsegmentation stores beside the tensors, shortened."""


@pytest.fixture(scope="module")
def network() -> PSPNet:
    torch.manual_seed(0)
    return PSPNet(
        19,
        backbone="resnet50",
        head_channels=16,
        deep_stem=True,
        deep_stem_channels=64,
        contract_dilation=True,
        align_corners=False,
    ).eval()


@pytest.fixture(scope="module")
def published(network: PSPNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "pspnet_r50-d8_512x1024_80k_cityscapes.pth"
    torch.save({"meta": {"config": CONFIG}, "state_dict": as_mmsegmentation(network)}, path)
    return path


def called(monkeypatch: pytest.MonkeyPatch, job: str, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [job, *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "jobs" / job), run_name="__main__")
    return int(stopped.value.code or 0)


def test_the_jobs_take_a_checkpoint_to_predictions(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    network: PSPNet,
    published: Path,
    tmp_path: Path,
) -> None:
    package, picture = tmp_path / "package", tmp_path / "picture.png"
    assert called(monkeypatch, "import_checkpoint.py", "--checkpoint", published, "--output", package) == 0
    assert "packaged into" in capsys.readouterr().out
    image = np.random.default_rng(0).integers(0, 256, (48, 75, 3), np.uint8)
    Image.fromarray(image).save(picture)
    out = tmp_path / "out"
    assert called(monkeypatch, "predict.py", "--model", package, "--input", picture, "--output", out) == 0
    expected = predict(network, image, mean=IMAGENET_MEAN, std=IMAGENET_STD, device="cpu")
    written = np.asarray(Image.open(out / "picture_label.png"))
    assert np.array_equal(written, CITYSCAPES.id_of(expected))
    assert len(np.unique(expected)) > 1


def test_a_package_says_where_it_is_from_and_how_it_was_trained(published: Path, tmp_path: Path) -> None:
    package = import_checkpoint(published, tmp_path / "package", class_table=CITYSCAPES, crop_size=769)
    model = load_package(package, device="cpu")
    assert model.info["config"]["data"]["crop_size"] == 769
    assert model.info["config"]["model"]["deep_stem_channels"] == 64
    assert (model.scores, model.network.align_corners) == (None, False)
    card = (package / "README.md").read_text()
    assert f"19 classes, from {published.name} of mmsegmentation (sha256 " in card


def test_the_crops_it_was_trained_on_are_those_of_its_configuration(
    network: PSPNet, published: Path, tmp_path: Path
) -> None:
    package = import_checkpoint(published, tmp_path / "package", class_table=CITYSCAPES)
    assert load_package(package, device="cpu").crop_size == "512x1024"
    silent = tmp_path / "silent.pth"
    torch.save({"meta": {"config": "align_corners=True"}, "state_dict": as_mmsegmentation(network)}, silent)
    with pytest.raises(InputError, match=r"the crops that it was trained on, because .*--crop-size 769"):
        import_checkpoint(silent, tmp_path / "another", class_table=CITYSCAPES)
    assert not (tmp_path / "another").exists()


@pytest.mark.parametrize(("num_classes", "crop_size"), [(19, 713), (150, None), (21, None)])
def test_semsegs_crops_are_known_of_cityscapes_alone(
    tmp_path: Path, num_classes: int, crop_size: int | None
) -> None:
    """Their files do not say them; ADE20K (150 classes) and VOC (21) they train on crops of 473."""
    classes = tuple(ClassInfo(f"class {n}", n, n, (n, 0, 0)) for n in range(num_classes))
    network = PSPNet(num_classes, backbone="resnet50", head_channels=8, deep_stem=True)
    path = tmp_path / "train_epoch_100.pth"
    torch.save(as_semseg(network), path)
    settings: dict[str, Any] = {"class_table": ClassTable("theirs", classes)}
    if crop_size is None:
        with pytest.raises(
            InputError, match=r"the crops that it was trained on, .*semseg's train_h \(473 for"
        ):
            import_checkpoint(path, tmp_path / "package", **settings)
        assert not (tmp_path / "package").exists()
        settings["crop_size"] = 473
    package = import_checkpoint(path, tmp_path / "package", **settings)
    assert load_package(package, device="cpu").crop_size == (crop_size or 473)


@pytest.mark.parametrize(
    ("backbone_settings", "settings"),
    [
        (
            "dict(depth=18, dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1))",
            {"backbone": "resnet18", "contract_dilation": True, "dilate_first_only": True},
        ),
        (
            "dict(dilations=(1, 1, 1, 2, 2, 4, 4), strides=(1, 2, 2, 1, 1, 1, 1))",
            {
                "backbone": "mobilenet_v2",
                "dilate_first_only": True,
                "branch_channels": 16,
                "aux_channels": 32,
            },
        ),
        (
            "dict(dilations=(1, 1, 2, 4), strides=(1, 2, 2, 2))",
            {
                "backbone": "resnet50",
                "output_stride": 32,
                "dilations": (1, 1, 2, 4),
                "contract_dilation": True,
            },
        ),
    ],
)
def test_their_other_networks_become_packages_and_trainings_begin_with_them(
    backbone_settings: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """The package's configuration is that of a network which takes the file's weights."""
    torch.manual_seed(0)
    source = PSPNet(19, head_channels=16, align_corners=False, **settings).eval()
    path = tmp_path / "theirs.pth"
    meta = {"config": CONFIG.replace(BACKBONE, f"backbone={backbone_settings}")}
    torch.save({"meta": meta, "state_dict": as_mmsegmentation(source)}, path)
    package = load_package(import_checkpoint(path, tmp_path / "package", class_table=CITYSCAPES))
    assert package.network.architecture == source.architecture
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(package.network(images).logits, source(images).logits)
    config = replaced(
        training_preset("tiny"), {"model": package.info["config"]["model"] | {"weights": str(path)}}
    )
    begun = new_model(config, 19).state_dict()
    assert all(torch.equal(value, begun[key]) for key, value in source.state_dict().items())
    other = override(config, {"model.dilate_first_only": False, "model.dilations": []})
    with pytest.raises(
        InputError, match=r"with model\.dilat.*, and configured is .*Set these as the file has them"
    ):
        new_model(other, 19)


def test_a_package_takes_the_place_of_nothing_but_a_package(published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    package = import_checkpoint(published, folder / "package", class_table=CITYSCAPES)
    assert (
        import_checkpoint(published, package, class_table=CITYSCAPES) == package
    )  # an older one it replaces
    checkpoint = folder / "d8.pth"
    checkpoint.write_bytes(published.read_bytes())
    before = sorted(folder.rglob("*"))
    for occupied in (folder, checkpoint):
        with pytest.raises(InputError, match=r"must go into a folder of its own, .*Give a new folder"):
            import_checkpoint(checkpoint, occupied, class_table=CITYSCAPES)
        assert sorted(folder.rglob("*")) == before


def test_a_class_table_of_other_data_is_refused(published: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must have the 19 classes of .*but nyuv2_40 has 40"):
        import_checkpoint(published, tmp_path / "package", class_table=NYUV2_40, crop_size=769)
    assert not list(tmp_path.iterdir())


def test_align_corners_other_than_the_files_are_refused(published: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is of mmsegmentation with False, and True is asked for"):
        import_checkpoint(
            published, tmp_path / "package", class_table=CITYSCAPES, crop_size=769, align_corners=True
        )
    assert not list(tmp_path.iterdir())


def test_a_package_with_timms_backbone_says_what_is_missing_where_timm_is(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = import_checkpoint(published, tmp_path / "package", class_table=CITYSCAPES, crop_size=769)
    info: dict[str, Any] = json.loads((package / "model.json").read_text())
    info["architecture"] |= {"backbone": "timm:resnet50", "deep_stem": False, "contract_dilation": False}
    (package / "model.json").write_text(json.dumps(info))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingPackageError, match="needs the library timm"):
        load_package(package)

"""Weights from a file or by name are exactly those of the network, or nothing is loaded and every key is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from pspnet.errors import InputError
from pspnet.model import PSPNet
from pspnet.weights import load_backbone_weights


def torchvision_stages(name: str) -> Any:
    torch.manual_seed(0)
    return torchvision.models.get_model(name).eval()


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_weights_of_torchvision_load_from_a_file_with_or_without_the_classifier(
    tmp_path: Path, name: str, ending: str
) -> None:
    state = torchvision_stages(name).state_dict()
    path = tmp_path / f"weights{ending}"
    if ending == ".pth":
        torch.save(state, path)
    else:
        # Also as in files of before torch 0.4.1, without counters.
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
        safetensors.torch.save_file(state, path)
    model = PSPNet(3, backbone=name, head_channels=8)
    load_backbone_weights(model, str(path))
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, state.get(key, torch.tensor(0))), key


def test_no_weights_leave_the_random_ones() -> None:
    model = PSPNet(3, backbone="resnet18", head_channels=8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_backbone_weights(model, "")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_every_wrong_key_of_a_weights_file_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = torchvision_stages("resnet18").state_dict()
    del state["layer3.1.conv2.weight"]
    state["stem.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    path = tmp_path / "foreign.pth"
    torch.save(state, path)
    model = PSPNet(3, backbone="resnet18", head_channels=8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_backbone_weights(model, str(path))
    for part in (
        "1 missing: layer3.1.conv2.weight",
        "1 unexpected: stem.weight",
        "1 of another shape: conv1.weight (64, 1, 7, 7) for (64, 3, 7, 7)",
    ):
        assert part in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Tensor.to_sparse, r"1 not a plain tensor: conv1\.weight \(sparse_coo\)"),
        (lambda weight: weight.to("meta"), r"1 not a plain tensor: conv1\.weight \(no values\)"),
        (Tensor.char, r"1 of another kind of number: conv1\.weight \(int8 for float32\)"),
        (lambda weight: weight + 1j, r"1 of another kind of number: conv1\.weight \(complex64 for float32\)"),
        (lambda weight: weight * torch.nan, r"1 not finite: conv1\.weight"),
        (lambda weight: weight.double() + 1e300, r"1 not finite: conv1\.weight"),
    ],
)
def test_values_that_no_training_could_have_left_are_refused(
    tmp_path: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    state = torchvision_stages("resnet18").state_dict()
    torch.save(state | {"conv1.weight": change(state["conv1.weight"])}, tmp_path / "changed.pth")
    model = PSPNet(3, backbone="resnet18", head_channels=8)
    with pytest.raises(InputError, match=rf"there are {message}\. Give"):
        load_backbone_weights(model, str(tmp_path / "changed.pth"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load(tmp_path: Path, dtype: torch.dtype) -> None:
    state = torchvision_stages("resnet18").to(dtype).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    model = PSPNet(3, backbone="resnet18", head_channels=8)
    load_backbone_weights(model, str(tmp_path / "weights.pth"))
    assert torch.equal(model.backbone.state_dict()["conv1.weight"], state["conv1.weight"].float())


def test_a_weights_file_that_is_absent_damaged_or_no_state_dict_is_refused(tmp_path: Path) -> None:
    model = PSPNet(3, backbone="resnet18", head_channels=8)
    (tmp_path / "torso.pth").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "torso.safetensors").write_bytes(b"\xff" * 20)
    torch.save([1, 2], tmp_path / "list.pth")
    for name, rule in (
        ("absent.pth", "there is no file"),
        ("torso.pth", "cannot be read"),
        ("torso.safetensors", "cannot be read"),
        ("list.pth", "tensors by their names"),
    ):
        with pytest.raises(InputError, match=rule):
            load_backbone_weights(model, str(tmp_path / name))


def test_a_file_that_would_run_code_is_refused_unread(tmp_path: Path) -> None:
    class Shell:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"conv1.weight": Shell()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="cannot be read"):
        load_backbone_weights(PSPNet(3, backbone="resnet18"), str(tmp_path / "evil.pth"))
    assert not (tmp_path / "executed").exists()


def test_genuine_weights_of_another_network_are_refused_with_their_keys(data_dir: Path) -> None:
    path = data_dir / "weights" / "mobilenet_v2_imagenet_features.pth"
    with pytest.raises(InputError, match=r"unexpected: .*features\.0\.0\.weight"):
        load_backbone_weights(PSPNet(3, backbone="resnet18"), str(path))


def test_genuine_weights_of_mobilenet_see_what_torchvisions_network_sees_with_them(data_dir: Path) -> None:
    path = data_dir / "weights" / "mobilenet_v2_imagenet_features.pth"
    theirs = torchvision_stages("mobilenet_v2")
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=False)
    model = PSPNet(3, backbone="mobilenet_v2", output_stride=32, head_channels=8).eval()
    load_backbone_weights(model, str(path))
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        assert torch.equal(model.backbone(images).stage4, theirs.features[:18](images))


@pytest.mark.parametrize(("name", "cut"), [("resnet18", "fc."), ("mobilenet_v2", "classifier.")])
def test_imagenet_takes_torchvisions_weights_by_the_backbones_name(
    monkeypatch: pytest.MonkeyPatch, name: str, cut: str
) -> None:
    """In place of the download, what torchvision's own class would return for that name."""
    state = torchvision_stages(name).state_dict()
    asked = []

    def downloaded(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(self.url)
        return state

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", downloaded)
    model = PSPNet(3, backbone=name, head_channels=8)
    load_backbone_weights(model, "imagenet")
    assert len(asked) == 1
    assert name in asked[0]
    assert all(torch.equal(value, state[key]) for key, value in model.backbone.state_dict().items())
    assert any(key.startswith(cut) for key in state)


def test_a_file_of_mmsegmentations_resnet_v1c_has_the_deep_stem_by_other_names_under_state_dict(
    tmp_path: Path,
) -> None:
    source, model = (
        PSPNet(3, backbone="resnet18", head_channels=8, deep_stem=True, deep_stem_channels=64)
        for _ in range(2)
    )
    names = {
        "conv1.weight": "stem.0.weight",
        "bn2.running_var": "stem.4.running_var",
        "conv3.weight": "stem.6.weight",
    }
    state = source.backbone.state_dict()
    renamed = {names.get(key, key): value for key, value in state.items()}
    assert renamed.keys() != state.keys()
    torch.save({"meta": {}, "state_dict": renamed}, tmp_path / "v1c.pth")
    load_backbone_weights(model, str(tmp_path / "v1c.pth"))
    assert all(torch.equal(value, state[key]) for key, value in model.backbone.state_dict().items())

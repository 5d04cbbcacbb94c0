"""Laws of the export: what other programs run gives what the model gives, at other sizes than it was traced with."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from pspnet.errors import InputError
from segfleet import export
from segfleet.export import export_model
from segfleet.package import SegmentationModel, load_package, package_model


@pytest.fixture(scope="module")
def model(
    write_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> SegmentationModel:
    folder = tmp_path_factory.mktemp("exporting")
    return load_package(
        package_model(write_checkpoint(folder / "epoch_0001"), folder / "package"), device="cpu"
    )


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_an_exported_model_gives_what_the_model_gives(
    model: SegmentationModel, images: list[np.ndarray], tmp_path: Path, ending: str
) -> None:
    exported = export_model(model, tmp_path / f"model.{ending}")
    assert [path.name for path in tmp_path.iterdir()] == [f"model.{ending}"]
    if ending == "onnx":
        session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
        assert json.loads(metadata["class_names"]) == list(model.class_table.class_names)

        def run(batch: np.ndarray) -> np.ndarray:
            return np.asarray(session.run(None, {"images": batch})[0])
    else:
        module = torch.export.load(exported.path).module()

        def run(batch: np.ndarray) -> np.ndarray:
            return np.asarray(module(torch.from_numpy(batch)))

    seen = set()
    for image in (*images, np.asarray(Image.fromarray(images[0]).resize((201, 77)))):
        batch = np.stack([image, np.roll(image, 7, axis=1)])
        for size in (1, 2):
            expected = np.stack([model.predict(one) for one in batch[:size]])
            assert np.mean(run(batch[:size]) != expected) <= 1e-3
            seen |= set(np.unique(expected))
    assert len(seen) > 1


def test_a_file_that_gives_something_else_is_not_kept(
    model: SegmentationModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_traced", lambda _: None)
    monkeypatch.setattr(torch.export, "save", lambda _program, path, **_: path.write_bytes(b""))
    monkeypatch.setattr(
        export, "_program_runner", lambda _: lambda batch: np.zeros(batch.shape[:3], np.uint8)
    )
    with pytest.raises(InputError, match=r"\d+\.\d+% of the pixels have another class"):
        export_model(model, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_other_endings_are_refused(model: SegmentationModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end with \.onnx or \.pt2, but got .*model\.pth"):
        export_model(model, tmp_path / "model.pth")

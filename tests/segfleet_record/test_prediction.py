"""Laws of the prediction: pictures of any size and kind, ids of the data set, no result lost to a bad picture."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspnet.errors import InputError
from segfleet.prediction import output_names, predict_folder, read_picture
from segfleet.protocol import Views
from segfleet.registry import SegmentationModel, load_package, package_model


@pytest.fixture(scope="module")
def model(
    write_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> SegmentationModel:
    """A model that sees cars everywhere."""
    folder = tmp_path_factory.mktemp("predicting")
    checkpoint = write_checkpoint(folder / "epoch_0001", favourite=1)
    return load_package(package_model(checkpoint, folder / "package"), device="cpu")


@pytest.fixture
def pictures(tmp_path: Path, images: list[np.ndarray]) -> Path:
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(images[0]).save(folder / "a.png")
    Image.fromarray(images[1]).save(folder / "b.jpg")
    Image.fromarray(images[2]).save(folder / "more/c.webp")
    Image.fromarray(images[0][..., 0]).save(folder / "grey.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_every_picture_gets_a_label_of_ids_an_overlay_and_areas(
    model: SegmentationModel, pictures: Path, tmp_path: Path, images: list[np.ndarray]
) -> None:
    out = tmp_path / "out"
    report = predict_folder(model, pictures, out)
    assert report.unreadable == []
    names = ["a", "b", "grey", "more/c"]
    assert [str(path.relative_to(out)) for path in report.label_paths] == [f"{n}_label.png" for n in names]
    for name, size in zip(names, (images[0], images[1], images[0], images[2]), strict=True):
        with Image.open(out / f"{name}_label.png") as label:
            ids = np.asarray(label)
        assert ids.shape == size.shape[:2]
        assert np.unique(ids).tolist() == [26]  # the data set's id of car, not its train id
        with Image.open(out / f"{name}_overlay.png") as overlay:
            assert overlay.height > size.shape[0]  # the legend
    assert report.areas_path is not None
    with report.areas_path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3
    assert {row["share"] for row in rows if row["class"] == "car"} == {"1.000000"}
    assert rows[0] == {"picture": "a", "class": "road", "pixels": "0", "share": "0.000000"}


def test_a_second_call_reads_no_result_of_the_first(model: SegmentationModel, pictures: Path) -> None:
    first = predict_folder(model, pictures, pictures / "out")
    second = predict_folder(model, pictures, pictures / "out")
    assert first.label_paths == second.label_paths


def test_pictures_that_cannot_be_read_are_named_and_skipped(
    model: SegmentationModel, pictures: Path, tmp_path: Path
) -> None:
    content = (pictures / "a.png").read_bytes()
    (pictures / "cut.png").write_bytes(content[: len(content) // 2])
    (pictures / "empty.jpg").touch()
    (pictures / "text.png").write_text("no picture at all")
    report = predict_folder(model, pictures, tmp_path / "out")
    assert [path.name for path, _ in report.unreadable] == ["cut.png", "empty.jpg", "text.png"]
    assert len(report.label_paths) == 4


def test_a_folder_of_which_nothing_can_be_read_is_refused(model: SegmentationModel, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(InputError, match=r"none of the 1 in .* is; bad\.png"):
        predict_folder(model, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inputs_that_make_no_sense_are_refused(
    model: SegmentationModel, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="nothing at"):
        predict_folder(model, tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has none"):
        predict_folder(model, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(InputError, match="another folder than --input"):
        predict_folder(model, pictures, pictures)


def test_one_picture_is_a_folder_of_one(model: SegmentationModel, pictures: Path, tmp_path: Path) -> None:
    report = predict_folder(model, pictures / "a.png", tmp_path / "out")
    assert [path.name for path in report.label_paths] == ["a_label.png"]


def test_a_picture_stands_as_its_camera_says(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    assert read_picture(tmp_path / "turned.png")[..., 0].tolist() == [[3, 0], [4, 1], [5, 2]]


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png")[..., 0].tolist() == [[0, 1, 255]]


def test_pictures_of_one_stem_do_not_overwrite_each_other() -> None:
    root = Path("tests")
    names = output_names([root / "a.png", root / "a.jpg", root / "b.png"], root)
    assert [str(name) for name in names.values()] == ["a.png", "a.jpg", "b"]


def test_windows_and_flip_see_every_pixel(model: SegmentationModel, pictures: Path, tmp_path: Path) -> None:
    report = predict_folder(
        model, pictures, tmp_path / "out", views=Views(window=33, flip=True, scales=(0.5, 1.0))
    )
    assert len(report.label_paths) == 4

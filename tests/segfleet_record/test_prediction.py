"""Laws of the prediction: pictures of any size and kind, ids of the data set, no result lost to a bad picture."""

import csv
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pspnet.errors import InputError
from segfleet.frames import output_names, read_picture
from segfleet.package import SegmentationModel, load_package, package_model
from segfleet.prediction import area_table, predict_pictures
from segfleet.protocol import Views


@pytest.fixture(scope="module")
def model(
    write_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> SegmentationModel:
    """A model that sees cars everywhere."""
    folder = tmp_path_factory.mktemp("predicting")
    checkpoint = write_checkpoint(folder / "epoch_0001", favourite=1)
    return load_package(package_model(checkpoint, folder / "package"), device="cpu")


@pytest.fixture(scope="module")
def thinking_model(
    write_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> SegmentationModel:
    """A model of random weights."""
    folder = tmp_path_factory.mktemp("predicting")
    return load_package(
        package_model(write_checkpoint(folder / "epoch_0001"), folder / "package"), device="cpu"
    )


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
    report = predict_pictures(model, pictures, out)
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
    first = predict_pictures(model, pictures, pictures / "out")
    second = predict_pictures(model, pictures, pictures / "out")
    assert first.label_paths == second.label_paths


def test_pictures_that_cannot_be_read_are_named_and_skipped(
    model: SegmentationModel, pictures: Path, tmp_path: Path
) -> None:
    content = (pictures / "a.png").read_bytes()
    (pictures / "cut.png").write_bytes(content[: len(content) // 2])
    (pictures / "empty.jpg").touch()
    (pictures / "text.png").write_text("no picture at all")
    report = predict_pictures(model, pictures, tmp_path / "out")
    assert [path.name for path, _ in report.unreadable] == ["cut.png", "empty.jpg", "text.png"]
    assert len(report.label_paths) == 4


def test_a_folder_of_which_nothing_can_be_read_is_refused(model: SegmentationModel, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(InputError, match=r"none of the 1 in .* is; bad\.png"):
        predict_pictures(model, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inputs_that_make_no_sense_are_refused(
    model: SegmentationModel, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="nothing at"):
        predict_pictures(model, tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has none"):
        predict_pictures(model, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(InputError, match="another folder than --input"):
        predict_pictures(model, pictures, pictures)


def test_pictures_below_the_output_folder_are_segmented_and_its_results_are_not(
    model: SegmentationModel, pictures: Path, tmp_path: Path
) -> None:
    """--input pictures/more --output pictures; what earlier calls wrote is known by its name."""
    for asked in (pictures / "more", f"{pictures}/more/*.webp", pictures / "more"):
        report = predict_pictures(model, asked, pictures)
        assert report.label_paths == [pictures / "c_label.png"]
    inner = predict_pictures(model, f"{pictures}/*/*", pictures / "more")
    assert inner.label_paths == [pictures / "more/more/c_label.png"]
    again = predict_pictures(model, f"{pictures}/**/*.webp", pictures / "more")
    assert again.label_paths == [pictures / "more/more/c_label.png"]
    with pytest.raises(InputError, match=r"all 2 of .* are results of earlier calls"):
        predict_pictures(model, f"{pictures}/more/more/*", pictures / "more")
    with pytest.raises(InputError, match="another folder than --input"):
        predict_pictures(model, f"{pictures}/*.png", pictures)


def test_one_picture_is_a_folder_of_one(model: SegmentationModel, pictures: Path, tmp_path: Path) -> None:
    report = predict_pictures(model, pictures / "a.png", tmp_path / "out")
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
    files = [root / name for name in ("a.png", "a.jpg", "a.png.png", "b.png")]
    assert [str(name) for name in output_names(files, root).values()] == [
        "a.png",
        "a.jpg",
        "a.png.png",
        "b",
    ]


def test_a_video_and_the_frames_of_a_folder_of_its_name_do_not_overwrite_each_other(
    model: SegmentationModel, images: list[np.ndarray], tmp_path: Path
) -> None:
    folder, out = tmp_path / "drives", tmp_path / "out"
    (folder / "drive").mkdir(parents=True)
    write_video(folder / "drive.mp4", num_frames=2)
    Image.fromarray(images[0]).save(folder / "drive/frame_000000.png")
    report = predict_pictures(model, folder, out)
    assert [str(path.relative_to(out)) for path in report.label_paths] == [
        "drive/frame_000000_label.png",
        "drive.mp4/frame_000000_label.png",
        "drive.mp4/frame_000001_label.png",
    ]


@pytest.mark.parametrize(
    ("views", "remedy"), [(Views(), "--window 713 or less"), (Views(window=33), "--window below 33")]
)
def test_a_picture_that_the_memory_does_not_hold_is_named_and_the_others_go_on(
    model: SegmentationModel,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    views: Views,
    remedy: str,
) -> None:
    with Image.open(pictures / "a.png") as small:
        small.resize((small.width * 2, small.height * 2)).save(pictures / "large.png")
    (pictures / "notes.txt").unlink()
    sizes = {path.name: read_picture(path).size for path in sorted(pictures.rglob("*.*"))}
    largest = max(sizes, key=lambda name: sizes[name])
    predict_batch = SegmentationModel.predict_batch

    def on_a_small_device(
        self: SegmentationModel, images: list[np.ndarray], views: Views
    ) -> list[np.ndarray]:
        if sum(image.size for image in images) >= sizes[largest]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return predict_batch(self, images, views)

    monkeypatch.setattr(SegmentationModel, "predict_batch", on_a_small_device)
    report = predict_pictures(model, pictures, tmp_path / "out", views=views, batch_size=len(sizes))
    assert [(path.name, reason) for path, reason in report.unreadable] == [
        (largest, f"the memory of cpu does not suffice; {remedy} takes less")
    ]
    assert len(report.label_paths) == len(sizes) - 1
    assert report.areas_path is not None
    assert report.areas_path.exists()


def test_another_error_of_the_network_is_no_picture_s_fault(
    model: SegmentationModel, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(SegmentationModel, "predict_batch", fail)
    with pytest.raises(RuntimeError, match="multiplied"):
        predict_pictures(model, pictures, tmp_path / "out")


def test_an_output_that_is_a_file_is_refused_before_anything_is_segmented(
    model: SegmentationModel, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("notes")
    with pytest.raises(InputError, match="--output must be a folder one can write to"):
        predict_pictures(model, pictures, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "notes"


def test_a_pattern_chooses_pictures_and_names_them_below_its_first_wildcard(
    model: SegmentationModel, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "more" / "deep").mkdir()
    (pictures / "a.png").rename(pictures / "more" / "deep" / "a.png")
    report = predict_pictures(model, f"{pictures}/mo*/**/*[ac].*", tmp_path / "out")
    names = [str(path.relative_to(tmp_path / "out")) for path in report.label_paths]
    assert names == ["more/c_label.png", "more/deep/a_label.png"]
    with pytest.raises(InputError, match=r"no such file is .*x\*\.png"):
        predict_pictures(model, f"{pictures}/x*.png", tmp_path / "out")


def test_frames_of_a_video_are_segmented_and_a_damaged_one_as_far_as_it_goes(
    model: SegmentationModel, tmp_path: Path
) -> None:
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    write_video(folder / "drive.mp4", num_frames=7)
    content = (folder / "drive.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    (folder / "text.avi").write_text("no video at all")
    write_video(folder / "whole.mkv", num_frames=7)
    (folder / "header.mkv").write_bytes((folder / "whole.mkv").read_bytes()[:600])
    (folder / "whole.mkv").unlink()
    report = predict_pictures(model, folder, out, every=3)
    names = [str(path.relative_to(out)) for path in report.label_paths]
    assert names == [f"drive/frame_{number:06d}_label.png" for number in (0, 3, 6)]
    assert [path.name for path, _ in report.unreadable] == ["cut.mp4", "header.mkv", "text.avi"]
    assert dict(report.unreadable)[folder / "header.mkv"] == "not one frame of it can be decoded"
    with Image.open(out / "drive/frame_000003_label.png") as label:
        assert label.size == (64, 48)


def write_video(path: Path, *, num_frames: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(num_frames):
            pixels = np.full((48, 64, 3), 30 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_a_batch_of_unlike_sizes_is_segmented_as_one_by_one(
    thinking_model: SegmentationModel, images: list[np.ndarray], tmp_path: Path, batch_size: int
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, index in enumerate((0, 1, 0, 2, 1, 0)):
        Image.fromarray(np.roll(images[index], 9 * number, axis=1)).save(folder / f"{number}.png")
    (folder / "4b.png").write_text("no picture")
    one = predict_pictures(thinking_model, folder, tmp_path / "one")
    batch = predict_pictures(thinking_model, folder, tmp_path / "batch", batch_size=batch_size)
    assert [path.name for path in one.label_paths] == [path.name for path in batch.label_paths]
    assert [path for path, _ in one.unreadable] == [path for path, _ in batch.unreadable] != []
    num_pixels = num_equal = 0
    for first, second in zip(one.label_paths, batch.label_paths, strict=True):
        with Image.open(first) as a, Image.open(second) as b:
            assert a.size == b.size
            num_pixels += np.asarray(a).size
            num_equal += int((np.asarray(a) == np.asarray(b)).sum())
    assert num_equal / num_pixels > 1 - 1e-3  # where two classes are as likely, rounding decides
    assert len(np.unique(np.concatenate([np.asarray(Image.open(p)).ravel() for p in one.label_paths]))) > 1


def test_the_areas_of_all_pictures_add_up(
    thinking_model: SegmentationModel, pictures: Path, tmp_path: Path
) -> None:
    report = predict_pictures(thinking_model, pictures, tmp_path / "out", batch_size=4)
    assert report.areas_path is not None
    with report.areas_path.open() as file:
        assert sum(int(row["pixels"]) for row in csv.DictReader(file)) == report.pixels.sum()
    lines = area_table(report, thinking_model.class_table).splitlines()
    assert sum(float(line.split()[-1].rstrip("%")) for line in lines) == pytest.approx(100, abs=0.05)


def test_windows_and_flip_see_every_pixel(model: SegmentationModel, pictures: Path, tmp_path: Path) -> None:
    report = predict_pictures(
        model, pictures, tmp_path / "out", views=Views(window=33, flip=True, scales=(0.5, 1.0))
    )
    assert len(report.label_paths) == 4

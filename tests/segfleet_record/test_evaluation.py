"""Laws of the evaluation: every labelled pixel once, the protocol with the numbers, pictures beside them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspnet.errors import InputError
from pspnet.labels import IGNORE_INDEX, ClassTable
from pspnet.pictures import panel
from pspnet.store import Store
from segfleet.evaluation import evaluate_model, scores_table, write_evaluation
from segfleet.package import SegmentationModel, load_package, package_model
from segfleet.protocol import Protocol
from segfleet.scores import Scores
from tests.stores import write_store


@pytest.fixture(scope="module")
def model(
    write_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> SegmentationModel:
    """A model that sees road everywhere."""
    folder = tmp_path_factory.mktemp("evaluated")
    checkpoint = write_checkpoint(folder / "epoch_0001", favourite=0)
    return load_package(package_model(checkpoint, folder / "package"), device="cpu")


def protocol(store: Store, split: str = "val") -> Protocol:
    return Protocol(store_digest=store.digest, split=split)


def test_the_scores_are_those_of_all_labelled_pixels(
    model: SegmentationModel, store: Store, images: list[np.ndarray]
) -> None:
    evaluation = evaluate_model(model, store, protocol(store))
    num_valid = sum((image.shape[0] - 1) * image.shape[1] for image in images)
    num_road = sum((image.shape[0] - 1) * (image.shape[1] * 3 // 4) for image in images)
    assert evaluation.confusion.tolist() == [[num_road, 0, 0], [num_valid - num_road, 0, 0], [0, 0, 0]]
    scores = evaluation.scores
    assert scores.class_iou == {"road": num_road / num_valid, "car": 0.0, "sky": None}
    assert scores.miou == pytest.approx(num_road / num_valid / 2)
    assert scores.pixel_accuracy == pytest.approx(num_road / num_valid)
    assert scores.mean_accuracy == pytest.approx(0.5)
    assert sorted(evaluation.image_miou) == [0, 1, 2]


@pytest.mark.parametrize("has_boundaries", [False, True])
def test_what_is_written_reads_back_and_the_pictures_open(
    model: SegmentationModel, store: Store, tmp_path: Path, has_boundaries: bool
) -> None:
    evaluation = evaluate_model(model, store, protocol(store), has_boundaries=has_boundaries, num_examples=2)
    paths = write_evaluation(evaluation, model, store, tmp_path / "out", num_examples=2)
    record = json.loads(paths[0].read_text())
    assert Scores.from_dict(record["scores"]) == evaluation.scores
    assert set(record["images"]) == {"image_0", "image_1", "image_2"}
    assert record["protocol_digest"] == evaluation.scores.protocol.digest
    with np.load(paths[4]) as counts:
        assert counts["names"].tolist() == ["image_0", "image_1", "image_2"]
        assert np.array_equal(counts["confusion"].sum(0), evaluation.confusion.numpy())
        assert counts["confusion"].shape == (3, 3, 3)
        assert str(counts["protocol"]) == evaluation.scores.protocol.digest
        assert ("boundary" in counts) == has_boundaries
    for path in paths[1:4]:
        with Image.open(path) as picture:
            picture.load()
            assert min(picture.size) > 100
    table = scores_table(evaluation.scores)
    assert "does not occur" in table
    assert "whole image" in table
    assert "without flip" in table
    assert ("boundary F-score" in table) == has_boundaries


def test_the_worst_images_are_in_the_one_picture_and_the_best_in_the_other(
    model: SegmentationModel, class_table: ClassTable, images: list[np.ndarray], tmp_path: Path
) -> None:
    """Road, which the model sees everywhere, is so many quarters of a label, and the rest is car: mIoU is half that."""
    pictures = {}
    for name, quarters in (("a", 2), ("b", 1), ("c", 3), ("d", 0)):
        label = np.ones((32, 32), dtype=np.uint8)
        label[:, : 8 * quarters] = 0
        pictures[name] = (np.roll(images[2], quarters, axis=1)[:32, :32].copy(), label)
    pictures["ignored"] = (pictures["a"][0], np.full((32, 32), IGNORE_INDEX, dtype=np.uint8))
    store = write_store(
        tmp_path / "store", class_table, {"val": [(name, *pair) for name, pair in pictures.items()]}
    )
    evaluation = evaluate_model(model, store, protocol(store), num_examples=2)
    paths = write_evaluation(evaluation, model, store, tmp_path / "out", num_examples=2)
    assert list(json.loads(paths[0].read_text())["images"].items()) == [
        ("d", 0.0),
        ("b", 0.125),
        ("a", 0.25),
        ("c", 0.375),
    ]
    for path, titles in (
        (tmp_path / "out/worst.png", ["d  mIoU 0.000", "b  mIoU 0.125"]),
        (tmp_path / "out/best.png", ["c  mIoU 0.375", "a  mIoU 0.250"]),
    ):
        rows = [(*pictures[title[0]], np.zeros((32, 32), dtype=np.uint8)) for title in titles]
        with Image.open(path) as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(panel(rows, class_table, titles)))


def test_only_the_examples_predictions_are_kept_and_they_are_those_that_were_counted(
    model: SegmentationModel, store: Store
) -> None:
    evaluation = evaluate_model(model, store, protocol(store), num_examples=1)
    kept = {index for index, image in evaluation.images.items() if image.prediction is not None}
    assert kept == {*evaluation.worst(1), *evaluation.best(1)}
    for index in kept:
        prediction = evaluation.images[index].prediction
        assert prediction is not None
        assert np.array_equal(prediction, model.predict(store.split("val").image(index)))
    none = evaluate_model(model, store, protocol(store))
    assert all(image.prediction is None for image in none.images.values())
    assert none.scores == evaluation.scores


def test_each_category_has_a_line_and_so_has_their_mean(store: Store) -> None:
    scores = Scores(
        miou=0.5,
        mean_accuracy=0.625,
        pixel_accuracy=0.75,
        class_iou={"road": 0.5, "sky": None},
        category_iou={"flat": 0.25, "vehicle": 0.5, "nature": None},
        protocol=protocol(store),
    )
    assert [line.split() for line in scores_table(scores).splitlines()[:-1]] == [
        ["road", "0.5000"],
        ["sky", "does", "not", "occur"],
        [],
        ["flat", "0.2500"],
        ["vehicle", "0.5000"],
        ["nature", "does", "not", "occur"],
        [],
        ["mIoU", "0.5000"],
        ["mIoU", "of", "categories", "0.3750"],
        ["mean", "accuracy", "0.6250"],
        ["pixel", "accuracy", "0.7500"],
    ]


def test_a_split_whose_pixels_are_all_ignored_is_refused_before_an_image_is_seen(
    model: SegmentationModel,
    class_table: ClassTable,
    images: list[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SegmentationModel, "predict", lambda *_, **__: pytest.fail("an image is seen"))
    label = np.full(images[0].shape[:2], IGNORE_INDEX, dtype=np.uint8)
    blank = write_store(tmp_path / "store", class_table, {"val": [("a", images[0], label)]})
    with pytest.raises(InputError, match="all of 'val' are ignored"):
        evaluate_model(model, blank, protocol(blank))


@pytest.mark.parametrize(
    ("views", "remedy"),
    [({}, "--window 713 or less takes less"), ({"window": 300}, "--window below 300 takes less")],
)
def test_an_image_that_the_memory_does_not_hold_is_named_with_what_takes_less(
    model: SegmentationModel,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    views: dict[str, int],
    remedy: str,
) -> None:
    def predict(_: SegmentationModel, image: np.ndarray, **__: object) -> np.ndarray:
        if image.shape[0] > 90:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return np.zeros(image.shape[:2], dtype=np.uint8)

    monkeypatch.setattr(SegmentationModel, "predict", predict)
    how = Protocol(store_digest=store.digest, split="val", **views)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=rf"memory of cpu, but image_2 of 97 x 130 .*{remedy}"):
        evaluate_model(model, store, how)


def test_another_error_of_the_network_is_not_taken_for_a_lack_of_memory(
    model: SegmentationModel, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predict(*_: object, **__: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(SegmentationModel, "predict", predict)
    with pytest.raises(RuntimeError, match="multiplied"):
        evaluate_model(model, store, protocol(store))


def test_a_split_without_labels_is_refused(model: SegmentationModel, store: Store) -> None:
    with pytest.raises(InputError, match="none of the 1 images of 'test' has one"):
        evaluate_model(model, store, protocol(store, "test"))


def test_a_split_that_is_not_there_is_refused(model: SegmentationModel, store: Store) -> None:
    with pytest.raises(InputError, match="val"):
        evaluate_model(model, store, protocol(store, "nothing"))


def test_a_store_with_other_classes_is_refused(
    model: SegmentationModel, class_table: ClassTable, images: list[np.ndarray], tmp_path: Path
) -> None:
    label = np.zeros(images[0].shape[:2], np.uint8)
    fewer = ClassTable("two", tuple(info for info in class_table.classes if info.name != "sky"))
    other = write_store(tmp_path / "store", fewer, {"val": [("a", images[0], label)]})
    with pytest.raises(InputError, match=r"has 3 classes and .* has 2"):
        evaluate_model(model, other, protocol(other))

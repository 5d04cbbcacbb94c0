"""Laws of the evaluation: every labelled pixel once, the protocol with the numbers, pictures beside them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspnet.errors import InputError
from pspnet.labels import ClassTable
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
    evaluation = evaluate_model(model, store, protocol(store), has_boundaries=has_boundaries)
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

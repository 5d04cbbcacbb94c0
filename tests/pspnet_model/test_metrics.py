"""Counts and fractions are those worked by hand and those of the official Cityscapes evaluator."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pspnet.labels import CITYSCAPES, IGNORE_INDEX, NYUV2_40, ClassInfo, ClassTable
from pspnet.metrics import ConfusionMatrix, constant_miou


def confusion_of(target: torch.Tensor, prediction: torch.Tensor, num_classes: int) -> ConfusionMatrix:
    confusion = ConfusionMatrix(num_classes)
    confusion.update(prediction, target)
    return confusion


def test_scores_of_a_hand_computed_example() -> None:
    target = torch.tensor([[0, 0, 1], [1, IGNORE_INDEX, 1]])
    prediction = torch.tensor([[0, 1, 1], [1, 0, 0]])
    confusion = confusion_of(target, prediction, 3)
    # class 0: 1 / 3; class 1: 2 / 4; class 2 occurs nowhere and is left out
    assert confusion.counts.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert confusion.class_iou[:2].tolist() == pytest.approx([1 / 3, 1 / 2])
    assert math.isnan(confusion.class_iou[2])
    assert confusion.miou == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert confusion.mean_accuracy == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert confusion.pixel_accuracy == pytest.approx(3 / 5)


def test_a_constant_prediction_scores_what_the_counts_say() -> None:
    target = torch.tensor([0, 0, 0, 2, 2, IGNORE_INDEX, 3])
    class_counts = [3, 0, 2, 1]
    for train_id in range(4):
        confusion = confusion_of(target, torch.full_like(target, train_id), 4)
        assert constant_miou(class_counts, train_id) == pytest.approx(confusion.miou)


def test_a_class_that_is_only_predicted_counts_as_zero() -> None:
    confusion = confusion_of(torch.tensor([0, 0]), torch.tensor([0, 1]), 2)
    assert confusion.class_iou.tolist() == [0.5, 0.0]
    assert confusion.miou == 0.25
    assert confusion.mean_accuracy == 0.5


def test_counts_of_parts_sum_to_those_of_the_whole_for_every_integer_type() -> None:
    random = np.random.default_rng(0)
    target = torch.from_numpy(random.choice([0, 1, 2, 3, IGNORE_INDEX], size=(6, 50)))
    prediction = torch.from_numpy(random.integers(0, 4, size=(6, 50)))
    whole = confusion_of(target, prediction, 4)
    parts = ConfusionMatrix(4)
    for row in range(6):
        parts.update(prediction[row].to(torch.uint8), target[row].to(torch.uint8))
    assert torch.equal(parts.counts, whole.counts)
    assert int(whole.counts.sum()) == int((target != IGNORE_INDEX).sum())


def test_counts_beyond_32_bits_are_exact() -> None:
    confusion = ConfusionMatrix(2)
    confusion.counts[0, 0] = 2**53
    confusion.update(torch.tensor([0]), torch.tensor([0]))
    assert int(confusion.counts[0, 0]) == 2**53 + 1


def test_without_a_valid_pixel_the_scores_are_nan() -> None:
    confusion = confusion_of(torch.tensor([IGNORE_INDEX]), torch.tensor([0]), 2)
    assert math.isnan(confusion.miou)
    assert math.isnan(confusion.pixel_accuracy)


@pytest.mark.parametrize(("target", "prediction"), [(2, 0), (0, 2), (0, 254), (254, 0)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_ids_outside_the_classes_are_refused_not_miscounted(
    target: int, prediction: int, dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match=f"train ids below 2, .* from {max(target, prediction)} to"):
        confusion_of(torch.tensor([target], dtype=dtype), torch.tensor([prediction], dtype=dtype), 2)
    for outside in (-1, 256):
        with pytest.raises(ValueError, match=f"from {outside} to {outside}"):
            confusion_of(torch.tensor([0]), torch.tensor([outside]), 2)


def test_an_ignored_prediction_counts_against_the_class_of_the_target_and_for_none() -> None:
    target = torch.tensor([0, 0, 1, IGNORE_INDEX], dtype=torch.uint8)
    prediction = torch.tensor([0, IGNORE_INDEX, 1, 0], dtype=torch.uint8)
    confusion = confusion_of(target, prediction, 2)
    assert (confusion.counts.tolist(), confusion.missed.tolist()) == ([[1, 0], [0, 1]], [1, 0])
    assert confusion.class_iou.tolist() == [0.5, 1.0]
    assert confusion.pixel_accuracy == pytest.approx(2 / 3)
    assert confusion.mean_accuracy == pytest.approx(3 / 4)
    assert confusion.num_pixels == 3
    confusion.add(confusion_of(target, prediction, 2))
    assert (confusion.counts.tolist(), confusion.missed.tolist()) == ([[2, 0], [0, 2]], [2, 0])


@pytest.mark.parametrize("num_pixels", [0, 1, 7, 8, 9, 1000])
def test_the_compiled_counts_are_those_of_bincount(num_pixels: int) -> None:
    random = np.random.default_rng(num_pixels)
    target = torch.from_numpy(random.choice([0, 3, 18, IGNORE_INDEX], num_pixels).astype(np.uint8))
    prediction = torch.from_numpy(random.choice([0, 1, 18, IGNORE_INDEX], num_pixels).astype(np.uint8))
    compiled, plain = confusion_of(target, prediction, 19), confusion_of(target.long(), prediction.long(), 19)
    assert torch.equal(compiled.counts, plain.counts)
    assert torch.equal(compiled.missed, plain.missed)
    assert compiled.num_pixels == int((target != IGNORE_INDEX).sum())


def test_pictures_whose_rows_lie_apart_in_memory_are_counted_as_they_look() -> None:
    random = np.random.default_rng(0)
    target, prediction = (torch.from_numpy(random.integers(0, 3, (9, 20), np.uint8)) for _ in range(2))
    cut = confusion_of(target[1:, 3::2], prediction[1:, 3::2], 3)
    assert torch.equal(
        cut.counts, confusion_of(target[1:, 3::2].long(), prediction[1:, 3::2].long(), 3).counts
    )


def test_category_iou_of_a_hand_computed_example() -> None:
    names = [("road", "flat"), ("pavement", "flat"), ("car", "vehicle"), ("tree", "nature")]
    table = ClassTable(
        "four", tuple(ClassInfo(name, n, n, (0, 0, 0), category) for n, (name, category) in enumerate(names))
    )
    target = torch.tensor([0, 0, 1, 1, 2, 2])
    prediction = torch.tensor([0, 1, 1, 2, 2, IGNORE_INDEX])
    # flat: 3 hits, 1 as vehicle; vehicle: 1 hit, 1 missed, 1 of flat; nature occurs nowhere
    found = confusion_of(target, prediction, 4).category_iou(table)
    assert list(found) == ["flat", "vehicle", "nature"]
    assert (found["flat"], found["vehicle"]) == (3 / 4, 1 / 3)
    assert math.isnan(found["nature"])
    assert confusion_of(target, prediction, 4).category_iou(NYUV2_40) == {}


KINDS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "perfect": lambda ids, random: ids,
    "shifted": lambda ids, random: np.roll(ids, random.integers(1, 40, 2), axis=(0, 1)),
    "noise": lambda ids, random: random.integers(0, 34, ids.shape, np.uint8),
    "some noise": lambda ids, random: np.where(random.random(ids.shape) < 0.3, random.integers(7, 34), ids),
    "constant": lambda ids, random: np.full_like(ids, 7),
    "ignored ids only": lambda ids, random: random.integers(0, 7, ids.shape, np.uint8),
    "absent classes": lambda ids, random: np.where(ids == 26, 31, np.where(ids == 24, 16, ids)),
    "few classes": lambda ids, random: np.where(np.isin(ids, (7, 8, 11)), ids, 11),
}
"""Predictions of ids, made of the ids of the labels."""


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_genuine_frankfurt_labels_are_those_of_cityscapesscripts(
    data_dir: Path, tmp_path: Path, kind: str
) -> None:
    """IoU of classes and of categories on every label map of Frankfurt that is at hand."""
    evaluator = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    label_paths = sorted((data_dir / "cityscapes/gtFine/val/frankfurt").glob("*_labelIds.png"))
    if len(label_paths) < 3:
        pytest.skip("needs three label maps of Frankfurt in SEGFLEET_DATA")
    confusion = ConfusionMatrix(CITYSCAPES.num_classes)
    prediction_paths = []
    for index, path in enumerate(label_paths):
        ids = np.array(Image.open(path))
        prediction = KINDS[kind](ids, np.random.default_rng(index)).astype(np.uint8)
        train_ids = [CITYSCAPES.train_id_of(pixels, where=path.name) for pixels in (prediction, ids)]
        confusion.update(*map(torch.from_numpy, train_ids))
        prediction_paths.append(str(tmp_path / path.name))
        Image.fromarray(prediction).save(prediction_paths[-1], compress_level=1)
    args = evaluator.args
    args.evalInstLevelScore = False  # it crashes with numpy 2.4 and is another score
    args.quiet = True
    args.JSONOutput = False
    official = evaluator.evaluateImgLists(prediction_paths, list(map(str, label_paths)), args)
    class_iou = dict(zip(CITYSCAPES.class_names, confusion.class_iou.tolist(), strict=True))
    category_iou = confusion.category_iou(CITYSCAPES)
    for ours, theirs, count in (
        (class_iou, official["classScores"], 19),
        (category_iou, official["categoryScores"], 7),
    ):
        known = {name: score for name, score in theirs.items() if name in ours}
        assert len(known) == count
        assert ours == pytest.approx(known, rel=1e-12, abs=0, nan_ok=True)
    assert confusion.miou == pytest.approx(official["averageScoreClasses"], rel=1e-12)
    assert np.nanmean(list(category_iou.values())) == pytest.approx(
        official["averageScoreCategories"], rel=1e-12
    )
    assert (confusion.miou == 1) == (kind == "perfect")
    assert (confusion.miou == 0) == (kind == "ignored ids only")

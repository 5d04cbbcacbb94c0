"""Counts and fractions are those worked by hand and those of the official Cityscapes evaluator."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pspnet.labels import CITYSCAPES, IGNORE_INDEX
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


@pytest.mark.parametrize(("target", "prediction"), [(2, 0), (0, 2), (0, IGNORE_INDEX), (0, -1)])
def test_ids_outside_the_classes_are_refused_not_miscounted(target: int, prediction: int) -> None:
    with pytest.raises(ValueError, match="train ids below 2"):
        confusion_of(torch.tensor([target]), torch.tensor([prediction]), 2)


def test_scores_of_genuine_frankfurt_labels_are_those_of_cityscapesscripts(
    data_dir: Path, tmp_path: Path
) -> None:
    """Three label maps of Frankfurt, predicted as themselves shifted by some pixels."""
    evaluator = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    label_paths = sorted((data_dir / "cityscapes/gtFine/val/frankfurt").glob("*_labelIds.png"))[:3]
    if len(label_paths) < 3:
        pytest.skip("needs three label maps of Frankfurt in SEGFLEET_DATA")
    confusion = ConfusionMatrix(CITYSCAPES.num_classes)
    prediction_paths = []
    for index, path in enumerate(label_paths):
        target = CITYSCAPES.train_id_of(np.array(Image.open(path)), where=path.name)
        prediction = np.roll(target, (5 + index, 11), axis=(0, 1))
        prediction[prediction == IGNORE_INDEX] = 0
        confusion.update(torch.from_numpy(prediction), torch.from_numpy(target))
        prediction_paths.append(str(tmp_path / path.name))
        Image.fromarray(CITYSCAPES.id_of(prediction)).save(prediction_paths[-1])
    args = evaluator.args
    args.evalInstLevelScore = False  # it crashes with numpy 2.4 and is another score
    args.quiet = True
    args.JSONOutput = False
    official = evaluator.evaluateImgLists(prediction_paths, list(map(str, label_paths)), args)
    class_iou = dict(zip(CITYSCAPES.class_names, confusion.class_iou.tolist(), strict=True))
    theirs = {name: score for name, score in official["classScores"].items() if name in class_iou}
    assert len(theirs) == 19
    assert class_iou == pytest.approx(theirs, rel=1e-12, nan_ok=True)
    assert confusion.miou == pytest.approx(official["averageScoreClasses"], rel=1e-12)
    assert 0.2 < confusion.miou < 0.95

"""Laws of the gate: equal models pass as rarely as the interval says, better ones pass, no class is sacrificed."""

from typing import Any

import numpy as np
import pytest
import torch

from pspnet.errors import InputError
from pspnet.metrics import ConfusionMatrix
from segfleet.gate import Decision, Limits, Measured, class_iou, decide, gain_resamples

NAMES = ["road", "car", "person", "train"]
PIXELS = 1000


def counted(
    rng: np.random.Generator, num_images: int, hit_rates: np.ndarray, *, noise: float = 0.5
) -> np.ndarray:
    """Return counts of images whose classes are hit at these rates, each image harder or easier than another."""
    num_classes = len(hit_rates)
    counts = np.zeros((num_images, num_classes, num_classes), dtype=np.int64)
    logits = np.log(hit_rates / (1 - hit_rates))
    for image in counts:
        rates = 1 / (1 + np.exp(-(logits + rng.normal(0, noise, num_classes))))
        for target, rate in enumerate(rates):
            hits = rng.binomial(PIXELS, rate)
            image[target, target] = hits
            wrong = rng.multinomial(PIXELS - hits, np.full(num_classes - 1, 1 / (num_classes - 1)))
            image[target, np.arange(num_classes) != target] = wrong
    return counts


def model(counts: np.ndarray, **known: Any) -> Measured:
    return Measured(**{"counts": counts, "seconds_per_image": 0.1, "size_bytes": 1000, **known})


def decided(challenger: np.ndarray, champion: np.ndarray, **limits: Any) -> Decision:
    return decide(model(challenger), model(champion), NAMES, Limits(**limits))


RATES = np.array([0.95, 0.9, 0.8, 0.7])


@pytest.mark.parametrize("num_images", [25, 100])
def test_of_two_models_that_are_equally_good_one_in_twenty_passes_at_most(num_images: int) -> None:
    rng = np.random.default_rng(num_images)
    passed = sum(
        decided(counted(rng, num_images, RATES), counted(rng, num_images, RATES), max_class_loss=1.0).promote
        for _ in range(200)
    )
    # at a true rate of 5 % more than 15 of 200 come up once in 50 times
    assert passed <= 15


def test_a_model_that_is_clearly_better_passes(recwarn: pytest.WarningsRecorder) -> None:
    rng = np.random.default_rng(0)
    passed = [decided(counted(rng, 100, RATES + 0.03), counted(rng, 100, RATES)).promote for _ in range(20)]
    assert all(passed)
    assert not recwarn.list


def test_a_class_that_loses_too_much_is_named_whatever_the_mean_says() -> None:
    champion = counted(np.random.default_rng(1), 50, RATES, noise=0)
    challenger = champion.copy()
    for target in range(3):  # better there …
        for wrong in range(3):
            if wrong != target:
                challenger[:, target, target] += challenger[:, target, wrong]
                challenger[:, target, wrong] = 0
    challenger[:, 3, 3] -= 90  # … and worse here
    challenger[:, 3, 0] += 30
    challenger[:, 3, 1] += 30
    challenger[:, 3, 2] += 30
    decision = decided(challenger, champion)
    assert decision.gain > 0.003
    assert decision.lower_gain > 0
    assert decision.class_gains["train"] < -0.05
    assert not decision.promote
    assert len(decision.reasons) == 1
    assert decision.reasons[0].startswith("train loses 0.0")
    assert decided(challenger, champion, class_floors={"train": 0.2}).promote
    with pytest.raises(InputError, match="class_floors must name classes of the model, but got 'tram'"):
        decided(challenger, champion, class_floors={"tram": 0.2})


def test_the_gain_must_be_above_the_minimum_even_at_its_lower_end() -> None:
    rng = np.random.default_rng(2)
    champion, challenger = counted(rng, 60, RATES), counted(rng, 60, RATES + 0.02)
    decision = decided(challenger, champion, min_gain=0.0)
    assert decision.promote
    assert 0 < decision.lower_gain < decision.gain
    between = (decision.lower_gain + decision.gain) / 2
    refused = decided(challenger, champion, min_gain=between)
    assert not refused.promote
    assert f"not above {between:+.4f}" in refused.reasons[0]


@pytest.mark.parametrize("num_blank", [1, 20])
def test_images_without_a_valid_pixel_are_left_out(num_blank: int) -> None:
    """Two images that decide: of 4000 draws of 22 images hundreds would be of blank ones only, which have no mIoU."""
    rng = np.random.default_rng(6)
    pair = [counted(rng, 2, RATES + 0.04), counted(rng, 2, RATES)]
    blank = np.zeros((num_blank, 4, 4), np.int64)
    decision = decided(*pair)
    assert decision.num_images == 2
    assert np.isfinite(decision.lower_gain)
    assert decided(*(np.concatenate([blank, counts]) for counts in pair)) == decision
    assert decided(*(np.concatenate([counts[:1], blank, counts[1:]]) for counts in pair)) == decision
    with pytest.raises(InputError, match=f"but none of {num_blank} has one"):
        decided(blank, blank)


def test_models_that_were_counted_on_other_images_are_not_compared() -> None:
    counts = counted(np.random.default_rng(7), 3, RATES)
    others = counts.copy()
    others[0, 1, 1] += 1
    for other in (counts[:2], others):
        with pytest.raises(
            ValueError, match=r"counted on the same images, but got 3 images with 12000 valid"
        ):
            decided(counts, other)


def test_latency_and_size() -> None:
    rng = np.random.default_rng(3)
    champion, challenger = counted(rng, 60, RATES), counted(rng, 60, RATES + 0.03)
    slow = model(challenger, seconds_per_image=0.25, size_bytes=2_000_000)
    assert decide(slow, model(champion), NAMES, Limits()).promote
    decision = decide(slow, model(champion), NAMES, Limits(max_latency_ratio=2.0, max_size_bytes=1_000_000))
    assert decision.reasons == [
        "an image takes 2.50 times as long, more than 2.00",
        "the package has 2.0 MB, more than 1.0",
    ]


def test_the_scores_are_those_of_the_confusion_matrix() -> None:
    counts = counted(np.random.default_rng(4), 7, RATES)
    counts[:, 2] = 0
    counts[:, :, 2] = 0
    matrix = ConfusionMatrix(4)
    matrix.counts += torch.from_numpy(counts.sum(0))
    np.testing.assert_array_equal(class_iou(counts.sum(0)), matrix.class_iou.numpy())


def test_resamples_of_a_single_kind_of_image_do_not_vary() -> None:
    one = counted(np.random.default_rng(5), 1, RATES)
    many, better = np.repeat(one, 30, axis=0), np.repeat(np.diagflat(one[0].sum(1))[None], 30, axis=0)
    gains = gain_resamples(better, many)
    np.testing.assert_allclose(gains, 1 - class_iou(one[0]).mean(), rtol=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_gain": 1.0},
        {"confidence": 1.0},
        {"confidence": 0.2},
        {"max_class_loss": -0.1},
        {"class_floors": {"car": 2.0}},
        {"max_latency_ratio": -1.0},
    ],
)
def test_limits_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Limits(**wrong)

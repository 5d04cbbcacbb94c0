"""Laws of the boundary F-score: hand-worked, equal to all distances compared, blind to ignored pixels."""

import math

import numpy as np
import pytest

from pspnet.labels import IGNORE_INDEX
from segfleet.boundary import boundary_counts, boundary_f


def halves(column: int, height: int = 6, width: int = 10) -> np.ndarray:
    """Class 0 left of the column, class 1 from there on."""
    ids = np.zeros((height, width), np.uint8)
    ids[:, column:] = 1
    return ids


def test_boundaries_of_a_hand_worked_example() -> None:
    """The line is off by three columns and each class's boundary is the column beside it."""
    within, beyond = 3 / math.hypot(6, 10), 2.9 / math.hypot(6, 10)
    near = boundary_counts(halves(8), halves(5), 3, tolerance=within)
    assert near.tolist() == [[6, 6, 6, 6], [6, 6, 6, 6], [0, 0, 0, 0]]
    far = boundary_counts(halves(8), halves(5), 3, tolerance=beyond)
    assert far.tolist() == [[6, 0, 6, 0], [6, 0, 6, 0], [0, 0, 0, 0]]
    # one image met, one not; a class without a boundary has no score
    scores = boundary_f([near, far])
    assert scores[:2].tolist() == [0.5, 0.5]
    assert math.isnan(scores[2])


def test_precision_and_recall_make_the_harmonic_mean() -> None:
    # 6 of 8 predicted pixels near, 3 of 4 of the label's; then a class that is only predicted
    counts = np.array([[8, 6, 4, 3], [5, 0, 0, 0]])
    assert boundary_f([counts]).tolist() == [pytest.approx(0.75), 0.0]
    counts = np.array([[8, 4, 4, 4], [0, 0, 0, 0]])
    assert boundary_f([counts])[0] == pytest.approx(2 * 0.5 / 1.5)


@pytest.mark.parametrize("seed", range(4))
def test_counts_are_those_of_all_distances(seed: int) -> None:
    random = np.random.default_rng(seed)
    target, prediction = (
        np.kron(random.choice(4, (4, 5)), np.ones((6, 5))).astype(np.uint8) for _ in range(2)
    )
    target[random.random(target.shape) < 0.1] = IGNORE_INDEX
    height, width = target.shape

    def boundary(ids: np.ndarray, train_id: int) -> list[tuple[int, int]]:
        found = []
        for y, x in np.ndindex(height, width):
            around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            inside = [(r, c) for r, c in around if 0 <= r < height and 0 <= c < width]
            valid = [place for place in inside if target[place] != IGNORE_INDEX]
            if (
                ids[y, x] == train_id
                and target[y, x] != IGNORE_INDEX
                and any(ids[place] != train_id for place in valid)
            ):
                found.append((y, x))
        return found

    counts = boundary_counts(prediction, target, 4, tolerance=0.08)
    radius = 0.08 * math.hypot(height, width)
    for train_id in range(4):
        ours, theirs = boundary(prediction, train_id), boundary(target, train_id)
        near = [
            sum(any(math.dist(a, b) <= radius for b in others) for a in places)
            for places, others in ((ours, theirs), (theirs, ours))
        ]
        assert counts[train_id].tolist() == [len(ours), near[0], len(theirs), near[1]]
    assert counts[:, 1].sum() > 0


def test_a_perfect_prediction_scores_1_and_what_is_predicted_on_ignored_pixels_counts_nothing() -> None:
    target = halves(5)
    target[:2] = IGNORE_INDEX
    prediction = halves(5)
    prediction[:2] = np.arange(20).reshape(2, 10) % 3
    counts = boundary_counts(prediction, target, 3)
    assert counts.tolist() == [[4, 4, 4, 4], [4, 4, 4, 4], [0, 0, 0, 0]]
    assert boundary_f([counts])[:2].tolist() == [1.0, 1.0]

"""How well the outlines of the classes are met: the boundary F-score of Csurka et al., BMVC 2013, section 3.2.

For each class of an image, precision is the share of the prediction's boundary pixels that lie within a tolerance of
the label's boundary of that class, recall the share of the label's near the prediction's, F their harmonic mean. A
class's score is the mean over the images where it has a boundary in either; DAVIS (Perazzi et al., CVPR 2016) scores
an object in the same way. Counts are whole numbers, so that the scores do not depend on who counts which image.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.spatial import KDTree

from pspnet.labels import IGNORE_INDEX

TOLERANCE = 0.0075
"""Of the image's diagonal, as in the paper: 17.2 pixels for Cityscapes."""


def boundary_counts(
    prediction: np.ndarray, target: np.ndarray, num_classes: int, *, tolerance: float = TOLERANCE
) -> np.ndarray:
    """Return int64 (num_classes, 4) for the train ids (h, w) of an image.

    Of each class: boundary pixels of the prediction, those of them that are near the label's, boundary pixels of the
    label, those near the prediction's. A boundary pixel has one above, below, left or right that is of another class
    and valid; ignored pixels are neither boundary nor make one.
    """
    radius = tolerance * math.hypot(*target.shape)
    valid = target != IGNORE_INDEX
    found = []
    for train_ids in (prediction, target):
        places = np.argwhere(_edges(train_ids, valid))
        found.append((places, train_ids[places[:, 0], places[:, 1]]))
    counts = np.zeros((num_classes, 4), dtype=np.int64)
    for train_id in range(num_classes):
        ours, theirs = (places[classes == train_id] for places, classes in found)
        counts[train_id] = (
            len(ours),
            _num_near(ours, theirs, radius),
            len(theirs),
            _num_near(theirs, ours, radius),
        )
    return counts


def boundary_f(counts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the F-score of each class, float64 (classes,), from the counts of each image.

    nan for a class that has no boundary in any.
    """
    predicted, near_label, wanted, near_prediction = np.moveaxis(np.stack(counts).astype(np.float64), 2, 0)
    precision = near_label / np.maximum(predicted, 1)
    recall = near_prediction / np.maximum(wanted, 1)
    both = precision + recall
    of_images = np.where(both > 0, 2 * precision * recall / np.where(both > 0, both, 1), 0)
    occurs = (predicted > 0) | (wanted > 0)
    num_images = occurs.sum(0)
    return np.where(num_images > 0, (of_images * occurs).sum(0) / np.maximum(num_images, 1), np.nan)


def _edges(train_ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
    edges = np.zeros(valid.shape, dtype=bool)
    for low, high in (
        ((slice(None, -1), slice(None)), (slice(1, None), slice(None))),
        ((slice(None), slice(None, -1)), (slice(None), slice(1, None))),
    ):
        differ = (train_ids[low] != train_ids[high]) & valid[low] & valid[high]
        edges[low] |= differ
        edges[high] |= differ
    return edges


def _num_near(places: np.ndarray, others: np.ndarray, radius: float) -> int:
    """Return how many of `places` have one of `others` no further than `radius` away."""
    if not len(places) or not len(others):
        return 0
    distances, _ = KDTree(others).query(places, distance_upper_bound=radius + 1e-6)
    return int((distances <= radius).sum())

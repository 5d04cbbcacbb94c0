"""Weights of the classes in the loss, from how often each occurs."""

from collections.abc import Sequence
from statistics import median
from typing import Literal

from pspnet.errors import InputError

Balance = Literal["none", "balanced", "median"]


def class_weights(counts: Sequence[int], balance: Balance) -> list[float]:
    """Return the weight of each class with `counts` pixels; classes without a pixel get 0.

    "balanced": all pixels / (classes that occur * pixels of the class), scikit-learn's class_weight="balanced": each
    class comes to the same share of the loss. "median": median of the pixels of the classes that occur / pixels of the
    class (Eigen and Fergus, ICCV 2015, section 6.3.1; frequencies over all images, theirs over those with the class).
    """
    present = [count for count in counts if count > 0]
    if balance == "none":
        return [1.0] * len(counts)
    if not present:
        raise InputError(
            "loss.class_balance needs labelled training pixels, but there are none. Set it to none, or ingest labels."
        )
    whole = median(present) if balance == "median" else sum(present) / len(present)
    return [whole / count if count else 0.0 for count in counts]

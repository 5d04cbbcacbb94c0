"""The gate between challenger and champion: a pure decision on counted pixels, with every number behind it.

Both models are counted on the same images, so that what is compared is paired: images that are hard for both say
nothing. The interval of the gain is the bootstrap's over images (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapters 13 and 22), whose scores are computed from summed counts as the scores themselves are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pspnet.errors import InputError

NUM_RESAMPLES = 4000
CHUNK = 500
"""Resamples at a time."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a challenger must keep to."""

    min_gain: float = 0.0
    """The gain in mIoU must be above this, even at the lower end of its interval."""

    confidence: float = 0.95
    """Of the one-sided interval: how sure it must be."""

    max_class_loss: float = 0.03
    """No class may lose more IoU than this."""

    class_floors: Mapping[str, float] = field(default_factory=dict)
    """Other limits for single classes, by name."""

    max_latency_ratio: float = 0.0
    """The challenger's seconds per image over the champion's; 0 for no limit."""

    max_size_bytes: int = 0
    """Bytes of the challenger's package; 0 for no limit."""

    def __post_init__(self) -> None:
        if not -1 <= self.min_gain < 1:
            raise InputError(
                f"min_gain must be a difference of mIoUs, from -1 to 1, but got {self.min_gain}."
            )
        if not 0.5 <= self.confidence < 1:
            raise InputError(
                f"confidence must be at least 0.5 and below 1, but got {self.confidence}. Usual: 0.95."
            )
        for name, value in {"max_class_loss": self.max_class_loss, **self.class_floors}.items():
            if not 0 <= value <= 1:
                raise InputError(f"The IoU that {name} may lose must be from 0 to 1, but got {value}.")
        for name in ("max_latency_ratio", "max_size_bytes"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be 0 (no limit) or more, but got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of a model."""

    counts: np.ndarray
    """int64 (images, classes, classes): pixels of each target by prediction, image by image."""
    seconds_per_image: float
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether the challenger passes, and why."""

    promote: bool
    reasons: list[str]
    """What it fails on, each with the number and the limit; what it passes on where it fails on nothing."""
    gain: float
    """Difference of the mIoUs."""
    lower_gain: float
    """Lower end of the interval of the gain."""
    class_gains: dict[str, float]
    """Difference of IoUs of each class that both have."""
    num_images: int
    """Images with a valid pixel: those that decide."""


def decide(challenger: Measured, champion: Measured, class_names: Sequence[str], limits: Limits) -> Decision:
    """Return whether the challenger passes every limit against the champion; both were counted on the same images.

    Images without a valid pixel say nothing of a model and are left out.
    """
    targets, others = (model.counts.sum(axis=2) for model in (challenger, champion))
    if not np.array_equal(targets, others):
        raise ValueError(
            f"Both models must be counted on the same images, but got {targets.shape[0]} images with "
            f"{targets.sum()} valid pixels and {others.shape[0]} with {others.sum()}, or with others of each class."
        )
    decisive = targets.any(axis=1)
    if not decisive.any():
        raise InputError(
            f"Models must be compared on images with a valid pixel, but none of {len(decisive)} has one. Give another "
            "split."
        )
    counts = [model.counts[decisive] for model in (challenger, champion)]
    unknown = sorted(set(limits.class_floors) - set(class_names))
    if unknown:
        raise InputError(
            f"class_floors must name classes of the model, but got {unknown[0]!r}. There are: {', '.join(class_names)}."
        )
    ious = [class_iou(of_images.sum(0)) for of_images in counts]
    gain = float(np.nanmean(ious[0]) - np.nanmean(ious[1]))
    gains = gain_resamples(*counts)
    lower = float(np.quantile(gains, 1 - limits.confidence))
    class_gains = {
        name: float(ours - theirs)
        for name, ours, theirs in zip(class_names, *ious, strict=True)
        if np.isfinite(ours) and np.isfinite(theirs)
    }
    failed = []
    spread = f"{limits.confidence:.0%} sure of {lower:+.4f} or more, over {len(counts[0])} images"
    if not lower > limits.min_gain:
        failed.append(f"the gain in mIoU is {gain:+.4f}, {spread}: not above {limits.min_gain:+.4f}")
    for name, class_gain in class_gains.items():
        floor = limits.class_floors.get(name, limits.max_class_loss)
        if class_gain < -floor:
            failed.append(f"{name} loses {-class_gain:.4f} IoU, more than {floor:.4f}")
    slower = challenger.seconds_per_image / champion.seconds_per_image
    if limits.max_latency_ratio and slower > limits.max_latency_ratio:
        failed.append(f"an image takes {slower:.2f} times as long, more than {limits.max_latency_ratio:.2f}")
    failed += size_failures(challenger, limits)
    passed = [f"the gain in mIoU is {gain:+.4f}, {spread}; no class loses more than it may"]
    return Decision(
        promote=not failed,
        reasons=failed or passed,
        gain=gain,
        lower_gain=lower,
        class_gains=class_gains,
        num_images=len(counts[0]),
    )


def size_failures(challenger: Measured, limits: Limits) -> list[str]:
    """Return what is wrong with the size of a challenger, which needs no champion."""
    if not limits.max_size_bytes or challenger.size_bytes <= limits.max_size_bytes:
        return []
    return [
        f"the package has {challenger.size_bytes / 1e6:.1f} MB, more than {limits.max_size_bytes / 1e6:.1f}"
    ]


def gain_resamples(challenger: np.ndarray, champion: np.ndarray) -> np.ndarray:
    """Return the difference of the mIoUs on NUM_RESAMPLES draws of as many images with replacement.

    Each image has a valid pixel, so that no draw is without a class.
    """
    num_images, num_classes = challenger.shape[:2]
    flat = [counts.reshape(num_images, -1).astype(np.float64) for counts in (challenger, champion)]
    rng = np.random.default_rng(0)
    shares = np.full(num_images, 1 / num_images)
    gains = []
    for _ in range(0, NUM_RESAMPLES, CHUNK):
        times_drawn = rng.multinomial(num_images, shares, size=CHUNK).astype(np.float64)
        ious = [class_iou((times_drawn @ counts).reshape(-1, num_classes, num_classes)) for counts in flat]
        gains.append(np.nanmean(ious[0], axis=-1) - np.nanmean(ious[1], axis=-1))
    return np.concatenate(gains)


def class_iou(counts: np.ndarray) -> np.ndarray:
    """Return the IoU of each class from counts (…, classes, classes); nan for a class that does not occur."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1).astype(np.float64)
    union = counts.sum(-1) + counts.sum(-2) - hits
    return np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)

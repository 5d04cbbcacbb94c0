"""When a trial is given up: ASHA's rungs (Li et al., MLSys 2020, algorithm 2) or the median rule of Vizier (Golovin
et al., KDD 2017, section 3.2), over what trials have seen.

What a trial has seen, its fidelity, is counted in pixels: one unit is an epoch of the base configuration. A trial with
a crop of half as many pixels sees half a unit an epoch, and trains twice as many epochs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pspnet.sizes import sides
from segfleet.config import TrainingConfig
from segfleet.override import override

MEDIAN_STARTUP_TRIALS = 5
"""Complete trials before the median rule prunes, as in Optuna."""
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a trial goes on, and why, with the numbers."""

    stop: bool
    reason: str


def epoch_weight(base: TrainingConfig, changes: Mapping[str, Any]) -> float:
    """Return how many pixels an epoch of the base configuration with `changes` sees, relative to one without."""
    changed = override(base, changes)
    pixels = [math.prod(sides(config.data.crop_size)) for config in (changed, base)]
    if base.schedule.max_iterations_per_epoch:  # otherwise an epoch is all images, whatever the batch
        pixels = [
            pixels[index] * config.schedule.global_batch_size for index, config in enumerate((changed, base))
        ]
    return pixels[0] / pixels[1]


def schedule_of(base: TrainingConfig, weight: float) -> dict[str, int]:
    """Return the changes to the schedule by which a trial sees as many pixels, and is evaluated as often, as `base`."""
    schedule = base.schedule
    lengths = {
        "schedule.num_epochs": schedule.num_epochs,
        "schedule.evaluate_every_epochs": schedule.evaluate_every_epochs,
    }
    return {path: max(1, round(length / weight)) for path, length in lengths.items()} if weight != 1 else {}


def rungs(*, min_epochs: int, max_epochs: int, reduction_factor: int) -> list[int]:
    """Return the fidelities at which ASHA compares: min_epochs * reduction_factor ** k, all before max_epochs."""
    epochs = []
    epoch = min_epochs
    while epoch < max_epochs:
        epochs.append(epoch)
        epoch *= reduction_factor
    return epochs


def value_at(mious: Mapping[float, float], fidelity: float) -> float | None:
    """Return the first value at or after a fidelity; None for a trial that did not get there."""
    return next((value for seen, value in sorted(mious.items()) if seen >= fidelity - _ROUNDING), None)


def decide_rung(value: float, others: Sequence[float], *, epoch: int, reduction_factor: int) -> Decision:
    """Return whether a trial with `value` at the rung of `epoch` stops, given what others had when they were there.

    The bar is the (1 - 1 / reduction_factor) quantile of the others, as in Ray Tune's AsyncHyperBandScheduler.
    """
    if not others:
        return Decision(stop=False, reason=f"first at the rung of epoch {epoch}, mIoU {value:.4f}")
    bar = float(np.percentile(others, (1 - 1 / reduction_factor) * 100))
    compared = f"mIoU {value:.4f} at the rung of epoch {epoch}, bar {bar:.4f} of {len(others)} others"
    return Decision(stop=value < bar, reason=compared)


def decide_median(
    mious: Mapping[float, float], complete: Sequence[Mapping[float, float]], *, min_epochs: int
) -> Decision:
    """Return whether a trial with these values by fidelity stops, as Optuna's MedianPruner decides.

    It stops where its best value so far is below the median of the complete trials at the same fidelity.
    """
    newest, best = max(mious), max(mious.values())
    others = [value for it in complete if (value := value_at(it, newest)) is not None]
    if newest < min_epochs - _ROUNDING or len(complete) < MEDIAN_STARTUP_TRIALS or not others:
        return Decision(stop=False, reason=f"epoch {newest:.4g} has too few complete trials to compare with")
    bar = float(np.median(others))
    return Decision(
        stop=best < bar,
        reason=f"best mIoU {best:.4f} up to epoch {newest:.4g}, median {bar:.4f} of {len(others)} complete trials",
    )

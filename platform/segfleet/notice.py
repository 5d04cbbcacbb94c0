"""When a node is to be taken back: the training is saved in the midst of its epoch, and goes on until it is torn down.

Workers agree without a word more than a step exchanges anyway: rank 0 raises a flag that is summed with the pixels of
the step, and only then do all of them ask whether a notice was given.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pspnet.json_values import typed
from pspnet.training_stats import EpochPart

POLL_S = 2.0
"""How often workers ask; what they lose by it is small against the two minutes that clouds give."""

MAX_SHARE = 0.1
"""Of the time after a notice, what saving may take: the more often it is saved, the fewer steps are lost."""


class Notice:
    """Decides when a training is saved because one of its nodes is to be taken back."""

    def __init__(self, is_given: Callable[[], bool] | None, *, asks: bool) -> None:
        """`is_given` is asked by all workers at once, None where nobody gives notice; one worker `asks` for that."""
        self._is_given = is_given
        self._asks = asks and is_given is not None
        self._next = time.monotonic() + POLL_S

    def is_due(self) -> bool:
        """Return whether all workers should ask after this step."""
        return self._asks and time.monotonic() >= self._next

    def hears(self) -> bool:
        """Ask, together with all other workers, whether the notice is given."""
        assert self._is_given is not None
        self._next = time.monotonic() + POLL_S
        return self._is_given()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Save within it: the next time comes when this has taken MAX_SHARE of the time since."""
        started = time.monotonic()
        yield
        self._next = started + (time.monotonic() - started) / MAX_SHARE


def epoch_part(values: Mapping[str, Any]) -> EpochPart:
    """Return the epoch's part that a checkpoint holds; InputError where it is none."""
    total, main, aux = typed(list[float], values["sums"], "sums")
    return EpochPart(
        iterations=typed(int, values["iterations"], "iterations"),
        num_images=typed(int, values["num_images"], "num_images"),
        sums=(total, main, aux),
        norms=typed(list[float], values["norms"], "norms"),
        scaler=typed(dict[str, int | float], values["scaler"], "scaler"),
        seconds=typed(float, values["seconds"], "seconds"),
    )

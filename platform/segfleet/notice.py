"""When a node is to be taken back: the training is saved in the midst of its epoch, and goes on while there is time.

Workers agree without a word more than a step exchanges anyway: rank 0 raises a flag that is summed with the pixels of
the step, and only then do all of them ask whether a notice was given. Where the notice says until when, the training
is saved a last time shortly before, and takes no further step, which would be done again elsewhere.
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
"""Of the time after a notice, what saving may take until the last time: the more often, the fewer steps are lost."""

MARGIN_S = 1.0
"""What clocks of nodes may differ by."""

GRACE_S = 15.0
"""How long after its time a node may still be there; then the training goes on."""

UNKNOWN = float("inf")
"""The time of a notice that does not say until when."""


class Notice:
    """Decides when a training is saved because one of its nodes is to be taken back."""

    def __init__(self, taken_back_at: Callable[[], float | None] | None, *, asks: bool) -> None:
        """`taken_back_at` is asked by all workers at once: Unix time in seconds, `UNKNOWN`, or None without a notice.

        It is None itself where nobody gives notice; one worker `asks` for that.
        """
        self._taken_back_at = taken_back_at
        self._asks = asks and taken_back_at is not None
        self._next = time.monotonic() + POLL_S
        self._end = UNKNOWN
        self._last_step, self._step_s, self._save_s = time.monotonic(), 0.0, 0.0

    def is_due(self) -> bool:
        """Return whether all workers should ask after the step that begins."""
        now = time.monotonic()
        self._step_s, self._last_step = now - self._last_step, now
        return self._asks and now >= self._next

    def hears(self) -> bool:
        """Ask, together with all other workers, whether the notice is given."""
        assert self._taken_back_at is not None
        now, end = time.monotonic(), self._taken_back_at()
        self._next = now + POLL_S
        self._end = UNKNOWN if end is None else now + end - time.time()
        return end is not None

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Save within it: the next time comes when this has taken MAX_SHARE of the time since, or as the last one."""
        started = time.monotonic()
        self._step_s = max(self._step_s, started - self._last_step)
        yield
        self._last_step = time.monotonic()
        self._save_s = max(self._save_s, self._last_step - started)
        paced, last = started + (self._last_step - started) / MAX_SHARE, self._end - self._reserve_s
        self._next = min(paced, last) if last > self._last_step else paced

    @property
    def when(self) -> str:
        """When the node is taken back, for people."""
        return "soon" if self._end == UNKNOWN else f"in {max(0.0, self._end - time.monotonic()):.0f} s"

    def seconds_idle(self) -> float:
        """Return how long no step is worth its while: until the node is gone, where no other could be saved."""
        now = time.monotonic()
        if self._end == UNKNOWN or not self._end - self._reserve_s <= now < self._end + GRACE_S:
            return 0.0
        return self._end + GRACE_S - now

    @property
    def _reserve_s(self) -> float:
        """The last time of saving is due so long before the end: two steps, and twice the time that saving took.

        A step runs when it falls due, and it is saved after the next one.
        """
        return 2 * self._step_s + 2 * self._save_s + MARGIN_S


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

"""The lines that a training writes for people: where it is, how fast, and where the time of a step goes."""

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pspnet.flops import Arithmetic
from pspnet.training_stats import IterationStats

PROGRESS_INTERVAL_S = 2.0


class ProgressLog:
    """Appends plain lines to a file that the job's terminal follows; silent where it has none (rank > 0)."""

    def __init__(self, path: Path | None) -> None:
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a")
        self._last_line = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._num_images, self._seconds = 0, 0.0
        self._parts_s: Counter[str] = Counter()
        self.arithmetic: Arithmetic | None = None
        """What an image costs; set once the network is known."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def say(self, line: str) -> None:
        """Write one line."""
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()

    def iteration(
        self, stats: IterationStats, epoch: int, num_epochs: int, max_iterations: int, batch: int
    ) -> None:
        """Write where the training is, at most every PROGRESS_INTERVAL_S.

        Its speed is that of the steps since the last such line, the first step of all left out; the time that is left
        counts what lies between them, too: evaluations, checkpoints, decisions.
        """
        self._parts_s.update(stats.parts_s)
        now = time.monotonic()
        self._first = self._first or (now, stats.iteration)
        if stats.iteration > self._first[1]:
            self._num_images += batch
            self._seconds += batch / stats.images_per_s
        if now - self._last_line < PROGRESS_INTERVAL_S or stats.iteration == self._first[1]:
            return
        self._last_line = now
        seconds_each = (now - self._first[0]) / (stats.iteration - self._first[1])
        left = seconds_each * (max_iterations - stats.iteration - 1)
        self.say(
            f"epoch {epoch + 1}/{num_epochs}  iteration {stats.iteration + 1}/{max_iterations}  "
            f"loss {stats.loss:.4f}  lr {stats.lr:.5f}  {self._speed(self._num_images / self._seconds)}  "
            f"{_shares(self._parts_s)}  ETA {_clock(left)}"
        )
        self._parts_s.clear()
        self._num_images, self._seconds = 0, 0.0

    def epoch(self, metrics: Mapping[str, Any], num_epochs: int, seconds: float) -> None:
        """Write what an epoch ended with."""
        line = (
            f"epoch {metrics['epoch']}/{num_epochs} done in {seconds:.1f} s  loss {metrics['loss']:.4f}  "
            f"{self._speed(metrics['images_per_s'])}  {_shares(metrics['step_s'])}"
        )
        if "miou" in metrics:
            line += f"  val mIoU {metrics['miou']:.4f}  pixel accuracy {metrics['pixel_accuracy']:.4f}"
        self._last_line = time.monotonic()
        self.say(line)

    def _speed(self, images_per_s: float) -> str:
        text = f"{images_per_s:.1f} images/s"
        if self.arithmetic is None:
            return text
        rates = self.arithmetic.rates(images_per_s)
        if "mfu" in rates:
            return f"{text}  MFU {rates['mfu']:.1%}"
        return f"{text}  {rates['tflops_per_s']:.3g} TFLOP/s"


def _shares(parts_s: Mapping[str, float]) -> str:
    """Return each part's share of the steps' time, in whole percent."""
    whole = sum(parts_s.values()) or 1.0
    return "  ".join(f"{part} {seconds / whole:.0%}" for part, seconds in parts_s.items())


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"

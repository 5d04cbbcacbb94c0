"""Progress of a long loop: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")

LINE_INTERVAL_S = 5.0


def tracked(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Yield each item and show how many are done."""
    if sys.stdout.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            yield from progress.track(items, description=description)
        return
    started = last_line = time.monotonic()
    for num_done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if num_done == len(items) or now - last_line >= LINE_INTERVAL_S:
            last_line = now
            left_s = (now - started) / num_done * (len(items) - num_done)
            ending = f"{left_s:.0f} s left" if num_done < len(items) else f"in {now - started:.0f} s"
            print(f"{description}: {num_done} of {len(items)}, {ending}", flush=True)

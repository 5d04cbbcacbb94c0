"""Progress of a long loop: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Collection, Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")

LINE_INTERVAL_S = 5.0


def tracked(items: Iterable[Item], description: str, *, num_items: int | None = None) -> Iterator[Item]:
    """Yield each item and show how many are done, of as many as there are or are expected."""
    if num_items is None:
        assert isinstance(items, Collection)
        num_items = len(items)
    if sys.stdout.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            yield from progress.track(items, total=num_items, description=description)
        return
    started = last_line = time.monotonic()
    for num_done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if num_done == num_items or now - last_line >= LINE_INTERVAL_S:
            last_line = now
            left_s = (now - started) / num_done * max(0, num_items - num_done)
            ending = f"{left_s:.0f} s left" if num_done < num_items else f"in {now - started:.0f} s"
            print(f"{description}: {num_done} of {num_items}, {ending}", flush=True)

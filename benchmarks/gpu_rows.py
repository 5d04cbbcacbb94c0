"""The rows of gpu.py: what takes turns on a card, and what is seen of it."""

import contextlib
import gc
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from gpu_ways import Loss, Way

from pspnet.errors import InputError
from pspnet.exhaustion import is_out_of_memory
from pspnet.flops import peak_flops
from pspnet.inference import Precision

FAILED = "failed, "


@dataclass
class Row:
    """One way of a step, of a prediction or of a batch's crops, and what was seen of it."""

    name: str
    way: Way | None = None
    outcome: str = ""
    """Why there is nothing to be seen: out of memory, no compiler, no time, failed."""
    loss: Loss | None = None
    """Of the first step."""
    peak_bytes: int = 0
    """Most that its tensors took at the same time, with its weights and its batch."""
    reserved_bytes: int = 0
    disagreement: float | None = None
    """Share of a prediction's pixels."""
    seconds: list[float] = field(default_factory=list)
    """Of a step or a prediction, in each round."""

    @property
    def has_failed(self) -> bool:
        """Whether something went wrong that is no want of memory, time or a compiler."""
        return self.outcome.startswith(FAILED)

    def ratios(self, base: "Row") -> list[float]:
        """How many times as fast as `base`, in every round."""
        if self.outcome or base.outcome:
            return []
        return [theirs / mine for theirs, mine in zip(base.seconds, self.seconds, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """All ways of a step with one batch size."""

    batch_size: int
    rows: list[Row]
    predicted: dict[str, int]
    """Bytes that pspnet.memory counts, by what is done: "" or "recomputed"."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is measured on."""

    device: torch.device
    name: str

    def peak(self, precision: Precision) -> float | None:
        """Return operations per second at most, None where they are not known."""
        return peak_flops(self.name, precision, is_tf32=torch.backends.cudnn.allow_tf32)

    def free(self) -> None:
        """Give back what no tensor holds, so that no way finds the gaps that another has left."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        """Wait for all that the device was given to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> tuple[int, int]:
        """Return the bytes of living tensors and what is reserved for them."""
        if self.device.type != "cuda":
            return 0, 0
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    def peak_memory(self) -> tuple[int, int]:
        """Return the most of both since `free`, or since the counters were reset."""
        if self.device.type != "cuda":
            return 0, 0
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def say(text: str) -> None:
    """Show how far it is, and what there is so far, should it be cut off."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def noted(row: Row) -> Iterator[None]:
    """Let what goes wrong be the row's outcome, so that the other ways are measured all the same."""
    try:
        yield
    except InputError as error:
        row.outcome = str(error)
    except Exception as error:  # a compiler, for one, fails in any way
        if is_out_of_memory(error):
            row.outcome = "oom"
            return
        row.outcome = f"{FAILED}{type(error).__name__}"
        say(traceback.format_exc())


def take_turns(
    card: Card,
    running: Sequence[tuple[Row, Callable[[int], object]]],
    *,
    num_rounds: int,
    calls_per_turn: int,
    deadline: float = math.inf,
) -> None:
    """Let every way take its turn in each round, the first call of it not timed; what goes wrong drops out.

    No round but the first is begun after `deadline`, by time.monotonic().
    """
    for number in range(num_rounds):
        if number and time.monotonic() > deadline:
            return
        say(f"round {number + 1} of {num_rounds}")
        for row, turn in running:
            if row.outcome:
                continue
            card.free()
            with noted(row):
                turn(1)
                card.wait()
                begun = time.perf_counter()
                turn(calls_per_turn)
                card.wait()
                row.seconds.append((time.perf_counter() - begun) / calls_per_turn)


def repeated(call: Callable[[], object]) -> Callable[[int], object]:
    """Return what calls it so often."""
    return lambda number: [call() for _ in range(number)]

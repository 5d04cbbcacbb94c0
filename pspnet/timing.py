"""Where the time of an optimizer step goes, as the device that computes sees it, without waiting for that device."""

import time
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Part = Literal["data_wait", "prepare", "forward", "backward", "all_reduce", "optimizer"]
PARTS: tuple[Part, ...] = get_args(Part)
"""data_wait: nothing to compute, the batch is not there yet. prepare: windows become crops. all_reduce: the sums over
the workers, as far as they are not hidden behind the backward pass; that includes the wait for slower workers.
optimizer: the gradient's norm, the step, the moving average."""


class StepClock:
    """Seconds of each part of the steps: by the host's clock on CPUs, by events in the stream on CUDA.

    `mark` ends a part. Events are read one step later, when the step's results have been waited for anyway, so that
    measuring waits for nothing.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.totals: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        """Of all steps read so far."""
        self.latest: dict[Part, float] = {}
        """Of the newest step that was read: on CUDA the one before the newest."""
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[Part, float | torch.cuda.Event]] = []
        self._unread: list[tuple[Part, float | torch.cuda.Event]] = []
        self._last = self._now()
        # The backward pass ends with the first parameter; what follows is the wait for the sums over workers.
        first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        self._hook = first.register_post_accumulate_grad_hook(self._on_last_gradient)

    def mark(self, part: Part) -> None:
        """Count the time since the last mark as `part`."""
        self._marks.append((part, self._now()))

    def end_step(self) -> None:
        """Read the step before, or on CPUs the one that ends."""
        if not self._is_cuda:
            self._unread, self._marks = self._marks, []
            self._read()
            return
        self._read()
        self._unread, self._marks = self._marks, []

    def close(self) -> dict[Part, float]:
        """Read the last step, waiting for it, and return the totals."""
        self._hook.remove()
        if self._is_cuda:
            torch.cuda.synchronize()
        self._read()
        return self.totals

    def _on_last_gradient(self, _: Tensor) -> None:
        self.mark("backward")

    def _read(self) -> None:
        if not self._unread:
            return
        self.latest = dict.fromkeys(PARTS, 0.0)
        for part, end in self._unread:
            self.latest[part] += _seconds(self._last, end)
            self._last = end
        for part, seconds in self.latest.items():
            self.totals[part] += seconds
        self._unread = []

    def _now(self) -> "float | torch.cuda.Event":
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(begin: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert isinstance(begin, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return begin.elapsed_time(end) / 1000

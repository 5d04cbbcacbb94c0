"""What one optimizer step and one epoch came to, and the error that ends a training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pspnet.timing import Part

What = Literal["loss", "gradient", "state"]


class DivergedError(RuntimeError):
    """Loss or gradient of an iteration are not finite, or the weights after an epoch's last; every worker raises it.

    But for the last case, before the weights change.
    """

    def __init__(self, iteration: int, names: Sequence[str], what: What = "loss") -> None:
        listed = ", ".join(names)
        said = f"The {what} of iteration {iteration + 1} is"
        if what == "state":
            said = f"Weights or statistics after iteration {iteration + 1} are"
        super().__init__(f"{said} not finite, on {listed}. A smaller lr may do.")
        self.iteration = iteration
        """From 0; the text counts from 1, as the log does."""
        self.names = list(names)
        """Images of the workers whose own share of the loss was not finite; of gradient and state, of all workers."""
        self.what: What = what

    def __reduce__(self) -> tuple[type["DivergedError"], tuple[int, list[str], What]]:
        return DivergedError, (self.iteration, self.names, self.what)


@dataclass(frozen=True, kw_only=True)
class IterationStats:
    """One optimizer step, over all workers."""

    iteration: int
    """Counted from the beginning of the training."""
    epoch: int
    loss: float
    main_loss: float
    aux_loss: float
    gradient_norm: float
    """Of all parameters together, before it is limited."""
    lr: float
    """Of the backbone."""
    images_per_s: float
    """Of all workers together, the wait for data counted in."""
    data_wait_s: float
    """Of this worker."""
    parts_s: dict[Part, float]
    """Seconds of each part of this worker's step; on CUDA of the step before, empty at the first of an epoch."""


@dataclass(frozen=True, kw_only=True)
class EpochPart:
    """What the first steps of an epoch leave for the rest of it, beside weights and optimizer; plain numbers."""

    iterations: int
    num_images: int
    """Of all workers."""
    sums: tuple[float, float, float]
    """Of their losses: total, main, auxiliary."""
    norms: list[float]
    scaler: dict[str, float | int]
    """State of the gradient scaler, empty but for fp16."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TrainStats:
    """One epoch, over all workers."""

    loss: float
    """Mean of the iterations' losses, as the next two."""
    main_loss: float
    aux_loss: float
    lr: float
    """Of the backbone, at the last iteration."""
    images_per_s: float
    data_wait_s: float
    """Time that a worker waited for data in the whole epoch, mean over workers; this and the next since the epoch
    went on, where it was begun elsewhere."""
    parts_s: dict[Part, float]
    """Seconds of each part of a step, mean over steps and workers."""
    gradient_norm: float
    """Mean of the iterations' norms, before they are limited (of those that are finite, with fp16)."""
    iterations: int
    scaler: dict[str, float | int]
    """State of the gradient scaler at the end, for the next epoch; empty but for fp16."""

"""Memory of a training step, counted before anything is computed, and what of it a device is found to take.

The step is run on fake tensors, which have sizes but no content; the bytes of all that live at the same time are added
up. Workspaces of kernels and the gaps between tensors are the device's: a line through a few measured steps.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pspnet.distributed import parallelise
from pspnet.freezing import train_mode
from pspnet.inference import Precision, autocast
from pspnet.labels import IGNORE_INDEX
from pspnet.loss import PLAIN, CrossEntropy, segmentation_loss
from pspnet.model import PSPNet
from pspnet.sizes import Size, sides
from pspnet.sizes_alone import sizes_alone

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of tensors of one worker in an optimizer step."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    """Of all parameters that are trained; the optimizer's momentum has as many."""
    activations: int
    """What lives at the end of the first forward pass and the loss, beside the weights: kept for the backward pass."""
    peak: int
    """Most that live at the same time, momentum counted in."""


@dataclass(frozen=True)
class Fit:
    """What a device takes: factor * counted peak + constant bytes."""

    factor: float = 1.0
    constant: float = 0.0

    def peak_bytes(self, memory: StepMemory) -> int:
        """Return what the step is predicted to take on the device."""
        return round(self.factor * memory.peak + self.constant)


def step_memory(
    build: Callable[[], PSPNet],
    crop_size: Size,
    num_images: int,
    *,
    precision: Precision = "fp32",
    accumulation_steps: int = 1,
    cross_entropy: CrossEntropy = PLAIN,
) -> StepMemory:
    """Return the memory of a step on the network that `build` makes, as `count_step`; nothing is computed."""
    with sizes_alone(build) as model:
        return count_step(
            model,
            crop_size,
            num_images,
            precision=precision,
            accumulation_steps=accumulation_steps,
            cross_entropy=cross_entropy,
        )


def count_step(
    model: PSPNet,
    crop_size: Size,
    num_images: int,
    *,
    precision: Precision = "fp32",
    accumulation_steps: int = 1,
    cross_entropy: CrossEntropy = PLAIN,
) -> StepMemory:
    """Take noise through `model`, `num_images` at a time, on its own device, and count what lives meanwhile.

    Of several accumulation steps two are taken, as `engine.train_one_epoch` takes them: the second, beside the
    gradients of the first and the images of all, is like those after it.
    """
    model.zero_grad(set_to_none=True)
    train_mode(model)
    device = next(model.parameters()).device
    weights = _num_bytes([*model.parameters(), *model.buffers()])
    gradients = _num_bytes([weight for weight in model.parameters() if weight.requires_grad])
    height, width = sides(crop_size)
    live = LiveBytes([*model.parameters(), *model.buffers()])
    with live:
        share = num_images * accumulation_steps
        images = torch.randn(share, 3, height, width, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        target = torch.zeros(share, height, width, dtype=torch.int64, device=device)
        parts = list(zip(images.split(num_images), target.split(num_images), strict=True))
        activations = 0
        for part, part_target in parts[:2]:
            with autocast(device, precision):
                output = model(part, upsample=False)
            loss = segmentation_loss(
                output,
                part_target,
                num_valid=target.numel(),
                aux_loss_weight=0.4,
                kind=cross_entropy,
                choose=_all_pixels,
            ).total
            activations = activations or live.now
            loss.backward()
    return StepMemory(
        weights=weights, gradients=gradients, activations=activations, peak=weights + gradients + live.peak
    )


def measure_fit(
    build: Callable[[], PSPNet],
    device: torch.device | str,
    *,
    precision: Precision,
    cases: Sequence[tuple[Size, int]] = ((129, 2), (257, 2), (257, 4)),
) -> Fit:
    """Return the line through what torch reserves on CUDA for a few steps of (crop, images); elsewhere what is counted.

    CUDA's context and NCCL's buffers are none of torch's allocator, and come beside it.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return Fit()
    model = build().to(device)
    parallelise(model, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    counted, taken = [], []
    for crop_size, num_images in cases:
        for _ in range(2):  # the optimizer's state is there from the second step on
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            count_step(model, crop_size, num_images, precision=precision)
            optimizer.step()
        taken.append(torch.cuda.max_memory_reserved(device))
        counted.append(step_memory(build, crop_size, num_images, precision=precision).peak)
    return fit_line(counted, taken)


def fit_line(counted: Sequence[int], taken: Sequence[int]) -> Fit:
    """Return the line of least squares, its constant not below 0, raised until no measured step lies above it."""
    factor, constant = np.polyfit(np.asarray(counted, float), np.asarray(taken, float), 1).tolist()
    if constant < 0:
        factor, constant = max(b / a for a, b in zip(counted, taken, strict=True)), 0.0
    above = max(b - (factor * a + constant) for a, b in zip(counted, taken, strict=True))
    return Fit(factor, constant + max(0.0, above))


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as anything refers to them."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()
        self._known = [tensor.untyped_storage() for tensor in known]
        self._seen.update(id(storage) for storage in self._known)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **kwargs or {})
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, num_bytes)

    def _remove(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.now -= num_bytes


def _all_pixels(target: Tensor, probabilities: Tensor, *, threshold: float, min_kept: int) -> Tensor:
    """Stand in for `ohem.hard_pixels`, which asks for values; what it takes beside this is gone before the peak."""
    return target.masked_fill(probabilities > 1, IGNORE_INDEX)


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

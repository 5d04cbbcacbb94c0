"""Confusion counts, exact in int64, and the fractions that follow from them."""

# ruff: noqa: F722
from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from pspnet.labels import IGNORE_INDEX, ClassTable


class ConfusionMatrix:
    """counts[i, j] valid pixels of target i were predicted as j; sums over workers are exact.

    missed[i] valid pixels of target i were predicted as IGNORE_INDEX, as files of others may hold: they count
    against class i and for no class (as in cityscapesScripts' evalPixelLevelSemanticLabeling.py).
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.counts: Int64[Tensor, "c c"] = torch.zeros(
            num_classes, num_classes, dtype=torch.int64, device=device
        )
        self.missed: Int64[Tensor, " c"] = torch.zeros(num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Integer[Tensor, "*axes"], target: Integer[Tensor, "*axes"]) -> None:
        """Count every pixel whose target is not IGNORE_INDEX."""
        is_bytes = prediction.dtype == target.dtype == torch.uint8
        if is_bytes and prediction.device.type == target.device.type == "cpu":
            from pspnet.cpu_counts import pair_counts

            table = torch.from_numpy(pair_counts(prediction.numpy(), target.numpy()))
        else:
            table = _pair_counts(prediction, target)
        size = self.num_classes
        of_classes = table[:size]
        for name, outside in (
            ("target", table[size:IGNORE_INDEX].sum(1)),
            ("prediction", of_classes[:, size:IGNORE_INDEX].sum(0)),
        ):
            if outside.any():
                ids = outside.nonzero().flatten() + size
                raise ValueError(
                    f"{name} must hold train ids below {size}, or {IGNORE_INDEX}, where the target is valid, "
                    f"but got ids from {int(ids.min())} to {int(ids.max())}."
                )
        self.counts += of_classes[:, :size].to(self.counts.device)
        self.missed += of_classes[:, IGNORE_INDEX].to(self.counts.device)

    def add(self, other: "ConfusionMatrix") -> None:
        """Count what `other` counted, too."""
        self.counts += other.counts.to(self.counts.device)
        self.missed += other.missed.to(self.missed.device)

    def all_reduce(self) -> None:
        """Sum over the workers of the group, where there is one; every worker must call it once."""
        if dist.is_available() and dist.is_initialized():
            both = torch.cat([self.counts, self.missed[None]])
            dist.all_reduce(both)
            self.counts.copy_(both[:-1])
            self.missed.copy_(both[-1])

    @property
    def num_pixels(self) -> int:
        """Valid pixels that were counted."""
        return int(self.counts.sum() + self.missed.sum())

    @property
    def class_iou(self) -> Float[Tensor, " c"]:
        """Intersection over union of each class; nan for a class neither in the targets nor predicted."""
        hits = self.counts.diagonal()
        return hits.double() / (self.counts.sum(0) + self._targets - hits).double()

    @property
    def miou(self) -> float:
        """Mean of `class_iou` over the classes that have one; nan where no pixel was counted."""
        return float(self.class_iou.nanmean())

    @property
    def mean_accuracy(self) -> float:
        """Mean over the classes of the targets of the share of their pixels that were predicted right."""
        return float((self.counts.diagonal().double() / self._targets.double()).nanmean())

    @property
    def pixel_accuracy(self) -> float:
        """Share of all valid pixels that were predicted right."""
        return float(self.counts.diagonal().sum().double() / self._targets.sum().double())

    def category_iou(self, class_table: ClassTable) -> dict[str, float]:
        """Return the IoU of each category of the classes; nan where it neither occurs nor is predicted.

        Classes of one category are one: a car predicted as a bus is right (Cordts et al., CVPR 2016, section 4.2).
        Empty for a table without categories.
        """
        categories = [info.category for info in class_table.trained]
        if not all(categories):
            return {}
        found = {}
        for category in dict.fromkeys(categories):
            inside = torch.tensor([other == category for other in categories], device=self.counts.device)
            predicted, wanted = self.counts[:, inside].sum(), self._targets[inside].sum()
            hits = self.counts[inside][:, inside].sum()
            found[category] = float(hits.double() / (predicted + wanted - hits).double())
        return found

    @property
    def _targets(self) -> Int64[Tensor, " c"]:
        """Valid pixels of each class of the targets."""
        return self.counts.sum(1) + self.missed


def _pair_counts(
    prediction: Integer[Tensor, "*axes"], target: Integer[Tensor, "*axes"]
) -> Int64[Tensor, "256 256"]:
    """Return how often each prediction (column) meets each target (row), from 0 to 255; ignored targets left out."""
    valid = target != IGNORE_INDEX
    predicted, wanted = prediction[valid].long(), target[valid].long()
    for name, ids in (("prediction", predicted), ("target", wanted)):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) <= IGNORE_INDEX:
            raise ValueError(
                f"{name} must hold train ids below 256, but got ids from {int(ids.min())} to {int(ids.max())}."
            )
    return torch.bincount(wanted * 256 + predicted, minlength=256**2).view(256, 256)


def constant_miou(class_counts: Sequence[int], train_id: int) -> float:
    """Return the mIoU of predicting `train_id` everywhere, given the valid pixels of each class.

    What a model must beat by far to have learned anything: with the most frequent class, the majority baseline.
    """
    num_occurring = sum(count > 0 for index, count in enumerate(class_counts) if index != train_id) + 1
    return class_counts[train_id] / sum(class_counts) / num_occurring

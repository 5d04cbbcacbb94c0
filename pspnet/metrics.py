"""Confusion counts, exact in int64, and the fractions that follow from them."""

# ruff: noqa: F722
from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from pspnet.labels import IGNORE_INDEX


class ConfusionMatrix:
    """counts[i, j] valid pixels of target i were predicted as j; sums over workers are exact."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.counts: Int64[Tensor, "c c"] = torch.zeros(
            num_classes, num_classes, dtype=torch.int64, device=device
        )

    def update(self, prediction: Integer[Tensor, "*axes"], target: Integer[Tensor, "*axes"]) -> None:
        """Count every pixel whose target is not IGNORE_INDEX."""
        valid = target != IGNORE_INDEX
        predicted, wanted = prediction[valid].long(), target[valid].long()
        size = self.num_classes
        for name, ids in (("prediction", predicted), ("target", wanted)):
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
                raise ValueError(
                    f"{name} must hold train ids below {size} where the target is valid, but got ids from "
                    f"{int(ids.min())} to {int(ids.max())}."
                )
        counts = torch.bincount(wanted * size + predicted, minlength=size**2)
        self.counts += counts.view(size, size).to(self.counts.device)

    def all_reduce(self) -> None:
        """Sum over the workers of the group, where there is one; every worker must call it once."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.counts)

    @property
    def class_iou(self) -> Float[Tensor, " c"]:
        """Intersection over union of each class; nan for a class neither in the targets nor predicted."""
        hits = self.counts.diagonal()
        return hits.double() / (self.counts.sum(0) + self.counts.sum(1) - hits).double()

    @property
    def miou(self) -> float:
        """Mean of `class_iou` over the classes that have one; nan where no pixel was counted."""
        return float(self.class_iou.nanmean())

    @property
    def mean_accuracy(self) -> float:
        """Mean over the classes of the targets of the share of their pixels that were predicted right."""
        return float((self.counts.diagonal().double() / self.counts.sum(1).double()).nanmean())

    @property
    def pixel_accuracy(self) -> float:
        """Share of all valid pixels that were predicted right."""
        return float(self.counts.diagonal().sum().double() / self.counts.sum().double())


def constant_miou(class_counts: Sequence[int], train_id: int) -> float:
    """Return the mIoU of predicting `train_id` everywhere, given the valid pixels of each class.

    What a model must beat by far to have learned anything: with the most frequent class, the majority baseline.
    """
    num_occurring = sum(count > 0 for index, count in enumerate(class_counts) if index != train_id) + 1
    return class_counts[train_id] / sum(class_counts) / num_occurring

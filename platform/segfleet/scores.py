"""How good a model is, always together with how that was measured."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pspnet.json_values import read_record, typed
from segfleet.protocol import Protocol


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Fractions between 0 and 1 over all valid pixels of a split."""

    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    class_iou: dict[str, float | None] = field(default_factory=dict)
    """IoU of each class by name; None for a class neither in the labels nor predicted."""

    category_iou: dict[str, float | None] = field(default_factory=dict)
    """IoU of each category of classes; empty where the class table has none."""

    boundary_f: dict[str, float | None] = field(default_factory=dict)
    """Boundary F-score of each class (`segfleet.boundary`); empty where it was not asked for."""

    protocol: Protocol

    @property
    def category_miou(self) -> float | None:
        """Mean of `category_iou` over the categories that have one."""
        return _mean(self.category_iou)

    @property
    def mean_boundary_f(self) -> float | None:
        """Mean of `boundary_f` over the classes that have one."""
        return _mean(self.boundary_f)

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as JSON values; `from_dict` reads them back."""
        return {**asdict(self), "protocol": self.protocol.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Scores":
        """Return the scores that `to_dict` wrote; InputError for anything else."""
        protocol = Protocol.from_dict(typed(dict[str, Any], values.get("protocol"), "protocol"))
        return read_record(cls, {**values, "protocol": protocol}, "scores")


def _mean(values: Mapping[str, float | None]) -> float | None:
    known = [value for value in values.values() if value is not None]
    return sum(known) / len(known) if known else None

"""How good a model is, always together with how that was measured."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How scores were measured; two mIoUs of different protocols are never compared."""

    store_digest: str
    """Digest of the ingested data set, which its labels and their train ids are part of."""

    split: str
    """Split of the store, all of its labelled images."""

    scales: tuple[float, ...] = (1.0,)
    """The image is seen at each of these scales."""

    flip: bool = False
    """Whether the mirror image is seen, too."""

    window: int = 0
    """Side of the sliding window in pixels, moved by two thirds of it; 0 for the image as a whole."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision of the forward pass."""

    def __str__(self) -> str:
        parts = [
            f"split {self.split} of store {self.store_digest[:12]}",
            "single-scale" if self.scales == (1.0,) else f"scales {', '.join(map(str, self.scales))}",
            "with flip" if self.flip else "without flip",
            f"sliding window {self.window}, stride 2/3" if self.window else "whole image",
            self.precision,
        ]
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Fractions between 0 and 1 over all valid pixels of a split."""

    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    class_iou: dict[str, float | None] = field(default_factory=dict)
    """IoU of each class by name; None for a class neither in the labels nor predicted."""

    protocol: Protocol

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as JSON values; `from_dict` reads them back."""
        values = asdict(self)
        values["protocol"]["scales"] = list(self.protocol.scales)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Scores":
        """Return the scores that `to_dict` wrote."""
        protocol = {**values["protocol"], "scales": tuple(values["protocol"]["scales"])}
        return cls(**{**values, "protocol": Protocol(**protocol)})

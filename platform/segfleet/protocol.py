"""How scores are measured: a record whose digest goes with every mIoU, and the protocols that have names."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pspnet.errors import InputError
from pspnet.inference import Average, Precision, default_stride
from pspnet.json_values import read_record
from pspnet.sizes import notation, sides
from segfleet.config import TrainingConfig

ProtocolName = Literal["whole", "semseg", "semseg_ms", "mmseg", "mmseg_ms"]
MULTIPLE_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
DIGEST_CHARACTERS = 12


@dataclass(frozen=True, kw_only=True)
class Views:
    """How a model looks at an image."""

    scales: tuple[float, ...] = (1.0,)
    """The image is seen at each of these scales."""

    flip: bool = False
    """Whether the mirror image is seen, too."""

    window: int | str = 0
    """Side of the sliding window in pixels, or HEIGHTxWIDTH; 0 for the image as a whole."""

    stride: int | str = 0
    """Pixels from one window to the next, or DOWNxACROSS; 0 stands for two thirds of the window, rounded up."""

    average: Average = "probabilities"
    """What is averaged where windows overlap, and resized to the image at other scales: probabilities, as semseg does,
    or logits, as mmsegmentation."""

    precision: Precision = "fp32"
    """Autocast precision of the forward pass."""

    def __post_init__(self) -> None:
        # Two records of the same measurement are the same record.
        for name in ("window", "stride"):
            object.__setattr__(self, name, notation(getattr(self, name)))
        if self.window != 0 and min(sides(self.window)) < 1:
            raise InputError(
                f"window must be a number of pixels, or 0 for whole images, but got {self.window}. "
                "Best is the training's crop_size."
            )
        strides = zip(sides(self.stride), sides(self.window), strict=True)
        if self.stride != 0 and not all(1 <= step <= side for step, side in strides):
            raise InputError(
                f"stride must be from 1 to the window's {self.window} pixels (0: two thirds of it), but got "
                f"{self.stride}. "
                + ("Larger ones leave gaps." if self.window else "Give a window, too, or leave stride out.")
            )
        object.__setattr__(self, "stride", self.stride or default_stride(self.window))
        object.__setattr__(self, "scales", tuple(map(float, self.scales)))
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise InputError(
                f"scales must be one or more positive numbers, but got {' '.join(map(str, self.scales)) or 'none'}. "
                "1 is the image's own size."
            )
        if not self.window and self.scales == (1.0,):  # nothing overlaps, nothing is resized
            object.__setattr__(self, "average", "probabilities")

    def __str__(self) -> str:
        averaged = "" if self.average == "probabilities" else f" averaging {self.average}"
        parts = [
            "single-scale" if self.scales == (1.0,) else f"scales {', '.join(map(str, self.scales))}",
            "with flip" if self.flip else "without flip",
            (f"sliding window {self.window} stride {self.stride}" if self.window else "whole image")
            + averaged,
            self.precision,
        ]
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Protocol(Views):
    """How scores were measured; two mIoUs of different protocols are never compared."""

    store_digest: str
    """Digest of the ingested data set, which its labels and their train ids are part of."""

    split: str
    """Split of the store, all of its labelled images."""

    @property
    def digest(self) -> str:
        """The first 12 hexadecimal digits of the sha256 of the record as JSON: sorted keys, no spaces."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARACTERS]

    def __str__(self) -> str:
        return f"split {self.split} of store {self.store_digest[:12]}, {Views.__str__(self)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values, with its digest; `from_dict` reads them back."""
        return {**asdict(self), "scales": list(self.scales), "digest": self.digest}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Protocol":
        """Return the record that `to_dict` wrote, now or before there was a stride or a digest; else InputError."""
        return read_record(
            cls, {name: value for name, value in values.items() if name != "digest"}, "protocol"
        )


def require_same_protocol(a: Protocol, b: Protocol) -> None:
    """Raise InputError that names what differs unless scores under `a` and `b` can be compared."""
    differences = [
        f"{field.name} {getattr(a, field.name)} and {getattr(b, field.name)}"
        for field in fields(Protocol)
        if getattr(a, field.name) != getattr(b, field.name)
    ]
    if differences:
        raise InputError(
            f"Scores can be compared only under one protocol, but {a.digest} and {b.digest} cannot: "
            f"{'; '.join(differences)}. Score both models on the same split of one store with the same flags."
        )


def training_protocol(config: TrainingConfig, store_digest: str) -> Protocol:
    """Return how a training scores itself after an epoch: whole images at one scale."""
    return Protocol(
        store_digest=store_digest, split=config.data.val_split, precision=config.workers.precision
    )


def protocol_tags(protocol: Protocol) -> dict[str, str]:
    """Return what an MLflow run says of how its mIoU was measured."""
    return {"segfleet.protocol": str(protocol), "segfleet.protocol_digest": protocol.digest}


def named_views(name: ProtocolName, crop_size: int | str) -> Views:
    """Return how the named protocol looks at an image, for a model that was trained on crops of that size.

    whole      the image at once, one scale, no mirror image
    semseg     windows of the crop, every two thirds, with their mirror images (semseg's tool/test.py)
    semseg_ms  the same at the scales 0.5, 0.75 to 1.75
    mmseg      the image at once; for crops of 769, windows of 769 every 513 (mmsegmentation's configs/pspnet)
    mmseg_ms   the same at the scales 0.5, 0.75 to 1.75, with the mirror image

    For crops of 769 mmsegmentation first makes the image 2049×1025; here it stays as it is.
    """
    scales = MULTIPLE_SCALES if name.endswith("_ms") else (1.0,)
    if name.startswith("semseg"):
        return Views(scales=scales, flip=True, window=crop_size)
    flip = name == "mmseg_ms"
    if name.startswith("mmseg") and crop_size == 769:
        return Views(scales=scales, flip=flip, window=769, stride=513, average="logits")
    return Views(scales=scales, flip=flip, average="logits" if name == "mmseg_ms" else "probabilities")


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """Flags of the jobs that predict; those that are not given are the named protocol's."""

    protocol: ProtocolName = "whole"
    """whole: images at once; semseg: windows of the training's crop with flip; mmseg: as its configurations,
    without flip; semseg_ms, mmseg_ms: at six scales with flip. The flags below override."""

    scales: tuple[float, ...] | None = None
    """Scales at which each image is seen; the predictions are averaged."""

    flip: bool | None = None
    """See the mirror image, too, and average: twice the time, a little better."""

    window: int | str | None = None
    """Side of a sliding window in pixels, or HEIGHTxWIDTH, best the training's crop_size; 0 for whole images."""

    stride: int | str | None = None
    """Pixels from window to window, or DOWNxACROSS; two thirds of the window where it is not given."""

    average: Average | None = None
    """What is averaged where windows overlap: probabilities (semseg) or logits (mmseg)."""

    precision: Precision = "fp32"
    """fp32, bf16 or fp16."""

    def views(self, crop_size: int | str) -> Views:
        """Return what the flags ask for, for a model that was trained on crops of that size."""
        named = named_views(self.protocol, crop_size)
        is_named_window = self.window is None or notation(self.window) == named.window
        return Views(
            scales=named.scales if self.scales is None else self.scales,
            flip=named.flip if self.flip is None else self.flip,
            window=named.window if self.window is None else self.window,
            stride=self.stride if self.stride is not None else named.stride if is_named_window else 0,
            average=self.average or ("logits" if self.protocol.startswith("mmseg") else "probabilities"),
            precision=self.precision,
        )

    def protocol_on(self, store_digest: str, split: str, *, crop_size: int | str) -> Protocol:
        """Return the protocol of these flags on a split of a store."""
        return Protocol(store_digest=store_digest, split=split, **asdict(self.views(crop_size)))

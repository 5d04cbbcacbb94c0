"""What happens to a window on the device: resize, crop, rotate, blur, distort, flip, normalise.

A crop is what resizing the whole image and then cropping it gives, but only the source pixels under the crop are
read. Resizing maps pixel centres, source = (target + 1/2) * size / scaled_size - 1/2, as F.interpolate does with
align_corners=False; images bilinear (nearest-exact for labels). Outside the image lie the mean colour and
IGNORE_INDEX.
"""

import copy
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pspnet.labels import IGNORE_INDEX
from pspnet.photometric import Photometric, distort
from pspnet.sizes import Size, sides

if TYPE_CHECKING:
    from pspnet.data import Batch

_HAS_NUMBA = importlib.util.find_spec("numba") is not None
"""Without it crops on a CPU are made like those on a GPU, five times as slowly."""
BLUR_TAPS = np.array([1, 4, 6, 4, 1], np.float32) / 16
"""Of the blur, along rows and columns: what cv2.GaussianBlur(image, (5, 5), 0) takes, as semseg asks for it."""


@dataclass(frozen=True)
class Sample:
    """One training window: which image, how large it is made, and where the crop lies in the scaled image."""

    index: int
    size: tuple[int, int]
    """(height, width) of the image."""
    scaled_size: tuple[int, int]
    """(height, width) of the image after the random scale."""
    top: int
    """Row of the scaled image at which the crop begins; negative where it is padded."""
    left: int
    flip: bool = False
    """Whether the crop is mirrored left to right."""
    angle: float = 0.0
    """Degrees by which the crop is turned about its centre."""
    is_blurred: bool = False
    """Whether the crop is blurred with `BLUR_TAPS`."""
    photometric: Photometric | None = None
    """How brightness and colours of the crop are distorted; padding keeps its colour."""


@dataclass(frozen=True)
class Window:
    """A part of a source image."""

    top: int
    left: int
    height: int
    width: int


def source_window(sample: Sample, crop_size: Size) -> Window:
    """Return the part of the source image that the crop depends on."""
    spans = []
    height, width = sides(crop_size)
    for offset, side, other, extent, scaled in zip(
        (sample.top, sample.left),
        (height, width),
        (width, height),
        sample.size,
        sample.scaled_size,
        strict=True,
    ):
        margin = _rotation_margin(sample.angle, side, other)
        first = min(max(offset - margin, 0), scaled - 1)
        last = min(max(offset + side - 1 + margin, 0), scaled - 1)
        ratio = extent / scaled
        begin = max(0, math.floor((first + 0.5) * ratio - 0.5))
        end = min(extent, math.floor((last + 0.5) * ratio - 0.5) + 2)
        spans.append((begin, end - begin))
    (top, num_rows), (left, num_columns) = spans
    return Window(top, left, num_rows, num_columns)


def prepare_batch(
    batch: "Batch",
    *,
    crop_size: Size,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Return (images, targets) of a batch on `device`.

    Images are float32 (n, 3, h, w) for crops of h x w pixels, normalised, channels_last; targets int64 (n, h, w).
    """
    device = torch.device(device)
    if device.type == "cpu" and _HAS_NUMBA:
        return _prepare_on_cpu(batch, crop_size, mean, std)
    batch = batch.to(device)
    images, targets = [], []
    for window, target, sample in zip(batch.windows, batch.targets, batch.samples, strict=True):
        image, label = crop(window, target, sample, crop_size, mean=mean)
        images.append(image)
        targets.append(label)
    stacked = normalise(torch.stack(images), mean, std)
    return stacked.contiguous(memory_format=torch.channels_last), torch.stack(targets).long()


def _prepare_on_cpu(
    batch: "Batch", crop_size: Size, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    from pspnet.cpu_crop import crop_into

    images = torch.empty(len(batch.samples), *sides(crop_size), 3)
    targets = torch.empty(len(batch.samples), *sides(crop_size), dtype=torch.int64)
    for number, (window, target, sample) in enumerate(
        zip(batch.windows, batch.targets, batch.samples, strict=True)
    ):
        crop_into(images[number], targets[number], window, target, sample, mean=mean, std=std)
    return images.permute(0, 3, 1, 2), targets


def crop(
    window: Tensor, target: Tensor, sample: Sample, crop_size: Size, *, mean: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return the crop of one sample from its source window: float32 (3, h, w) in grey levels, uint8 (h, w)."""
    read = _rotated if sample.angle else _upright
    image, label, inside = read(window, target, sample, crop_size, _column(mean, window.device))
    if sample.is_blurred:
        image = blur(image)
    if sample.photometric is not None:
        distorted = distort(image, sample.photometric)
        image = distorted if inside is None else torch.where(inside, distorted, image)
    if sample.flip:
        image, label = image.flip(-1), label.flip(-1)
    return image, label


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (images - mean) / std as float32; images are (n, 3, h, w) or (3, h, w) in grey levels, 0 to 255."""
    return (images.float() - _column(mean, images.device)) / _column(std, images.device)


def blur(image: Tensor) -> Tensor:
    """Return the image, float32 (3, h, w), blurred with `BLUR_TAPS`, reflected at the border (cv2.GaussianBlur)."""
    kernel = _sent(BLUR_TAPS, image.device)
    padded = functional.pad(image[:, None], (2, 2, 2, 2), mode="reflect")
    return functional.conv2d(functional.conv2d(padded, kernel.view(1, 1, 1, 5)), kernel.view(1, 1, 5, 1))[
        :, 0
    ]


def _upright(
    window: Tensor, target: Tensor, sample: Sample, crop_size: Size, fill: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Resize rows, then columns, each as a weighted sum of two neighbours; with what lies in the image."""
    area = source_window(sample, crop_size)
    height, width = sides(crop_size)
    rows = Axis(sample.top, height, sample.size[0], sample.scaled_size[0], area.top)
    columns = Axis(sample.left, width, sample.size[1], sample.scaled_size[1], area.left)
    image = rows.interpolate(window, dim=1)
    image = columns.interpolate(image, dim=2)
    label = rows.pick(target, dim=0)
    label = columns.pick(label, dim=1)
    if not (rows.is_padded or columns.is_padded):
        return image, label, None
    inside = rows.inside(window.device)[:, None] & columns.inside(window.device)[None, :]
    return torch.where(inside, image, fill), torch.where(inside, label, IGNORE_INDEX), inside


def _rotated(
    window: Tensor, target: Tensor, sample: Sample, crop_size: Size, fill: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the crop about its centre: every pixel is read where it comes from; with what lies in the image."""
    area = source_window(sample, crop_size)
    height, width = window.shape[1:]
    centre_y, centre_x = ((side - 1) / 2 for side in sides(crop_size))
    y, x = (
        torch.arange(side, dtype=torch.float64, device=window.device) - (side - 1) / 2
        for side in sides(crop_size)
    )
    y, x = y[:, None], x[None, :]
    cosine, sine = math.cos(math.radians(sample.angle)), math.sin(math.radians(sample.angle))
    scaled_y = cosine * y - sine * x + centre_y + sample.top
    scaled_x = sine * y + cosine * x + centre_x + sample.left
    inside = (scaled_y > -0.5) & (scaled_y < sample.scaled_size[0] - 0.5)
    inside &= (scaled_x > -0.5) & (scaled_x < sample.scaled_size[1] - 0.5)
    ratio_y, ratio_x = (size / scaled for size, scaled in zip(sample.size, sample.scaled_size, strict=True))
    source_y = ((scaled_y + 0.5) * ratio_y - 0.5 - area.top).clamp(0, height - 1)
    source_x = ((scaled_x + 0.5) * ratio_x - 0.5 - area.left).clamp(0, width - 1)
    grid = torch.stack(
        [source_x * (2 / max(1, width - 1)) - 1, source_y * (2 / max(1, height - 1)) - 1], dim=-1
    )
    image = functional.grid_sample(
        window[None].float(), grid[None].float(), mode="bilinear", padding_mode="border", align_corners=True
    )[0]
    label = target[
        (source_y + 0.5).floor().long().clamp(max=height - 1),
        (source_x + 0.5).floor().long().clamp(max=width - 1),
    ]
    return torch.where(inside, image, fill), torch.where(inside, label, IGNORE_INDEX), inside


class Axis:
    """How the rows (or columns) of a crop come from those of a source window."""

    def __init__(self, offset: int, side: int, size: int, scaled: int, begin: int) -> None:
        target = np.arange(offset, offset + side)
        self.is_inside = (target >= 0) & (target < scaled)
        self.is_padded = not bool(self.is_inside.all())
        centre = (np.clip(target, 0, scaled - 1) + 0.5) * (size / scaled)
        source = np.clip(centre - 0.5, 0, size - 1)
        low = np.minimum(np.floor(source).astype(np.int64), size - 1)
        self.weight = (source - low).astype(np.float32)
        """Of `high`; the rest is that of `low`."""
        self.low = low - begin
        self.high = np.minimum(low + 1, size - 1) - begin
        # In whole numbers: floating point would decide ties, where a centre falls between two pixels, by chance.
        self.nearest = (2 * np.clip(target, 0, scaled - 1) + 1) * size // (2 * scaled) - begin

    def reversed(self) -> "Axis":
        """Return the axis of the mirrored crop."""
        other = copy.copy(self)
        for name in ("is_inside", "weight", "low", "high", "nearest"):
            setattr(other, name, getattr(self, name)[::-1].copy())
        return other

    def inside(self, device: torch.device) -> Tensor:
        """Return which rows of the crop lie in the image."""
        return _sent(self.is_inside, device)

    def interpolate(self, image: Tensor, *, dim: int) -> Tensor:
        """Return the weighted sums of two neighbours along `dim`, float32."""
        shape = [-1 if axis == dim else 1 for axis in range(image.dim())]
        weight = _sent(self.weight, image.device).view(shape)
        low, high = (
            image.index_select(dim, _sent(index, image.device)).float()
            for index in (self.low, np.minimum(self.high, image.shape[dim] - 1))
        )
        return torch.lerp(low, high, weight)

    def pick(self, label: Tensor, *, dim: int) -> Tensor:
        """Return the nearest neighbours along `dim`."""
        return label.index_select(dim, _sent(self.nearest, label.device))


def _rotation_margin(angle: float, side: int, other: int) -> int:
    """Return by how many pixels a turned crop reaches beyond its upright place along `side`."""
    if not angle:
        return 0
    radians = math.radians(abs(angle))
    reach = (side - 1) / 2 * (math.cos(radians) + (other - 1) / (side - 1) * math.sin(radians) - 1)
    return math.ceil(max(0.0, reach)) + 1


def _column(values: Sequence[float], device: torch.device | str) -> Tensor:
    return _sent(np.array(values, np.float32), torch.device(device)).view(-1, 1, 1)


def _sent(values: np.ndarray, device: torch.device) -> Tensor:
    """Return the values on `device`; to a GPU from pinned memory, since any other copy waits for all before it."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

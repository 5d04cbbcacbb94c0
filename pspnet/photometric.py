"""Photometric distortion: brightness, contrast, saturation and hue as mmsegmentation varies them.

mmseg/datasets/transforms/transforms.py, PhotoMetricDistortion: each step with probability 1/2, contrast before or
after the others at random. Its images are uint8 between the steps, and so are the values here: whole grey levels in
float32, which every product below fits exactly. Colours turn into hue (0 to 179, two degrees each), saturation and
value (0 to 255) by OpenCV's fixed-point formula for uint8.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BRIGHTNESS_DELTA = 32.0
"""Grey levels that are added at most (mmseg's default, as are the others)."""
CONTRAST_RANGE = (0.5, 1.5)
SATURATION_RANGE = (0.5, 1.5)
HUE_DELTA = 18
"""Steps of two degrees, from -18 to 17: mmseg draws by numpy.random.randint, which leaves out its end."""

_NUM_HUES = 180
_FRACTION = 4096
"""One, in OpenCV's fixed-point numbers of 12 bits."""


@dataclass(frozen=True)
class Photometric:
    """The steps of one crop; None for a step that it is spared."""

    brightness: float | None = None
    """Grey levels that are added."""
    contrast: float | None = None
    """Factor of all grey levels."""
    saturation: float | None = None
    """Factor of the saturation."""
    hue: int | None = None
    """Steps of two degrees by which the hue is turned."""
    is_contrast_first: bool = False
    """Whether contrast comes before saturation and hue, not after them."""


def draw_photometric(*, seed: int, epoch: int, position: int) -> Photometric | None:
    """Draw the steps for the crop at `position` of an epoch; None where all coins fall on no."""
    entropy = np.random.SeedSequence([seed, epoch, position, 2])
    chances = np.random.Generator(np.random.Philox(entropy)).random(9).tolist()
    coins = [chance < 0.5 for chance in chances[:5]]
    if not any(coins[:4]):
        return None
    brightness, contrast, saturation, hue = chances[5:]
    return Photometric(
        brightness=_between(-BRIGHTNESS_DELTA, BRIGHTNESS_DELTA, brightness) if coins[0] else None,
        contrast=_between(*CONTRAST_RANGE, contrast) if coins[1] else None,
        saturation=_between(*SATURATION_RANGE, saturation) if coins[2] else None,
        hue=int(hue * 2 * HUE_DELTA) - HUE_DELTA if coins[3] else None,
        is_contrast_first=coins[4],
    )


def distort(image: Tensor, photometric: Photometric) -> Tensor:
    """Return the image, red, green and blue planes (3, ...) in grey levels, after its steps: float32, whole levels.

    It is first rounded to whole levels, as the uint8 images that mmseg distorts are.
    """
    image = _levels(image.float() + 0.5)
    if photometric.brightness is not None:
        image = _levels(image + photometric.brightness)
    if photometric.contrast is not None and photometric.is_contrast_first:
        image = _levels(image * photometric.contrast)
    if photometric.saturation is not None:
        hue, saturation, value = to_hsv(image)
        image = from_hsv(hue, _levels(saturation.mul_(photometric.saturation)), value)
    if photometric.hue is not None:
        hue, saturation, value = to_hsv(image)
        image = from_hsv(hue.add_(photometric.hue).remainder_(_NUM_HUES), saturation, value)
    if photometric.contrast is not None and not photometric.is_contrast_first:
        image = _levels(image * photometric.contrast)
    return image


def to_hsv(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return hue (0 to 179), saturation and value (0 to 255) of whole levels (3, ...): cv2.COLOR_RGB2HSV of uint8."""
    red, green, blue = image
    value = torch.maximum(red, green).clamp_(min=blue)
    spread = value - torch.minimum(red, green).clamp_(max=blue)
    per_value = torch.reciprocal(value.clamp(min=1)).mul_(255 * _FRACTION).round_()
    saturation = _shifted(per_value.mul_(spread))
    hue = (red - green).add_(spread, alpha=4)
    hue = torch.where(value == green, (blue - red).add_(spread, alpha=2), hue)
    hue = torch.where(value == red, green - blue, hue)
    per_spread = torch.reciprocal(spread.clamp_(min=1)).mul_(_NUM_HUES / 6 * _FRACTION).round_()
    hue = _shifted(hue.mul_(per_spread))
    return hue.add_(hue < 0, alpha=_NUM_HUES), saturation, value


def from_hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Return red, green and blue (3, ...), whole levels: cv2.COLOR_HSV2RGB of uint8.

    A colour has its full value within 60 degrees of its own hue, (1 - saturation) of it beyond 120 degrees. OpenCV's
    vector code computes that in float32, in this order, and cuts what follows the point. It fuses 1 - saturation * w
    into one rounding, which torch cannot on every device: 1 878 of the 11 796 480 colours differ by 1 in a value.
    """
    image = torch.empty((3, *hue.shape), dtype=hue.dtype, device=hue.device)
    sector, share, unit = hue * (6 / _NUM_HUES), saturation * -(1 / 255), value * (1 / 255)
    for plane, centre, sign, offset in zip(image, (3, 2, 4), (-1, 1, 1), (2, -1, -1), strict=True):
        torch.sub(sector, centre, out=plane)
        plane.abs_().mul_(sign).add_(offset).clamp_(0, 1).mul_(share).add_(1).mul_(unit).mul_(255).floor_()
    return image


def _levels(image: Tensor) -> Tensor:
    """Clip and cut to whole levels, in place: what numpy's astype(uint8) does."""
    return image.clamp_(0, 255).floor_()


def _shifted(fixed: Tensor) -> Tensor:
    """Return fixed-point numbers rounded to whole ones, in place; halves go up."""
    return fixed.add_(_FRACTION / 2).mul_(1 / _FRACTION).floor_()


def _between(low: float, high: float, chance: float) -> float:
    return low + (high - low) * chance

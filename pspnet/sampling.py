"""Which image a window is taken from, and where in it, for the sake of the classes.

Class-uniform sampling (Zhu et al., "Improving Semantic Segmentation via Video Propagation and Label Relaxation",
CVPR 2019): at a share of the positions a class is drawn, each with the same chance, then an image that holds it, then
a window around the class: there around its centroid in a tile, here around any of its pixels.

A limit on the share of one class (mmseg/datasets/transforms/transforms.py, RandomCrop with cat_max_ratio): while one
class has too much of the window's valid pixels, the window is placed anew, up to ten times. Only labels are read.

Every choice follows from (seed, epoch, position).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from pspnet.errors import InputError
from pspnet.labels import IGNORE_INDEX
from pspnet.sizes import Size, sides
from pspnet.store import Split
from pspnet.transforms import Axis, Sample, source_window

NUM_REDRAWS = 10
"""How often a window is placed anew; the last place is taken whatever it holds (mmseg)."""

Place = tuple[int, int]
"""Row and column of a scaled image."""


@dataclass(frozen=True)
class ClassUniform:
    """How often a class decides which image is seen, and which images it can choose from."""

    share: float
    """Share of the positions of an epoch at which a class is drawn."""
    images: dict[int, np.ndarray]
    """Train id to the indices of the images that hold it; without the classes that no image holds."""


@dataclass(frozen=True)
class Focus:
    """The class that was drawn for a position, and the image."""

    train_id: int
    index: int


def class_uniform(split: Split, share: float) -> ClassUniform:
    """Look through all labels of a split: 2 ms for each of 2048 x 1024 pixels that is in memory."""
    images: dict[int, list[int]] = {}
    for index in range(len(split)):
        label = _label(split, index)
        for train_id in np.flatnonzero(_class_counts(label)).tolist():
            images.setdefault(train_id, []).append(index)
    return ClassUniform(share, {train_id: np.array(images[train_id]) for train_id in sorted(images)})


def draw_focus(classes: ClassUniform, *, seed: int, epoch: int, position: int) -> Focus | None:
    """Draw class and image for a position; None where the position keeps the image that the epoch gives it."""
    coin, which_class, which_image = _chances(seed, epoch, position, 3, (3,)).tolist()
    if coin >= classes.share or not classes.images:
        return None
    train_id, indices = list(classes.images.items())[int(which_class * len(classes.images))]
    return Focus(train_id, int(indices[int(which_image * len(indices))]))


def place_window(
    sample: Sample,
    split: Split,
    *,
    seed: int,
    epoch: int,
    position: int,
    crop_size: Size,
    focus: Focus | None,
    max_class_share: float,
) -> Sample:
    """Return the sample with its window moved to a pixel of the focus, and on while one class has too much of it."""
    if focus is None and max_class_share >= 1:
        return sample
    pixels = None
    if focus is not None:
        pixels = ClassPixels(_label(split, sample.index) == focus.train_id, sample.scaled_size)

    def moved(chances: np.ndarray) -> Sample:
        if pixels is None:
            top, left = random_offset(sample.scaled_size, crop_size, chances)
        else:
            top, left = centred_offset(sample.scaled_size, crop_size, pixels.draw(chances))
        return replace(sample, top=top, left=left)

    chances = _chances(seed, epoch, position, 4, (1 + NUM_REDRAWS, 2))
    placed = sample if pixels is None else moved(chances[0])
    if max_class_share >= 1:
        return placed
    for again in chances[1:]:
        if is_mixed(_window_counts(placed, split, crop_size), max_class_share):
            break
        placed = moved(again)
    return placed


def is_mixed(counts: np.ndarray, max_class_share: float) -> bool:
    """Return whether there are two classes or more and none has `max_class_share` of the valid pixels."""
    return bool(np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < max_class_share)


def random_offset(scaled_size: tuple[int, int], crop_size: Size, chances: np.ndarray) -> Place:
    """Return where a crop begins for chances in [0, 1); a scaled image smaller than the crop lies in its middle."""
    top, left = (
        int(chance * (extent - side + 1)) if extent >= side else -((side - extent) // 2)
        for extent, side, chance in zip(scaled_size, sides(crop_size), chances, strict=True)
    )
    return top, left


def centred_offset(scaled_size: tuple[int, int], crop_size: Size, centre: Place) -> Place:
    """Return where the crop around `centre` begins, moved into the scaled image where that is large enough."""
    top, left = (
        min(max(place - side // 2, 0), extent - side) if extent >= side else -((side - extent) // 2)
        for extent, side, place in zip(scaled_size, sides(crop_size), centre, strict=True)
    )
    return top, left


class ClassPixels:
    """The pixels of one class in the scaled label, all with the same chance; the label itself is never scaled."""

    def __init__(self, mask: np.ndarray, scaled_size: tuple[int, int]) -> None:
        """`mask`, bool (h, w), says which pixels of the label are of the class."""
        self._mask, self._scaled_size = mask, scaled_size
        self._rows, self._columns = (
            Axis(0, scaled, size, scaled, 0).nearest
            for scaled, size in zip(scaled_size, mask.shape, strict=True)
        )
        copies = np.bincount(self._columns, minlength=mask.shape[1]).astype(np.float32)
        in_row = (mask.astype(np.float32) @ copies).astype(np.int64)
        self._up_to_row = in_row[self._rows].cumsum()

    def draw(self, chances: np.ndarray) -> Place:
        """Return a pixel; where the scaled label has lost all of the class, the place of one that it had."""
        total = int(self._up_to_row[-1])
        if total == 0:
            places = np.argwhere(self._mask)
            row, column = places[int(chances[0] * len(places))].tolist()
            height, width = self._mask.shape
            return (
                (2 * row + 1) * self._scaled_size[0] // (2 * height),
                (2 * column + 1) * self._scaled_size[1] // (2 * width),
            )
        row = int(np.searchsorted(self._up_to_row, int(chances[0] * total), side="right"))
        columns = np.flatnonzero(self._mask[self._rows[row]][self._columns])
        return row, int(columns[int(chances[1] * len(columns))])


def require_label(split: Split, index: int) -> None:
    """Raise InputError where a training image has no label."""
    if not split.has_label(index):
        raise InputError(
            f"A training image must have a label, but {split.name(index)} has none. "
            "Give another data.train_split, or ingest its label."
        )


def _label(split: Split, index: int) -> np.ndarray:
    require_label(split, index)
    label = split.label(index)
    assert label is not None
    return label


def _window_counts(sample: Sample, split: Split, crop_size: Size) -> np.ndarray:
    """Count the classes of the crop as it is before it is turned: exactly its pixels, read by the same indices."""
    area = source_window(replace(sample, angle=0.0), crop_size)
    require_label(split, sample.index)
    label = split.label_window(
        sample.index, top=area.top, left=area.left, height=area.height, width=area.width
    )
    assert label is not None
    height, width = sides(crop_size)
    down = Axis(sample.top, height, sample.size[0], sample.scaled_size[0], area.top)
    across = Axis(sample.left, width, sample.size[1], sample.scaled_size[1], area.left)
    rows, columns = down.nearest[down.is_inside], across.nearest[across.is_inside]
    return _class_counts(label.take(rows, axis=0).take(columns, axis=1))


def _class_counts(label: np.ndarray) -> np.ndarray:
    """Return the pixels of each train id, int64 (255,), without the ignored ones."""
    # torch counts uint8 as it is, twice as fast as numpy, which widens it; it wants an array that can be written
    return torch.bincount(torch.from_numpy(label.flatten()), minlength=IGNORE_INDEX).numpy()[:IGNORE_INDEX]


def _chances(seed: int, epoch: int, position: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    entropy = np.random.SeedSequence([seed, epoch, position, stream])
    return np.random.Generator(np.random.Philox(entropy)).random(shape)

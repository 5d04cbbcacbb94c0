"""The documented training pipelines of semseg, mmsegmentation and torchvision, for benchmarks/data_path.py.

semseg's own code runs where a checkout is given; otherwise, and for the others, the same calls in the same order.
"""

import collections
import collections.abc
import importlib
import importlib.util
import itertools
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torchvision import tv_tensors
from torchvision.transforms import v2

from pspnet.labels import IGNORE_INDEX

cv2: Any = importlib.import_module("cv2") if importlib.util.find_spec("cv2") else None
"""OpenCV, what semseg and mmsegmentation read with: the extra `bench` installs it."""

HEIGHT, WIDTH, CROP = 1024, 2048, 713
MIN_SCALE, MAX_SCALE, ROTATE = 0.5, 2.0, 10.0
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

Reader = Callable[[], object]
"""Reads its next sample when it is called."""


def references(
    folder: Path, files: Sequence[tuple[str, str]], semseg: Path | None
) -> tuple[dict[str, Reader], list[str]]:
    """Return the documented training pipelines of the three projects, and what is to be said of them."""

    def cycled(read: Callable[[str, str], object]) -> Reader:
        turn = itertools.cycle(files)
        return lambda: read(*next(turn))

    random.seed(0)
    torch.manual_seed(0)
    if cv2 is not None:
        cv2.setNumThreads(1)
    ways = {"torchvision": cycled(_torchvision_sample)}
    if cv2 is None:
        notes = ["opencv is not installed: semseg's steps by Pillow, mmsegmentation left out"]
        return {"semseg": cycled(_semseg_by_pillow)} | ways, notes
    ways["mmseg"] = cycled(_mmseg_sample)
    notes = ["mmseg and torchvision: the calls of their documented pipelines in their order"]
    if semseg is None:
        return {"semseg": cycled(_semseg_sample)} | ways, ["semseg: its calls in its order", *notes]
    data_set, turn = _semseg_data_set(semseg, folder), itertools.cycle(range(len(files)))
    return {"semseg": lambda: data_set[next(turn)]} | ways, ["semseg: its own code", *notes]


def _semseg_data_set(checkout: Path, folder: Path) -> Any:
    """Return semseg's own SemData with the transforms of its tool/train.py."""
    if not hasattr(collections, "Iterable"):  # semseg is written for Python before 3.10
        collections.Iterable = collections.abc.Iterable  # type: ignore[attr-defined]
    transform, dataset = (_module(checkout / "util" / f"{name}.py") for name in ("transform", "dataset"))
    mean = list(MEAN)
    steps = [
        transform.RandScale([MIN_SCALE, MAX_SCALE]),
        transform.RandRotate([-ROTATE, ROTATE], padding=mean, ignore_label=IGNORE_INDEX),
        transform.RandomGaussianBlur(),
        transform.RandomHorizontalFlip(),
        transform.Crop([CROP, CROP], crop_type="rand", padding=mean, ignore_label=IGNORE_INDEX),
        transform.ToTensor(),
        transform.Normalize(mean=mean, std=list(STD)),
    ]
    return dataset.SemData(
        split="train", data_root="", data_list=str(folder / "list.txt"), transform=transform.Compose(steps)
    )


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"semseg_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        sys.exit(f"--semseg must be a checkout of semseg, but {path} cannot be read.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _semseg_sample(image_path: str, label_path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The calls of semseg's SemData and of its training transforms, in their order."""
    image: Any = np.float32(cv2.cvtColor(cv2.imread(image_path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))
    label = cv2.imread(label_path, cv2.IMREAD_GRAYSCALE)
    scale = random.uniform(MIN_SCALE, MAX_SCALE)
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    if random.random() < 0.5:
        height, width = label.shape
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), random.uniform(-ROTATE, ROTATE), 1)
        for_image = {"flags": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_CONSTANT, "borderValue": MEAN}
        for_label = {
            "flags": cv2.INTER_NEAREST,
            "borderMode": cv2.BORDER_CONSTANT,
            "borderValue": IGNORE_INDEX,
        }
        image = cv2.warpAffine(image, matrix, (width, height), **for_image)
        label = cv2.warpAffine(label, matrix, (width, height), **for_label)
    if random.random() < 0.5:
        image = cv2.GaussianBlur(image, (5, 5), 0)
    if random.random() < 0.5:
        image, label = cv2.flip(image, 1), cv2.flip(label, 1)
    image, label = _cropped(image, label)
    pixels = torch.from_numpy(image.transpose((2, 0, 1))).float()
    for channel, mean, std in zip(pixels, MEAN, STD, strict=True):
        channel.sub_(mean).div_(std)
    return pixels, torch.from_numpy(label).long()


def _cropped(image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    missing = [max(CROP - extent, 0) for extent in label.shape]
    if any(missing):
        top, left = missing[0] // 2, missing[1] // 2
        border = (top, missing[0] - top, left, missing[1] - left, cv2.BORDER_CONSTANT)
        image = cv2.copyMakeBorder(image, *border, value=MEAN)
        label = cv2.copyMakeBorder(label, *border, value=IGNORE_INDEX)
    top, left = (random.randint(0, extent - CROP) for extent in label.shape)
    return image[top : top + CROP, left : left + CROP], label[top : top + CROP, left : left + CROP]


def _mmseg_sample(image_path: str, label_path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The calls of mmsegmentation's Cityscapes pipeline: resize, crop (cat_max_ratio 0.75), flip, photometric."""
    image, label = cv2.imread(image_path, cv2.IMREAD_COLOR), cv2.imread(label_path, cv2.IMREAD_UNCHANGED)
    scale = random.uniform(MIN_SCALE, MAX_SCALE)
    size = (int(WIDTH * scale + 0.5), int(HEIGHT * scale + 0.5))
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
    top, left = 0, 0
    for _ in range(11):
        top, left = (random.randint(0, max(extent - CROP, 0)) for extent in label.shape)
        ids, counts = np.unique(label[top : top + CROP, left : left + CROP], return_counts=True)
        counts = counts[ids != IGNORE_INDEX]
        if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
    image, label = image[top : top + CROP, left : left + CROP], label[top : top + CROP, left : left + CROP]
    if random.random() < 0.5:
        image, label = cv2.flip(image, 1), cv2.flip(label, 1)
    planes = torch.from_numpy(np.ascontiguousarray(_photometric(image).transpose(2, 0, 1)))
    pixels = planes[[2, 1, 0]].float()
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    below, right = (CROP - extent for extent in label.shape)
    pixels = torch.nn.functional.pad(pixels, (0, right, 0, below))
    train_ids = torch.from_numpy(np.ascontiguousarray(label)).long()
    return pixels, torch.nn.functional.pad(train_ids, (0, right, 0, below), value=IGNORE_INDEX)


def _photometric(image: np.ndarray) -> np.ndarray:
    """mmsegmentation's PhotoMetricDistortion, uint8 BGR."""

    def converted(pixels: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
        return np.clip(pixels.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    if random.random() < 0.5:
        image = converted(image, beta=random.uniform(-32, 32))
    is_contrast_first, has_contrast = random.random() < 0.5, random.random() < 0.5
    if is_contrast_first and has_contrast:
        image = converted(image, random.uniform(0.5, 1.5))
    for channel in (1, 0):
        if random.random() < 0.5:
            hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
            if channel == 1:
                hsv[..., 1] = converted(hsv[..., 1], random.uniform(0.5, 1.5))
            else:
                hsv[..., 0] = (hsv[..., 0].astype(int) + random.randint(-18, 17)) % 180
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if has_contrast and not is_contrast_first:
        image = converted(image, random.uniform(0.5, 1.5))
    return image


def _torchvision_sample(image_path: str, label_path: str) -> tuple[Any, Any]:
    """The transforms of torchvision's reference training of segmentation, on tensors, at these sizes."""
    image = tv_tensors.Image(torchvision.io.decode_image(image_path, torchvision.io.ImageReadMode.RGB))
    label = tv_tensors.Mask(torchvision.io.decode_image(label_path)[0])
    return _TORCHVISION(image, label)


_TORCHVISION = v2.Compose(
    [
        v2.ScaleJitter((HEIGHT, WIDTH), scale_range=(MIN_SCALE, MAX_SCALE)),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomCrop(CROP, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: IGNORE_INDEX}),
        v2.ToDtype(
            {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}, scale=True
        ),
        v2.Normalize([value / 255 for value in MEAN], [value / 255 for value in STD]),
        v2.ToPureTensor(),
    ]
)


def _semseg_by_pillow(image_path: str, label_path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """semseg's steps in their order by Pillow, on uint8, which is not semseg's speed."""
    image: Image.Image = Image.open(image_path).convert("RGB")
    label: Image.Image = Image.open(label_path)
    scale = random.uniform(MIN_SCALE, MAX_SCALE)
    size = (round(image.width * scale), round(image.height * scale))
    image, label = image.resize(size, Image.Resampling.BILINEAR), label.resize(size, Image.Resampling.NEAREST)
    fill = tuple(map(int, MEAN))
    if random.random() < 0.5:
        angle = random.uniform(-ROTATE, ROTATE)
        image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=fill)
        label = label.rotate(angle, Image.Resampling.NEAREST, fillcolor=IGNORE_INDEX)
    if random.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(1.0))
    if random.random() < 0.5:
        image, label = ImageOps.mirror(image), ImageOps.mirror(label)
    left, top = (
        random.randint(0, extent - CROP) if extent >= CROP else (extent - CROP) // 2 for extent in image.size
    )
    label = ImageOps.invert(label).crop(
        (left, top, left + CROP, top + CROP)
    )  # outside: 0, the inverse of 255
    pixels = (
        torch.from_numpy(np.array(image.crop((left, top, left + CROP, top + CROP)))).permute(2, 0, 1).float()
    )
    for channel, mean, std in zip(pixels, MEAN, STD, strict=True):
        channel.sub_(mean).div_(std)
    return pixels, torch.from_numpy(np.array(ImageOps.invert(label))).long()

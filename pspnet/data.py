"""Which windows a worker trains on: every random choice follows from (seed, epoch, position) alone.

Position p of an epoch is the p-th image of its permutation. Iteration i takes the positions from
i * global_batch_size on, worker r every world_size-th of them from r on: the number of workers, threads and
restarts does not change which windows are seen.

With class-uniform sampling a share of the positions takes another image than the permutation's (pspnet.sampling).
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pspnet.errors import InputError
from pspnet.photometric import draw_photometric
from pspnet.sampling import ClassUniform, draw_focus, place_window, random_offset, require_label
from pspnet.sizes import Size
from pspnet.store import Split
from pspnet.transforms import Sample, Window, source_window

ROTATE_PROBABILITY = 0.5
"""Share of the windows that are rotated, where rotation is on (semseg)."""


@dataclass(frozen=True)
class Batch:
    """Windows of the source images as they are stored; `transforms.prepare_batch` makes equal crops of them."""

    memory: Tensor
    """uint8 (bytes,): for each sample the pixels of its window (h, w, 3), then its train ids (h, w)."""
    areas: list[Window]
    samples: list[Sample]
    names: list[str]

    @cached_property
    def windows(self) -> list[Tensor]:
        """The windows' pixels, uint8 (3, h, w), each of its own size; views in memory order (h, w, 3)."""
        return [pixels.permute(2, 0, 1) for pixels, _ in _parts(self.memory, self.areas)]

    @cached_property
    def targets(self) -> list[Tensor]:
        """The windows' train ids, uint8 (h, w); views."""
        return [train_ids for _, train_ids in _parts(self.memory, self.areas)]

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`: one copy, whatever the number of windows."""
        return replace(self, memory=self.memory.to(device, non_blocking=True))


def _parts(memory: Tensor, areas: Sequence[Window]) -> list[tuple[Tensor, Tensor]]:
    """Return views of pixels (h, w, 3) and train ids (h, w) of each window."""
    sizes = [count for area in areas for count in (3 * area.height * area.width, area.height * area.width)]
    parts = memory.split(sizes)
    return [
        (pixels.view(area.height, area.width, 3), train_ids.view(area.height, area.width))
        for area, pixels, train_ids in zip(areas, parts[::2], parts[1::2], strict=True)
    ]


def epoch_order(num_images: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of the images that an epoch goes through, int64 (num_images,)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(
        num_images
    )


def draw_sample(
    *,
    seed: int,
    epoch: int,
    position: int,
    index: int,
    size: tuple[int, int],
    crop_size: Size,
    min_scale: float,
    max_scale: float,
    flip_probability: float,
    rotate_degrees: float,
    blur_probability: float,
    is_photometric: bool = False,
) -> Sample:
    """Draw scale, flip, rotation, blur and place of the window at `position` of an epoch, in semseg's ranges.

    With `is_photometric` also the distortion of its brightness and colours, in mmsegmentation's ranges.

    `size` is that of image `index`, (height, width). A scaled image smaller than the crop lies in its middle.
    """
    entropy = np.random.SeedSequence([seed, epoch, position, 1])
    chances = np.random.Generator(np.random.Philox(entropy)).random(7)
    scale = min_scale + (max_scale - min_scale) * float(chances[0])
    scaled_size = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    top, left = random_offset(scaled_size, crop_size, chances[1:3])
    is_rotated = rotate_degrees > 0 and chances[4] < ROTATE_PROBABILITY
    return Sample(
        index=index,
        size=size,
        scaled_size=scaled_size,
        top=top,
        left=left,
        flip=bool(chances[3] < flip_probability),
        angle=rotate_degrees * (2 * float(chances[5]) - 1) if is_rotated else 0.0,
        is_blurred=bool(chances[6] < blur_probability),
        photometric=draw_photometric(seed=seed, epoch=epoch, position=position) if is_photometric else None,
    )


def num_iterations(num_images: int, global_batch_size: int, max_iterations_per_epoch: int = 0) -> int:
    """Return the optimizer steps of an epoch; the images that do not fill the last batch are left to other epochs.

    Raises InputError where there are fewer images than one batch.
    """
    whole = num_images // global_batch_size
    if whole == 0:
        raise InputError(
            f"schedule.global_batch_size must be at most the number of training images, {num_images}, but got "
            f"{global_batch_size}. Make it smaller or ingest more images."
        )
    return min(whole, max_iterations_per_epoch) if max_iterations_per_epoch else whole


def train_batches(
    split: Split,
    *,
    seed: int,
    epoch: int,
    rank: int,
    world_size: int,
    global_batch_size: int,
    crop_size: Size,
    min_scale: float,
    max_scale: float,
    flip_probability: float,
    rotate_degrees: float,
    blur_probability: float,
    is_photometric: bool = False,
    max_class_share: float = 1.0,
    classes: ClassUniform | None = None,
    start_iteration: int = 0,
    max_iterations: int = 0,
    num_prefetch_threads: int = 1,
) -> Iterator[Batch]:
    """Yield this worker's batches of an epoch, copied by threads ahead of their use.

    `start_iteration` and `max_iterations` (0: to the end) are counted from the beginning of the epoch. Without
    prefetch threads a batch is read when it is asked for. A window is placed anew while one class has
    `max_class_share` of it; `classes` turns class-uniform sampling on.
    """
    order = epoch_order(len(split), seed=seed, epoch=epoch)

    def draw(position: int) -> Sample:
        focus = None
        if classes is not None:
            focus = draw_focus(classes, seed=seed, epoch=epoch, position=position)
        index = int(order[position]) if focus is None else focus.index
        sample = draw_sample(
            seed=seed,
            epoch=epoch,
            position=position,
            index=index,
            size=split.size(index),
            crop_size=crop_size,
            min_scale=min_scale,
            max_scale=max_scale,
            flip_probability=flip_probability,
            rotate_degrees=rotate_degrees,
            blur_probability=blur_probability,
            is_photometric=is_photometric,
        )
        return place_window(
            sample,
            split,
            seed=seed,
            epoch=epoch,
            position=position,
            crop_size=crop_size,
            focus=focus,
            max_class_share=max_class_share,
        )

    def read(iteration: int) -> Batch:
        first = iteration * global_batch_size
        positions = range(first + rank, first + global_batch_size, world_size)
        return _read_batch(split, [draw(position) for position in positions], crop_size)

    iterations = range(start_iteration, num_iterations(len(split), global_batch_size, max_iterations))
    if num_prefetch_threads == 0:
        yield from map(read, iterations)
        return
    with ThreadPoolExecutor(num_prefetch_threads, thread_name_prefix="prefetch") as threads:
        ahead: deque[Future[Batch]] = deque()
        todo = iter(iterations)
        try:
            ahead.extend(threads.submit(read, i) for i in itertools.islice(todo, num_prefetch_threads + 1))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(threads.submit(read, i) for i in itertools.islice(todo, 1))
                yield batch
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


def shard_indices(num_images: int, rank: int, world_size: int) -> range:
    """Return the images that worker `rank` evaluates: each image is in exactly one worker's share, unpadded."""
    return range(rank, num_images, world_size)


def _read_batch(split: Split, samples: list[Sample], crop_size: Size) -> Batch:
    areas = [source_window(sample, crop_size) for sample in samples]
    memory = _new_memory(sum(4 * area.height * area.width for area in areas))
    for sample, area, (pixels, train_ids) in zip(samples, areas, _parts(memory, areas), strict=True):
        require_label(split, sample.index)
        split.read_window(
            sample.index, top=area.top, left=area.left, image=pixels.numpy(), label=train_ids.numpy()
        )
    return Batch(memory, areas, samples, [split.name(sample.index) for sample in samples])


def _new_memory(num_bytes: int) -> Tensor:
    """Return uint8 (num_bytes,), pinned where there is a GPU to copy it to."""
    if torch.cuda.is_available():
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    return torch.from_numpy(np.empty(num_bytes, dtype=np.uint8))  # of huge pages, unlike torch's own

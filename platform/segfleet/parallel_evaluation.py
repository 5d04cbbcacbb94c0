"""The evaluation of `segfleet.evaluation`, its images shared out to a Ray cluster."""

import copy
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from pspnet.errors import InputError
from pspnet.store import Store
from segfleet import cluster
from segfleet.config import WorkersConfig
from segfleet.evaluation import (
    Evaluation,
    ImageCounts,
    check_classes,
    count_images,
    evaluate_model,
    evaluation_of,
    keep_examples,
    labelled_images,
)
from segfleet.package import SegmentationModel
from segfleet.progress import tracked
from segfleet.protocol import Protocol

IMAGES_PER_TASK = 8
"""Enough that handing them over costs nothing, few enough that no worker ends long after the others."""


def evaluate(
    model: SegmentationModel,
    store: Store,
    protocol: Protocol,
    *,
    workers: WorkersConfig,
    storage_dir: str | Path,
    has_boundaries: bool = False,
    num_examples: int = 0,
) -> Evaluation:
    """Return what `evaluate_model` returns, by this process alone or by several on a cluster.

    On a CPU each has `workers.cpus_per_worker` threads: they decide which kernels compute the logits, and so how these
    are rounded. However many workers there are, the counts are the same on processors of one kind; a single one takes
    the device of `model`, several take GPUs only with `workers.use_gpu`.
    """
    wanted: dict[str, Any] = {"has_boundaries": has_boundaries, "num_examples": num_examples}
    if workers.num_workers > 1:
        if model.device.type != "cpu" and not workers.use_gpu:
            print(
                f"note: {workers.num_workers} workers compute on CPUs, where a single one would take the GPU and round "
                "otherwise; --use-gpu True gives each a GPU",
                flush=True,
            )
        with cluster.connect(storage_dir):
            return evaluate_on_cluster(model, store, protocol, workers=workers, **wanted)
    compute_as_one_worker(model, workers)
    return evaluate_model(model, store, protocol, **wanted)


def compute_as_one_worker(model: SegmentationModel, workers: WorkersConfig) -> None:
    """Take the threads that each of several workers would have on a CPU, and say what would be faster.

    What this process then predicts is what an evaluation counts. InputError where a GPU is asked for and `model` is on
    none.
    """
    if model.device.type != "cpu":
        return
    if workers.use_gpu:
        raise InputError(
            "--use-gpu True must find a GPU, but torch sees none on this machine. Set --use-gpu False."
        )
    num_threads = torch.get_num_threads()
    torch.set_num_threads(workers.cpus_per_worker)
    if num_threads > workers.cpus_per_worker == 1:
        print(
            f"note: one thread computes, where torch would take {num_threads}. An evaluation shares its images out by "
            f"--num-workers {num_threads} and counts the same; --cpus-per-worker {num_threads} takes the threads and "
            "rounds otherwise",
            flush=True,
        )


def evaluate_on_cluster(
    model: SegmentationModel,
    store: Store,
    protocol: Protocol,
    *,
    workers: WorkersConfig,
    has_boundaries: bool = False,
    num_examples: int = 0,
) -> Evaluation:
    """Return what `evaluate_model` returns, each image seen once by one of `workers.num_workers` workers.

    Counts are whole numbers, each image is predicted by itself and no share is padded: the number of workers changes
    nothing. Needs a connection to Ray; the store must lie where every node sees it. InputError where the cluster can
    never hold a worker.
    """
    check_classes(model, store)
    indices = labelled_images(store, protocol)
    cluster.check_place(workers)
    on_cpu = replace(model, network=copy.deepcopy(model.network).cpu(), device=torch.device("cpu"))
    count = ray.remote(
        num_cpus=workers.cpus_per_worker,
        num_gpus=1 if workers.use_gpu else 0,
        runtime_env={"env_vars": cluster.environment(workers)},
    )(_count)
    shared, path = ray.put(on_cpu), store.location.text
    size = max(1, min(IMAGES_PER_TASK, math.ceil(len(indices) / workers.num_workers)))
    batches = [indices[first : first + size] for first in range(0, len(indices), size)]
    images: dict[int, ImageCounts] = {}
    counting: list[ray.ObjectRef] = []
    waiting = iter(batches)
    for _ in tracked(batches, f"evaluating {model.source} on {protocol.split}"):
        for batch in itertools.islice(waiting, workers.num_workers - len(counting)):
            counting.append(
                count.remote(shared, path, protocol, workers, batch, has_boundaries, num_examples)
            )
        (done,), counting = ray.wait(counting)
        try:
            images |= copy.deepcopy(ray.get(done))  # Ray's memory ends with the connection
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None  # without the remote traceback that Ray makes part of its message
            raise
        keep_examples(images, num_examples)
    return evaluation_of(images, store.class_table, protocol)


def _count(
    model: SegmentationModel,
    store_path: str,
    protocol: Protocol,
    workers: WorkersConfig,
    indices: list[int],
    has_boundaries: bool,
    num_examples: int,
) -> dict[int, ImageCounts]:
    """Return the counts of a worker's images."""
    torch.set_num_threads(workers.cpus_per_worker)
    device = torch.device("cuda" if workers.use_gpu else "cpu")
    model = replace(model, network=model.network.to(device), device=device)
    return count_images(
        model,
        Store.open(store_path),
        protocol,
        indices,
        has_boundaries=has_boundaries,
        num_examples=num_examples,
    )

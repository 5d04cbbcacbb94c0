"""An evaluation that workers share is the one of a single worker, to the last count."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from pspnet.errors import InputError
from pspnet.store import Store
from segfleet import cluster
from segfleet.config import WorkersConfig
from segfleet.evaluation import (
    Evaluation,
    ImageCounts,
    count_images,
    evaluate_model,
    evaluation_of,
    keep_examples,
)
from segfleet.package import SegmentationModel, load_package, package_model
from segfleet.parallel_evaluation import evaluate, evaluate_on_cluster
from segfleet.protocol import Protocol


@pytest.fixture(scope="module")
def model(
    write_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> SegmentationModel:
    """Random weights, so that all classes are predicted somewhere."""
    folder = tmp_path_factory.mktemp("shared")
    return load_package(
        package_model(write_checkpoint(folder / "epoch_0001", seed=3), folder / "package"), device="cpu"
    )


def test_the_order_in_which_images_are_counted_changes_nothing(
    model: SegmentationModel, store: Store
) -> None:
    protocol = Protocol(store_digest=store.digest, split="val")
    whole = evaluate_model(model, store, protocol, has_boundaries=True, num_examples=1)
    parts: dict[int, ImageCounts] = {}
    for share in ([2], [0, 1]):
        parts |= count_images(model, store, protocol, share, has_boundaries=True, num_examples=1)
        keep_examples(parts, 1)
    shared = evaluation_of(parts, store.class_table, protocol)
    assert shared.scores == whole.scores
    assert list(shared.images) == list(whole.images) == [0, 1, 2]
    assert torch.equal(shared.confusion, whole.confusion)
    assert shared.scores.mean_boundary_f is not None
    for index, image in whole.images.items():
        assert np.array_equal(shared.images[index].prediction, image.prediction)  # type: ignore[arg-type]


@pytest.mark.parametrize("cpus_per_worker", [1, 2])
def test_one_worker_has_the_threads_that_one_of_several_has(
    model: SegmentationModel,
    store: Store,
    tmp_path: Path,
    cpus_per_worker: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one thread other kernels compute the logits than with two, and they round otherwise."""
    seen: list[int] = []
    monkeypatch.setattr(
        "segfleet.parallel_evaluation.evaluate_model", lambda *_, **__: seen.append(torch.get_num_threads())
    )
    num_threads = torch.get_num_threads()
    protocol = Protocol(store_digest=store.digest, split="val")
    evaluate(
        model,
        store,
        protocol,
        workers=WorkersConfig(cpus_per_worker=cpus_per_worker, num_workers=1),
        storage_dir=tmp_path,
    )
    torch.set_num_threads(num_threads)
    assert seen == [cpus_per_worker]


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def evaluated(
    model: SegmentationModel, store: Store, storage_dir: Path, workers: WorkersConfig
) -> Evaluation:
    protocol = Protocol(store_digest=store.digest, split="val")
    return evaluate(model, store, protocol, workers=workers, storage_dir=storage_dir)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("cpus_per_worker", "is_noted"), [(1, True), (2, False)])
def test_a_single_thread_is_said_where_there_are_more_and_nothing_was_asked_for(
    model: SegmentationModel,
    store: Store,
    tmp_path: Path,
    cpus_per_worker: int,
    is_noted: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluated(model, store, tmp_path, WorkersConfig(cpus_per_worker=cpus_per_worker))
    assert ("--num-workers 4" in capsys.readouterr().out) == is_noted


def test_a_gpu_that_is_asked_for_and_not_there_is_refused(
    model: SegmentationModel, store: Store, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--use-gpu True must find a GPU"):
        evaluated(model, store, tmp_path, WorkersConfig(use_gpu=True))


@pytest.mark.parametrize(
    ("device", "use_gpu", "is_noted"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_several_workers_on_cpus_where_one_would_take_a_gpu_are_noted(
    model: SegmentationModel,
    store: Store,
    tmp_path: Path,
    device: str,
    use_gpu: bool,
    is_noted: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda _: contextlib.nullcontext())
    monkeypatch.setattr("segfleet.parallel_evaluation.evaluate_on_cluster", lambda *_, **__: None)
    there = dataclasses.replace(model, device=torch.device(device))
    evaluated(there, store, tmp_path, WorkersConfig(num_workers=2, use_gpu=use_gpu))
    assert ("note: 2 workers compute on CPUs" in capsys.readouterr().out) == is_noted


@pytest.mark.slow
def test_1_2_and_4_workers_count_the_same(model: SegmentationModel, store: Store, tmp_path: Path) -> None:
    """Three images, so that of two workers one has more than the other, and of four one has none.

    Four are more than this machine may have CPUs.
    """
    protocol = Protocol(store_digest=store.digest, split="val", flip=True, window=33)
    with cluster.connect(tmp_path):
        evaluations = [
            evaluate_on_cluster(
                model,
                store,
                protocol,
                workers=WorkersConfig(num_workers=number),
                has_boundaries=True,
                num_examples=1,
            )
            for number in (1, 2, 4)
        ]
        with pytest.raises(InputError, match="10000 CPUs were asked for and the largest of 1 nodes"):
            evaluate_on_cluster(model, store, protocol, workers=WorkersConfig(cpus_per_worker=10000))
        shutil.copytree(store.location.path, tmp_path / "moved")
        gone = Store.open(tmp_path / "moved")
        shutil.rmtree(tmp_path / "moved")
        with pytest.raises(InputError, match="moved") as refused:
            evaluate_on_cluster(model, gone, protocol, workers=WorkersConfig(num_workers=1))
        assert "ray::" not in str(refused.value)
    assert not ray.is_initialized()
    first = evaluations[0]
    assert len(torch.unique(first.confusion.sum(0))) == 3
    for other in evaluations[1:]:
        assert torch.equal(other.confusion, first.confusion)
        assert other.scores == first.scores
        for index, image in first.images.items():
            assert torch.equal(other.images[index].confusion.counts, image.confusion.counts)
            assert np.array_equal(other.images[index].boundary, image.boundary)  # type: ignore[arg-type]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers have
    alone = evaluate_model(model, store, protocol, has_boundaries=True, num_examples=1)
    torch.set_num_threads(num_threads)
    assert alone.scores == first.scores
    for index, image in alone.images.items():
        for shared in evaluations:
            assert np.array_equal(shared.images[index].prediction, image.prediction)  # type: ignore[arg-type]

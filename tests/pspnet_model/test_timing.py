"""Time is counted where it is spent, on whichever worker waits; arithmetic as a real pass does it."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.utils.flop_counter import FlopCounterMode

from pspnet.data import Batch
from pspnet.distributed import parallelise
from pspnet.flops import Arithmetic, peak_flops, training_flops
from pspnet.model import PSPNet
from pspnet.timing import PARTS
from pspnet.training_stats import IterationStats, TrainStats
from tests.pspnet_model import engine_workers

PAUSE_S = 1.0


class Time:
    """A clock that goes on only while somebody pauses."""

    def __init__(self) -> None:
        self._now = 100.0

    def pause(self) -> None:
        self._now += PAUSE_S

    def perf_counter(self) -> float:
        return self._now

    monotonic = perf_counter


def timed(
    slow: str, pause: Callable[[], None], rank: int = 0, world_size: int = 1
) -> tuple[TrainStats, list[IterationStats]]:
    """Train three iterations of which one part has a pause, and return what they came to."""

    def slow_batches(rank: int, world_size: int) -> Iterator[Batch]:
        for batch in engine_workers.batches(rank, world_size):
            pause()
            yield batch

    def slow_prepare(batch: Batch) -> tuple[Tensor, Tensor]:
        pause()
        return engine_workers.prepare(batch)

    model = engine_workers.new_model().double()
    optimizer = engine_workers.new_optimizer(model)
    if slow == "forward":
        model.backbone.register_forward_pre_hook(lambda *_: pause())
    if slow == "backward":
        model.backbone.layer2.register_full_backward_hook(lambda *_: pause())
    if slow == "optimizer":
        optimizer.register_step_pre_hook(lambda *_: pause())
    steps: list[IterationStats] = []
    stats = engine_workers.train(
        parallelise(model, "cpu"),
        (slow_batches if slow == "data_wait" else engine_workers.batches)(rank, world_size),
        optimizer=optimizer,
        prepare=slow_prepare if slow == "prepare" else engine_workers.prepare,
        on_iteration=steps.append,
    )
    return stats, steps


@pytest.mark.parametrize("slow", [part for part in PARTS if part != "all_reduce"])
def test_a_pause_is_counted_in_its_part_and_in_no_other(slow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time()
    monkeypatch.setattr("pspnet.timing.time", clock)
    monkeypatch.setattr("pspnet.engine.time", clock)
    stats, steps = timed(slow, clock.pause)
    expected = {part: PAUSE_S if part == slow else 0.0 for part in PARTS}
    assert [step.parts_s for step in steps] == [expected] * 3
    assert stats.parts_s == expected
    assert stats.images_per_s == engine_workers.GLOBAL_BATCH_SIZE / PAUSE_S


def run_worker(rank: int, folder: str) -> None:
    """Let the second worker be slow in its backward pass."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    _, steps = timed("backward" if rank == 1 else "none", lambda: time.sleep(PAUSE_S), rank, 2)
    torch.save([step.parts_s for step in steps], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_wait_for_a_slower_worker_is_counted_as_all_reduce(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    spawn(run_worker, args=(str(tmp_path),), nprocs=2)
    quick, slow = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for mine, theirs in zip(quick, slow, strict=True):
        assert theirs["backward"] >= PAUSE_S
        assert mine["all_reduce"] > PAUSE_S / 2
        assert theirs["all_reduce"] < mine["all_reduce"]


def test_arithmetic_is_counted_as_in_a_real_pass_and_without_changing_the_random_numbers() -> None:
    model = PSPNet(5, backbone="resnet18", head_channels=16).train()
    before = torch.get_rng_state()
    flops = training_flops(model, 65)
    assert torch.equal(torch.get_rng_state(), before)
    with FlopCounterMode(display=False) as counter:
        output = model(torch.randn(4, 3, 65, 65), upsample=False)
        assert output.aux_logits is not None
        (output.logits.sum() + output.aux_logits.sum()).backward()
    assert flops == counter.get_total_flops() // 4
    # A backward pass costs two forward ones; frozen stages have none.
    forward = counter.get_flop_counts()["Global"]
    assert sum(forward.values()) == 4 * flops
    assert flops / 3 < training_flops(model, 65, num_frozen_stages=5) < flops


@pytest.mark.parametrize(
    ("name", "precision", "is_tf32", "tflops"),
    [
        ("NVIDIA H200", "bf16", True, 989.4),
        ("NVIDIA H200 NVL", "bf16", True, 835.5),
        ("NVIDIA GH200 480GB", "bf16", True, 989.4),
        ("NVIDIA A10G", "bf16", True, 70.0),
        ("NVIDIA A10", "bf16", True, 125.0),
        ("NVIDIA H100 PCIe", "bf16", True, 756.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", True, 156.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", False, 19.5),
        ("NVIDIA L40S", "fp16", True, 362.0),
        ("NVIDIA L4", "fp16", True, 121.0),
        ("NVIDIA B200", "bf16", True, 2250.0),
        ("NVIDIA GB200", "bf16", True, 2500.0),
        ("NVIDIA H800", "bf16", True, 989.4),
        ("NVIDIA H20", "bf16", True, 148.0),
        ("NVIDIA A800-SXM4-80GB", "bf16", True, 312.0),
        ("NVIDIA A40", "bf16", True, 149.7),
        ("NVIDIA RTX A6000", "fp32", True, 77.4),
        ("NVIDIA GeForce RTX 4090", "bf16", True, 165.2),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", True, 80.0),
        ("NVIDIA GeForce RTX 4090 D", "bf16", True, math.nan),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", True, math.nan),
        ("Tesla V100-SXM3-32GB", "fp16", True, 125.0),
        ("Tesla V100-SXM2-16GB", "fp32", True, 15.7),
        ("Tesla V100-SXM2-16GB", "bf16", True, math.nan),
        ("NVIDIA GeForce RTX 2080 Ti", "fp16", True, 53.8),
        ("NVIDIA GeForce RTX 2080 Ti", "bf16", True, math.nan),
        ("Tesla T4", "fp32", True, 8.1),
        ("Tesla T4", "bf16", True, math.nan),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", True, math.nan),
        ("Quadro T400", "fp16", True, math.nan),
        ("Some other GPU", "bf16", True, math.nan),
    ],
)
def test_the_peak_is_that_of_the_device_or_unknown(
    name: str, precision: Any, is_tf32: bool, tflops: float
) -> None:
    peak = peak_flops(name, precision, is_tf32=is_tf32)
    assert peak is None if math.isnan(tflops) else peak == pytest.approx(tflops * 1e12)


def test_mfu_by_hand() -> None:
    """Ten images a second of 2 TFLOP on two devices of 100 TFLOP/s."""
    known = Arithmetic(flops_per_image=2 * 10**12, peak_flops=2 * 100e12)
    assert known.rates(10.0) == pytest.approx({"tflops_per_s": 20.0, "mfu": 0.1})
    unknown = Arithmetic(flops_per_image=2 * 10**12, peak_flops=None)
    assert unknown.rates(10.0) == pytest.approx({"tflops_per_s": 20.0})

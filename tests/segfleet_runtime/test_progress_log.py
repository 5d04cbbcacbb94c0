"""The progress lines tell the training's own speed, and the time that is really left."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pspnet.flops import Arithmetic
from pspnet.training_stats import IterationStats
from segfleet import progress_log
from segfleet.progress_log import ProgressLog


def step(iteration: int, seconds: float) -> IterationStats:
    """One optimizer step of 8 images."""
    return IterationStats(
        iteration=iteration,
        epoch=0,
        loss=1.0,
        main_loss=1.0,
        aux_loss=0.0,
        gradient_norm=1.0,
        lr=0.1,
        images_per_s=8 / seconds,
        data_wait_s=0.0,
        parts_s={"forward": seconds},
    )


def test_a_line_has_the_speed_of_its_steps_and_the_time_left_counts_what_lies_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 4 s, the first of 50 s; an evaluation of 100 s after the third; then steps of 2 s."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress_log, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with ProgressLog(tmp_path / "log") as log:
        log.arithmetic = Arithmetic(flops_per_image=10**12, peak_flops=1e13)
        for iteration, seconds in enumerate((50, 4, 4, 2, 2)):
            clock.now += seconds + (100 if iteration == 3 else 0)
            log.iteration(step(iteration, seconds), iteration // 3, 2, 6, 8)
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.partition("iteration ")[2][:3] for line in lines] == ["2/6", "3/6", "4/6", "5/6"]
    assert ["2.0 images/s  MFU 20.0%" in line for line in lines] == [True, True, False, False]
    assert ["4.0 images/s  MFU 40.0%" in line for line in lines] == [False, False, True, True]
    assert lines[-1].endswith("ETA 0:00:28")  # 112 s for 4 steps, and one is left

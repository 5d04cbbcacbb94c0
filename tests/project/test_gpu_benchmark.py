"""benchmarks/gpu.py, as far as it can be tried without a GPU."""

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; it finds its neighbours as it does when it is run."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu

    return gpu


def cpu(gpu: Any) -> Any:
    return gpu.Card(device=torch.device("cpu"), name="no GPU")


def measured_steps(gpu: Any, networks: Any, flops: dict[str, int], *, compiled: bool = False) -> Any:
    """The ways of --quick on two crops of 33, two rounds of one step."""
    options = argparse.Namespace(quick=True, compile=compiled, rounds=2, steps=1)
    images, target = torch.randn(2, 3, 33, 33), torch.zeros(2, 33, 33).long()
    return gpu._measure_steps(
        options, cpu(gpu), networks, images, target, flops, gpu.Budget(time.monotonic())
    )


@pytest.mark.slow
def test_on_a_cpu_it_writes_its_tables_and_ends_with_json(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- gpu: begin -->\nnot measured yet\n<!-- gpu: end -->\nafter\n")
    sizes = ("--backbone", "resnet18", "--crop", "33", "--batch", "2", "--rounds", "1", "--steps", "1")
    shown = run("--device", "cpu", *sizes, "--quick", "--write", str(page))
    assert shown.returncode == 0, shown.stderr
    numbers = json.loads(shown.stdout.splitlines()[-1])
    assert numbers["gpu_step_bf16"] > 0
    assert numbers["gpu_inference_bf16"] > 0
    assert numbers["gpu_mfu_bf16"] is None  # nobody knows the peak of a CPU
    text = page.read_text()
    assert "| 2 | **pspnet, bf16** |" in text
    assert "| 33×33 | **pspnet, bf16** |" in text
    assert "not measured yet" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu._card("cuda")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --device cuda needs a GPU")
    assert "--device cpu" in line


@pytest.mark.parametrize(("device", "number"), [("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_chosen_by_its_number(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, device: str, number: int
) -> None:
    """torch.cuda.set_device refuses a device without one."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    card = gpu._card(device)
    assert chosen == [number]
    assert card.device == torch.device("cuda", number)


NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
)


@pytest.mark.parametrize("error", NO_MEMORY)
def test_what_does_not_fit_is_a_row_and_the_others_go_on(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def begin(way: Any, *_: Any) -> Any:
        if way.of == "reference" and way.how == "channels_last":
            raise error
        calls = 0

        def steps(number: int) -> tuple[float, float]:
            nonlocal calls
            calls += 1
            if way.of == "fcn" or (way.of == "pspnet" and calls > 3):
                raise error
            return 1.0, 2.0

        return steps

    monkeypatch.setattr(gpu, "begin", begin)
    monkeypatch.setattr(gpu, "_counted_memory", lambda *_: {"": 2**30})
    flops = {"reference": 1, "fcn": 1, "pspnet": 1}
    case = measured_steps(gpu, SimpleNamespace(pspnet=None), flops)
    seen = {row.name: (row.outcome, len(row.seconds)) for row in case.rows}
    assert seen["reference, bf16"] == ("", 2)
    assert seen["reference, bf16, channels_last"] == ("oom", 0)
    assert seen["torchvision's fcn_resnet50, bf16"] == ("oom", 0)
    assert seen["pspnet, bf16"] == ("oom", 0)
    assert "| 2 | **pspnet, bf16** | oom |" in gpu.step_table(cpu(gpu), [case], flops, gpu.Fit())


def test_a_prediction_that_does_not_fit_is_a_row_and_nothing_is_compared_with_it(gpu: Any) -> None:
    import gpu_predictions as predictions

    def fails(picture: np.ndarray) -> np.ndarray:
        raise torch.OutOfMemoryError

    ways = {"reference, fp32": fails, "pspnet, fp32": lambda picture: picture}
    options = argparse.Namespace(rounds=1, steps=1)
    differs: list[str] = []
    picture = np.zeros((2, 2), np.uint8)
    wanted = predictions._exact(ways, picture, "2×2", differs)
    rows = predictions._measure_prediction(options, cpu(gpu), ways, picture, wanted, deadline=math.inf)
    table = gpu.prediction_table({"2×2": rows})
    assert "| 2×2 | reference, fp32 | oom |" in table
    assert len(rows[1].seconds) == 1
    assert rows[1].disagreement is None
    assert differs == []


def test_what_fails_otherwise_is_a_row_and_told(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    row = gpu.Row("crops")
    with gpu.noted(row):
        raise KeyError("nothing")
    assert (row.outcome, row.has_failed) == ("failed, KeyError", True)
    assert "nothing" in capsys.readouterr().err
    assert "| crops, batch 8 | failed, KeyError | – |" in gpu.crop_table([row], 8)


def test_after_the_deadline_no_further_round_is_begun(gpu: Any) -> None:
    row = gpu.Row("a way")
    gpu.take_turns(cpu(gpu), [(row, lambda number: None)], num_rounds=3, calls_per_turn=1, deadline=0.0)
    assert len(row.seconds) == 1
    assert gpu._rounds([row, gpu.Row("", seconds=[0.1] * 3)]) == "1 to 3"


@pytest.mark.slow
@pytest.mark.long
def test_what_is_compiled_is_compiled_once(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo traces; its graphs are computed as they are."""
    traced: list[Any] = []
    at_the_first_round: list[int] = []

    def compiler(graph: Any, _: Any) -> Any:
        traced.append(graph)
        return graph

    def take_turns(*arguments: Any, **options: Any) -> None:
        at_the_first_round.append(len(traced))
        real_take_turns(*arguments, **options)

    real_take_turns = gpu.take_turns
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    monkeypatch.setattr(gpu, "require_compiler", lambda device: None)
    monkeypatch.setattr(gpu, "take_turns", take_turns)
    networks = gpu.Networks.new("resnet18", None)
    case = measured_steps(gpu, networks, {"reference": 1, "pspnet": 1}, compiled=True)
    outcomes = {row.name: row.outcome for row in case.rows}
    assert outcomes["pspnet, bf16, compiled"] == outcomes["pspnet, fp32, compiled"] == ""
    assert at_the_first_round == [len(traced)]
    assert len(traced) >= 2


def test_a_way_goes_on_with_the_scale_of_its_last_step(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_ways as ways

    scales: list[float] = []

    def train_one_epoch(*_: Any, scaler_state: dict[str, float], **__: Any) -> Any:
        scales.append(scaler_state["scale"])
        return SimpleNamespace(main_loss=1.0, aux_loss=2.0, scaler=scaler_state | {"scale": scales[-1] / 2})

    monkeypatch.setattr(ways, "train_one_epoch", train_one_epoch)
    networks = gpu.Networks.new("resnet18", None)
    way = gpu.Way(of="pspnet", precision="fp16")
    steps = gpu.begin(way, networks, torch.zeros(2, 3, 33, 33), torch.zeros(2, 33, 33).long())
    for _ in range(3):
        steps(1)
    assert scales == [ways.FIRST_SCALE, ways.FIRST_SCALE / 2, ways.FIRST_SCALE / 4]


def test_nothing_is_written_where_the_ways_do_not_compute_the_same(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- gpu: begin -->\nnot measured yet\n<!-- gpu: end -->\n")
    before = page.read_text()
    predictions = {"9×9": [gpu.Row(f"{of}, bf16", outcome="oom") for of in ("reference", "pspnet")]}
    monkeypatch.setattr(gpu, "loss_difference", lambda *_: 0.5)
    monkeypatch.setattr(gpu, "counted_flops", lambda *_: {"reference": 1})
    monkeypatch.setattr(gpu, "_measure_steps", lambda *_: gpu.Case(batch_size=2, rows=[], predicted={}))
    monkeypatch.setattr(gpu, "measure_predictions", lambda *_, **__: predictions)
    monkeypatch.setattr(gpu, "measure_crops", lambda *_, **__: [])
    arguments = ["--device", "cpu", "--backbone", "resnet18", "--crop", "33", "--batch", "2"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, "--write", str(page)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert "Nothing is written" in str(ended.value.code)
    assert "5.0e-01" in str(ended.value.code)
    assert page.read_text() == before
    shown = capsys.readouterr().out
    assert "| 9×9 | **pspnet, bf16** | oom |" in shown
    assert json.loads(shown.splitlines()[-1])["gpu_step_bf16"] is None


def test_mfu_and_ratios_of_a_step_by_hand(gpu: Any) -> None:
    """16 images of 2 TFLOP in 0.1 s are 320 TFLOP/s, of 989.4 at most; the reference takes 0.3 s."""
    import gpu_tables as tables

    card = gpu.Card(device=torch.device("cpu"), name="NVIDIA H200")
    ours = gpu.Row("", gpu.Way(of="pspnet", precision="bf16"), seconds=[0.1, 0.1])
    theirs = gpu.Row("", gpu.Way(of="reference", precision="bf16"), seconds=[0.3, 0.2])
    case = gpu.Case(batch_size=16, rows=[ours, theirs], predicted={"": 2**30})
    assert tables.mfu(card, case, ours, 2 * 10**12) == pytest.approx(320 / 989.4)
    assert ours.ratios(theirs) == pytest.approx([3, 2])
    assert ours.ratios(tables.row_of(case, gpu.Way(of="reference", precision="fp16"))) == []

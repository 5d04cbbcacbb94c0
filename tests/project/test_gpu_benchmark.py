"""benchmarks/gpu.py, as far as it can be tried without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def test_what_does_not_fit_is_a_row_and_the_others_go_on(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card = gpu.Card(device=torch.device("cpu"), name="NVIDIA H200")
    images = torch.zeros(2, 3, 9, 9)

    def begin(way: Any, *_: Any) -> Any:
        if way.of == "fcn":
            raise torch.OutOfMemoryError
        return lambda number: (1.0, 2.0)

    monkeypatch.setattr(gpu, "begin", begin)
    rows = [gpu.Row(of, gpu.Way(of=of, precision="bf16")) for of in ("reference", "fcn", "pspnet")]
    steps = [gpu._begun(row, card, None, images, images) for row in rows]
    assert [row.outcome for row in rows] == ["", "oom", ""]

    def grows(number: int) -> None:
        raise torch.OutOfMemoryError

    gpu.take_turns(card, [(rows[0], steps[0]), (rows[2], grows)], num_rounds=2, calls_per_turn=1)
    assert [row.outcome for row in rows] == ["", "oom", "oom"]
    assert len(rows[0].seconds) == 2


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

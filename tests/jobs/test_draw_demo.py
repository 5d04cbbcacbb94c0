"""jobs/draw_demo.py as a person runs it."""

import subprocess
import sys
from pathlib import Path

JOB = Path(__file__).resolve().parents[2] / "jobs" / "draw_demo.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(JOB), *arguments], capture_output=True, text=True, check=False)


def test_it_draws_and_says_what(tmp_path: Path) -> None:
    sizes = ("--num-train", "2", "--num-val", "1", "--width", "96", "--height", "48")
    result = run("--root", str(tmp_path / "demo"), *sizes)
    assert result.returncode == 0, result.stderr
    assert "drew 3 scenes, kept 0" in result.stdout
    assert len(list((tmp_path / "demo").rglob("*.png"))) == 6


def test_bad_input_is_one_plain_message_and_exit_2(tmp_path: Path) -> None:
    result = run("--root", str(tmp_path / "demo"), "--width", "7")
    assert result.returncode == 2
    assert result.stderr.startswith("error: width and height")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "demo").exists()

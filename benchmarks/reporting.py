"""What the benchmarks share: pictures of Cityscapes' size, versions, and the tables in README.md."""

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow
import torch
import torchvision
from PIL import Image
from reference_pipelines import HEIGHT, WIDTH, cv2

from pspnet.labels import CITYSCAPES

MAX_PAIRS = 16
Pair = tuple[np.ndarray, np.ndarray]
"""A picture, uint8 (h, w, 3), and its train ids, uint8 (h, w)."""


def parser_of(description: str, *, quick: str = "") -> argparse.ArgumentParser:
    """Return a parser of what the benchmarks share: --write, and --quick where `quick` says what is then measured."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    if quick:
        parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--write", type=Path, help="file whose part between the marks is replaced")
    return parser


def pin_to_one_core() -> str:
    """Let this process compute with one thread on one core, where the system can, and say on which."""
    torch.set_num_threads(1)
    if not hasattr(os, "sched_setaffinity"):
        return "not pinned (this system cannot)"
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return f"{core} of {_processor()}"


def _processor() -> str:
    """Return the processor's name, and which of the instructions for bf16 it has."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    said = {name.strip(): value.strip() for name, _, value in lines}
    name = said.get("model name") or platform.machine()
    has = set(said.get("flags", "").split())
    return ", ".join([name, *(it for it in ("avx512_bf16", "amx_bf16") if it in has)])


def pictures(cityscapes: Path | None) -> tuple[list[Pair], str, int]:
    """Return pairs of Cityscapes' size, genuine ones from the folder `cityscapes` or drawn, what they are,
    and how many bytes their files have (0 where they are drawn)."""
    if cityscapes is None:
        rng = np.random.default_rng(0)
        return [_noise(rng) for _ in range(4)], "4 of textured noise, 2048x1024", 0
    pairs: list[Pair] = []
    num_bytes = 0
    for path in sorted(cityscapes.glob("leftImg8bit/*/*/*_leftImg8bit.png")):
        label = Path(str(path).replace("leftImg8bit", "gtFine").removesuffix(".png") + "_labelIds.png")
        if label.is_file() and len(pairs) < MAX_PAIRS:
            num_bytes += path.stat().st_size + label.stat().st_size
            ids = CITYSCAPES.train_id_of(np.asarray(Image.open(label)), where=str(label))
            pairs.append((np.asarray(Image.open(path).convert("RGB")), ids))
    if not pairs:
        sys.exit(
            f"--cityscapes must hold leftImg8bit and gtFine with labelIds, but {cityscapes} has no pair."
        )
    return pairs, f"{len(pairs)} genuine Cityscapes pairs, 2048x1024", num_bytes


def _noise(rng: np.random.Generator) -> Pair:
    """Return smooth colour with fine grain, whose PNG is about as large as that of a photograph, and large regions.

    Their class can be told by the colour.
    """

    def smooth(channels: int, cells: int) -> torch.Tensor:
        coarse = torch.from_numpy(rng.random((1, channels, cells, 2 * cells), dtype=np.float32))
        return torch.nn.functional.interpolate(coarse, size=(HEIGHT, WIDTH), mode="bilinear")[0]

    grain = torch.from_numpy(rng.normal(0, 2, (3, HEIGHT, WIDTH)).astype(np.float32))
    regions = smooth(1, 12)
    colour = torch.cat([regions, smooth(2, 8)])
    image = (colour * 160 + smooth(3, 128) * 60 + grain).clamp(0, 255).byte()
    label = (regions[0] * 19).byte()
    return image.permute(1, 2, 0).contiguous().numpy(), label.numpy()


def versions() -> str:
    """Return what was measured with: versions and commit."""
    packages = {"torch": torch, "torchvision": torchvision, "numpy": np, "pyarrow": pyarrow, "opencv": cv2}
    named = [f"{name} {module.__version__}" for name, module in packages.items() if module is not None]
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return ", ".join([f"Python {platform.python_version()}", *named, f"commit {commit}"])


def record(text: str, name: str, path: Path | None) -> None:
    """Print what was measured; where there is a `path`, also put it between the marks of `name` in that file."""
    print(text)
    if path is not None:
        write_between(path, name, text)


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of `name` in the file `path`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = path.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"--write must name a file with the lines {begin} and {end}, but {path} has not both.")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def cell(values: Sequence[float]) -> str:
    """Return the median and, in brackets, the smallest and the largest."""
    return f"{median(values):.3g} ({min(values):.3g}–{max(values):.3g})"

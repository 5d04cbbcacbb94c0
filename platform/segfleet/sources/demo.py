"""The demo data set: drawn street scenes in the folders, names and label ids of Cityscapes, which its reader reads.

Scene k of a split depends on the seed, the split and k alone, so any number of scenes and of processes gives the
same bytes. Every file appears whole or not at all; drawing again completes what is missing.
"""

import hashlib
import json
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pspnet.errors import InputError
from segfleet.progress import tracked
from segfleet.sources.demo_scene import draw_street
from segfleet.sources.demo_street import make_street

CITIES = {
    "train": ("ahrenfeld", "birkenau", "eschhausen", "kaltbrunn", "lindhafen", "moorstedt"),
    "val": ("oberwald", "sandhausen", "tannrode"),
}
"""Invented; as in Cityscapes no city is in two splits."""

SETTINGS_FILE = "demo.json"
SMALLEST = 32
LARGEST = 4096
SCENES_WORTH_A_PROCESS = 8


@dataclass(frozen=True, kw_only=True)
class DrawReport:
    """What became of one call."""

    root: Path
    num_drawn: int
    num_kept: int
    num_removed: int


@dataclass(frozen=True)
class _Scene:
    """One image and its label to be drawn."""

    root: str
    split: str
    index: int
    width: int
    height: int
    seed: int

    @property
    def image_path(self) -> Path:
        return self._path("leftImg8bit", "leftImg8bit")

    @property
    def label_path(self) -> Path:
        return self._path("gtFine", "gtFine_labelIds")

    def _path(self, folder: str, ending: str) -> Path:
        cities = CITIES[self.split]
        city = cities[self.index % len(cities)]
        name = f"{city}_{self.index // len(cities):06d}_000019_{ending}.png"
        return Path(self.root) / folder / self.split / city / name


def draw_scene(*, seed: int, split: str, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return image uint8 (h, w, 3) and Cityscapes label ids uint8 (h, w) of one scene at size (width, height)."""
    rng = np.random.default_rng([seed, list(CITIES).index(split), index])
    return draw_street(make_street(rng, index), size)


def draw_demo(
    root: str | os.PathLike[str],
    *,
    num_train: int,
    num_val: int,
    size: tuple[int, int] = (512, 256),
    seed: int = 0,
    num_processes: int = 1,
) -> DrawReport:
    """Make `root` hold exactly these scenes at size (width, height), drawing only what is not there already."""
    root = Path(root)
    _check(root, num_train=num_train, num_val=num_val, size=size, seed=seed, num_processes=num_processes)
    settings = {"seed": seed, "width": size[0], "height": size[1], "drawing": _drawing_digest()}
    numbers = {"train": num_train, "val": num_val}
    scenes = [
        _Scene(str(root), split, index, size[0], size[1], seed)
        for split, number in numbers.items()
        for index in range(number)
    ]
    is_same = _settings_in(root) == settings
    wanted = {path for scene in scenes for path in (scene.image_path, scene.label_path)} if is_same else set()
    num_removed = _remove_others(root, wanted)
    root.mkdir(parents=True, exist_ok=True)
    _write(root / SETTINGS_FILE, (json.dumps(settings, indent=2) + "\n").encode())
    missing = [scene for scene in scenes if not (_is_whole(scene.image_path) and _is_whole(scene.label_path))]
    num_processes = min(num_processes, max(1, len(missing) // SCENES_WORTH_A_PROCESS))
    _draw_all(missing, num_processes)
    return DrawReport(
        root=root, num_drawn=len(missing), num_kept=len(scenes) - len(missing), num_removed=num_removed
    )


def _check(
    root: Path, *, num_train: int, num_val: int, size: tuple[int, int], seed: int, num_processes: int
) -> None:
    """Raise InputError where this cannot be drawn, or not there."""
    for name, value, least in (
        ("num_train", num_train, 1),
        ("num_val", num_val, 1),
        ("seed", seed, 0),
        ("num_processes", num_processes, 1),
    ):
        if value < least:
            raise InputError(f"{name} must be {least} or more, but got {value}.")
    if not all(SMALLEST <= side <= LARGEST for side in size):
        raise InputError(
            f"width and height of the scenes must be {SMALLEST} to {LARGEST} pixels, but got {size[0]} x {size[1]}. "
            "512 x 256 is a good size for a CPU, 2048 x 1024 is that of Cityscapes."
        )
    if root.exists() and not root.is_dir():
        raise InputError(f"root must be a folder, but {root} is a file. Give another --root.")
    is_ours = (root / SETTINGS_FILE).exists()
    foreign = [name for name in ("leftImg8bit", "gtFine") if (root / name).exists()]
    if foreign and not is_ours:
        raise InputError(
            f"root must be a new folder or one that holds the demo, but {root} already holds {' and '.join(foreign)} "
            "from elsewhere. Give another --root: the demo never mixes with your own images."
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"root must be a folder that can be made, but {root} cannot: {error.strerror}."
        ) from error


def _drawing_digest() -> str:
    """Return a digest of the code that draws: scenes of another version are drawn anew."""
    digest = hashlib.sha256()
    for name in (path.name for path in sorted(Path(__file__).parent.glob("demo*.py"))):
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:16]


def _settings_in(root: Path) -> dict | None:
    try:
        return json.loads((root / SETTINGS_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _remove_others(root: Path, wanted: set[Path]) -> int:
    """Remove scenes that an earlier call drew here and this one does not want; return how many files."""
    ours = re.compile(
        rf"({'|'.join(sum(CITIES.values(), ()))})_\d{{6}}_000019_(leftImg8bit|gtFine_labelIds)\.png"
    )
    others = [
        path
        for folder in ("leftImg8bit", "gtFine")
        for path in (root / folder).glob("*/*/*.png")
        if path not in wanted and ours.fullmatch(path.name)
    ]
    halves = [path for folder in ("leftImg8bit", "gtFine") for path in (root / folder).glob("*/*/.*.part")]
    for path in others + halves:
        path.unlink(missing_ok=True)
    return len(others)


def _is_whole(path: Path) -> bool:
    """Tell whether the file is there and its checksums hold."""
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError):  # Pillow calls a broken PNG a SyntaxError
        return False
    return True


def _draw_all(scenes: list[_Scene], num_processes: int) -> None:
    if num_processes == 1:
        for scene in tracked(scenes, "drawing scenes"):
            _draw(scene)
        return
    # spawned, not forked: a caller may have threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        try:
            for drawn in tracked([pool.submit(_draw, scene) for scene in scenes], "drawing scenes"):
                drawn.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _draw(scene: _Scene) -> None:
    image, ids = draw_scene(
        seed=scene.seed, split=scene.split, index=scene.index, size=(scene.width, scene.height)
    )
    _write_png(scene.image_path, image, compress_level=2)
    _write_png(scene.label_path, ids, compress_level=6)


def _write_png(path: Path, pixels: np.ndarray, *, compress_level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    Image.fromarray(pixels).save(aside, format="PNG", compress_level=compress_level)
    aside.replace(path)


def _write(path: Path, content: bytes) -> None:
    aside = _aside(path)
    aside.write_bytes(content)
    aside.replace(path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")

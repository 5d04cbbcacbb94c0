"""What people want segmented: a folder of pictures, a pattern with wildcards, one picture, or a video's frames."""

import glob
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pspnet.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts")
LABEL_ENDING, OVERLAY_ENDING = "_label.png", "_overlay.png"
_WILDCARDS = "*?["


@dataclass(frozen=True)
class Frame:
    """A picture to segment, or why it cannot be read."""

    name: Path
    """Where its results go in the output folder, without an ending."""
    source: Path
    image: np.ndarray | None
    """uint8 (h, w, 3)."""
    fault: str = ""


@dataclass(frozen=True)
class Source:
    """One file of `Inputs`."""

    path: Path
    name: Path
    is_video: bool
    num_frames: int
    """1 for a picture; 0 where a video does not say."""


@dataclass(frozen=True)
class Inputs:
    """The files that were asked for."""

    sources: tuple[Source, ...]
    every: int
    """Of a video, each so many frames one is read."""

    @property
    def num_frames(self) -> int:
        """How many frames there will be, as far as the videos say."""
        return sum(math.ceil(source.num_frames / self.every) for source in self.sources)

    def __iter__(self) -> Iterator[Frame]:
        for source in self.sources:
            if source.is_video:
                yield from _frames_of_video(source, self.every)
                continue
            try:
                yield Frame(source.name, source.path, read_picture(source.path))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                yield Frame(source.name, source.path, None, _first_line(error))


def find_inputs(asked: str | Path, output_dir: str | Path, *, every: int = 1) -> Inputs:
    """Return the pictures and videos of a folder and its subfolders, of a pattern (`**` for subfolders), or the one.

    Results of earlier calls, which are pictures in `output_dir` named as results are, are left out. Raises InputError
    where there is nothing.
    """
    if every < 1:
        raise InputError(f"--every must be 1 or more, but got {every}. 1 takes each frame of a video.")
    path, output_dir = Path(asked), Path(output_dir).resolve()
    if path.is_file():
        found, root = [path], path.parent
    elif path.is_dir():
        found, root = sorted(path.rglob("*")), path
    elif any(sign in str(asked) for sign in _WILDCARDS):
        found, root = sorted(map(Path, glob.glob(str(asked), recursive=True))), _root_of(path)
    else:
        raise InputError(
            f"--input must be a folder of pictures, a picture, a video or a pattern such as 'drive/*/left_*.png', but "
            f"there is nothing at {asked}."
        )
    if not path.is_file():
        if output_dir == root.resolve():
            raise InputError(
                f"--output must be another folder than --input, but both are {root}. Results would lie among the "
                "pictures."
            )
        found = [
            file for file in found if file.suffix.lower() in SUFFIXES + VIDEO_SUFFIXES and file.is_file()
        ]
    pictures = [file for file in found if path.is_file() or not _is_result(file, output_dir)]
    if not pictures:
        if found:
            where = f"all {len(found)} of {asked} are results of earlier calls, by their names in --output"
        elif path.is_dir():
            where = f"{asked} has none, nor have its subfolders"
        else:
            where = f"no such file is {asked}"
        raise InputError(
            f"--input must hold pictures ({', '.join(SUFFIXES)}) or videos ({', '.join(VIDEO_SUFFIXES)}), but {where}."
        )
    names = output_names(pictures, root)
    return Inputs(tuple(_source(file, names[file]) for file in pictures), every)


def output_names(files: Sequence[Path], root: Path) -> dict[Path, Path]:
    """Return where each file's results go in the output folder; what would go where another's do keeps its suffix.

    A video's frames go into a folder: it keeps its suffix, too, where the folder of its stem holds other files.
    """
    relative = {file: file.relative_to(root) for file in files}
    num_files = Counter(path.with_suffix("") for path in relative.values())
    num_files.update(relative.values())  # a.png.png without its suffix is a.png
    folders = {folder for path in relative.values() for folder in path.parents}

    def is_taken(path: Path) -> bool:
        return num_files[path.with_suffix("")] > 1 or (_is_video(path) and path.with_suffix("") in folders)

    return {file: path if is_taken(path) else path.with_suffix("") for file, path in relative.items()}


def read_picture(path: str | Path) -> np.ndarray:
    """Return a picture as uint8 RGB (h, w, 3), upright as its camera says; 16-bit grey becomes 8-bit."""
    with warnings.catch_warnings(), Image.open(path) as picture:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        picture.load()
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I"):
            values = np.asarray(upright).astype(np.float64)
            upright = Image.fromarray((values / 257 if values.max() > 255 else values).astype(np.uint8))
        return np.array(upright.convert("RGB"))


def _is_result(file: Path, output_dir: Path) -> bool:
    """Whether an earlier call wrote the picture."""
    return file.name.endswith((LABEL_ENDING, OVERLAY_ENDING)) and output_dir in file.resolve().parents


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _root_of(pattern: Path) -> Path:
    """Return the folders of a pattern before its first wildcard."""
    parts = []
    for part in pattern.parts[:-1]:
        if any(sign in part for sign in _WILDCARDS):
            break
        parts.append(part)
    return Path(*parts)


def _source(path: Path, name: Path) -> Source:
    if not _is_video(path):
        return Source(path, name, is_video=False, num_frames=1)
    av = _video_library(path)
    try:
        with av.open(str(path)) as container:
            return Source(path, name, is_video=True, num_frames=container.streams.video[0].frames)
    except (av.error.FFmpegError, IndexError):
        return Source(path, name, is_video=True, num_frames=1)


def _frames_of_video(source: Source, every: int) -> Iterator[Frame]:
    """Yield frames 0, every, 2 * every …; what can be decoded of a damaged video, then its fault."""
    av = _video_library(source.path)
    number = -1
    try:
        with av.open(str(source.path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number % every == 0:
                    yield Frame(
                        source.name / f"frame_{number:06d}", source.path, frame.to_ndarray(format="rgb24")
                    )
    except (av.error.FFmpegError, IndexError) as error:
        yield Frame(source.name, source.path, None, _first_line(error))
        return
    if number < 0:  # cut off behind its header, which the library takes for an end
        yield Frame(source.name, source.path, None, "not one frame of it can be decoded")


def _video_library(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise InputError(
            f"Videos need the library PyAV, which is not installed, but --input has {path.name}. Install it: "
            "pip install -c constraints.txt -e '.[video]'."
        ) from error
    return av


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__

"""Laws of the ingest: whole or not at all, every problem named, the same bytes however it was interrupted."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pspnet.errors import InputError
from pspnet.manifest import ShardFormat
from pspnet.store import Store, write_shard
from segfleet import ingest as module
from segfleet.ingest import ingest, summary
from segfleet.sources.folder import FolderSource, folder_source


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    for split, count in (("train", 40), ("val", 3)):
        for number in range(count):
            size = (10 + number % 3, 14)
            for kind, pixels in (
                ("", rng.integers(0, 256, (*size, 3), dtype=np.uint8)),
                ("annot", rng.integers(0, 3, size, dtype=np.uint8)),
            ):
                path = folder / f"{split}{kind}" / f"{split}{number:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    (folder / "classes.csv").write_text("id,name,r,g,b\n0,road,128,64,128\n1,tree,0,128,0\n2,void,0,0,0\n")
    return folder


def digests(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_store_holds_what_the_files_hold(root: Path, tmp_path: Path) -> None:
    report = ingest(folder_source(root), tmp_path / "store")
    store = Store.open(tmp_path / "store")
    train = store.split("train")
    assert (len(train), len(store.split("val")), report.is_new) == (40, 3, True)
    images = []
    for index in range(len(train)):
        image = np.array(Image.open(root / "train" / f"{train.name(index)}.png"))
        label = np.array(Image.open(root / "trainannot" / f"{train.name(index)}.png"))
        assert np.array_equal(train.image(index), image)
        stored = train.label(index)
        assert stored is not None
        assert np.array_equal(stored, np.where(label == 2, 255, label))
        images.append(image.reshape(-1, 3))
    assert np.allclose(store.mean, np.concatenate(images).mean(axis=0))
    assert np.allclose(store.std, np.concatenate(images).std(axis=0))
    counts = store.manifest.class_counts("train")
    assert sum(counts) == sum(len(pixels) for pixels in images)
    assert "train: 40 images" in summary(report)
    assert [path.name for path in tmp_path.iterdir() if "ingest" in path.name] == []


def test_every_problem_is_named_at_once_and_nothing_is_left(root: Path, tmp_path: Path) -> None:
    (root / "train" / "train001.png").write_bytes((root / "train" / "train001.png").read_bytes()[:60])
    Image.fromarray(np.zeros((3, 3), dtype=np.uint8)).save(root / "trainannot" / "train005.png")
    label = np.zeros((10, 14), dtype=np.uint8)
    label[0, :7] = 77
    Image.fromarray(label).save(root / "valannot" / "val000.png")
    Image.new("CMYK", (14, 10)).save(root / "train" / "train009.tif")
    (root / "train" / "train009.png").unlink()
    with pytest.raises(InputError) as refused:
        ingest(folder_source(root), tmp_path / "store")
    text = str(refused.value)
    assert text.startswith("4 of 43 pairs cannot be used, and no store was made")
    for named in (
        "train001.png fails",
        "train005.png is 3 x 3",
        "val000.png has 77 (7 pixels)",
        "train009.tif is CMYK",
    ):
        assert named in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pictures",
        "store-report.html",
        "store-report.json",
    ]


@pytest.mark.parametrize("shard_format", ["raw", "tiles"])
def test_killed_at_any_shard_and_run_again_the_bytes_are_the_same(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_format: ShardFormat
) -> None:
    monkeypatch.setattr(module, "IMAGES_PER_SHARD", 8)
    ingest(folder_source(root), tmp_path / "whole", shard_format=shard_format)
    write, read = write_shard, FolderSource.read
    for killed_at in range(6):
        done: list[str] = []

        def dying(
            path: Path, samples: Any, *, at: int = killed_at, done: list[str] = done, **options: Any
        ) -> object:
            if len(done) == at:
                raise KeyboardInterrupt
            done.append(path.name)
            return write(path, samples, **options)

        path = tmp_path / f"store{killed_at}"
        monkeypatch.setattr(module, "write_shard", dying)
        with pytest.raises(KeyboardInterrupt):
            ingest(folder_source(root), path, shard_format=shard_format)
        assert not path.exists()
        monkeypatch.setattr(module, "write_shard", write)
        num_read: list[str] = []
        monkeypatch.setattr(
            FolderSource, "read", lambda self, pair, n=num_read: (n.append(pair.name), read(self, pair))[1]
        )
        ingest(folder_source(root), path, shard_format=shard_format)
        assert len(num_read) == 43 - sum(8 if name != "val-00000.arrow" else 3 for name in done)
        monkeypatch.setattr(FolderSource, "read", read)
        assert digests(path) == digests(tmp_path / "whole")


def test_tiles_are_the_same_data_in_another_form(root: Path, tmp_path: Path) -> None:
    raw = ingest(folder_source(root), tmp_path / "raw")
    tiled = ingest(folder_source(root), tmp_path / "tiles", shard_format="tiles")
    assert tiled.manifest.digest == raw.manifest.digest
    assert {info.format for infos in tiled.manifest.splits.values() for info in infos} == {"tiles"}
    with pytest.raises(InputError, match=r"--format must be that of the store, .* is tiles and got raw"):
        ingest(folder_source(root), tmp_path / "tiles")
    changed = ingest(folder_source(root), tmp_path / "tiles", overwrite=True)
    assert digests(tmp_path / "tiles") == digests(tmp_path / "raw")
    assert changed.is_new


def test_a_killed_ingest_is_taken_up_in_the_other_format(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(folder_source(root), tmp_path / "whole", shard_format="tiles")

    def dying(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "publish_store", dying)
        with pytest.raises(KeyboardInterrupt):
            ingest(folder_source(root), tmp_path / "store")
    ingest(folder_source(root), tmp_path / "store", shard_format="tiles")
    assert digests(tmp_path / "store") == digests(tmp_path / "whole")


def test_the_same_files_again_are_not_ingested_again_and_other_files_are_refused(
    root: Path, tmp_path: Path
) -> None:
    first = ingest(folder_source(root), tmp_path / "store")
    again = ingest(folder_source(root), tmp_path / "store")
    assert (again.is_new, again.manifest.digest) == (False, first.manifest.digest)
    Image.fromarray(np.zeros((10, 14), dtype=np.uint8)).save(root / "trainannot" / "train000.png")
    before = digests(tmp_path / "store")
    with pytest.raises(InputError, match="--overwrite True"):
        ingest(folder_source(root), tmp_path / "store")
    assert digests(tmp_path / "store") == before
    changed = ingest(folder_source(root), tmp_path / "store", overwrite=True)
    assert changed.manifest.digest != first.manifest.digest


def test_what_a_killed_writer_left_half_done_does_not_get_into_the_store(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(folder_source(root), tmp_path / "whole")

    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "publish_store", killed)
    with pytest.raises(KeyboardInterrupt):
        ingest(folder_source(root), tmp_path / "store")
    monkeypatch.undo()
    aside = next(tmp_path.glob(".store.ingest-*"))
    (aside / ".train-00000.arrow.4711").write_bytes(b"half")
    ingest(folder_source(root), tmp_path / "store")
    assert digests(tmp_path / "store") == digests(tmp_path / "whole")


def test_a_folder_that_is_no_store_is_never_touched(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is neither"):
            ingest(folder_source(root), tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


RUN = """
import sys
from segfleet import ingest
from segfleet.sources.folder import folder_source
ingest.IMAGES_PER_SHARD = 4
ingest.ingest(folder_source(sys.argv[1]), sys.argv[2], skip_bad=3)
"""


def run_and_kill(root: Path, store: Path, seconds: float) -> None:
    """Ingest in a process of its own, killed so many seconds after it has begun to write."""
    command = [sys.executable, "-c", RUN, str(root), str(store)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(store.parent.glob(f".{store.name}.ingest-*/*")):
        time.sleep(0.001)
    time.sleep(seconds)
    process.kill()
    process.wait()


@pytest.mark.slow
def test_killed_at_ten_random_moments_and_run_again_the_bytes_are_the_same(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL, which leaves half a file behind; with pairs left out, one of them found only among all pairs."""
    shutil.copy(root / "val" / "val001.png", root / "train" / "train030.png")
    shutil.copy(root / "valannot" / "val001.png", root / "trainannot" / "train030.png")
    for number in (3, 17):
        (root / "train" / f"train{number:03d}.png").write_text("no picture")
    monkeypatch.setattr(module, "IMAGES_PER_SHARD", 4)
    manifest = ingest(folder_source(root), tmp_path / "whole", skip_bad=3).manifest
    assert (manifest.num_images("train"), len(manifest.left_out)) == (37, 3)
    num_killed = 0
    for seed in range(5):
        rng = random.Random(seed)
        store = tmp_path / f"store{seed}"
        for _ in range(2):
            run_and_kill(root, store, rng.uniform(0, 0.06))
            num_killed += not store.exists()
        ingest(folder_source(root), store, skip_bad=3)
        assert digests(store) == digests(tmp_path / "whole")
    assert num_killed > 0


@pytest.mark.slow
def test_on_a_cluster_the_bytes_are_those_of_one_process(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segfleet import cluster

    ingest(folder_source(root), tmp_path / "here")
    with cluster.connect(tmp_path):
        ingest(folder_source(root), tmp_path / "there")
    assert digests(tmp_path / "there") == digests(tmp_path / "here")

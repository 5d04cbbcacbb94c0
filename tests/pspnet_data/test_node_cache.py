"""Copies of shards on a node: one for all processes, verified, bounded, whatever happens to who makes them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pspnet import node_cache
from pspnet.errors import InputError
from pspnet.location import Location, is_on_network
from pspnet.node_cache import NodeCache
from pspnet.store import Store

MakeStore = Callable[..., Store]
GIB = 2**30
SILENT = {"say": lambda _: None}


def cache_in(folder: Path, max_bytes: int = GIB) -> NodeCache:
    """Return a cache that copies every store."""
    return NodeCache(folder=folder, max_bytes=max_bytes, when="always")


def copies(folder: Path) -> list[Path]:
    """Return all files of a cache but its locks."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name != "locks")


def pixels(store: Store, split: str = "train") -> list[bytes]:
    """Return all that a split holds."""
    read = store.split(split)
    return [read.image(index).tobytes() + read.label(index).tobytes() for index in range(len(read))]


def flip_a_byte(path: Path, at: int) -> None:
    """Change one byte of a file in place."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_copied_store_reads_as_the_store_itself(make_store: MakeStore, tmp_path: Path) -> None:
    original = make_store(tmp_path / "store", num_shards=3)
    cache = cache_in(tmp_path / "cache")
    copy = Store.open(tmp_path / "store", cache=cache, **SILENT)
    assert pixels(copy) == pixels(original)
    found = copies(cache.folder)
    assert [path.suffix for path in found] == [".arrow"] * 3
    assert {path.stem for path in found} == {shard.file_digest for shard in original.manifest.splits["train"]}
    before = [path.stat().st_mtime_ns for path in found], [path.stat().st_ino for path in found]
    assert pixels(Store.open(tmp_path / "store", cache=cache, **SILENT)) == pixels(original)
    assert ([path.stat().st_mtime_ns for path in found], [path.stat().st_ino for path in found]) == before


def test_only_the_shards_of_the_split_are_copied(make_store: MakeStore, tmp_path: Path) -> None:
    make_store(tmp_path / "store", num_shards=2, splits=("train", "val"))
    cache = cache_in(tmp_path / "cache")
    store = Store.open(tmp_path / "store", cache=cache, **SILENT)
    assert copies(cache.folder) == []
    val = store.split("val")
    assert {path.stem for path in copies(cache.folder)} == {
        shard.file_digest for shard in store.manifest.splits["val"]
    }
    assert len(val) > 0


READ = """
import sys
import time
from pathlib import Path
from pspnet import node_cache
from pspnet.location import Location
from pspnet.node_cache import NodeCache
from pspnet.store import Store

store, cache, log = map(Path, sys.argv[1:])
chunks = Location.chunks
def logged(location, file):
    with log.open("a") as lines:
        lines.write(file + "\\n")
    if file != "manifest.json":
        time.sleep(1)  # long enough that others come meanwhile
    return chunks(location, file)
Location.chunks = logged
split = Store.open(store, cache=NodeCache(folder=cache, max_bytes=2**30, when="always")).split("train")
print("ready", flush=True)
sys.stdin.readline()
print(split.image(len(split) - 1).sum())
"""


def start_reader(*arguments: Path, code: str = READ) -> subprocess.Popen[str]:
    """Start a process that opens the store, says "ready", and reads when a line comes."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_eight_processes_make_one_copy(make_store: MakeStore, tmp_path: Path) -> None:
    original = make_store(tmp_path / "store", num_shards=5)
    readers = [start_reader(tmp_path / "store", tmp_path / "cache", tmp_path / "log") for _ in range(8)]
    last = original.split("train")
    expected = str(last.image(len(last) - 1).sum())
    answers = [reader.communicate("go\n", timeout=120)[0].splitlines()[-1] for reader in readers]
    assert answers == [expected] * 8
    read = [line for line in (tmp_path / "log").read_text().split() if line != "manifest.json"]
    assert sorted(read) == sorted(shard.file for shard in original.manifest.splits["train"])
    assert len(copies(tmp_path / "cache")) == 5


def test_a_flipped_byte_of_the_source_is_named_and_nothing_is_kept(
    make_store: MakeStore, tmp_path: Path
) -> None:
    make_store(tmp_path / "store", num_shards=1)
    shard = next((tmp_path / "store").glob("*.arrow"))
    flip_a_byte(shard, shard.stat().st_size // 2)
    store = Store.open(tmp_path / "store", cache=cache_in(tmp_path / "cache"), **SILENT)
    with pytest.raises(InputError, match=rf"{shard.name} has the sha256 .*jobs/copy_store.py"):
        store.split("train")
    assert copies(tmp_path / "cache") == []


@pytest.mark.parametrize("change", ["flipped", "truncated", "touched"])
def test_a_changed_copy_is_noticed(make_store: MakeStore, tmp_path: Path, change: str) -> None:
    original = make_store(tmp_path / "store", num_shards=1)
    cache = cache_in(tmp_path / "cache")
    Store.open(tmp_path / "store", cache=cache, **SILENT).split("train")
    (copy,) = copies(cache.folder)
    if change == "flipped":
        flip_a_byte(copy, copy.stat().st_size // 2)
    elif change == "truncated":
        copy.chmod(0o644)
        os.truncate(copy, 100)
    else:
        os.utime(copy)
    said: list[str] = []
    assert pixels(Store.open(tmp_path / "store", cache=cache, say=said.append)) == pixels(original)
    assert "was changed since it was verified" in said[0]


STALL = READ.replace(
    "    return chunks(location, file)",
    """    if file == "manifest.json":
        return chunks(location, file)
    def half():
        whole = b"".join(chunks(location, file))
        yield whole[: len(whole) // 2]
        print("half", flush=True)
        time.sleep(600)
    return half()""",
)


def test_a_killed_copier_leaves_the_work_to_the_next(make_store: MakeStore, tmp_path: Path) -> None:
    original = make_store(tmp_path / "store", num_shards=1)
    stalled = start_reader(tmp_path / "store", tmp_path / "cache", tmp_path / "log", code=STALL)
    assert stalled.stdout is not None
    assert stalled.stdout.readline() == "half\n"
    (part,) = copies(tmp_path / "cache")
    assert part.suffix == ".part"
    waiting = start_reader(tmp_path / "store", tmp_path / "cache", tmp_path / "log")
    time.sleep(3)  # until it waits; where the machine is slower, it comes later and finds the part abandoned
    assert waiting.poll() is None
    stalled.send_signal(signal.SIGKILL)
    stalled.communicate()
    answer, _ = waiting.communicate("go\n", timeout=120)
    last = original.split("train")
    assert answer.splitlines()[-1] == str(last.image(len(last) - 1).sum())
    assert [path.suffix for path in copies(tmp_path / "cache")] == [".arrow"]


def test_the_oldest_copies_go_first_but_those_in_use_stay(make_store: MakeStore, tmp_path: Path) -> None:
    stores = [make_store(tmp_path / f"store{number}", num_shards=1, seed=number) for number in range(4)]
    digests = [store.manifest.splits["train"][0].file_digest for store in stores]
    size = stores[0].num_bytes()
    cache = cache_in(tmp_path / "cache", max_bytes=3 * size + size // 2)

    def opened(number: int) -> Store:
        return Store.open(tmp_path / f"store{number}", cache=cache, **SILENT)

    in_use = opened(0).split("train")  # the oldest, and held
    opened(1).split("train")
    opened(2).split("train")
    opened(1).split("train")  # used again: 2 is now the oldest that nobody holds
    opened(3).split("train")
    assert {path.stem for path in copies(cache.folder)} == {digests[0], digests[1], digests[3]}
    assert in_use.image(0).any()
    del in_use
    opened(2).split("train")
    assert {path.stem for path in copies(cache.folder)} == {digests[1], digests[2], digests[3]}


def test_what_cannot_fit_is_refused_with_the_setting(make_store: MakeStore, tmp_path: Path) -> None:
    first = make_store(tmp_path / "first", num_shards=2)
    make_store(tmp_path / "second", num_shards=2, seed=1)
    small = cache_in(tmp_path / "small", max_bytes=first.num_bytes() // 2)
    with pytest.raises(
        InputError, match=r"SEGFLEET_CACHE_GIB must have room for the shards in use, which are"
    ):
        Store.open(tmp_path / "first", cache=small, **SILENT).split("train")
    cache = cache_in(tmp_path / "cache", max_bytes=first.num_bytes() * 3 // 2)
    in_use = Store.open(tmp_path / "first", cache=cache, **SILENT).split("train")
    with pytest.raises(InputError, match=r"SEGFLEET_CACHE_GIB must have room .* are in use and"):
        Store.open(tmp_path / "second", cache=cache, **SILENT).split("train")
    assert in_use.image(0).any()
    assert not list(cache.folder.glob("*.part"))


def test_a_full_disk_is_named(make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "store", num_shards=1)
    monkeypatch.setattr(NodeCache, "_free_bytes", lambda _: 1000)
    with pytest.raises(InputError, match=r"must have .* GiB free for a shard, but has .*SEGFLEET_CACHE_DIR"):
        Store.open(tmp_path / "store", cache=cache_in(tmp_path / "cache"), **SILENT).split("train")


def test_a_mounted_store_for_which_there_is_no_room_is_read_in_place(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = make_store(tmp_path / "store", num_shards=1)
    monkeypatch.setattr(node_cache, "is_on_network", lambda _: True)
    said: list[str] = []
    cache = NodeCache(folder=tmp_path / "cache", max_bytes=10)
    assert pixels(Store.open(tmp_path / "store", cache=cache, say=said.append)) == pixels(original)
    assert len(said) == 1
    assert "is read over the network. SEGFLEET_CACHE_GIB must have room" in said[0]
    cache = NodeCache(folder=tmp_path / "cache", max_bytes=GIB)
    assert pixels(Store.open(tmp_path / "store", cache=cache, **SILENT)) == pixels(original)
    assert len(copies(cache.folder)) == 1


def test_a_cache_that_cannot_be_made_is_named(make_store: MakeStore, tmp_path: Path) -> None:
    make_store(tmp_path / "store", num_shards=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="SEGFLEET_CACHE_DIR must be a folder that can be written to"):
        Store.open(tmp_path / "store", cache=cache_in(tmp_path / "file"), **SILENT).split("train")


def test_a_store_without_file_digests_is_read_in_place_only(make_store: MakeStore, tmp_path: Path) -> None:
    make_store(tmp_path / "store", num_shards=1)
    manifest = tmp_path / "store" / "manifest.json"
    digest = Store.open(tmp_path / "store").manifest.splits["train"][0].file_digest
    manifest.write_text(manifest.read_text().replace(digest, ""))
    assert len(Store.open(tmp_path / "store").split("train")) > 0
    with pytest.raises(InputError, match="must have the digests of its files in its manifest"):
        Store.open(tmp_path / "store", cache=cache_in(tmp_path / "cache"), **SILENT).split("train")


def test_the_environment_describes_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (node_cache.FOLDER_VARIABLE, node_cache.SIZE_VARIABLE, node_cache.WHEN_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    assert NodeCache.from_environment().max_bytes == 100 * GIB
    monkeypatch.setenv(node_cache.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv(node_cache.SIZE_VARIABLE, "0.5")
    monkeypatch.setenv(node_cache.WHEN_VARIABLE, "always")
    assert NodeCache.from_environment() == NodeCache(folder=tmp_path, max_bytes=GIB // 2, when="always")
    for size in ("0", "-1", "many", "nan", "inf"):
        monkeypatch.setenv(node_cache.SIZE_VARIABLE, size)
        with pytest.raises(InputError, match="SEGFLEET_CACHE_GIB must be a positive number of GiB"):
            NodeCache.from_environment()
    monkeypatch.setenv(node_cache.SIZE_VARIABLE, "1")
    monkeypatch.setenv(node_cache.WHEN_VARIABLE, "sometimes")
    with pytest.raises(InputError, match="SEGFLEET_CACHE must be one of auto, always, never"):
        NodeCache.from_environment()


def test_network_file_systems_are_told_by_the_table_of_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "40 22 0:40 / /data rw,relatime shared:9 - nfs4 server:/export rw\n"
        "41 40 8:2 / /data/local rw,relatime - xfs /dev/sdb rw\n"
        "42 22 0:42 / /mnt/two\\040words rw - lustre x rw\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda _: table)
    expected = {
        "/data/cityscapes": True,
        "/data": True,
        "/data/local/x": False,
        "/database": False,
        "/home": False,
        "/mnt/two words/x": True,
    }
    assert {path: is_on_network(path) for path in expected} == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s3://key:secret@bucket/store", r"must not hold a password"),
        ("ftp://host/store", r"begins with s3://, gs://, .*but got ftp://host/store"),
        ("s3:///", r"one that pyarrow.fs can open"),
    ],
)
def test_addresses_that_cannot_be_used_are_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Location.parse(text)
    assert "secret" not in str(caught.value)


def test_a_file_uri_is_a_folder(make_store: MakeStore, tmp_path: Path) -> None:
    original = make_store(tmp_path / "store", num_shards=1)
    assert pixels(Store.open(f"file://{tmp_path}/store")) == pixels(original)


def test_windows_of_a_copied_store(make_store: MakeStore, tmp_path: Path) -> None:
    original = make_store(tmp_path / "store", num_shards=2).split("train")
    copy = Store.open(tmp_path / "store", cache=cache_in(tmp_path / "cache"), **SILENT).split("train")
    for index in range(len(original)):
        for ours, theirs in zip(
            copy.window(index, top=3, left=5, height=7, width=11),
            original.window(index, top=3, left=5, height=7, width=11),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, theirs)

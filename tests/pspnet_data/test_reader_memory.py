"""A reader's own memory does not grow with its store: the pages of a mapped file are the system's, to take back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pspnet.labels import NYUV2_13
from pspnet.manifest import ShardFormat
from pspnet.store import publish_store, write_shard

MIB = 2**20

READ = """
import json, sys
from pspnet.data import train_batches
from pspnet.store import Store

def own_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

split = Store.open(sys.argv[1]).split("train")
start, peak, windows = own_bytes(), 0, 0
for epoch in range(int(sys.argv[2])):
    for batch in train_batches(
        split,
        seed=0,
        epoch=epoch,
        global_batch_size=4,
        rank=0,
        world_size=1,
        crop_size=713,
        min_scale=0.5,
        max_scale=2.0,
        flip_probability=0.5,
        rotate_degrees=10.0,
        blur_probability=0.5,
    ):
        peak = max(peak, own_bytes())
        windows += len(batch.windows)
print(json.dumps({"start": start, "peak": peak, "windows": windows}))
"""


def read(store: Path, num_epochs: int) -> dict[str, int]:
    """Return what a process of its own found of its memory while it read every image `num_epochs` times."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(store), str(num_epochs)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


def store_of(folder: Path, num_images: int, shard_format: ShardFormat) -> Path:
    """Write a store of large images that differ in their names only."""
    aside = folder / "aside"
    aside.mkdir(parents=True)
    rows = np.arange(1024, dtype=np.uint8)[:, None]
    image = np.broadcast_to(rows[..., None], (1024, 2048, 3)).copy()
    label = np.broadcast_to(rows % 13, (1024, 2048)).copy()
    shards = [
        write_shard(
            aside / f"train-{first}.arrow",
            ((f"image{first + index}", image, label) for index in range(20)),
            num_classes=13,
            shard_format=shard_format,
        )
        for first in range(0, num_images, 20)
    ]
    publish_store(
        aside, folder / "store", name="x", class_table=NYUV2_13, splits={"train": shards}, source={}
    )
    return folder / "store"


@pytest.mark.slow
@pytest.mark.parametrize("shard_format", ["raw", "tiles"])
def test_ten_times_the_store_takes_no_more_of_a_readers_own_memory(
    tmp_path: Path, shard_format: ShardFormat
) -> None:
    small = read(store_of(tmp_path / "small", 20, shard_format), 10)
    large = read(store_of(tmp_path / "large", 200, shard_format), 1)
    assert small["windows"] == large["windows"] == 200
    assert sum(path.stat().st_size for path in (tmp_path / "large").rglob("*.arrow")) > (
        1600 * MIB if shard_format == "raw" else 0
    )
    assert large["peak"] < small["peak"] + 100 * MIB
    assert large["peak"] < 1024 * MIB
    print(
        f"{shard_format}: own memory {small['peak'] / MIB:.0f} MiB, with ten times the images {large['peak'] / MIB:.0f}"
    )

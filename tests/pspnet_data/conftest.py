"""A small store of several shards, and object storage on this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

# pspnet is imported inside the fixtures: jaxtyping checks only what is imported after the conftest files.
if TYPE_CHECKING:
    from pspnet.store import Store

IMAGES_PER_SHARD = 2


def make_store(
    folder: Path, *, num_shards: int, splits: tuple[str, ...] = ("train",), seed: int = 0
) -> "Store":
    """Write a store of random images of 40 x 60 pixels to `folder`."""
    from pspnet.labels import NYUV2_13
    from pspnet.store import Store, publish_store, write_shard

    rng = np.random.default_rng(seed)
    aside = folder.with_name(f".{folder.name}")
    aside.mkdir()
    shards = {
        split: [
            write_shard(
                aside / f"{split}-{number:05d}.arrow",
                [
                    (
                        f"{split}_{number}_{index}",
                        rng.integers(0, 256, (40, 60, 3), dtype=np.uint8),
                        rng.integers(0, 13, (40, 60), dtype=np.uint8),
                    )
                    for index in range(IMAGES_PER_SHARD)
                ],
                num_classes=13,
            )
            for number in range(num_shards)
        ]
        for split in splits
    }
    publish_store(aside, folder, name="random", class_table=NYUV2_13, splits=shards, source={})
    return Store.open(folder)


@pytest.fixture(name="make_store")
def make_store_fixture() -> Callable[..., "Store"]:
    return make_store

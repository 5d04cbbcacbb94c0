"""Small stores of the pictures that a test makes."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from pspnet.labels import ClassTable
from pspnet.manifest import ShardFormat
from pspnet.store import Store, publish_store, write_shard

Picture = tuple[str, np.ndarray, np.ndarray | None]
"""Name, image and train ids; None where there is no label."""


def write_store(
    path: Path,
    class_table: ClassTable,
    splits: Mapping[str, Iterable[Picture]],
    *,
    shard_format: ShardFormat = "raw",
) -> Store:
    """Write pictures to a store at `path`, one shard a split."""
    aside = path.with_name(f"{path.name}.aside")
    aside.mkdir(parents=True)
    shards = {
        split: [
            write_shard(
                aside / f"{split}.arrow",
                pictures,
                num_classes=class_table.num_classes,
                shard_format=shard_format,
            )
        ]
        for split, pictures in splits.items()
    }
    publish_store(
        aside,
        path,
        name=class_table.name,
        class_table=class_table,
        splits=shards,
        source={},
    )
    return Store.open(path)

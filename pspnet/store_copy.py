"""A whole store from one place to another, such as from a folder to object storage."""

from pathlib import Path

from pspnet.errors import InputError
from pspnet.location import Location
from pspnet.manifest import MANIFEST_FILE, read_manifest
from pspnet.node_cache import Say
from pspnet.store import Store


def copy_store(source: str | Path, target: str | Path, *, say: Say = print) -> Store:
    """Copy a store and return the copy, which appears with its manifest, the last file; go on where a copy broke off.

    Every shard is verified by its digest on the way. A shard that is there already is read back, and left if it is
    right. Raises InputError where there is another store at `target`, or where a shard of `source` is damaged.
    """
    store, to = Store.open(source), Location.parse(target)
    manifest = b"".join(store.location.chunks(MANIFEST_FILE))
    if to.exists(MANIFEST_FILE):
        there = read_manifest(b"".join(to.chunks(MANIFEST_FILE)), f"{to.text}/{MANIFEST_FILE}")
        if there.digest != store.digest:
            raise InputError(
                f"A store must not be copied over another, but {to.text} is the store {there.name} with digest "
                f"{there.digest[:16]}, not {store.digest[:16]}. Give another place, or remove that one."
            )
    shards = [shard for of_split in store.manifest.splits.values() for shard in of_split]
    total, done = store.num_bytes(), 0
    for number, shard in enumerate(shards, start=1):
        wanted = shard.file_digest or store.location.sha256(shard.file)
        is_there = to.exists(shard.file) and to.sha256(shard.file) == wanted
        if not is_there:
            found = to.write(shard.file, store.location.chunks(shard.file))
            if found != wanted:
                raise InputError(
                    f"A shard must be the one that its manifest names, but {store.location.text}/{shard.file} has the "
                    f"sha256 {found[:16]}…, not {wanted[:16]}…. Ingest the data again."
                )
        done += shard.num_bytes or store.location.num_bytes(shard.file)
        say(
            f"{shard.file} {'was there already' if is_there else 'copied'}: {number} of {len(shards)} shards, "
            f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        )
    to.write(MANIFEST_FILE, [manifest])
    return Store.open(target, say=say)

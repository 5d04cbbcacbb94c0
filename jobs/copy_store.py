"""Copy an ingested data set to another place, such as object storage that every node of a cluster reads."""

from dataclasses import dataclass

from pspnet.store_copy import copy_store
from segfleet.cli import parse_options, run_job


@dataclass(frozen=True, kw_only=True)
class Options:
    """From where, and to where."""

    store: str
    """Folder or address of the ingested data set (made by jobs/ingest_*.py)."""

    to: str
    """Folder or address (s3://bucket/path, gs://bucket/path) of the copy; a copy that broke off goes on."""


def main() -> None:
    """Copy shard by shard, verified, the manifest last, and print how the copy is used."""
    options = parse_options(Options, description=__doc__)
    copy = copy_store(options.store, options.to)
    print(
        f"store {copy.location.text}: digest {copy.digest[:16]}. Use it as --data.store {copy.location.text}"
    )


if __name__ == "__main__":
    run_job(main)

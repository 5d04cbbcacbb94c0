"""Stores in object storage, against a server that speaks S3 on this machine."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import moto.server
import pytest

from pspnet.errors import InputError
from pspnet.location import Location
from pspnet.node_cache import NodeCache
from pspnet.store import Store
from pspnet.store_copy import copy_store

MakeStore = Callable[..., Store]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """host:port of a server with the bucket "stores", for whoever has the keys in the environment."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        host, port = server.get_host_and_port()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="stores")
        yield f"{host}:{port}"
    server.stop()


def uri(endpoint: str, name: str) -> str:
    """Return the address of a store in the bucket."""
    return f"s3://stores/{name}?scheme=http&endpoint_override={endpoint}&region=us-east-1"


def test_a_store_copied_to_s3_and_read_from_there(
    endpoint: str, make_store: MakeStore, tmp_path: Path
) -> None:
    original = make_store(tmp_path / "store", num_shards=3)
    said: list[str] = []
    copy = copy_store(tmp_path / "store", uri(endpoint, "a"), say=said.append)
    assert [line.split(":")[0] for line in said] == [f"train-0000{n}.arrow copied" for n in range(3)]
    assert (copy.digest, copy.num_bytes()) == (original.digest, original.num_bytes())
    cache = NodeCache(folder=tmp_path / "cache", max_bytes=2**30)
    read = Store.open(uri(endpoint, "a"), cache=cache, say=said.append).split("train")
    expected = original.split("train")
    assert len(read) == len(expected) == 6
    for index in range(len(read)):
        assert read.name(index) == expected.name(index)
        assert (read.image(index) == expected.image(index)).all()
        assert (read.label(index) == expected.label(index)).all()


def test_a_copy_that_broke_off_goes_on(endpoint: str, make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", num_shards=3)
    there = Location.parse(uri(endpoint, "b"))
    for number in range(2):
        there.write(f"train-0000{number}.arrow", store.location.chunks(f"train-0000{number}.arrow"))
    there.write("train-00000.arrow", [b"torn"])
    with pytest.raises(InputError, match=r"there is no manifest\.json"):
        Store.open(uri(endpoint, "b"))
    said: list[str] = []
    copy_store(tmp_path / "store", uri(endpoint, "b"), say=said.append)
    assert [line.split(":")[0] for line in said] == [
        "train-00000.arrow copied",
        "train-00001.arrow was there already",
        "train-00002.arrow copied",
    ]
    other = make_store(tmp_path / "other", num_shards=1, seed=1)
    with pytest.raises(InputError, match=rf"must not be copied over another.*not {other.digest[:16]}"):
        copy_store(tmp_path / "other", uri(endpoint, "b"))


def test_a_store_copied_to_a_folder(make_store: MakeStore, tmp_path: Path) -> None:
    original = make_store(tmp_path / "store", num_shards=2)
    copy = copy_store(tmp_path / "store", tmp_path / "deep" / "copy", say=lambda _: None)
    assert copy.digest == original.digest
    assert sorted(path.name for path in (tmp_path / "deep" / "copy").iterdir()) == [
        "manifest.json",
        "train-00000.arrow",
        "train-00001.arrow",
    ]


def test_a_damaged_shard_is_not_copied_on(make_store: MakeStore, tmp_path: Path) -> None:
    make_store(tmp_path / "store", num_shards=1)
    shard = tmp_path / "store" / "train-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"train-00000.arrow has the sha256 .*Ingest the data again"):
        copy_store(tmp_path / "store", tmp_path / "copy", say=lambda _: None)
    assert not (tmp_path / "copy" / "manifest.json").exists()


def test_a_server_that_is_not_there_is_named(tmp_path: Path, endpoint: str) -> None:
    with pytest.raises(InputError, match=r"there is no manifest.json in s3://stores/none"):
        Store.open(uri(endpoint, "none"))
    with pytest.raises(ConnectionError, match=r"s3://nobucket/x\S*/manifest.json could not be read"):
        b"".join(Location.parse(uri(endpoint, "x").replace("stores", "nobucket")).chunks("manifest.json"))

"""Laws of the second format: tiles are read as the raw pixels are, damage is named, and PNG is not smaller."""

import contextlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pspnet import tiles
from pspnet.errors import InputError
from pspnet.labels import CITYSCAPES, NYUV2_13
from pspnet.manifest import ShardFormat
from pspnet.store import Store
from tests.stores import Picture, write_store

DATA = Path(os.environ.get("SEGFLEET_DATA", "../shared/data"))
SIZES = [(1, 1), (128, 128), (129, 127), (300, 40), (5, 400), (257, 385)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store]:
    """The same pictures, smooth and noisy, one without a label, in both formats."""
    folder, rng = tmp_path_factory.mktemp("tiles"), np.random.default_rng(0)
    samples: list[Picture] = []
    for number, size in enumerate(SIZES):
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        if number % 2:
            image = np.cumsum(image // 100, axis=0, dtype=np.uint8)
        label = rng.integers(0, 13, size, dtype=np.uint8)
        samples.append((f"image{number}", image, None if number == 2 else label))
    raw = write_store(folder / "raw", NYUV2_13, {"train": samples})
    return raw, write_store(folder / "tiles", NYUV2_13, {"train": samples}, shard_format="tiles")


def test_whole_images_and_the_digest_are_those_of_the_raw_store(stores: tuple[Store, Store]) -> None:
    raw, tiled = (store.split("train") for store in stores)
    assert stores[0].digest == stores[1].digest
    assert raw.labelled() == tiled.labelled()
    for index in range(len(SIZES)):
        assert tiled.size(index) == raw.size(index)
        assert np.array_equal(tiled.image(index), raw.image(index))
        label, expected = tiled.label(index), raw.label(index)
        assert (label is None) == (expected is None)
        assert label is None or expected is None or np.array_equal(label, expected)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_windows_are_those_of_the_raw_store(stores: tuple[Store, Store], data: st.DataObject) -> None:
    raw, tiled = (store.split("train") for store in stores)
    index = data.draw(st.integers(0, len(SIZES) - 1))
    area = {}
    for begin, extent, size in (("top", "height", SIZES[index][0]), ("left", "width", SIZES[index][1])):
        area[begin] = data.draw(st.integers(0, size - 1))
        area[extent] = data.draw(st.integers(1, size - area[begin]))
    for got, expected in zip(tiled.window(index, **area), raw.window(index, **area), strict=True):
        assert (got is None) == (expected is None)
        assert got is None or expected is None or np.array_equal(got, expected)


def test_a_window_decodes_only_the_tiles_that_it_touches() -> None:
    image = np.random.default_rng(0).integers(0, 256, (256, 384, 3), dtype=np.uint8)
    data = np.frombuffer(tiles.encode(image), dtype=np.uint8).copy()
    first, second = data[:8].view("<u4")
    data[first:second] = 0  # the first tile is gone
    out = np.empty((100, 100, 3), dtype=np.uint8)
    tiles.decode_into(out, data, size=(256, 384), top=120, left=128, what="x")
    assert np.array_equal(out, image[120:220, 128:228])
    with pytest.raises(InputError, match="the tiles of x are damaged"):
        tiles.decode_into(out, data, size=(256, 384), top=120, left=127, what="x")


def frame_of(num_bytes: int, declared: int | None = None) -> bytes:
    """Return a zstd frame of zeros, or one that declares another size than it has."""
    frame = bytearray(zstandard.ZstdCompressor().compress(bytes(num_bytes)))
    if declared is not None:
        header = zstandard.get_frame_parameters(bytes(frame))
        assert header.content_size == num_bytes
        place = bytes(frame).index(num_bytes.to_bytes(4, "little"))
        frame[place : place + 4] = declared.to_bytes(4, "little")
    return bytes(frame)


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\x08\0\0\0",
        np.array([8, 8], dtype="<u4").tobytes(),
        np.array([8, 2**31], dtype="<u4").tobytes() + b"x" * 50,
        np.array([40, 8], dtype="<u4").tobytes() + b"x" * 50,
        np.array([8, 8 + len(frame_of(3 * 128**2 - 1))], dtype="<u4").tobytes() + frame_of(3 * 128**2 - 1),
        np.array([8, 8 + len(frame_of(2**20))], dtype="<u4").tobytes() + frame_of(2**20, 3 * 2**30),
        np.array([8, 8 + len(frame_of(2**20))], dtype="<u4").tobytes() + frame_of(2**20, 3 * 128**2),
    ],
)
def test_damaged_tiles_are_named(damaged: bytes) -> None:
    out = np.empty((128, 128, 3), dtype=np.uint8)
    data = np.frombuffer(damaged, dtype=np.uint8)
    with pytest.raises(InputError, match="the tiles of picture 7 are damaged"):
        tiles.decode_into(out, data, size=(128, 128), top=0, left=0, what="picture 7")


@settings(deadline=None, max_examples=100)
@given(place=st.integers(0, 10**9), value=st.integers(0, 255))
def test_any_byte_may_be_wrong_and_nothing_is_read_that_is_not_there(place: int, value: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (150, 140, 3), dtype=np.uint8)
    data = np.frombuffer(tiles.encode(image), dtype=np.uint8).copy()
    data[place % len(data)] = value
    out = np.empty_like(image)
    with contextlib.suppress(InputError):
        tiles.decode_into(out, data, size=(150, 140), top=0, left=0, what="x")


def test_a_shard_of_an_unknown_format_is_refused(tmp_path: Path) -> None:
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    store = write_store(tmp_path / "store", NYUV2_13, {"train": [("a", image, None)]}, shard_format="tiles")
    file = Path(store.location.path) / "train.arrow"
    table = pa.ipc.open_file(file).read_all().replace_schema_metadata({"segfleet.format": "wavelets"})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match=r"raw or tiles, but .* is of the format 'wavelets'"):
        store.split("train")


@pytest.mark.parametrize("shard_format", ["raw", "tiles"])
@pytest.mark.parametrize("width", [-5, 0, 1_633_771_992])
def test_a_size_that_the_bytes_cannot_have_is_refused_before_memory_is_taken(
    tmp_path: Path, shard_format: ShardFormat, width: int
) -> None:
    samples: list[Picture] = [("a", np.zeros((9, 7, 3), dtype=np.uint8), np.zeros((9, 7), dtype=np.uint8))]
    store = write_store(tmp_path / "store", NYUV2_13, {"train": samples}, shard_format=shard_format)
    file = Path(store.location.path) / "train.arrow"
    table = pa.ipc.open_file(file).read_all()
    wrong = table.set_column(2, table.schema.field(2), [pa.array([width], pa.int32())])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(wrong)
    assert file.stat().st_size == store.manifest.splits["train"][0].num_bytes
    with pytest.raises(InputError, match="must hold whole images"):
        store.split("train")


@pytest.mark.skipif(not (DATA / "cityscapes").is_dir(), reason="no genuine Cityscapes pictures at hand")
def test_genuine_street_scenes_are_no_larger_than_as_png() -> None:
    num_bytes = [0, 0]
    for path in sorted(DATA.glob("cityscapes/leftImg8bit/train/*/*.png")):
        label = Path(
            str(path).replace("/leftImg8bit/", "/gtFine/").replace("leftImg8bit.png", "gtFine_labelIds.png")
        )
        num_bytes[0] += path.stat().st_size + label.stat().st_size
        train_ids = CITYSCAPES.train_id_of(np.asarray(Image.open(label)), where=str(label))
        for pixels in (np.asarray(Image.open(path)), train_ids):
            encoded = np.frombuffer(tiles.encode(pixels), dtype=np.uint8)
            out = np.empty_like(pixels)
            tiles.decode_into(out, encoded, size=pixels.shape[:2], top=0, left=0, what="x")
            assert np.array_equal(out, pixels)
            num_bytes[1] += encoded.size
    assert 0 < num_bytes[1] < num_bytes[0]

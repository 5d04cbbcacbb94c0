"""Laws of picture formats: a label in any lossless one is the same label, and a lossy one is refused by its name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pspnet.errors import InputError
from segfleet.ingest import ingest
from segfleet.sources.files import read_colours, read_ids, read_image
from segfleet.sources.folder import folder_source

IDS = np.random.default_rng(0).integers(0, 3, (21, 17), dtype=np.uint8)
ROWS_PER_STRIP = 278
COLOURS = np.array([(128, 64, 128), (0, 128, 0), (0, 0, 0)], dtype=np.uint8)
CLASSES = "id,name,r,g,b\n0,road,128,64,128\n1,tree,0,128,0\n2,void,0,0,0\n"


def folder(root: Path, image_ending: str, label: Image.Image, label_ending: str, **saved: Any) -> Path:
    for split in ("train", "val"):
        for kind, picture, ending, more in (
            ("", Image.new("RGB", (17, 21), (9, 99, 199)), image_ending, {}),
            ("annot", label, label_ending, saved),
        ):
            (root / f"{split}{kind}").mkdir(parents=True, exist_ok=True)
            picture.save(root / f"{split}{kind}" / f"a{ending}", **more)
    (root / "classes.csv").write_text(CLASSES)
    return root


def in_palette() -> Image.Image:
    picture = Image.fromarray(IDS, "P")
    picture.putpalette(COLOURS.ravel().tolist())
    return picture


@pytest.mark.parametrize(
    ("label", "kind", "ending", "saved"),
    [
        (Image.fromarray(IDS), "ids", ".png", {}),
        (Image.fromarray(IDS), "ids", ".bmp", {}),
        (Image.fromarray(IDS), "ids", ".tif", {}),
        (Image.fromarray(IDS), "ids", ".tiff", {"compression": "tiff_lzw"}),
        (Image.fromarray(IDS), "ids", ".TIF", {"compression": "tiff_adobe_deflate"}),
        (Image.fromarray(IDS), "ids", ".webp", {"lossless": True}),
        (Image.fromarray(IDS.astype(np.uint16)), "ids", ".png", {}),
        (Image.fromarray(IDS.astype(np.uint16)), "ids", ".tif", {}),
        (Image.fromarray(IDS.astype(np.int32)), "ids", ".tif", {}),
        (in_palette(), "ids", ".png", {}),
        (in_palette(), "colours", ".png", {}),
        (Image.fromarray(COLOURS[IDS]), "colours", ".png", {}),
        (Image.fromarray(COLOURS[IDS]), "colours", ".tif", {}),
        (Image.fromarray(COLOURS[IDS]), "colours", ".webp", {"lossless": True}),
    ],
)
def test_a_label_in_any_lossless_format_is_the_same_label(
    tmp_path: Path, label: Image.Image, kind: Any, ending: str, saved: dict[str, Any]
) -> None:
    source = folder_source(folder(tmp_path, ".png", label, ending, **saved), label_kind=kind)
    ids = source.read(source.listing().pairs[0])[1]
    assert np.asarray(ids).tolist() == IDS.tolist()


def test_a_16_bit_label_of_the_other_byte_order_is_read_as_it_is_meant(tmp_path: Path) -> None:
    Image.frombytes("I;16B", (2, 1), b"\x01\x00\x00\x05").save(tmp_path / "a.tif")
    assert read_ids(tmp_path / "a.tif").tolist() == [[256, 5]]


def test_a_label_of_one_bit_has_the_ids_0_and_1(tmp_path: Path) -> None:
    Image.fromarray(IDS > 0).save(tmp_path / "a.png")
    ids = read_ids(tmp_path / "a.png")
    assert np.issubdtype(ids.dtype, np.integer)
    assert ids.tolist() == (IDS > 0).astype(int).tolist()


@pytest.mark.parametrize("ending", [".png", ".jpg", ".JPEG", ".webp", ".tif", ".tiff", ".bmp"])
def test_images_may_have_any_format(tmp_path: Path, ending: str) -> None:
    source = folder_source(folder(tmp_path, ending, Image.fromarray(IDS), ".png"))
    image = source.read(source.listing().pairs[0])[0]
    assert image.shape == (21, 17, 3)
    assert np.abs(image.astype(int) - (9, 99, 199)).max() <= 6


@pytest.mark.parametrize(
    ("name", "saved", "message"),
    [
        ("a.webp", {"quality": 95}, r"a\.webp is lossy WebP"),
        ("a.tif", {"compression": "jpeg"}, r"a\.tif is TIFF with jpeg in it"),
        ("a.png", {"format": "JPEG", "quality": 100}, r"a\.png is JPEG"),
        ("a.png", {"format": "GIF"}, r"a\.png is GIF"),
    ],
)
def test_a_lossy_label_is_refused_whatever_its_name_says(
    tmp_path: Path, name: str, saved: dict[str, Any], message: str
) -> None:
    Image.fromarray(COLOURS[IDS]).save(tmp_path / name, **saved)
    for read in (read_ids, read_colours):
        with pytest.raises(InputError, match=f"lossless WebP.*{message}.*Export the labels again as PNG"):
            read(tmp_path / name)
    assert read_image(tmp_path / name).shape == (21, 17, 3)


def test_a_label_of_several_pages_is_refused(tmp_path: Path) -> None:
    Image.fromarray(IDS).save(tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(IDS)])
    with pytest.raises(InputError, match=r"one picture, but .*a\.tif holds 2"):
        read_ids(tmp_path / "a.tif")


def test_jpeg_labels_and_names_of_two_files_are_all_named_before_anything_is_read(tmp_path: Path) -> None:
    folder(tmp_path, ".png", Image.fromarray(IDS), ".jpg")
    Image.fromarray(IDS).save(tmp_path / "val" / "a.jpg")
    with pytest.raises(InputError) as refused:
        ingest(folder_source(tmp_path), tmp_path / "store")
    for named in (
        f"{tmp_path / 'trainannot' / 'a.jpg'} is JPEG",
        f"{tmp_path / 'valannot' / 'a.jpg'} is JPEG",
        f"there are {tmp_path / 'val' / 'a.jpg'} and a.png",
        "Export labels again as PNG",
    ):
        assert named in str(refused.value)
    (tmp_path / "val" / "a.jpg").unlink()
    for split in ("train", "val"):  # beside the label, a JPEG is but an overlay that somebody looked at
        Image.fromarray(IDS).save(tmp_path / f"{split}annot" / "a.png")
    assert len(folder_source(tmp_path).listing().pairs) == 2


@pytest.mark.parametrize("rows_per_strip", [21, 8])
def test_a_tiff_of_more_rows_than_it_holds_is_refused_and_not_continued_in_black(
    tmp_path: Path, rows_per_strip: int
) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(COLOURS[IDS]).save(path, tiffinfo={ROWS_PER_STRIP: rows_per_strip})
    assert read_image(path).shape == (21, 17, 3)
    height_entry = b"\x01\x01\x04\x00\x01\x00\x00\x00\x15\x00\x00\x00"  # ImageLength, 32 bits, one value, 21
    content = path.read_bytes()
    assert content.count(height_entry) == 1
    path.write_bytes(content.replace(height_entry, height_entry[:-4] + (12_000_000).to_bytes(4, "little")))
    with pytest.raises(InputError, match=r"at most 200000000 pixels, .* declares 204000000"):
        read_image(path)
    path.write_bytes(content.replace(height_entry, height_entry[:-4] + (99).to_bytes(4, "little")))
    with Image.open(path) as picture:
        assert picture.size == (17, 99)
    with pytest.raises(InputError, match=r"its parts hold (357|408) pixels of 1683"):
        read_image(path)

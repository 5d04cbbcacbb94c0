"""Laws of the checks: every kind of fault is named with its file and remedy in one run, and nothing else is."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pspnet.errors import InputError
from pspnet.store import Store
from segfleet.checks import compare_pairs
from segfleet.ingest import IngestReport, ingest, summary
from segfleet.sources import files
from segfleet.sources.files import read_colours, read_ids, read_image
from segfleet.sources.folder import folder_source

ROOT = Path(__file__).parents[2]
SIZE = (24, 32)


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def ids(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, SIZE, dtype=np.uint8)


def save(pixels: np.ndarray | Image.Image, path: Path, **options: Any) -> None:
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(path, **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for split, count, seed in (("train", 24, 0), ("val", 4, 100)):
        (folder / split).mkdir(parents=True)
        (folder / f"{split}annot").mkdir()
        for number in range(count):
            save(noise(seed + number), folder / split / f"{split}{number:02d}.png")
            save(ids(seed + number), folder / f"{split}annot" / f"{split}{number:02d}.png")
    (folder / "classes.csv").write_text("id,name,r,g,b\n0,road,128,64,128\n1,tree,0,128,0\n2,void,0,0,0\n")
    return folder


def image(root: Path, number: int, split: str = "train") -> Path:
    return root / split / f"{split}{number:02d}.png"


def label(root: Path, number: int, split: str = "train") -> Path:
    return root / f"{split}annot" / f"{split}{number:02d}.png"


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


def as_jpeg(path: Path, **options: Any) -> Path:
    jpeg = path.with_suffix(".jpg")
    save(Image.open(path).convert("RGB"), jpeg, **options)
    path.unlink()
    return jpeg


def bomb(path: Path) -> None:
    """Declare 40000 x 40000 pixels in a file of 67 bytes."""
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
        )

    header = (40000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    path.write_bytes(
        files.PNG_SIGNATURE
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    save(Image.open(path), path, exif=exif)


def with_alpha(path: Path) -> None:
    save(np.dstack([noise(1), np.full(SIZE, 128, dtype=np.uint8)]), path)


def spoil(root: Path) -> dict[str, tuple[str, str]]:
    """Spoil twelve pairs, one in each way; return pair to (kind, what its finding must say)."""
    cut(image(root, 1), 12)
    cut(as_jpeg(image(root, 2)), 2)
    save(ids(3)[:, :20], label(root, 3))
    save(np.where(ids(4) == 1, 9, 0).astype(np.uint8), label(root, 4))
    save(np.full(SIZE, 2, dtype=np.uint8), label(root, 5))
    as_cmyk = Image.open(image(root, 6)).convert("CMYK")
    image(root, 6).unlink()
    save(as_cmyk, image(root, 6).with_suffix(".jpg"))
    with_alpha(image(root, 7))
    save(noise(8)[..., 0].astype(np.uint16) * 257, image(root, 8))
    bomb(image(root, 9))
    turned(label(root, 10))
    save(noise(101), image(root, 11))  # the picture of val 01
    label(root, 12).write_text("no picture")
    num_outside = int((ids(4) == 1).sum())
    return {
        "train/train01": ("file", "train01.png fails: its end is missing"),
        "train/train02": ("file", "train02.jpg fails: image file is truncated"),
        "train/train03": ("size", "is 20 x 24 (width x height)"),
        "train/train04": ("ids", f"train04.png has 9 ({num_outside} pixels)"),
        "train/train05": ("void", "all 768 of"),
        "train/train06": ("file", "train06.jpg is CMYK. Convert it to RGB"),
        "train/train07": ("file", "train07.png is RGBA and has some. Paint it"),
        "train/train08": ("file", "train08.png has 16 (I;16). Convert it"),
        "train/train09": ("file", "declares 1600000000 and was not decoded. Cut it"),
        "train/train10": ("file", "EXIF orientation 3, which viewers obey"),
        "train/train11": ("duplicate", "val01.png of val. Remove it from train"),
        "train/train12": ("file", "train12.png is of no known picture format. Replace it"),
    }


def test_twelve_corruptions_are_all_named_with_file_and_remedy_in_one_run_and_nothing_is_written(
    root: Path, tmp_path: Path
) -> None:
    expected = spoil(root)
    with pytest.raises(InputError) as refused:
        ingest(folder_source(root), tmp_path / "store")
    text = str(refused.value)
    assert text.startswith("12 of 28 pairs cannot be used, and no store was made")
    assert "--skip-bad 12" in text
    assert "  8 file, 1 size, 1 ids, 1 void, 1 duplicate" in text
    report = json.loads((tmp_path / "store-report.json").read_text())
    named = {f"{found['split']}/{found['name']}": found for found in report["problems"]}
    assert named.keys() == expected.keys()
    for pair, (kind, says) in expected.items():
        assert named[pair]["kind"] == kind
        assert says in named[pair]["text"]
        assert Path(named[pair]["file"]).is_file()
        assert named[pair]["text"] in text
        assert named[pair]["text"].count(". ") >= 1, "a remedy follows the rule"
    assert (report["is_refused"], report["num_usable"], report["warnings"]) == (True, 16, [])
    page = (tmp_path / "store-report.html").read_text()
    assert page.count("<img") == 16
    assert page.count("cannot be shown") == 2
    assert "http" not in page
    assert not any("ingest" in path.name or path.name == "store" for path in tmp_path.iterdir())


def test_skip_bad_leaves_out_just_the_bad_pairs_and_the_manifest_names_them(
    root: Path, tmp_path: Path
) -> None:
    expected = spoil(root)
    with pytest.raises(InputError, match="more than --skip-bad 11 allows"):
        ingest(folder_source(root), tmp_path / "store", skip_bad=11)
    report = ingest(folder_source(root), tmp_path / "store", skip_bad=12)
    store = Store.open(tmp_path / "store")
    train = store.split("train")
    names = [train.name(index) for index in range(len(train))]
    assert names == ["train00", *(f"train{number}" for number in range(13, 24))]
    left_out = [line.split(": ")[0] for line in store.manifest.left_out]
    assert sorted(left_out) == [*expected]
    assert "left out, because --skip-bad allows it" in summary(report)
    # What is left is what a folder without them gives.
    for pair in expected:
        (root / "trainannot" / f"{pair[6:]}.png").unlink()
    ingest(folder_source(root), tmp_path / "clean")
    clean = Store.open(tmp_path / "clean")
    assert (clean.mean, clean.std) == (store.mean, store.std)
    assert clean.manifest.selection == store.manifest.selection
    assert [clean.split("train").name(index) for index in range(len(train))] == names
    with pytest.raises(InputError, match="or its files have changed"):
        ingest(folder_source(root), tmp_path / "store", skip_bad=12)


def test_a_store_with_left_out_pairs_is_not_taken_where_none_may_be(root: Path, tmp_path: Path) -> None:
    cut(image(root, 1), 12)
    first = ingest(folder_source(root), tmp_path / "store", skip_bad=1)
    assert not ingest(folder_source(root), tmp_path / "store", skip_bad=1).is_new
    with pytest.raises(InputError, match="made without 1 bad"):
        ingest(folder_source(root), tmp_path / "store")
    assert Store.open(tmp_path / "store").digest == first.manifest.digest


def test_the_job_exits_with_2_and_prints_the_report_s_path(root: Path, tmp_path: Path) -> None:
    cut(image(root, 1), 12)
    command = [sys.executable, str(ROOT / "jobs" / "ingest_folder.py"), "--root", str(root)]
    command += ["--store", str(tmp_path / "store")]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2, refused.stderr
    assert str(tmp_path / "store-report.html") in refused.stderr
    assert "Traceback" not in refused.stderr
    assert subprocess.run([*command, "--skip-bad", "1"], capture_output=True).returncode == 0


def test_an_image_s_fault_does_not_hide_its_label_s(root: Path, tmp_path: Path) -> None:
    cut(image(root, 1), 12)
    cut(label(root, 1), 12)
    with pytest.raises(InputError, match="1 of 28 pairs"):
        ingest(folder_source(root), tmp_path / "store")
    report = json.loads((tmp_path / "store-report.json").read_text())
    assert [Path(found["file"]).parent.name for found in report["problems"]] == ["train", "trainannot"]


def findings(root: Path, tmp_path: Path) -> IngestReport:
    return ingest(folder_source(root), tmp_path / "store", skip_bad=28)


def copy_with_label(root: Path) -> None:
    save(noise(3), image(root, 20))
    save(ids(3), label(root, 20))


def copy_with_other_label(root: Path) -> None:
    save(noise(3), image(root, 20))


def lighter_copy(root: Path, split: str) -> None:
    save(np.clip(noise(3).astype(int) + 2, 0, 255).astype(np.uint8), image(root, 2, split))


@pytest.mark.parametrize(
    ("spoil_it", "problems", "warnings"),
    [
        (copy_with_label, [], [("train20", "duplicate")]),
        (copy_with_other_label, [("train03", "duplicate"), ("train20", "duplicate")], []),
        (lambda root: lighter_copy(root, "train"), [], [("train02", "near duplicate")]),
        (lambda root: lighter_copy(root, "val"), [], [("val02", "near duplicate")]),
        (lambda root: None, [], []),
    ],
)
def test_equal_and_similar_pictures_are_found(
    root: Path,
    tmp_path: Path,
    spoil_it: Callable[[Path], None],
    problems: list[tuple[str, str]],
    warnings: list[tuple[str, str]],
) -> None:
    spoil_it(root)
    found = findings(root, tmp_path).found
    assert found is not None
    assert [(item.name, item.kind) for item in found.problems] == problems
    assert [(item.name, item.kind) for item in found.warnings] == warnings


def test_pictures_of_one_colour_are_not_taken_for_alike() -> None:
    assert compare_pairs([]) == ([], [])


@pytest.mark.parametrize(("bits", "num_ids"), [(1, 2), (2, 4), (4, 16)])
def test_labels_of_few_bits_hold_their_ids_not_their_brightness(
    tmp_path: Path, bits: int, num_ids: int
) -> None:
    values = np.arange(16, dtype=np.uint8).reshape(4, 4) % num_ids
    palette = Image.fromarray(values, "P")
    palette.putpalette([0] * 768)
    palette.save(tmp_path / "palette.png", bits=bits)
    assert np.array_equal(read_ids(tmp_path / "palette.png"), values)
    grey_png(tmp_path / "grey.png", values, bits)
    assert np.array_equal(read_ids(tmp_path / "grey.png"), values)


def grey_png(path: Path, values: np.ndarray, bits: int) -> None:
    """Write a PNG of `bits` bits a pixel; Pillow writes none with 2 or 4."""
    import zlib

    spread = np.unpackbits(values[..., None], axis=-1)[..., 8 - bits :].reshape(len(values), -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in spread)
    header = (
        values.shape[1].to_bytes(4, "big") + values.shape[0].to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    )
    content = files.PNG_SIGNATURE
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    path.write_bytes(content)


def test_sixteen_bits_of_colour_are_refused_not_cut_to_eight(tmp_path: Path) -> None:
    import zlib

    header = (1).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    content = files.PNG_SIGNATURE
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(7))), (b"IEND", b"")):
        content += len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    (tmp_path / "deep.png").write_bytes(content)
    with pytest.raises(InputError, match=r"deep\.png has 16 \(RGB\)"):
        read_image(tmp_path / "deep.png")
    with pytest.raises(InputError, match="with 16 bits a channel"):
        read_colours(tmp_path / "deep.png")


@pytest.mark.parametrize("num_bytes", [1, 4, 8, 12, 13, 16, 17, 30])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_file_without_its_last_bytes_is_found(tmp_path: Path, suffix: str, num_bytes: int) -> None:
    path = tmp_path / f"torn{suffix}"
    save(noise(0), path)
    cut(path, num_bytes)
    with pytest.raises(InputError, match="decode to its last byte"):
        read_image(path)


def test_one_wrong_bit_in_a_png_is_found(tmp_path: Path) -> None:
    save(noise(0), tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for place in range(8, len(whole), 97):
        broken = bytearray(whole)
        broken[place] ^= 1
        (tmp_path / "a.png").write_bytes(broken)
        with pytest.raises(InputError):
            read_image(tmp_path / "a.png")


def test_pages_and_transparent_palettes_are_refused_by_name(tmp_path: Path) -> None:
    save(noise(0), tmp_path / "pages.tif", save_all=True, append_images=[Image.fromarray(noise(1))])
    with pytest.raises(InputError, match=r"pages\.tif holds 2"):
        read_image(tmp_path / "pages.tif")
    hole = Image.fromarray(ids(0), "P")
    hole.putpalette([0, 0, 0, 255, 255, 255])
    hole.save(tmp_path / "hole.png", transparency=1)
    with pytest.raises(InputError, match="no transparent pixels"):
        read_image(tmp_path / "hole.png")
    save(np.dstack([noise(1), np.full(SIZE, 255, dtype=np.uint8)]), tmp_path / "opaque.png")
    assert np.array_equal(read_image(tmp_path / "opaque.png"), noise(1))

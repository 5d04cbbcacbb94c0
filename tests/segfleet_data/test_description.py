"""Laws of the description: it says what the manifest says, and the pictures hold every split."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pspnet.labels import CITYSCAPES
from pspnet.manifest import Selection
from pspnet.pictures import colourise
from pspnet.store import Store, publish_store, write_shard
from segfleet.description import CELL_WIDTH, describe_store, draw_contact_sheet

ROOT = Path(__file__).parents[2]


def store_of(folder: Path, *, cut: bool) -> Store:
    """Three images of one class each in train, one without a label in test."""
    aside = folder / "aside"
    aside.mkdir()
    samples = [
        (f"ulm_{k}", np.full((4, 6, 3), 40 * k, dtype=np.uint8), np.full((4, 6), k, dtype=np.uint8))
        for k in range(3)
    ]
    splits = {
        "train": [write_shard(aside / "train-00000.arrow", samples, num_classes=19)],
        "test": [write_shard(aside / "test-00000.arrow", [(*samples[0][:2], None)], num_classes=19)],
    }
    counts = [24 if k == 1 else 0 for k in range(20)]
    selection = Selection(fraction=0.3, rule="name", groups=[], indices=[1], class_counts=counts)
    publish_store(
        aside,
        folder / "store",
        name="ulm",
        class_table=CITYSCAPES,
        splits=splits,
        source={"kind": "drawn", "root": "/here"},
        selection=selection if cut else None,
        left_out=["train/ulm_9: torn"],
    )
    return Store.open(folder / "store")


def test_the_text_says_what_the_manifest_says(tmp_path: Path) -> None:
    store = store_of(tmp_path, cut=True)
    text = describe_store(store)
    files = sum(path.stat().st_size for path in Path(store.location.path).iterdir())
    for said in (
        store.digest,
        f"{files / 1e6:,.1f} MB in 2 shards",
        "mean    40.00, 40.00, 40.00   std 32.66, 32.66, 32.66",
        "3 of 4 x 6",
        "selection has 1 images, fit the other 2 (30% asked for; single images by name)",
        store.manifest.splits["train"][0].digest,
        "train/ulm_9: torn",
    ):
        assert said in text
    rows = {line.split()[1]: line.split() for line in text.splitlines() if "%" in line and "#" in line}
    assert rows["sidewalk"][4:] == ["33.333%", "0.000%", "0.000%", "100.000%"]
    assert rows["building"][4:] == ["33.333%", "0.000%", "50.000%", "0.000%"]


def test_the_contact_sheet_shows_each_label_in_the_colours_of_its_classes(tmp_path: Path) -> None:
    for cut in (False, True):
        folder = tmp_path / str(cut)
        folder.mkdir()
        store = store_of(folder, cut=cut)
        page = np.asarray(Image.open(draw_contact_sheet(store, folder / "sheet.png")))
        for train_id in range(3):
            colour = colourise(np.array([[train_id]], dtype=np.uint8), CITYSCAPES)[0, 0]
            num_pixels = int((page == colour).all(axis=-1).sum())
            assert CELL_WIDTH * 200 <= num_pixels < CELL_WIDTH * 202 + 1000


def test_the_job_prints_and_draws(tmp_path: Path) -> None:
    store_of(tmp_path, cut=True)
    job = [sys.executable, str(ROOT / "jobs" / "describe_store.py")]
    done = subprocess.run([*job, str(tmp_path / "store")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("store-classes.png", "store-sheet.png"):
        assert str(tmp_path / name) in done.stdout
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 300
    refused = subprocess.run([*job, str(tmp_path)], capture_output=True, text=True)
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)

"""The ingest jobs: their flags reach the source, and what a person can mend is one message and exit code 2."""

import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspnet.store import Store
from segfleet.cli import run_job

JOBS = Path(__file__).parents[2] / "jobs"


def run(monkeypatch: pytest.MonkeyPatch, job: str, *flags: str | Path) -> int:
    spec = importlib.util.spec_from_file_location(f"{job}_job", JOBS / f"{job}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [job, *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        run_job(module.main)
    return int(str(ended.value.code))


def test_polygons_of_drives_become_a_store_whose_val_is_whole_drives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        name = f"drive{number // 4}_{number:03d}"
        Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / f"{name}.webp", lossless=True)
        shapes = [{"label": "road", "points": [[0, 3], [8, 3], [8, 6], [0, 6]], "shape_type": "polygon"}]
        (tmp_path / f"{name}.json").write_text(json.dumps({"shapes": shapes}))
    (tmp_path / "classes.csv").write_text("id,name,r,g,b\n0,road,128,64,128\n1,sky,70,130,180\n")
    common = ("--root", tmp_path, "--store", tmp_path / "store", "--labels", "labelme")
    groups = ("--val-fraction", "0.3", "--group-pattern", r"(.*)_\d+")
    assert run(monkeypatch, "ingest_folder", *common) == 2
    assert capsys.readouterr().err.startswith("error: A model is measured on images")
    assert run(monkeypatch, "ingest_folder", *common, *groups, "--background", "sky") == 0
    assert "note: val is 4 of 12 images, 1 of 3 groups (seed 0): drive" in capsys.readouterr().out
    store = Store.open(tmp_path / "store")
    val = store.split("val")
    assert len({val.name(index).split("_")[0] for index in range(len(val))}) == 1
    assert np.asarray(val.label(0)).tolist() == [[1] * 8] * 3 + [[0] * 8] * 3


def test_lists_name_what_is_train_and_val(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate("abcd"):
        for folder, colour in (("images", 60 * number), ("labels", 0)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("L", (8, 6), colour).save(tmp_path / folder / f"{name}.png")
    (tmp_path / "classes.csv").write_text("id,name,r,g,b\n0,road,128,64,128\n")
    (tmp_path / "train.txt").write_text("c\na\n")
    (tmp_path / "val.txt").write_text("b.png\n")
    lists = ("--train-list", tmp_path / "train.txt", "--val-list", tmp_path / "val.txt")
    common = ("--root", tmp_path, "--store", tmp_path / "store")
    assert run(monkeypatch, "ingest_folder", *common, *lists) == 0
    store = Store.open(tmp_path / "store")
    names = {
        split: [store.split(split).name(index) for index in range(len(store.split(split)))]
        for split in ("train", "val")
    }
    assert names == {"train": ["a", "c"], "val": ["b"]}


def test_cityscapes_in_archives_becomes_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, label = tmp_path / "a.png", tmp_path / "b.png"
    Image.new("RGB", (8, 6)).save(picture)
    Image.new("L", (8, 6), 7).save(label)
    common = ("--root", tmp_path, "--store", tmp_path / "store")
    with zipfile.ZipFile(tmp_path / "leftImg8bit_trainvaltest.zip", "w") as file:
        file.write(picture, "leftImg8bit/train/x/x_0_1_leftImg8bit.png")
        file.write(picture, "leftImg8bit/train_extra/y/y_0_1_leftImg8bit.png")
    assert run(monkeypatch, "ingest_cityscapes", *common) == 2
    assert "has no gtFine (nor gtFine_trainvaltest.zip)" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "gtFine_trainvaltest.zip", "w") as file:
        file.write(label, "gtFine/train/x/x_0_1_gtFine_labelIds.png")
    assert run(monkeypatch, "ingest_cityscapes", *common) == 0
    assert len(Store.open(tmp_path / "store").split("train")) == 1
    with zipfile.ZipFile(tmp_path / "gtCoarse.zip", "w") as file:
        file.write(label, "gtCoarse/train_extra/y/y_0_1_gtCoarse_labelIds.png")
    coarse = ("--train-labels", "coarse", "--overwrite", "True")
    assert run(monkeypatch, "ingest_cityscapes", *common, *coarse) == 0
    assert "no label for image" in capsys.readouterr().out
    assert Store.open(tmp_path / "store").split("train").name(0) == "y_0_1"

"""Laws of the sources: the official readings, on small files drawn here and on the real data where it is at hand."""

import csv
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from pspnet.errors import InputError
from pspnet.labels import CITYSCAPES, IGNORE_INDEX, NYUV2_13, NYUV2_40, ClassTable, read_class_table
from pspnet.store import Store
from segfleet.ingest import ingest
from segfleet.sources.cityscapes import cityscapes_source
from segfleet.sources.files import read_ids, read_image
from segfleet.sources.folder import folder_source
from segfleet.sources.nyuv2 import nyuv2_source

DATA = Path(os.environ.get("SEGFLEET_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="no real data: set SEGFLEET_DATA to the folder that has it"
)
CLASSES = "id,name,r,g,b\n0,road,128,64,128\n1,tree,0,128,0\n2,void,0,0,0\n"


def picture(path: Path, pixels: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
    return path


def test_cityscapes_train_ids_are_those_of_the_official_package() -> None:
    from cityscapesscripts.helpers.labels import labels

    official = [
        (x.name, x.id, x.trainId if x.trainId >= 0 else IGNORE_INDEX, x.color, x.category) for x in labels
    ]
    assert [(c.name, c.id, c.train_id, c.colour, c.category) for c in CITYSCAPES.classes] == official


def test_an_id_outside_the_table_is_named_with_its_pixels_and_place() -> None:
    ids = np.array([[7, 8, 99], [99, 200, 7]], dtype=np.uint8)
    with pytest.raises(InputError, match=r"'cityscapes', but a\.png has 99 \(2 pixels\), 200 \(1 pixels\)"):
        CITYSCAPES.train_id_of(ids, where="a.png")
    with pytest.raises(InputError, match=r"-1 \(1 pixels\)"):
        CITYSCAPES.train_id_of(np.array([[-1]]), where="a.png")


def test_train_ids_go_to_ids_and_back() -> None:
    train_ids = np.arange(19, dtype=np.uint8)[None]
    assert np.array_equal(CITYSCAPES.train_id_of(CITYSCAPES.id_of(train_ids), where=""), train_ids)
    assert CITYSCAPES.id_of(np.array([[IGNORE_INDEX]], dtype=np.uint8)).tolist() == [[0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "columns id, name, r, g, b"),
        ("id,name\n0,road\n", "lacks b, g, r"),
        ("id,name,r,g,b\n0,road,1,2,x\n", r"Line 2 .* whole numbers"),
        ("id,name,r,g,b\n0,road,1,2,256\n", "0 to 255"),
        ("id,name,r,g,b\n0,road,1,2,3\n0,tree,1,2,3\n", "but 0 is several"),
        ("id,name,r,g,b,train_id\n0,road,1,2,3,4\n", r"without a gap .* got \[4\]"),
        ("id,name,r,g,b\n0,void,1,2,3\n", "without a gap"),
        ("id,name,r,g,b\n,road,1,2,3\n", "whole numbers"),
    ],
)
def test_a_class_table_that_cannot_be_one_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "classes.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_class_table(tmp_path / "classes.csv")


def test_a_class_table_survives_json() -> None:
    for table in (CITYSCAPES, NYUV2_40, NYUV2_13):
        assert ClassTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_pictures_become_rgb_or_are_refused_by_name(tmp_path: Path) -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert read_image(picture(tmp_path / "grey.png", grey)).tolist() == np.stack([grey] * 3, axis=-1).tolist()
    rgba = np.zeros((2, 3, 4), dtype=np.uint8)
    with pytest.raises(InputError, match=r"rgba\.png is RGBA"):
        read_image(picture(tmp_path / "rgba.png", rgba))
    Image.new("CMYK", (3, 2)).save(tmp_path / "cmyk.jpg")
    with pytest.raises(InputError, match=r"cmyk\.jpg is CMYK"):
        read_image(tmp_path / "cmyk.jpg")
    whole = picture(
        tmp_path / "noise.png", np.random.default_rng(0).integers(0, 256, (40, 40, 3))
    ).read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"decode to its last byte, but .*torn\.png"):
        read_image(tmp_path / "torn.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match="no known picture format"):
        read_image(tmp_path / "text.png")
    with pytest.raises(InputError, match=r"one id per pixel .*rgb\.png is RGB"):
        read_ids(picture(tmp_path / "rgb.png", np.zeros((2, 2, 3))))


def test_a_sideways_photograph_is_turned_upright(tmp_path: Path) -> None:
    upright = np.zeros((4, 6, 3), dtype=np.uint8)
    upright[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: the viewer turns it by 90 degrees clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), upright)


def test_cityscapes_pairs_by_name_and_notes_what_is_alone(tmp_path: Path) -> None:
    for split, name in (
        ("train", "a_000000_000019"),
        ("train", "b_000000_000019"),
        ("test", "c_000000_000019"),
    ):
        picture(tmp_path / "leftImg8bit" / split / "x" / f"{name}_leftImg8bit.png", np.zeros((2, 2, 3)))
    for name in ("a_000000_000019", "d_000000_000019"):
        picture(tmp_path / "gtFine" / "train" / "x" / f"{name}_gtFine_labelIds.png", np.full((2, 2), 7))
    listing = cityscapes_source(tmp_path).listing()
    assert [(p.split, p.name, p.label is None) for p in listing.pairs] == [
        ("test", "c_000000_000019", True),
        ("train", "a_000000_000019", False),
    ]
    assert [note.split(" ")[:4] for note in listing.notes] == [
        ["no", "label", "for", "image"],
        ["no", "image", "for", "label"],
    ]
    (tmp_path / "half" / "leftImg8bit").mkdir(parents=True)
    with pytest.raises(InputError, match="has no gtFine"):
        cityscapes_source(tmp_path / "half").listing()


@pytest.mark.parametrize(
    ("image", "label"), [("{}", "{}annot"), ("images/{}", "labels/{}"), ("p/{}/x", "q/{}")]
)
def test_a_folder_is_recognised_or_named_by_flags(tmp_path: Path, image: str, label: str) -> None:
    for split in ("train", "val"):
        picture(tmp_path / image.format(split) / f"{split}1.png", np.zeros((2, 2, 3)))
        picture(tmp_path / label.format(split) / f"{split}1.png", [[0, 1], [2, 0]])
    (tmp_path / "classes.csv").write_text(CLASSES)
    named = {"images": image.format("{split}"), "labels": label.format("{split}")} if image[0] == "p" else {}
    source = folder_source(tmp_path, **named)  # type: ignore[arg-type]
    pairs = source.listing().pairs
    assert [(pair.split, pair.name) for pair in pairs] == [("train", "train1"), ("val", "val1")]
    ids = source.read(pairs[0])[1]
    assert ids is not None
    assert source.class_table.train_id_of(ids, where="").tolist() == [[0, 1], [IGNORE_INDEX, 0]]


def test_a_folder_without_val_holds_out_a_share_that_more_images_do_not_change(tmp_path: Path) -> None:
    (tmp_path / "classes.csv").write_text(CLASSES)

    def held_out(count: int) -> set[str]:
        for number in range(count):
            picture(tmp_path / "images" / f"{number}.png", np.zeros((1, 1, 3)))
            picture(tmp_path / "labels" / f"{number}.png", [[0]])
        pairs = folder_source(tmp_path, val_share=0.3).listing().pairs
        return {pair.name for pair in pairs if pair.split == "val"}

    few = held_out(20)
    assert 1 <= len(few) <= 12
    assert held_out(40) & {str(number) for number in range(20)} == few
    with pytest.raises(InputError, match=r"--val-share 0\.1"):
        folder_source(tmp_path)


def test_labels_painted_in_class_colours_are_ids_and_other_colours_are_named(tmp_path: Path) -> None:
    for split in ("train", "val"):
        picture(tmp_path / split / "a.png", np.zeros((1, 2, 3)))
        picture(tmp_path / f"{split}annot" / "a.png", [[[0, 128, 0], [0, 0, 0]]])
    (tmp_path / "classes.csv").write_text(CLASSES)
    source = folder_source(tmp_path, label_kind="colours")
    pairs = source.listing().pairs
    ids = source.read(pairs[0])[1]
    assert ids is not None
    assert ids.tolist() == [[1, 2]]
    picture(tmp_path / "trainannot" / "a.png", [[[9, 9, 9], [0, 0, 0]]])
    with pytest.raises(InputError, match=r"\(9, 9, 9\) 1 pixels"):
        source.read(pairs[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "classes.csv").unlink(), "there is no .*classes.csv"),
        (lambda root: [p.unlink() for p in root.glob("*annot/*")], "there is no pair"),
        (lambda root: [p.rename(p.with_name("z" + p.name[5:])) for p in root.glob("*annot")], "hold folders"),
        (lambda root: picture(root / "train" / "a.bmp", np.zeros((1, 1, 3))), "differ in their names"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    for split in ("train", "val"):
        picture(tmp_path / split / "a.png", np.zeros((1, 1, 3)))
        picture(tmp_path / f"{split}annot" / "a.png", [[0]])
    (tmp_path / "classes.csv").write_text(CLASSES)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        folder_source(tmp_path).listing()


def test_the_mat_file_is_transposed_not_turned(tmp_path: Path) -> None:
    """MATLAB writes column by column: h5py sees (n, 3, w, h). Turning instead of transposing would mirror it."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    raw = rng.integers(0, 895, (2, 4, 6)).astype(np.uint16)
    mapping = rng.integers(1, 41, (1, 894)).astype(np.uint8)
    with h5py.File(tmp_path / "nyu.mat", "w") as file:
        file["images"] = images.transpose(0, 3, 2, 1)
        file["labels"] = raw.transpose(0, 2, 1)
    scipy.io.savemat(tmp_path / "splits.mat", {"trainNdxs": [[2]], "testNdxs": [[1]]})
    scipy.io.savemat(tmp_path / "classMapping40.mat", {"mapClass": mapping})
    source = nyuv2_source(mat=tmp_path / "nyu.mat")
    pairs = source.listing().pairs
    assert [(pair.split, pair.name) for pair in pairs] == [("train", "0002"), ("val", "0001")]
    image, ids = source.read(pairs[1])
    assert ids is not None
    assert np.array_equal(image, images[0])
    assert ids.tolist() == [
        [0 if value == 0 else int(mapping[0, value - 1]) for value in row] for row in raw[0].tolist()
    ]


@needs_data
def test_the_mini_mat_equals_the_exported_labels_and_pictures() -> None:
    folder = DATA / "nyuv2"
    source = nyuv2_source(
        mat=folder / "mat_mini" / "nyu_depth_v2_labeled_mini.mat",
        splits=folder / "mat_mini" / "splits_mini.mat",
        mapping=folder / "nyuv2_894_to_40.csv",
    )
    official_ids = json.loads((folder / "mat_mini" / "ids.json").read_text())["ids"]
    num_compared = 0
    for pair in source.listing().pairs:
        official = official_ids[int(pair.image)]
        exported = folder / "labels40" / f"{official:04d}.png"
        if not exported.exists():
            continue
        image, ids = source.read(pair)
        assert ids is not None
        assert np.array_equal(ids, read_ids(exported)), official
        picture_of_it = read_image(folder / "images" / f"{official:04d}.jpg").astype(int)
        mirrored = picture_of_it[:, ::-1]
        assert np.abs(image - picture_of_it).mean() < 4 < np.abs(image - mirrored).mean()
        num_compared += 1
    assert num_compared == 6


@needs_data
def test_thirteen_classes_are_the_published_reduction_of_forty() -> None:
    rows = list(csv.DictReader((DATA / "nyuv2" / "nyuv2_40_to_13.csv").read_text().splitlines()))
    forty = nyuv2_source(root=DATA / "nyuv2", num_classes=40)
    thirteen = nyuv2_source(root=DATA / "nyuv2", num_classes=13)
    pair = forty.listing().pairs[0]
    of_40, of_13 = forty.read(pair)[1], thirteen.read(pair)[1]
    assert of_40 is not None
    assert of_13 is not None
    published = np.array([0, *(int(row["class13_id"]) for row in rows)])
    assert np.array_equal(of_13, published[of_40])


def exported(root: Path, train: list[int], test: list[int]) -> None:
    """Write pictures of these official ids, as they are exported from the .mat file."""
    rng = np.random.default_rng(0)
    for number in train + test:
        picture(root / "images" / f"{number:04d}.png", rng.integers(0, 256, (8, 8, 3)))
        (root / "images" / f"{number:04d}.png").rename(root / "images" / f"{number:04d}.jpg")
        picture(root / "labels40" / f"{number:04d}.png", np.full((8, 8), 1 + number % 40))
    (root / "nyuv2_splits.json").write_text(json.dumps({"train": train, "test": test}))


def test_no_scene_of_nyu_lies_in_two_parts(tmp_path: Path) -> None:
    """A scene's ids follow one another in one part of the official split, which is cut where a run of ids ends."""
    train = [*range(3, 9), *range(12, 30), *range(33, 36), *range(40, 45), *range(50, 59)]
    exported(tmp_path / "raw", train, [])
    source = nyuv2_source(root=tmp_path / "raw")
    val = [int(pair.name) for pair in source.listing().pairs if pair.split == "val"]
    assert val == [*range(50, 59)]  # a tenth is 4 of 41: the last run is not cut through
    ingest(source, tmp_path / "store", selection_fraction=0.25)
    store = Store.open(tmp_path / "store")
    fit, selection = (
        {int(part.name(index)) for index in range(len(part))}
        for part in (store.split("fit"), store.split("selection"))
    )
    assert fit | selection == set(train) - set(val)
    assert selection
    assert not {number + step for number in selection for step in (-1, 1)} & fit


def test_ids_of_one_run_and_names_without_zeros_are_listed(tmp_path: Path) -> None:
    exported(tmp_path, [*range(1, 21)], [])
    for path in [*tmp_path.glob("*/*.jpg"), *tmp_path.glob("*/*.png")]:
        path.rename(path.with_stem(f"{int(path.stem):02d}"))
    pairs = nyuv2_source(root=tmp_path).listing().pairs
    assert [pair.name for pair in pairs if pair.split == "val"] == ["19", "20"]
    assert len(pairs) == 20


def test_names_without_zeros_are_cut_as_ids(tmp_path: Path) -> None:
    """Sorted as text 100 lies before 92: a tail of that cuts through runs. A picture that is no id is no trouble."""
    exported(tmp_path, [*range(1, 90), *range(91, 131)], [])
    for path in [*tmp_path.glob("*/*.jpg"), *tmp_path.glob("*/*.png")]:
        path.rename(path.with_stem(f"{int(path.stem)}"))
    for folder, suffix in (("images", "jpg"), ("labels40", "png")):
        (tmp_path / folder / f"cover.{suffix}").write_bytes(b"")
    pairs = nyuv2_source(root=tmp_path).listing().pairs
    assert sorted(int(pair.name) for pair in pairs if pair.split == "val") == [*range(91, 131)]


def test_a_scene_of_nyus_test_part_is_no_training_scenes_neighbour(tmp_path: Path) -> None:
    """An id that follows one of the other part begins a run."""
    exported(tmp_path, [3, 4, 7, 8], [5, 6])
    groups = {pair.name: pair.group for pair in nyuv2_source(root=tmp_path).listing().pairs}
    assert groups == {"0003": "0003", "0004": "0003", "0005": "0005", "0006": "0005"} | {
        "0007": "0007",
        "0008": "0007",
    }


@needs_data
def test_genuine_cityscapes_label_maps_have_the_official_train_ids() -> None:
    from cityscapesscripts.helpers.labels import id2label

    paths = sorted((DATA / "cityscapes").glob("gtFine/*/*/*_labelIds.png"))
    assert len(paths) == 16
    for path in paths:
        ids = read_ids(path)
        expected = {value: id2label[value].trainId for value in np.unique(ids).tolist()}
        got = CITYSCAPES.train_id_of(ids, where=path.name)
        for value, train_id in expected.items():
            assert set(np.unique(got[ids == value]).tolist()) == {train_id if train_id >= 0 else IGNORE_INDEX}


def test_of_a_large_mat_file_only_one_image_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """The original is 2.8 GB; here as many images, of which HDF5 writes none until they are filled."""
    with h5py.File(tmp_path / "nyu.mat", "w") as file:
        file.create_dataset("images", (1449, 3, 640, 480), dtype=np.uint8)
        file.create_dataset("labels", (1449, 640, 480), dtype=np.uint16)
    scipy.io.savemat(tmp_path / "splits.mat", {"trainNdxs": [[1]], "testNdxs": [[1449]]})
    scipy.io.savemat(tmp_path / "classMapping40.mat", {"mapClass": np.ones((1, 894), dtype=np.uint8)})
    source = nyuv2_source(mat=tmp_path / "nyu.mat", num_classes=13)
    tracemalloc.start()
    try:
        for pair in source.listing().pairs:
            image, ids = source.read(pair)
            assert (image.shape, np.asarray(ids).shape) == ((480, 640, 3), (480, 640))
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()

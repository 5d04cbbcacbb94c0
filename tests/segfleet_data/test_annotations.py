"""Laws of annotated polygons: what was drawn last is seen, what nobody drew is ignored, every mistake is named."""

import base64
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pspnet.errors import InputError
from pspnet.labels import IGNORE_INDEX
from pspnet.store import Store
from segfleet.ingest import ingest
from segfleet.sources import Source
from segfleet.sources.folder import folder_source

CLASSES = "id,name,r,g,b\n0,road,128,64,128\n1,tree,0,128,0\n2,car,0,0,142\n"
HEIGHT, WIDTH = 6, 9


def box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def shape(label: str, points: Any, kind: str = "polygon", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **more}


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = 40 * len(path.stem)  # train and val differ
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), grey % 256, dtype=np.uint8)).save(path)


def save_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def labelme(root: Path, name: str, shapes: list[dict[str, Any]], **more: Any) -> None:
    save_image(root / f"{name}.jpg")
    content = {"version": "5.5.0", "shapes": shapes, "imagePath": f"{name}.jpg", "imageData": None}
    save_json(root / f"{name}.json", content | {"imageHeight": HEIGHT, "imageWidth": WIDTH} | more)


def train_ids(source: Source, index: int = 0) -> np.ndarray:
    pair = source.listing().pairs[index]
    ids = source.read(pair)[1]
    assert ids is not None
    return source.class_table.train_id_of(ids, where=pair.name)


# road in columns 0 to 5, a car of 2 x 2 on it, a tree in columns 7 and 8; column 6 is of nobody
EXPECTED = np.full((HEIGHT, WIDTH), IGNORE_INDEX)
EXPECTED[:, :6] = 0
EXPECTED[2:4, 1:3] = 2
EXPECTED[:, 7:] = 1
SCENE = [("road", box(0, 0, 6, 6)), ("car", box(1, 2, 3, 4)), ("tree", box(7, -3, 20, 20))]


@pytest.fixture
def labelme_root(tmp_path: Path) -> Path:
    (tmp_path / "classes.csv").write_text(CLASSES)
    for split in ("train", "val"):
        labelme(tmp_path / split, f"{split}1", [shape(name, points) for name, points in SCENE])
    return tmp_path


def coco(split: str, **more: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": f"{split}1.jpg", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 3, "name": "tree"}, {"id": 1, "name": "road"}, {"id": 2, "name": "car"}],
        "annotations": [
            {
                "id": number,
                "image_id": 7,
                "category_id": {"road": 1, "car": 2, "tree": 3}[name],
                "segmentation": [[value for point in points for value in point]],
            }
            for number, (name, points) in enumerate(SCENE)
        ],
    } | more


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        save_image(tmp_path / "images" / split / f"{split}1.jpg")
        save_json(tmp_path / "annotations" / f"{split}.json", coco(split))
    return tmp_path


def test_later_shapes_lie_over_earlier_ones_and_what_nobody_drew_is_ignored(labelme_root: Path) -> None:
    source = folder_source(labelme_root, label_kind="labelme")
    assert [(pair.split, pair.name) for pair in source.listing().pairs] == [
        ("train", "train1"),
        ("val", "val1"),
    ]
    assert train_ids(source).tolist() == EXPECTED.tolist()
    assert source.class_table.class_names == ("road", "tree", "car")


def test_what_nobody_drew_is_the_background_that_is_named(labelme_root: Path, tmp_path: Path) -> None:
    found = train_ids(folder_source(labelme_root, label_kind="labelme", background="tree"))
    assert found.tolist() == np.where(EXPECTED == IGNORE_INDEX, 1, EXPECTED).tolist()
    with pytest.raises(
        InputError, match=r"--background must be a class, but got 'sky', .* are road, tree, car"
    ):
        folder_source(labelme_root, label_kind="labelme", background="sky")
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    with pytest.raises(InputError, match="each pixel has a value"):
        folder_source(tmp_path, background="road")


def test_a_table_with_an_ignored_class_needs_no_other(labelme_root: Path) -> None:
    (labelme_root / "classes.csv").write_text(CLASSES + "9,void,0,0,0\n")
    source = folder_source(labelme_root, label_kind="labelme")
    assert [info.name for info in source.class_table.classes] == ["road", "tree", "car", "void"]
    assert train_ids(source).tolist() == EXPECTED.tolist()


def test_rectangles_circles_and_masks_are_areas_too(labelme_root: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[255, 0], [255, 255]], dtype=np.uint8)).convert("1").save(buffer, "PNG")
    mask = base64.b64encode(buffer.getvalue()).decode()
    shapes = [
        shape("road", [[6, 6], [0, 0]], "rectangle"),
        shape("car", [[2, 3], [2, 4.2]], "circle"),
        shape("tree", [[7, 4], [8, 5]], "mask", mask=mask),
    ]
    labelme(labelme_root / "train", "train1", shapes)
    expected = EXPECTED.copy()
    expected[:, 7:] = IGNORE_INDEX
    expected[[4, 5, 5], [7, 7, 8]] = 1
    assert train_ids(folder_source(labelme_root, label_kind="labelme")).tolist() == expected.tolist()


def test_every_mistake_of_every_labelme_file_is_named_at_once(labelme_root: Path, tmp_path: Path) -> None:
    wrong = [
        shape("raod", box(0, 0, 1, 1)),
        shape("sky", box(0, 0, 1, 1)),
        shape("road", [[0, 0], [1, 1]], "line"),
        shape("tree", [[0, 0], [1, 1]]),
        shape("car", [[0, 0], [1, 1]], "mask", mask="AAAA"),
        shape("car", [["a", 0], [1, 1], [2, 2]]),
        shape("car", [[0, 0], [1e300, 0]], "circle"),
        shape("car", [[0, 0], [1e8, 0]], "circle"),
        shape("tree", [[1, 1]], "x" * 3000),
    ]
    labelme(labelme_root / "train", "train1", wrong)
    labelme(labelme_root / "train", "train2", [], imageWidth=4)
    labelme(labelme_root / "train", "train3", [])
    (labelme_root / "train" / "train3.json").write_text("{")
    labelme(labelme_root / "train", "train4", [])
    save_json(labelme_root / "train" / "train4.json", [1, 2])
    with pytest.raises(InputError) as refused:
        ingest(folder_source(labelme_root, label_kind="labelme"), tmp_path / "store")
    text = str(refused.value)
    for named in (
        "4 of 5 pairs cannot be used",
        "train1.json has 'raod', 'sky', and the classes",
        "are road, tree, car, unlabelled",
        "shape 3 (road): a line has no area (known: polygon, rectangle, circle, mask)",
        "shape 4 (tree): a polygon needs three points, not 2",
        "shape 5 (car): its mask is no PNG of at most the image's size",
        "shape 6 (car): its points are not pairs of numbers",
        "shape 7 (car): its points are not pairs of numbers of at most 1e+09, shape 9 (tree): a xxxx",
        "train2.json says 4 x 6 and the image is 9 x 6",
        "train3.json. Export it again.",
        "train4.json has none",
    ):
        assert named in text, named
    assert "x" * 201 not in text


def test_labelme_files_may_lie_in_folders_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "classes.csv").write_text(CLASSES)
    for number in range(4):
        labelme(tmp_path / "images", f"a{number}", [shape("road", box(0, 0, 9, 9))])
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "images" / f"a{number}.json").rename(tmp_path / "labels" / f"a{number}.json")
    source = folder_source(tmp_path, label_kind="labelme", val_fraction=0.5)
    assert [pair.split for pair in source.listing().pairs] == ["train", "train", "val", "val"]
    assert not train_ids(source).any()


def test_coco_is_labelme_of_the_same_polygons(coco_root: Path) -> None:
    (coco_root / "classes.csv").write_text(CLASSES)
    source = folder_source(coco_root, label_kind="coco")
    assert train_ids(source).tolist() == EXPECTED.tolist()
    assert source.class_table.class_names == ("road", "tree", "car")


def test_without_a_table_the_classes_are_the_categories(coco_root: Path, tmp_path: Path) -> None:
    source = folder_source(coco_root, label_kind="coco")
    assert source.class_table.class_names == ("road", "car", "tree")
    of_category = np.full(256, IGNORE_INDEX)
    of_category[[0, 1, 2]] = [0, 2, 1]
    assert train_ids(source).tolist() == of_category[EXPECTED].tolist()
    with_sky = folder_source(coco_root, label_kind="coco", background="sky")
    assert with_sky.class_table.class_names == ("sky", "road", "car", "tree")
    assert train_ids(with_sky)[0].tolist() == [1, 1, 1, 1, 1, 1, 0, 3, 3]
    report = ingest(source, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    assert store.split("train").label(0).tolist() == of_category[EXPECTED].tolist()
    assert report.manifest.class_table == source.class_table


def test_coco_run_lengths_are_its_polygons(coco_root: Path) -> None:
    polygons = train_ids(folder_source(coco_root, label_kind="coco"))
    content = coco("train")
    for item in content["annotations"]:
        (xs, ys) = item["segmentation"][0][::2], item["segmentation"][0][1::2]
        mask = np.zeros((HEIGHT, WIDTH), dtype=int)
        mask[max(0, min(ys)) : max(ys), min(xs) : max(xs)] = 1
        flat = [0, *mask.T.ravel().tolist()]
        edges = [index - 1 for index in range(1, len(flat)) if flat[index] != flat[index - 1]]
        runs = np.diff([0, *edges, mask.size]).tolist()
        item["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": runs}
    save_json(coco_root / "annotations" / "train.json", content)
    source = folder_source(coco_root, label_kind="coco")
    assert train_ids(source).tolist() == polygons.tolist()


def test_several_polygons_of_one_annotation_are_one_area(coco_root: Path) -> None:
    content = coco("train")
    content["annotations"] = content["annotations"][:1]
    content["annotations"][0]["segmentation"] = [[0, 0, 4, 0, 4, 6, 0, 6], [2, 0, 6, 0, 6, 6, 2, 6]]
    save_json(coco_root / "annotations" / "train.json", content)
    expected = [0] * 6 + [IGNORE_INDEX] * 3
    assert train_ids(folder_source(coco_root, label_kind="coco")).tolist() == [expected] * HEIGHT


def test_a_worker_needs_no_json_file_and_a_changed_one_is_other_data(coco_root: Path, tmp_path: Path) -> None:
    source = folder_source(coco_root, label_kind="coco")
    first = ingest(source, tmp_path / "store")
    pair = source.listing().pairs[0]
    sent = pickle.dumps((source, pair))
    (coco_root / "annotations" / "train.json").rename(tmp_path / "away")
    there, its_pair = pickle.loads(sent)  # noqa: S301
    assert there.read(its_pair)[1].tolist() == np.asarray(source.read(pair)[1]).tolist()
    assert pair.annotation not in repr(pair)
    (tmp_path / "away").rename(coco_root / "annotations" / "train.json")
    assert not ingest(source, tmp_path / "store").is_new
    content = coco("train")
    del content["annotations"][1]
    save_json(coco_root / "annotations" / "train.json", content)
    assert train_ids(source)[2, 1] == 0
    second = ingest(source, tmp_path / "store", overwrite=True)
    assert second.is_new
    assert second.manifest.digest != first.manifest.digest


def test_coco_images_without_annotations_are_left_out_unless_there_is_a_background(coco_root: Path) -> None:
    content = coco("train")
    content["images"] += [
        {"id": 8, "file_name": "empty.jpg", "height": HEIGHT, "width": WIDTH},
        {"id": 9, "file_name": "absent.jpg", "height": HEIGHT, "width": WIDTH},
    ]
    save_json(coco_root / "annotations" / "train.json", content)
    images = coco_root / "images" / "train"
    save_image(images / "empty.jpg")
    save_image(images / "alone.jpg")
    listing = folder_source(coco_root, label_kind="coco").listing()
    assert [pair.name for pair in listing.pairs] == ["train1", "val1"]
    assert listing.notes == [
        f"no label for image {images / 'empty.jpg'}",
        f"no image for label {images / 'absent.jpg'} of {coco_root / 'annotations' / 'train.json'}",
        f"no label for image {images / 'alone.jpg'}",
    ]
    source = folder_source(coco_root, label_kind="coco", background="road")
    assert [pair.name for pair in source.listing().pairs] == ["empty", "train1", "val1"]
    assert not train_ids(source).any()


def test_every_mistake_of_a_coco_file_is_named_at_once(coco_root: Path, tmp_path: Path) -> None:
    content = coco("train")
    content["images"] += [{"id": 7, "file_name": "../x.jpg", "height": 1, "width": 1}, {"id": 8}]
    content["images"] += [{"id": 7, "file_name": "again.jpg", "height": 1, "width": 1}]
    content["annotations"] += [{"id": 90, "image_id": 55, "category_id": 1}]
    content["annotations"] += [{"id": 91, "image_id": 7, "category_id": 44}]
    content["categories"] += [{"id": 1, "name": "again"}, {"id": "x", "name": "text"}]
    save_json(coco_root / "annotations" / "train.json", content)
    with pytest.raises(InputError) as refused:
        folder_source(coco_root, label_kind="coco")
    for named in (
        "category id 1 is there twice",
        "the category 'text' has no whole id",
        "image 7 lies outside of its folder (../x.jpg)",
        "image 7 (again.jpg) is there twice",
        "image 8 has no file_name",
        "annotation 90 is of image 55, which is not there",
        "annotation 91 is of category 44, which is not there",
    ):
        assert named in str(refused.value), named


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "it has no segmentation"),
        (None, "it has no segmentation"),
        ([[1, 1, 2, 2]], "needs three points, not 2"),
        ([[1, 1, 2, 2, 3]], "not pairs of numbers"),
        ([["a"] * 6], "not pairs of numbers"),
        ([[float("nan")] * 6], "not pairs of numbers"),
        ([[1e300] * 6], r"not pairs of numbers of at most 1e\+09"),
        ([[10**400] * 6], "not pairs of numbers"),
        ({"size": [6, 9], "counts": [10**400]}, "must add up to 6 x 9 pixels, but are 10000"),
        ({"size": [1, 2], "counts": [2]}, r"of size \[1, 2\], not \[6, 9\]"),
        ({"size": [6, 9], "counts": [2]}, "must add up to 6 x 9 pixels, but are 2"),
        ({"size": [6, 9], "counts": None}, "neither a list of whole numbers nor a text"),
    ],
)
def test_a_segmentation_that_is_none_is_named(
    coco_root: Path, tmp_path: Path, segmentation: Any, message: str
) -> None:
    content = coco("train")
    content["annotations"][1]["segmentation"] = segmentation
    save_json(coco_root / "annotations" / "train.json", content)
    with pytest.raises(InputError, match=rf"train\.json#7 annotation 1 \(car\): .*{message}"):
        ingest(folder_source(coco_root, label_kind="coco"), tmp_path / "store")


def test_categories_and_classes_that_differ_are_refused(coco_root: Path) -> None:
    (coco_root / "classes.csv").write_text(CLASSES.replace("car", "lorry"))
    with pytest.raises(InputError) as refused:
        folder_source(coco_root, label_kind="coco").listing()
    assert "train.json has 'car', and the classes" in str(refused.value)
    assert "val.json has 'car', and the classes" in str(refused.value)
    (coco_root / "classes.csv").unlink()
    save_json(coco_root / "annotations" / "val.json", coco("val", categories=[{"id": 1, "name": "sky"}]))
    with pytest.raises(InputError):
        folder_source(coco_root, label_kind="coco")
    renamed = coco("val")
    renamed["categories"][0]["name"] = "sky"
    save_json(coco_root / "annotations" / "val.json", renamed)
    with pytest.raises(InputError, match="All splits must have the same categories, but id 3"):
        folder_source(coco_root, label_kind="coco")


def test_an_image_of_another_size_than_its_annotations_is_named(coco_root: Path, tmp_path: Path) -> None:
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(coco_root / "images" / "train" / "train1.jpg")
    with pytest.raises(InputError, match=r"train\.json#7 says 9 x 6 and .*train1\.jpg is 10 x 6"):
        ingest(folder_source(coco_root, label_kind="coco"), tmp_path / "store")


@pytest.mark.parametrize(
    ("images", "file"),
    [
        ("{split}", "annotations/{split}.json"),
        ("{split}", "annotations/instances_{split}.json"),
        ("images/{split}", "annotations/{split}.json"),
        ("images/{split}", "annotations/instances_{split}.json"),
        ("{split}", "{split}/_annotations.coco.json"),
        ("{split}2017", "annotations/instances_{split}2017.json"),
    ],
)
def test_layouts_of_coco_are_recognised_or_named_by_flags(tmp_path: Path, images: str, file: str) -> None:
    for split in ("train", "val"):
        save_image(tmp_path / images.format(split=split) / f"{split}1.jpg")
        save_json(tmp_path / file.format(split=split), coco(split))
    flags = {"images": images, "labels": file} if "2017" in images else {}
    pairs = folder_source(tmp_path, label_kind="coco", **flags).listing().pairs  # type: ignore[arg-type]
    assert [(pair.split, pair.name) for pair in pairs] == [("train", "train1"), ("val", "val1")]


def test_one_coco_file_is_divided_by_a_rule_and_images_may_lie_in_folders_of_drives(tmp_path: Path) -> None:
    content = coco("train")
    names = [f"drive{drive}/{frame}.jpg" for drive in range(3) for frame in range(2)]
    content["images"] = [{"id": name, "file_name": name, "height": HEIGHT, "width": WIDTH} for name in names]
    content["annotations"] = [content["annotations"][0] | {"id": name, "image_id": name} for name in names]
    save_json(tmp_path / "annotations.json", content)
    for name in names:
        save_image(tmp_path / "images" / name)
    source = folder_source(tmp_path, label_kind="coco", val_fraction=0.3, group_pattern="(.*)/.*")
    pairs = source.listing().pairs
    assert [pair.split for pair in pairs] == ["train"] * 4 + ["val"] * 2
    assert len({pair.name.split("/")[0] for pair in pairs[4:]}) == 1
    with pytest.raises(InputError, match="has no split val"):
        folder_source(tmp_path, label_kind="coco")

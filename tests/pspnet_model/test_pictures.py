"""Colours of pictures mean what the legend says; a panel holds every picture of every row."""

import numpy as np
import pytest
import torch
from PIL import Image

from pspnet.labels import CITYSCAPES, IGNORE_INDEX, NYUV2_13, NYUV2_40, ClassInfo, ClassTable
from pspnet.pictures import (
    COLUMNS,
    IGNORED,
    PAPER,
    WRONG,
    colourise,
    confusion_matrix_picture,
    error_picture,
    legend,
    overlay,
    panel,
)

TABLE = ClassTable(
    name="three",
    classes=(
        ClassInfo(name="road", id=7, train_id=0, colour=(128, 64, 128)),
        ClassInfo(name="car", id=26, train_id=1, colour=(0, 0, 142)),
        ClassInfo(name="a class that occurs nowhere", id=30, train_id=2, colour=(1, 200, 3)),
    ),
)
IMAGE = np.full((2, 2, 3), 100, dtype=np.uint8)
LABEL = np.array([[0, 1], [IGNORE_INDEX, 1]], dtype=np.uint8)
PREDICTION = np.array([[0, 0], [1, 1]], dtype=np.uint8)


def colours_of(picture: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(map(int, colour)) for colour in np.unique(np.array(picture).reshape(-1, 3), axis=0)}


def test_each_class_has_its_colour_and_ignored_pixels_are_light_grey() -> None:
    assert colourise(LABEL, TABLE).tolist() == [[[128, 64, 128], [0, 0, 142]], [list(IGNORED), [0, 0, 142]]]


def test_an_overlay_mixes_image_and_colour_and_leaves_ignored_pixels() -> None:
    mixed = overlay(IMAGE, LABEL, TABLE, alpha=0.5)
    assert mixed.tolist() == [[[114, 82, 114], [50, 50, 121]], [[100, 100, 100], [50, 50, 121]]]
    assert overlay(IMAGE, LABEL, TABLE, alpha=0.0).tolist() == IMAGE.tolist()
    assert np.array_equal(IMAGE, np.full_like(IMAGE, 100))


def test_errors_are_red_unless_the_label_ignores_the_pixel() -> None:
    picture = error_picture(IMAGE, LABEL, PREDICTION)
    right, wrong, ignored = picture[0, 0], picture[0, 1], picture[1, 0]
    assert tuple(wrong) == WRONG
    assert tuple(ignored) == IGNORED
    assert len(set(right.tolist())) == 1
    assert right[0] < 100
    assert tuple(picture[1, 1]) == tuple(right)


def test_a_panel_shows_four_pictures_for_each_row_of_any_size() -> None:
    wide = np.kron(LABEL, np.ones((30, 60), np.uint8))
    tall = np.kron(LABEL, np.ones((60, 20), np.uint8))
    rows = [(np.full((*ids.shape, 3), 100, np.uint8), ids, np.zeros_like(ids)) for ids in (wide, tall)]
    picture = panel(rows, TABLE, ["first.png", "second.png"], cell_width=100)
    assert picture.width > len(COLUMNS) * 100
    assert picture.height > 50 + 300
    shown = np.array(picture)
    for colour in ((128, 64, 128), (0, 0, 142), WRONG, IGNORED, (100, 100, 100)):
        assert (shown == colour).all(axis=2).sum() > 100, colour
    assert (1, 200, 3) not in colours_of(picture), "a class that occurs nowhere is in the legend"


def test_a_panel_without_labels_shows_predictions_only() -> None:
    picture = panel([(IMAGE, None, PREDICTION)], TABLE, cell_width=100)
    colours = colours_of(picture)
    assert (0, 0, 142) in colours
    assert WRONG not in colours


def test_a_title_too_long_for_the_page_does_not_widen_it() -> None:
    rows = [(IMAGE, LABEL, PREDICTION)]
    long = panel(rows, TABLE, ["x" * 3000], cell_width=60)
    assert long.size == panel(rows, TABLE, ["x"], cell_width=60).size


def test_panels_without_rows_or_with_other_titles_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        panel([], TABLE)
    with pytest.raises(ValueError, match="one title for each row, but got 1 for 2"):
        panel([(IMAGE, LABEL, PREDICTION)] * 2, TABLE, ["one"])


@pytest.mark.parametrize("size", [(2, 2), (300, 500)])
def test_a_legend_leaves_the_picture_as_it_is_and_names_what_occurs(size: tuple[int, int]) -> None:
    ids = np.zeros(size, np.uint8)
    picture = np.random.default_rng(0).integers(0, 99, (*size, 3), dtype=np.uint8)
    page = legend(picture, ids, TABLE)
    left = (page.width - size[1]) // 2
    assert np.array_equal(np.array(page)[: size[0], left : left + size[1]], picture)
    below = colours_of(page.crop((0, size[0], page.width, page.height)))
    assert {PAPER, (128, 64, 128)} <= below
    assert not {(0, 0, 142), (1, 200, 3)} & below


def test_a_confusion_matrix_is_drawn_from_tensors_and_arrays_with_empty_classes() -> None:
    counts = np.array([[90, 10, 0], [0, 0, 0], [5, 0, 5]])
    names = TABLE.class_names
    picture = confusion_matrix_picture(counts, names)
    assert np.array_equal(np.array(picture), np.array(confusion_matrix_picture(torch.tensor(counts), names)))
    assert not np.array_equal(np.array(picture), np.array(confusion_matrix_picture(counts.T, names)))
    nothing = confusion_matrix_picture(np.zeros((3, 3), int), names)
    assert nothing.size == picture.size
    with pytest.raises(ValueError, match="must be square"):
        confusion_matrix_picture(counts[:2], names)


@pytest.mark.parametrize("table", [CITYSCAPES, NYUV2_40, NYUV2_13], ids=lambda table: table.name)
def test_no_class_looks_like_ignored_or_wrong_pixels(table: ClassTable) -> None:
    for colour in (IGNORED, WRONG):
        nearest = np.abs(table.colours.astype(int) - colour).sum(axis=1).min()
        assert nearest > 20, f"a class has nearly the colour {colour}"

"""Laws of outlines and run lengths: polygons divide the plane, and run lengths are COCO's own."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from segfleet.sources.polygons import circle_points, polygon_mask, run_length_mask

SHAPE = (23, 31)
coordinate = st.floats(-8, 40, allow_nan=False)
polygons = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=9)


def runs_of(mask: np.ndarray) -> list[int]:
    """COCO's run lengths, by the text of its format: column by column, beginning with background."""
    values = [False, *mask.T.ravel().tolist()]
    runs = [len(list(group)) for _, group in itertools.groupby(values)]
    return [runs[0] - 1, *runs[1:]]


def packed(runs: list[int]) -> str:
    """rleToString of pycocotools, line by line."""
    text = ""
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != -1 if bits & 16 else value != 0
            text += chr((bits | 32 if more else bits) + 48)
    return text


def test_a_rectangle_covers_the_pixels_whose_centres_it_holds() -> None:
    mask = polygon_mask(np.array([(2, 1), (6, 1), (6, 4), (2, 4)]), (6, 8))
    expected = np.zeros((6, 8), dtype=bool)
    expected[1:4, 2:6] = True
    assert np.array_equal(mask, expected)
    moved = polygon_mask(np.array([(2.4, 1.4), (6.4, 1.4), (6.4, 4.4), (2.4, 4.4)]), (6, 8))
    assert np.array_equal(moved, expected)


@given(points=polygons)
def test_a_pixel_is_inside_if_a_ray_from_its_centre_crosses_the_outline_an_odd_number_of_times(
    points: list[tuple[float, float]],
) -> None:
    mask = polygon_mask(np.array(points), SHAPE)
    for row, column in itertools.product(range(0, SHAPE[0], 4), range(0, SHAPE[1], 5)):
        x, y = column + 0.5, row + 0.5
        crossed, is_near = 0, False
        for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
            is_near |= min(abs(y0 - y), abs(y1 - y)) < 1e-9
            if (y0 <= y) != (y1 <= y):
                crossing = x0 + (y - y0) / (y1 - y0) * (x1 - x0)
                is_near |= abs(crossing - x) < 1e-6
                crossed += crossing > x
        assert is_near or mask[row, column] == (crossed % 2 == 1)


@given(points=polygons, middle=st.tuples(coordinate, coordinate))
def test_triangles_with_common_edges_leave_no_pixel_out_and_share_none(
    points: list[tuple[float, float]], middle: tuple[float, float]
) -> None:
    whole = polygon_mask(np.array(points), SHAPE)
    fan = np.zeros(SHAPE, dtype=int)
    for start, end in zip(points, [*points[1:], points[0]], strict=True):
        fan += polygon_mask(np.array([middle, start, end]), SHAPE)
    assert np.array_equal(fan % 2 == 1, whole)


def test_a_polygon_is_pillows_but_for_the_border() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
        radii = rng.uniform(8, 22, 12)
        points = np.stack([25 + radii * np.cos(angles), 25 + radii * np.sin(angles)], axis=1)
        picture = Image.new("L", (50, 50))
        ImageDraw.Draw(picture).polygon([tuple(point) for point in points.tolist()], fill=1)
        differs = polygon_mask(points, (50, 50)) != (np.asarray(picture) > 0)
        starts, ends = points[:, None], np.roll(points, -1, axis=0)[:, None]
        centres = (np.argwhere(differs)[:, ::-1] + 0.5)[None]
        along = np.clip(
            ((centres - starts) * (ends - starts)).sum(-1) / ((ends - starts) ** 2).sum(-1), 0, 1
        )[..., None]
        distance = np.linalg.norm(starts + along * (ends - starts) - centres, axis=-1).min(axis=0)
        assert distance.max(initial=0) < 1.5


def test_a_circle_is_a_circle_to_a_tenth_of_a_pixel() -> None:
    rows, columns = np.mgrid[:100, :100] + 0.5
    for radius in (0.8, 3.0, 12.5, 45.0):
        mask = polygon_mask(circle_points((50.2, 49.5), (50.2 + radius, 49.5)), (100, 100))
        distance = np.hypot(columns - 50.2, rows - 49.5)
        assert mask[distance < radius - 0.11].all()
        assert not mask[distance > radius + 1e-6].any()


@given(
    mask=st.integers(1, 9).flatmap(
        lambda width: st.lists(
            st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=9
        )
    )
)
def test_run_lengths_are_the_pixels_packed_or_not(mask: list[list[bool]]) -> None:
    pixels = np.array(mask)
    runs = runs_of(pixels)
    assert np.array_equal(run_length_mask(runs, pixels.shape), pixels)
    assert np.array_equal(run_length_mask(packed(runs), pixels.shape), pixels)
    assert np.array_equal(run_length_mask(packed(runs).encode(), pixels.shape), pixels)


def test_run_lengths_of_a_large_picture_are_those_that_pycocotools_packs() -> None:
    # pycocotools 2.0: mask.encode of a picture of 480 x 640 that is true in rows 100 to 299, columns 50 to 57,
    # and in rows 7 to 8 of column 600
    pixels = np.zeros((480, 640), dtype=bool)
    pixels[100:300, 50:58] = True
    pixels[7:9, 600] = True
    text = "Tag0X6h80000000000000Som7jIl_dH"
    assert packed(runs_of(pixels)) == text
    assert np.array_equal(run_length_mask(text, pixels.shape), pixels)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3, 2], "must add up to 2 x 3 pixels, but are 5"),
        ([7, -1], "but are 6"),
        ([], "but are 0"),
        ("\x7f", "is none of compressed run lengths"),
        ("P", "end within a number"),
        ("o" * 1000, "does not end"),
    ],
)
def test_run_lengths_that_do_not_fit_are_refused(counts: list[int] | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_length_mask(counts, (2, 3))

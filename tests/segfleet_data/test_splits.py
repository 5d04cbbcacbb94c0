"""Laws of dividing a folder: groups stay whole, the order of files is of no effect, lists say what they say."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspnet.errors import InputError
from segfleet.sources import Pair
from segfleet.sources.splits import SplitRule, chosen_groups


def pairs_of(names: list[str], split: str = "train") -> list[Pair]:
    return [Pair(split, name, f"images/{name}.jpg", f"labels/{name}.png") for name in names]


FRAMES = [f"drive{drive}_{frame:04d}" for drive in range(8) for frame in range(10)]


def test_all_frames_of_a_drive_are_on_one_side_and_the_drives_are_named() -> None:
    listing = SplitRule(val_fraction=0.25, group_pattern=r"(.*)_\d+").divided(pairs_of(FRAMES))
    sides = {(pair.name.split("_")[0], pair.split) for pair in listing.pairs}
    val = sorted(drive for drive, split in sides if split == "val")
    assert len(sides) == 8
    assert len(val) == 2
    assert listing.notes == [f"val is 20 of 80 images, 2 of 8 groups (seed 0): {val[0]}, {val[1]}"]


@given(order=st.permutations(FRAMES), seed=st.integers(0, 5))
def test_the_order_of_the_files_is_of_no_effect(order: list[str], seed: int) -> None:
    rule = SplitRule(val_fraction=0.3, group_pattern=r"(.*)_\d+", seed=seed)
    assert rule.divided(pairs_of(order)) == rule.divided(pairs_of(FRAMES))


def test_other_seeds_draw_other_groups() -> None:
    group_of = {name: name.split("_")[0] for name in FRAMES}
    drawn = Counter(
        group for seed in range(200) for group in chosen_groups(group_of, fraction=0.25, seed=seed)
    )
    assert sum(drawn.values()) == 400
    assert set(drawn) == set(group_of.values())
    assert max(drawn.values()) < 80  # 50 each on average


@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=9),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
def test_both_sides_have_images_and_no_group_could_be_added_to_come_nearer(
    sizes: list[int], fraction: float, seed: int
) -> None:
    group_of = {f"{group}_{number}": str(group) for group, size in enumerate(sizes) for number in range(size)}
    chosen = chosen_groups(group_of, fraction=fraction, seed=seed)
    assert 0 < len(chosen) < len(sizes)
    count, wanted = sum(sizes[int(group)] for group in chosen), fraction * sum(sizes)
    if len(chosen) < len(sizes) - 1 and count <= wanted:
        others = [size for group, size in enumerate(sizes) if str(group) not in chosen]
        assert all(abs(count + size - wanted) >= abs(count - wanted) for size in others)


def test_without_a_pattern_each_image_is_its_own_group() -> None:
    listing = SplitRule(val_fraction=0.1).divided(pairs_of(FRAMES))
    assert sum(pair.split == "val" for pair in listing.pairs) == 8
    assert listing.notes[0].startswith("val is 8 of 80 images, 8 of 80 images (seed 0): ")


def test_lists_say_what_is_train_and_val_and_the_rest_is_noted(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("# day\na\nb.jpg\n\n")
    (tmp_path / "val.txt").write_text("d\n")
    rule = SplitRule(train_list=str(tmp_path / "train.txt"), val_list=str(tmp_path / "val.txt"))
    listing = rule.divided([*pairs_of(["d", "c", "b", "a"]), *pairs_of(["e"], "test")])
    assert [(pair.split, pair.name) for pair in listing.pairs] == [
        ("test", "e"),
        ("train", "a"),
        ("train", "b"),
        ("val", "d"),
    ]
    assert listing.notes == ["in no list, left out: c"]


def test_everything_that_is_wrong_with_lists_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a\nx\ny\n")
    (tmp_path / "val.txt").write_text("a\nz\n")
    rule = SplitRule(train_list=str(tmp_path / "train.txt"), val_list=str(tmp_path / "val.txt"))
    with pytest.raises(InputError, match=r"train\.txt names x, y, of .*val\.txt names z, of .*both name a\."):
        rule.divided(pairs_of(["a", "b"]))
    (tmp_path / "val.txt").unlink()
    with pytest.raises(InputError, match="readable text file"):
        rule.divided(pairs_of(["a", "x", "y"]))


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"val_share": 1.0}, r"--val-share must be in \[0, 1\), but got 1\.0"),
        ({"val_fraction": -0.1}, r"--val-fraction must be in \[0, 1\), but got -0\.1"),
        ({"train_list": "a.txt"}, "--train-list and --val-list must be given together"),
        ({"val_share": 0.1, "val_fraction": 0.1}, "but got --val-share and --val-fraction. Give one"),
        ({"group_pattern": "(.*)"}, "without --val-fraction"),
        ({"val_fraction": 0.1, "group_pattern": "("}, "must be a regular expression"),
        ({"val_fraction": 0.1, "group_pattern": ".*"}, "must have a group in parentheses"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(given_settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SplitRule(**given_settings)


def test_images_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(InputError, match="does not match other, strange"):
        SplitRule(val_fraction=0.1, group_pattern=r"(.*)_\d+").divided(
            pairs_of([*FRAMES, "strange", "other"])
        )
    with pytest.raises(InputError, match="all 10 are of drive0"):
        SplitRule(val_fraction=0.1, group_pattern=r"(.*)_\d+").divided(pairs_of(FRAMES[:10]))
    with pytest.raises(InputError, match=r"makes 0 of 1 images val.*--val-fraction"):
        SplitRule(val_share=0.01).divided(pairs_of(["a"]))

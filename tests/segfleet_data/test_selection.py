"""Laws of the selection split: a fixed, disjoint part of train that depends on the names alone."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pspnet.errors import InputError
from pspnet.store import Store
from segfleet import ingest as module
from segfleet.ingest import ingest, summary
from segfleet.selection import choose_selection, group_of
from segfleet.sources.cityscapes import cityscapes_source
from segfleet.sources.folder import FolderSource, folder_source

CITIES = {"aachen": 12, "bochum": 6, "bremen": 10, "erfurt": 5, "ulm": 7}


def chosen(names: list[str], fraction: float) -> set[str]:
    selection = choose_selection(names, [[1, 0]] * len(names), fraction=fraction)
    return set() if selection is None else {names[index] for index in selection.indices}


@given(
    st.lists(st.text("abc_01", min_size=1), unique=True, max_size=40),
    st.floats(0, 0.5),
    st.randoms(use_true_random=False),
)
def test_the_choice_is_a_true_part_whatever_the_order(
    names: list[str], fraction: float, rng: random.Random
) -> None:
    part = chosen(names, fraction)
    shuffled = names.copy()
    rng.shuffle(shuffled)
    assert chosen(shuffled, fraction) == part
    assert bool(part) == (fraction > 0 and len(names) > 1)
    assert len(part) <= max(1, round(2 * max(1.0, fraction * len(names))))
    assert not names or part < set(names)


def test_whole_cities_are_chosen() -> None:
    names = [f"{city}_{frame:06d}_000019" for city, count in CITIES.items() for frame in range(count)]
    for fraction in (0.1, 0.2, 0.4):
        part = chosen(names, fraction)
        cities = {group_of(name) for name in part}
        assert part == {name for name in names if group_of(name) in cities}
        assert fraction / 2 <= len(part) / len(names) <= 2 * fraction


def test_one_clip_or_names_without_one_are_cut_by_name() -> None:
    for names in ([f"IMG_{k:04d}" for k in range(50)], [f"{k:04d}" for k in range(50)]):
        selection = choose_selection(names, [[1, 0]] * 50, fraction=0.1)
        assert selection is not None
        assert (selection.rule, selection.groups, len(selection.indices)) == ("name", [], 5)


@pytest.mark.parametrize("fraction", [-0.1, 0.6, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match="--selection-fraction must be from 0"):
        choose_selection(["a", "b"], [[1], [1]], fraction=fraction)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    root = tmp_path / "cityscapes"
    for split, cities in (("train", CITIES), ("val", {"munster": 2})):
        for city, count in cities.items():
            for folder, ending, shape, high in (
                ("leftImg8bit", "leftImg8bit", (8, 12, 3), 256),
                ("gtFine", "gtFine_labelIds", (8, 12), 34),
            ):
                (root / folder / split / city).mkdir(parents=True)
                for frame in range(count):
                    pixels = rng.integers(0, high, shape, dtype=np.uint8)
                    path = root / folder / split / city / f"{city}_{frame:06d}_000019_{ending}.png"
                    Image.fromarray(pixels).save(path)
    return root


def names_of(store: Store, split: str) -> list[str]:
    part = store.split(split)
    return [part.name(index) for index in range(len(part))]


def test_fit_and_selection_are_train_and_share_nothing(root: Path, tmp_path: Path) -> None:
    report = ingest(cityscapes_source(root), tmp_path / "store", selection_fraction=0.2)
    store = Store.open(tmp_path / "store")
    assert store.manifest == report.manifest
    train, fit, selection = (names_of(store, split) for split in ("train", "fit", "selection"))
    assert len(train) == 40
    assert sorted(fit + selection) == train
    assert not set(fit) & set(selection)
    for split in ("fit", "selection", "train"):
        part = store.split(split)
        assert store.manifest.num_images(split) == len(part)
        labels = np.concatenate([part.label(index).ravel() for index in range(len(part))])
        counts = np.bincount(labels, minlength=256)
        assert store.manifest.class_counts(split) == [*counts[:19], counts[255]]
    part = store.split("selection")
    whole = store.split("train")
    at = train.index(part.name(0))
    assert np.array_equal(part.image(0), whole.image(at))
    assert "selection is cut from train: whole groups" in summary(report)
    with pytest.raises(InputError, match="There are: fit, selection, train, val"):
        store.split("test")


def test_the_cut_is_the_same_for_any_shards_and_belongs_to_the_digest(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ingest(cityscapes_source(root), tmp_path / "store").manifest
    none = ingest(cityscapes_source(root), tmp_path / "none", selection_fraction=0).manifest
    monkeypatch.setattr(module, "IMAGES_PER_SHARD", 3)
    other = ingest(cityscapes_source(root), tmp_path / "other").manifest
    assert first.selection == other.selection is not None
    assert none.selection is None
    assert none.digest != first.digest
    assert none.split_names == ["train", "val"]
    with pytest.raises(InputError, match="There are: train, val"):
        Store.open(tmp_path / "none").split("selection")


def test_a_store_cut_otherwise_is_not_taken_for_the_one_asked_for(root: Path, tmp_path: Path) -> None:
    source = cityscapes_source(root)
    first = ingest(source, tmp_path / "store")
    with pytest.raises(InputError, match=r"was cut with 0\.1 and got 0\.3"):
        ingest(source, tmp_path / "store", selection_fraction=0.3)
    assert not ingest(source, tmp_path / "store", overwrite=True).is_new
    again = ingest(source, tmp_path / "store", selection_fraction=0.3, overwrite=True)
    assert again.is_new
    assert again.manifest.digest != first.manifest.digest
    ingest(source, tmp_path / "none", selection_fraction=0)
    older = ingest(source, tmp_path / "none")
    assert (older.is_new, "no selection split" in older.notes[-1]) == (False, True)


def test_a_folder_of_its_own_called_so_is_not_hidden(tmp_path: Path) -> None:
    for split in ("train", "selection"):
        for kind in ("", "annot"):
            (tmp_path / f"{split}{kind}").mkdir()
        for number in range(3):
            pixels = np.random.default_rng(number + len(split)).integers(0, 2, (4, 4), dtype=np.uint8)
            Image.fromarray(pixels * 255).save(tmp_path / split / f"{number}.png")
            Image.fromarray(pixels).save(tmp_path / f"{split}annot" / f"{number}.png")
    (tmp_path / "classes.csv").write_text("id,name,r,g,b\n0,road,128,64,128\n1,tree,0,128,0\n")
    table = folder_source(tmp_path, val_share=0.1).class_table
    folders = {split: (tmp_path / split, tmp_path / f"{split}annot") for split in ("train", "selection")}
    manifest = ingest(FolderSource(tmp_path, table, folders), tmp_path / "store").manifest
    assert manifest.selection is None
    assert len(Store.open(tmp_path / "store").split("selection")) == 3

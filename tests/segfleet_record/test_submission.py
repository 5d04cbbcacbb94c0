"""A submission is what the Cityscapes server takes; stores of other data sets work in all other ways."""

import runpy
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pspnet.errors import InputError
from pspnet.labels import CITYSCAPES, NYUV2_40, ClassTable
from pspnet.metrics import ConfusionMatrix
from pspnet.store import Store
from segfleet.config import WorkersConfig
from segfleet.evaluation import evaluate_model, write_evaluation
from segfleet.package import SegmentationModel, load_package, package_model
from segfleet.parallel_evaluation import compute_as_one_worker
from segfleet.prediction import predict_pictures
from segfleet.protocol import Protocol, ViewOptions
from segfleet.sources.cityscapes import cityscapes_source
from segfleet.sources.demo import draw_demo
from segfleet.submission import ENDING, write_submission
from tests.stores import Picture, write_store

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture(scope="module")
def street_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three drawn scenes with labels as val, and one without as test."""
    folder = tmp_path_factory.mktemp("streets")
    draw_demo(folder / "demo", num_train=1, num_val=3, size=(96, 48))
    source = cityscapes_source(folder / "demo")
    scenes: list[Picture] = []
    for pair in source.listing().pairs:
        image, ids = source.read(pair)
        if pair.split == "val":
            assert ids is not None
            scenes.append((pair.name, image, CITYSCAPES.train_id_of(ids, where=pair.name)))
    unlabelled: Picture = ("nowhere_000000_000019", scenes[0][1], None)
    return write_store(folder / "store", CITYSCAPES, {"val": scenes, "test": [unlabelled]})


def model_of(table: ClassTable, write_checkpoint: Callable[..., Path], folder: Path) -> SegmentationModel:
    checkpoint = write_checkpoint(folder / "epoch_0001", classes=table, seed=1)
    return load_package(package_model(checkpoint, folder / "package"), device="cpu")


@pytest.fixture(scope="module")
def street_model(
    write_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> SegmentationModel:
    return model_of(CITYSCAPES, write_checkpoint, tmp_path_factory.mktemp("street_model"))


def test_the_files_are_found_by_the_official_evaluator_and_score_what_we_score(
    street_model: SegmentationModel, street_store: Store, tmp_path: Path
) -> None:
    evaluator = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    protocol = ViewOptions(protocol="semseg").protocol_on(street_store.digest, "val", crop_size=33)
    paths = write_submission(street_model, street_store, protocol, tmp_path / "out")
    args = evaluator.CArgs()
    args.predictionPath, args.predictionWalk = str(tmp_path / "out"), None
    confusion = ConfusionMatrix(19)
    split = street_store.split("val")
    for index, path in enumerate(paths[:-1]):
        label_file = f"{split.name(index)}_gtFine_labelIds.png"
        assert evaluator.getPrediction(args, label_file) == str(path)
        with Image.open(path) as picture:
            assert picture.mode == "L"
            ids = np.asarray(picture)
        assert ids.shape == (48, 96)
        train_ids = CITYSCAPES.train_id_of(ids, where=path.name)
        assert (train_ids < 19).all()
        confusion.update(torch.from_numpy(train_ids), torch.tensor(split.label(index)))
    evaluation = evaluate_model(street_model, street_store, protocol)
    assert torch.equal(confusion.counts, evaluation.confusion)
    assert evaluation.scores.category_miou is not None
    with zipfile.ZipFile(paths[-1]) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [path.name for path in paths[:-1]]
        assert archive.read(paths[0].name) == paths[0].read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in paths}


def test_a_split_without_labels_can_be_submitted(
    street_model: SegmentationModel, street_store: Store, tmp_path: Path
) -> None:
    protocol = Protocol(store_digest=street_store.digest, split="test")
    paths = write_submission(street_model, street_store, protocol, tmp_path)
    assert [path.name for path in paths] == [f"nowhere_000000_000019{ENDING}", "submission.zip"]
    with pytest.raises(InputError, match="none of the 1 images of 'test' has one"):
        evaluate_model(street_model, street_store, protocol)


@pytest.fixture
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("cpus_per_worker", [1, 2])
def test_the_job_submits_what_it_scores(
    street_model: SegmentationModel,
    street_store: Store,
    tmp_path: Path,
    cpus_per_worker: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a process of three threads, with which other kernels compute the logits and round otherwise."""
    seen = set()
    predict = SegmentationModel.predict

    def noted(*arguments: Any, **views: Any) -> Any:
        seen.add(torch.get_num_threads())
        return predict(*arguments, **views)

    monkeypatch.setattr(SegmentationModel, "predict", noted)
    monkeypatch.chdir(tmp_path)
    job = [
        *("evaluate.py", "--model", street_model.source, "--store", str(street_store.location.path)),
        *("--precision", "bf16", "--cpus-per-worker", str(cpus_per_worker)),
    ]
    for flags in ([], ["--submission", "out"]):
        torch.set_num_threads(3)
        monkeypatch.setattr(sys, "argv", [*job, *flags])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(JOBS / "evaluate.py"), run_name="__main__")
        assert not ended.value.code
    assert seen == {cpus_per_worker}
    counts = np.load("evaluation/image_counts.npz")
    split = street_store.split("val")
    for index, (name, expected) in enumerate(zip(counts["names"], counts["confusion"], strict=True)):
        with Image.open(tmp_path / "out" / f"{name}{ENDING}") as picture:
            train_ids = CITYSCAPES.train_id_of(np.asarray(picture), where=name)
        confusion = ConfusionMatrix(19)
        confusion.update(torch.from_numpy(train_ids), torch.tensor(split.label(index)))
        np.testing.assert_array_equal(confusion.counts.numpy(), expected)


def test_a_submission_by_a_gpu_that_is_not_there_is_refused(street_model: SegmentationModel) -> None:
    assert street_model.device.type == "cpu"
    with pytest.raises(InputError, match="--use-gpu True must find a GPU"):
        compute_as_one_worker(street_model, WorkersConfig(use_gpu=True))


def test_what_the_server_would_refuse_is_said_before_hours_are_spent(
    street_model: SegmentationModel,
    street_store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The split test has one image of 48 x 96; val has three."""

    def said(split: str) -> str:
        protocol = Protocol(store_digest=street_store.digest, split=split)
        write_submission(street_model, street_store, protocol, tmp_path / split)
        note, _, rest = capsys.readouterr().out.partition("\n")
        assert "note" not in rest
        return note if note.startswith("note") else ""

    assert said("val").endswith("will refuse this: 3 of 'val', 3 of another size")
    assert said("test").endswith("will refuse this: 1 of 'test', 1 of another size")
    monkeypatch.setattr("segfleet.submission.SIZE", (48, 96))
    assert said("test").endswith("1 of 'test', 0 of another size")
    monkeypatch.setattr("segfleet.submission.NUM_IMAGES", 1)
    assert said("test") == ""
    monkeypatch.setattr("segfleet.submission.NUM_IMAGES", 3)
    assert said("val").endswith("3 of 'val', 0 of another size")


def test_a_submission_that_the_memory_does_not_hold_is_one_plain_message_without_a_zip(
    street_model: SegmentationModel, street_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predict(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(SegmentationModel, "predict", predict)
    protocol = Protocol(store_digest=street_store.digest, split="test", window=65)
    with pytest.raises(InputError, match=r"nowhere_000000_000019 of 48 x 96 .*--window below 65 takes less"):
        write_submission(street_model, street_store, protocol, tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_that_are_not_cityscapes_are_refused(
    street_model: SegmentationModel, street_store: Store, tmp_path: Path
) -> None:
    image = np.zeros((33, 33, 3), np.uint8)
    other = write_store(tmp_path / "store", CITYSCAPES, {"val": [("holiday", image, None)]})
    protocol = Protocol(store_digest=other.digest, split="val")
    with pytest.raises(InputError, match="but one is 'holiday'"):
        write_submission(street_model, other, protocol, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rooms_are_refused_as_a_submission_and_work_in_all_other_ways(
    write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Two rooms of NYU Depth V2's 40 classes, one of them smaller than the sliding window."""
    random = np.random.default_rng(0)
    rooms: list[Picture] = []
    for number, (height, width) in enumerate(((48, 64), (30, 40))):
        image = random.integers(0, 256, (height, width, 3), np.uint8)
        label = np.kron(random.integers(0, 40, (height // 2, width // 2)), np.ones((2, 2))).astype(np.uint8)
        label[:3] = 255
        rooms.append((f"{number:04d}", image, label))
    store = write_store(tmp_path / "store", NYUV2_40, {"val": rooms})
    model = model_of(NYUV2_40, write_checkpoint, tmp_path)
    for name in ("whole", "semseg", "semseg_ms", "mmseg", "mmseg_ms"):
        protocol = ViewOptions(protocol=name).protocol_on(store.digest, "val", crop_size=33)
        evaluation = evaluate_model(model, store, protocol, has_boundaries=True, num_examples=1)
        assert evaluation.scores.category_iou == {}
        assert evaluation.scores.category_miou is None
        assert evaluation.scores.mean_boundary_f is not None
        assert int(evaluation.confusion.sum()) == 45 * 64 + 27 * 40
    paths = write_evaluation(evaluation, model, store, tmp_path / "evaluation", num_examples=1)
    assert all(path.is_file() for path in paths)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray(rooms[0][1]).save(pictures / "room.png")
    views = ViewOptions(protocol="semseg").views(33)
    assert len(predict_pictures(model, pictures, tmp_path / "out", views=views).label_paths) == 1
    with pytest.raises(InputError, match="Cityscapes' 19 classes, but this one's are those of 'nyuv2_40'"):
        write_submission(model, store, protocol, tmp_path / "submission")

"""evaluate, promote, predict and sync_tracking as a person calls them: exit codes, one plain message, results."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pspnet.store import Store
from segfleet.config import TrackingConfig
from segfleet.package import SegmentationModel, package_model
from segfleet.registry import aliases_of, register

pytestmark = pytest.mark.filterwarnings(
    "ignore::sqlalchemy.exc.SADeprecationWarning"  # MLflow 3.17 uses what SQLAlchemy 2.1 deprecates
)

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run a job in this process and return its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(job: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [job, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(JOBS / job), run_name="__main__")
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def name(
    local: TrackingConfig, write_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A model whose champion sees cars everywhere, and whose challenger sees road, of which there is more."""
    folder = tmp_path_factory.mktemp("registered")
    for favourite in (1, 0):
        checkpoint = write_checkpoint(folder / f"epoch_000{favourite}", favourite=favourite)
        register(local.tracking_uri, "roads", package_model(checkpoint, folder / f"package_{favourite}"))
    return "roads"


@pytest.mark.slow
def test_evaluate_prints_the_scores_and_their_protocol(
    call: Call, local: TrackingConfig, name: str, store: Store, tmp_path: Path
) -> None:
    model = f"models:/{name}@challenger"
    code, out, _ = call(
        "evaluate.py", "--model", model, "--store", store.location.path, "--tracking-uri", local.tracking_uri
    )
    assert code == 0
    for text in ("mIoU", "mean accuracy", "pixel accuracy", store.digest[:12], "single-scale", "whole image"):
        assert text in out
    arguments = ("--model", model, "--store", store.location.path, "--tracking-uri", local.tracking_uri)
    code, shared, _ = call(
        "evaluate.py", *arguments, "--protocol", "semseg", "--boundaries", "True", "--num-workers", 2
    )
    assert code == 0
    for text in ("boundary F-score", "with flip", "sliding window"):
        assert text in shared
    assert {path.name for path in (tmp_path / "evaluation").iterdir()} == {
        "scores.json",
        "image_counts.npz",
        "confusion_matrix.png",
        "worst.png",
        "best.png",
    }


def test_a_submission_of_other_classes_than_cityscapes_is_one_plain_message(
    call: Call, local: TrackingConfig, name: str, store: Store, tmp_path: Path
) -> None:
    model = ("--model", f"models:/{name}@challenger", "--tracking-uri", local.tracking_uri)
    code, _, err = call("evaluate.py", *model, "--store", store.location.path, "--submission", "out")
    assert code == 2
    assert err.startswith("error: A submission to the Cityscapes server must be")
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--num-examples", 0), "--num-examples must be 1 or more, but got 0"),
        (("--output", "notes"), "--output must be a folder one can write to, but notes is not"),
        (("--scales", "nan"), "scales must be one or more positive numbers, but got nan"),
        (("--submission", "out", "--num-workers", 2), "--submission must come without --num-workers"),
        (("--submission", "out", "--compare-with", "notes"), "--submission must come without --num-workers"),
        (("--compare-with", "notes"), "--compare-with must be the scores.json that jobs/evaluate.py wrote"),
        (("--compare-with", "absent"), "--compare-with must be the scores.json that jobs/evaluate.py wrote"),
        (("--compare-with", "."), "--compare-with must be the scores.json that jobs/evaluate.py wrote"),
    ],
)
def test_what_evaluate_could_not_do_or_write_is_refused_before_an_image_is_seen(
    call: Call,
    local: TrackingConfig,
    name: str,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[object, ...],
    said: str,
) -> None:
    def see(*_: object, **__: object) -> None:
        pytest.fail("an image is seen")

    monkeypatch.setattr("segfleet.parallel_evaluation.evaluate_model", see)
    (tmp_path / "notes").write_text("mine")
    model = ("--model", f"models:/{name}@challenger", "--tracking-uri", local.tracking_uri)
    code, _, err = call("evaluate.py", *model, "--store", store.location.path, *flags)
    assert code == 2
    assert err.startswith(f"error: {said}")
    assert len(err.splitlines()) == 1
    assert (tmp_path / "notes").read_text() == "mine"


def test_two_evaluations_under_one_protocol_are_shown_side_by_side(
    call: Call, local: TrackingConfig, name: str, store: Store, tmp_path: Path
) -> None:
    """Version 1 sees cars everywhere, which are the smaller part, version 2 the road."""
    given = ("--store", store.location.path, "--tracking-uri", local.tracking_uri)
    assert call("evaluate.py", "--model", f"models:/{name}/1", *given, "--output", "one")[0] == 0
    arguments = ("--model", f"models:/{name}/2", *given, "--compare-with", "one/scores.json")
    code, out, _ = call("evaluate.py", *arguments, "--output", "two")
    assert code == 0
    one, two = (
        json.loads((tmp_path / folder / "scores.json").read_text())["scores"] for folder in ("one", "two")
    )
    assert two["miou"] > one["miou"]
    assert f"earlier: models:/{name}/1, one/scores.json" in out
    rows = [line.split() for line in out.partition("earlier: ")[2].splitlines()]
    for words, earlier, now in (
        (["mIoU"], one["miou"], two["miou"]),
        (["pixel", "accuracy"], one["pixel_accuracy"], two["pixel_accuracy"]),
        (["road"], one["class_iou"]["road"], two["class_iou"]["road"]),
        (["car"], one["class_iou"]["car"], two["class_iou"]["car"]),
    ):
        assert [*words, f"{now:.4f}", f"{earlier:.4f}", f"{now - earlier:+.4f}"] in rows
    assert ["sky", "-", "-"] in rows
    code, _, err = call("evaluate.py", *arguments, "--output", "one")
    assert code == 2
    assert err.startswith("error: --output must be another folder than that of --compare-with")
    assert json.loads((tmp_path / "one/scores.json").read_text())["scores"] == one


def test_an_evaluation_under_another_protocol_is_not_compared_nor_one_of_other_content(
    call: Call,
    local: TrackingConfig,
    name: str,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ("--model", f"models:/{name}/1", "--tracking-uri", local.tracking_uri)
    given = (*model, "--store", store.location.path)
    assert call("evaluate.py", *given, "--output", "one")[0] == 0
    record = json.loads((tmp_path / "one/scores.json").read_text())
    monkeypatch.setattr(SegmentationModel, "predict", lambda *_, **__: pytest.fail("an image is seen"))

    def refused(*flags: object) -> str:
        code, _, err = call("evaluate.py", *given, "--output", "two", *flags)
        assert code == 2
        assert len(err.splitlines()) == 1
        assert not (tmp_path / "two").exists()
        return err

    err = refused("--compare-with", "one/scores.json", "--flip", "True", "--precision", "bf16")
    for text in ("flip True and False", "precision bf16 and fp32", record["protocol_digest"], "same flags"):
        assert text in err
    scores = record["scores"]
    for content, said in (
        (json.dumps(record)[:-9], "must be JSON"),
        ("[]", "must be of type dict"),
        (json.dumps({"model": "m"}), "scores must be of type dict"),
        (json.dumps(record | {"scores": scores | {"miou": "0.5"}}), "miou, must be of type float"),
        (json.dumps(record | {"scores": scores | {"protocol": {}}}), "must have the field"),
        (json.dumps(record | {"scores": scores | {"class_iou": {"road": 0.5}}}), "an IoU of each class"),
    ):
        (tmp_path / "damaged.json").write_text(content)
        assert said in refused("--compare-with", "damaged.json")


@pytest.mark.parametrize(
    ("job", "flags"), [("evaluate.py", ("--model", "models:/roads/1")), ("promote.py", ("--name", "roads"))]
)
def test_an_image_that_the_memory_does_not_hold_is_one_plain_message(
    call: Call,
    local: TrackingConfig,
    name: str,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    job: str,
    flags: tuple[str, ...],
) -> None:
    def predict(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(SegmentationModel, "predict", predict)
    code, _, err = call(job, *flags, "--store", store.location.path, "--tracking-uri", local.tracking_uri)
    assert code == 2
    assert err.startswith("error: Each image must fit into the memory of")
    assert "--window 713 or less takes less" in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_promote_refuses_with_3_and_promotes_with_0(
    call: Call, local: TrackingConfig, name: str, store: Store
) -> None:
    model = ("--name", name, "--tracking-uri", local.tracking_uri)
    arguments: tuple[object, ...] = (*model, "--store", store.location.path)
    code, out, _ = call("promote.py", *arguments, "--min-gain", 0.9)
    assert code == 3
    assert "version 2 refused: the gain in mIoU" in out
    arguments = (*arguments, "--class-floors", "car", 1.0)
    code, out, _ = call("promote.py", *arguments, "--dry-run", "True")
    assert code == 0
    assert "would be promoted" in out
    assert aliases_of(local.tracking_uri, name)["champion"] == 1
    code, out, _ = call("promote.py", *arguments)
    assert code == 0
    assert "version 2 promoted" in out
    assert aliases_of(local.tracking_uri, name)["champion"] == 2
    code, out, _ = call("promote.py", *model, "--history", "True")
    assert code == 0
    assert [line.split("version 2 ")[1].split(",")[0] for line in out.splitlines()] == ["refused", "promoted"]
    code, out, _ = call("promote.py", *model, "--rollback", "True")
    assert code == 0
    assert "version 1 is the champion again" in out
    assert aliases_of(local.tracking_uri, name)["champion"] == 1


def test_predict_skips_a_bad_picture_and_says_so(
    call: Call, local: TrackingConfig, name: str, images: list[np.ndarray], tmp_path: Path
) -> None:
    pictures, out_dir = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    Image.fromarray(images[0]).save(pictures / "good.jpg")
    (pictures / "bad.jpg").write_text("no picture")
    model = ("--model", f"models:/{name}/1", "--tracking-uri", local.tracking_uri)
    code, out, err = call("predict.py", *model, "--input", pictures, "--output", out_dir)
    assert code == 0
    assert "1 pictures segmented" in out
    assert "1 skipped" in out
    assert "bad.jpg" in err
    with Image.open(out_dir / "good_label.png") as label:
        assert np.unique(np.asarray(label)).tolist() == [26]

    (pictures / "good.jpg").unlink()
    code, _, err = call("predict.py", *model, "--input", pictures, "--output", out_dir)
    assert code == 2
    assert err.startswith("error: At least one picture must be readable")


@pytest.mark.parametrize(
    ("job", "flags"),
    [
        ("evaluate.py", ("--model", "models:/absent@champion", "--store", "{store}")),
        ("promote.py", ("--name", "absent", "--store", "{store}")),
        ("predict.py", ("--model", "models:/absent@champion", "--input", ".", "--output", "out")),
    ],
)
def test_a_model_that_is_not_registered_is_one_plain_message_with_the_names_that_are(
    call: Call,
    local: TrackingConfig,
    name: str,
    store: Store,
    job: str,
    flags: tuple[str, ...],
    tmp_path: Path,
) -> None:
    given = [flag.format(store=store.location.path) for flag in flags]
    code, _, err = call(job, *given, "--tracking-uri", local.tracking_uri)
    assert code == 2
    assert err.startswith("error: There is no registered model 'absent'")
    assert name in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize("job", ["evaluate.py", "promote.py"])
def test_a_store_that_is_not_there_is_one_plain_message(call: Call, job: str, tmp_path: Path) -> None:
    which = ("--model", "models:/x@y") if job == "evaluate.py" else ("--name", "x")
    code, _, err = call(job, *which, "--store", tmp_path / "absent")
    assert code == 2
    assert "absent" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("job", ["evaluate.py", "promote.py", "predict.py", "sync_tracking.py"])
def test_help_explains_every_flag(call: Call, job: str) -> None:
    code, out, _ = call(job, "--help")
    assert code == 0
    assert "MLflow server or database" in " ".join(out.replace("│", " ").split())


def test_sync_tracking_without_anything_to_send_says_so(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("sync_tracking.py", "--storage-dir", tmp_path)
    assert code == 0
    assert "0 of 0 unsent runs" in out
    code, _, err = call("sync_tracking.py", "--storage-dir", tmp_path / "absent")
    assert code == 2
    assert "absent" in err

"""Laws of model packages and of the registry, on a database of its own."""

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pspnet.errors import InputError
from pspnet.inference import predict
from pspnet.labels import ClassTable
from pspnet.model import PSPNet
from segfleet import registry, tracking, tracking_server
from segfleet.checkpoint import load_checkpoint
from segfleet.config import TrackingConfig
from segfleet.package import DamagedPackageError, digest, load_package, package_model
from segfleet.protocol import Protocol
from segfleet.registry import fetch, register
from segfleet.scores import Scores

pytestmark = pytest.mark.filterwarnings(
    "ignore::sqlalchemy.exc.SADeprecationWarning"  # MLflow 3.17 uses what SQLAlchemy 2.1 deprecates
)


@pytest.fixture(scope="module")
def package(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package_model(checkpoint, tmp_path_factory.mktemp("packages") / "package")


@pytest.fixture
def copied(package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package, tmp_path / "package"))


def expected(checkpoint: Path, image: np.ndarray) -> np.ndarray:
    loaded = load_checkpoint(checkpoint)
    model = PSPNet.from_architecture(loaded.state["architecture"])
    model.load_state_dict(loaded.model_state)
    state = loaded.state
    return predict(model, image, mean=state["mean"], std=state["std"], device="cpu")


def test_a_package_predicts_what_its_checkpoint_does_at_three_sizes(
    checkpoint: Path, package: Path, images: list[np.ndarray]
) -> None:
    model = load_package(package, device="cpu")
    for image in images:
        assert np.array_equal(model.predict(image), expected(checkpoint, image))


def test_a_package_is_data_and_says_what_it_is(package: Path, class_table: ClassTable) -> None:
    assert sorted(path.name for path in package.iterdir()) == ["README.md", "model.json", "model.safetensors"]
    model = load_package(package, device="cpu")
    assert model.class_table == class_table
    assert model.scores == Scores(
        miou=0.5,
        mean_accuracy=0.625,
        pixel_accuracy=0.75,
        class_iou={"road": 0.75, "car": 0.25, "sky": None},
        protocol=Protocol(store_digest="5" * 64, split="val"),
    )
    card = (package / "README.md").read_text()
    assert "| road | 0.7500 |" in card
    assert "whole image" in card


def test_the_same_checkpoint_gives_the_same_package(checkpoint: Path, package: Path, tmp_path: Path) -> None:
    again = package_model(checkpoint, tmp_path / "again")
    assert digest(again) == digest(package)
    assert digest(package_model(checkpoint, again)) == digest(package)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.mark.parametrize("damage", ["flipped byte", "cut", "missing"])
def test_damaged_weights_are_refused(copied: Path, damage: str) -> None:
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(content if damage == "flipped byte" else content[:-1])
    with pytest.raises(DamagedPackageError, match=r"model\.safetensors"):
        load_package(copied)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"architecture": {"num_classes": 4, "backbone": "resnet18", "head_channels": 8}},
        {"architecture": {"num_classes": 3, "backbone": "resnet9000"}},
        {"class_table": {"name": "three"}},
        {"mean": None},
        {"weights": None},
        {"scores": {"miou": 1}},
    ],
)
def test_a_description_that_does_not_fit_is_a_plain_error(copied: Path, change: dict[str, object]) -> None:
    path = copied / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match="must"):
        load_package(copied)


@pytest.mark.parametrize("text", ["", "[]", "{", "\udcff"])
def test_a_description_that_is_no_json_object_is_a_plain_error(copied: Path, text: str) -> None:
    (copied / "model.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="must"):
        load_package(copied)


def test_the_first_version_is_challenger_and_champion_and_the_next_challenger_only(
    local: TrackingConfig, package: Path, tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    assert register(local.tracking_uri, "first", package) == 1
    assert registry.aliases_of(local.tracking_uri, "first") == {"challenger": 1, "champion": 1}
    other = package_model(write_checkpoint(tmp_path / "epoch_0001", favourite=1), tmp_path / "package")
    assert register(local.tracking_uri, "first", other) == 2
    assert registry.aliases_of(local.tracking_uri, "first") == {"challenger": 2, "champion": 1}
    found = registry.find_version(local.tracking_uri, "first", "champion")
    assert (int(found.version), found.aliases) == (1, ["champion"])
    # the old package again: found, not doubled, and it does not become the challenger again
    assert register(local.tracking_uri, "first", package) == 1
    assert registry.aliases_of(local.tracking_uri, "first") == {"challenger": 2, "champion": 1}
    client = tracking_server.client(local.tracking_uri)
    assert len(client.search_model_versions("name='first'")) == 2


def test_of_twin_versions_the_oldest_stays(local: TrackingConfig, package: Path) -> None:
    """urllib sends a create_model_version again when its answer is lost."""
    register(local.tracking_uri, "twins", package)
    client = tracking_server.client(local.tracking_uri)
    first = client.get_model_version("twins", "1")
    location = client.get_model_version_download_uri("twins", "1")
    client.create_model_version("twins", location, tags=first.tags)
    assert register(local.tracking_uri, "twins", package) == 1
    assert [int(item.version) for item in client.search_model_versions("name='twins'")] == [1]


def test_a_version_belongs_to_its_run_and_carries_its_scores(
    local: TrackingConfig, checkpoint: Path, tmp_path: Path
) -> None:
    run_id = tracking.open_run(local, run_name="r", key="r", parent_run_id=None, tags={}, params={})
    package = package_model(checkpoint, tmp_path / "package", run_id=run_id)
    register(local.tracking_uri, "of-run", package, run_id=run_id)
    client = tracking_server.client(local.tracking_uri)
    version = client.get_model_version("of-run", "1")
    assert version.run_id == run_id
    assert version.tags["miou"] == "0.5000"
    assert "whole image" in version.tags["protocol"]
    measured = Scores.from_dict(
        registry.fetch(f"models:/{version.name}/{version.version}", tracking_uri=local.tracking_uri).info[
            "scores"
        ]
    ).protocol
    assert version.tags["protocol_digest"] == measured.digest
    tags = client.get_logged_model(version.tags[registry.MODEL_ID_TAG]).tags
    assert tags["segfleet.protocol_digest"] == measured.digest
    outputs = client.get_run(run_id).outputs
    assert outputs is not None
    assert [model.model_id for model in outputs.model_outputs] == [version.tags[registry.MODEL_ID_TAG]]
    metrics = client.get_logged_model(version.tags[registry.MODEL_ID_TAG]).metrics or []
    assert {metric.key: metric.value for metric in metrics} == {
        "registered/miou": 0.5,
        "registered/mean_accuracy": 0.625,
        "registered/pixel_accuracy": 0.75,
    }


def test_what_is_fetched_predicts_what_the_checkpoint_does(
    local: TrackingConfig, checkpoint: Path, package: Path, images: list[np.ndarray]
) -> None:
    register(local.tracking_uri, "fetched", package)
    for address in ("models:/fetched@champion", "models:/fetched/1", str(package)):
        model = fetch(address, tracking_uri=local.tracking_uri, device="cpu")
        assert np.array_equal(model.predict(images[0]), expected(checkpoint, images[0]))
    assert fetch("models:/fetched@champion", tracking_uri=local.tracking_uri).source == "models:/fetched/1"


def test_a_version_whose_artifacts_were_exchanged_is_refused(
    local: TrackingConfig, package: Path, tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    register(local.tracking_uri, "exchanged", package)
    client = tracking_server.client(local.tracking_uri)
    model = client.get_logged_model(client.get_model_version("exchanged", "1").tags[registry.MODEL_ID_TAG])
    other = package_model(write_checkpoint(tmp_path / "epoch_0001", seed=1), tmp_path / "package")
    client.log_model_artifacts(model.model_id, str(other), "data/package")
    with pytest.raises(DamagedPackageError, match="must be the package that was registered"):
        fetch("models:/exchanged/1", tracking_uri=local.tracking_uri)


def test_a_name_that_is_not_registered_is_refused_with_those_that_are(
    local: TrackingConfig, package: Path
) -> None:
    register(local.tracking_uri, "known", package)
    with pytest.raises(InputError, match=r"no registered model 'unknown'.*There are: .*known"):
        fetch("models:/unknown@champion", tracking_uri=local.tracking_uri)
    with pytest.raises(InputError, match=r"no version or alias 'best'.*known@champion \(version 1\)"):
        fetch("models:/known@best", tracking_uri=local.tracking_uri)
    with pytest.raises(InputError, match=r"no version or alias '7'.*known/1"):
        fetch("models:/known/7", tracking_uri=local.tracking_uri)


@pytest.mark.parametrize("address", ["models:known@champion", "models:/known", "models:/a/b/c", "models:/a@"])
def test_an_address_that_names_no_version_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="models:/name@alias"):
        fetch(address)


def test_a_folder_that_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no model\.json in"):
        fetch(str(tmp_path / "nothing"))


@pytest.mark.parametrize("name", ["a/b", "a:b", "", "a@b"])
def test_a_name_that_cannot_be_addressed_is_refused(name: str, local: TrackingConfig, package: Path) -> None:
    with pytest.raises(InputError, match="registered_model_name must"):
        register(local.tracking_uri, name, package)


def test_a_registration_that_fails_leaves_nothing_behind(
    local: TrackingConfig, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("the disk is full")

    monkeypatch.setattr(MlflowClient, "create_model_version", refuse)
    client = tracking_server.client(local.tracking_uri)
    experiment = tracking.find_experiment(client, local.tracking_uri, "segfleet")
    before = len(client.search_logged_models([experiment]))
    with pytest.raises(InputError, match="the disk is full"):
        register(local.tracking_uri, "half-made", package)
    assert "half-made" not in [model.name for model in client.search_registered_models()]
    assert len(client.search_logged_models([experiment])) == before


def test_an_absent_server_is_a_plain_error_within_ten_seconds(package: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(InputError, match="MLflow server must answer"):
        register(uri, "name", package)
    with pytest.raises(InputError, match="MLflow server must answer"):
        fetch("models:/name@champion", tracking_uri=uri)
    assert time.monotonic() - started < 10


def test_an_image_of_another_kind_is_refused(package: Path) -> None:
    model = load_package(package, device="cpu")
    for image in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)):
        with pytest.raises(InputError, match="uint8 of shape"):
            model.predict(image)


def test_a_model_is_in_evaluation_mode(package: Path) -> None:
    network = load_package(package, device="cpu").network
    assert not network.training
    assert all(not torch.isnan(tensor).any() for tensor in network.state_dict().values())

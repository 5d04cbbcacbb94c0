"""The MLflow registry, which holds model packages as versions with the aliases challenger and champion.

A version holds the package as an MLflow pyfunc whose loader is this module: `mlflow.pyfunc.load_model` works
where segfleet is installed, with MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false.
"""

import contextlib
import functools
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pspnet.errors import InputError
from pspnet.json_values import shown
from segfleet import provenance, tracking, tracking_server
from segfleet.config import TrackingConfig
from segfleet.faults import fault
from segfleet.package import (
    MODEL_FILE,
    DamagedPackageError,
    SegmentationModel,
    digest,
    load_package,
    model_card,
)
from segfleet.protocol import protocol_tags
from segfleet.scores import Scores
from segfleet.secret import masked

import mlflow.artifacts  # isort: skip  (after tracking_server, which sets MLflow's environment)
from mlflow import MlflowClient  # isort: skip
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric  # isort: skip
from mlflow.entities.model_registry import ModelVersion  # isort: skip
from mlflow.exceptions import MlflowException  # isort: skip

PACKAGE_DIR = "package"
CHALLENGER, CHAMPION = "challenger", "champion"
PACKAGE_TAG = "segfleet.package"
MODEL_ID_TAG = "segfleet.model_id"
UNFINISHED_TAG = "segfleet.unfinished"
"""A version carries it until its aliases are set."""
REQUIREMENTS = ("torch", "torchvision", "numpy", "safetensors", "pillow", "mlflow")


_MODEL_FILES = {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "data"}
_FLAVOR_KEYS = {"loader_module", "data", "env", "python_version", "streamable", "code"}
_MAX_MLMODEL_BYTES = 2**20


def register(tracking_uri: str, name: str, package_dir: str | Path, *, run_id: str = "") -> int:
    """Make the package a version of the registered model `name`, and return its number.

    The same package is registered once: calling again finds its version, and completes what died in between. A
    new version becomes the challenger, and the champion where there is none.
    """
    check_name(name)
    info = load_package(package_dir, device="cpu").info
    package_digest = digest(package_dir)
    tracking_server.check_server(tracking_uri)
    with tracking_server.plain_errors(tracking_uri):
        client = tracking_server.client(tracking_uri)
        version = _version_of_package(client, name, package_digest)
        if version is None:
            model = _log_model(client, tracking_uri, name, Path(package_dir), info, package_digest, run_id)
            fault("registry.uploaded")
            try:
                with _as_default(tracking_uri):
                    version = _create_version(client, name, model, info, package_digest, run_id)
            except BaseException:
                # Only an answer may have been lost: a version's model is never deleted.
                with contextlib.suppress(MlflowException, OSError):
                    if _version_of_package(client, name, package_digest) is None:
                        _delete_model(client, model)
                raise
        fault("registry.version")
        aliases = client.get_registered_model(name).aliases
        if UNFINISHED_TAG in version.tags or CHALLENGER not in aliases:
            client.set_registered_model_alias(name, CHALLENGER, str(version.version))
        fault("registry.challenger")
        if CHAMPION not in aliases:
            client.set_registered_model_alias(name, CHAMPION, str(version.version))
        if UNFINISHED_TAG in version.tags:
            with _already_gone():
                client.delete_model_version_tag(name, str(version.version), UNFINISHED_TAG)
        return int(version.version)


def find_version(tracking_uri: str, name: str, alias_or_version: str) -> ModelVersion:
    """Return the version of that alias or number; InputError names what is registered."""
    tracking_server.check_server(tracking_uri)
    with tracking_server.plain_errors(tracking_uri):
        client = tracking_server.client(tracking_uri)
        try:
            registered = client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            names = sorted(model.name for model in client.search_registered_models())
            raise InputError(
                f"There is no registered model {name!r} at {masked(tracking_uri)}. "
                + (f"There are: {', '.join(names)}." if names else "None is registered there yet.")
            ) from error
        number = registered.aliases.get(alias_or_version, alias_or_version)
        versions = {str(item.version) for item in client.search_model_versions(f"name='{name}'")}
        if str(number) not in versions:
            aliases = [
                f"{name}@{alias} (version {number})" for alias, number in sorted(registered.aliases.items())
            ]
            raise InputError(
                f"The registered model {name!r} has no version or alias {alias_or_version!r}. There are: "
                f"{', '.join([*aliases, *(f'{name}/{number}' for number in sorted(versions, key=int))])}."
            )
        return client.get_model_version(name, str(number))  # a search leaves the aliases out


def aliases_of(tracking_uri: str, name: str) -> dict[str, int]:
    """Return the aliases of a registered model, each with the number of its version."""
    with tracking_server.plain_errors(tracking_uri):
        aliases = tracking_server.client(tracking_uri).get_registered_model(name).aliases
        return {alias: int(version) for alias, version in aliases.items()}


def fetch(
    model_uri: str, *, tracking_uri: str = "", device: str | torch.device | None = None
) -> SegmentationModel:
    """Return the verified model at models:/name@alias, models:/name/version, or in a folder.

    `tracking_uri` is as in the configuration: empty takes MLFLOW_TRACKING_URI, else the default database.
    """
    if not model_uri.startswith("models:"):
        return load_package(model_uri, device=device)
    name, alias_or_version = parse_model_uri(model_uri)
    uri = tracking_server.resolve_uri(TrackingConfig(tracking_uri=tracking_uri))
    version = find_version(uri, name, alias_or_version)
    if PACKAGE_TAG not in version.tags:
        raise InputError(
            f"A model must be registered by segfleet, but {name}/{version.version} was not. Use a version "
            "that "
            f"carries the tag {PACKAGE_TAG}."
        )
    with tempfile.TemporaryDirectory(prefix="segfleet-") as folder:
        with tracking_server.plain_errors(uri), _quiet():
            location = tracking_server.client(uri).get_model_version_download_uri(name, str(version.version))
            _refuse_code(location, Path(folder), uri, model_uri)
            mlflow.artifacts.download_artifacts(
                artifact_uri=f"{location}/data/{PACKAGE_DIR}", dst_path=folder, tracking_uri=uri
            )
        package_dir = Path(folder) / PACKAGE_DIR
        if version.tags.get(PACKAGE_TAG) != digest(package_dir):
            raise DamagedPackageError(
                f"{model_uri} must be the package that was registered (sha256 "
                f"{version.tags.get(PACKAGE_TAG)}), but "
                f"its {MODEL_FILE} differs. Register the model again."
            )
        model = load_package(package_dir, device=device)
    return replace(model, source=f"models:/{name}/{version.version}")


def _refuse_code(location: str, folder: Path, uri: str, model_uri: str) -> None:
    """Raise DamagedPackageError where others could load code with the model: `fetch` itself runs none of it."""
    files = mlflow.artifacts.list_artifacts(artifact_uri=location, tracking_uri=uri)
    found = {f"{file.path.rsplit('/', 1)[-1]}" for file in files}
    problems = [f"it holds {shown(name)}" for name in sorted(found - _MODEL_FILES)]
    described: Any = None
    with contextlib.suppress(OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError):
        path = mlflow.artifacts.download_artifacts(
            artifact_uri=f"{location}/MLmodel", dst_path=str(folder), tracking_uri=uri
        )
        if Path(path).stat().st_size < _MAX_MLMODEL_BYTES:
            described = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    flavors = described.get("flavors") if isinstance(described, dict) else None
    if not isinstance(flavors, dict) or set(flavors) != {"python_function"}:
        problems.append("its MLmodel does not describe a Python function alone")
    else:
        flavor = flavors["python_function"]
        flavor = flavor if isinstance(flavor, dict) else {}
        if flavor.get("loader_module") != __name__:
            problems.append(f"its loader_module is {shown(flavor.get('loader_module'))}")
        unknown = sorted(map(str, flavor.keys() - _FLAVOR_KEYS))
        problems += [
            f"its MLmodel has {shown(key)}" for key in [*unknown, *(["code"] if flavor.get("code") else [])]
        ]
    if problems:
        raise DamagedPackageError(
            f"A registered model must be data alone, as segfleet registers it, but of {model_uri} {problems[0]}. "
            "Nothing of it was run. Delete that version, and register the package again."
        )


def parse_model_uri(model_uri: str) -> tuple[str, str]:
    """Return the name, and the alias or the number of the version, of a models:/ address."""
    found = re.fullmatch(r"models:/([^/@:]+)(?:@([^/@:]+)|/(\d+))", model_uri)
    if not found:
        raise InputError(
            f"A registered model must be models:/name@alias or models:/name/version, but got {model_uri!r}. "
            "For example models:/pspnet@champion."
        )
    return found[1], found[2] or found[3]


def check_name(name: str) -> None:
    """Raise InputError for a name that the registry would refuse, or a models:/ address."""
    if not re.fullmatch(r"[\w.\- ]+", name):
        raise InputError(
            f"tracking.registered_model_name must be letters, digits, spaces and . _ -, but got {name!r}. "
            "For example pspnet-cityscapes."
        )


class PyfuncModel:
    """The model as MLflow calls it: uint8 image (h, w, 3), or images (n, h, w, 3), to train ids."""

    def __init__(self, model: SegmentationModel) -> None:
        self.model = model

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> np.ndarray:
        """Return train ids, uint8 (h, w) or (n, h, w)."""
        images = np.asarray(model_input)
        if images.ndim == 4:
            return np.stack(self.model.predict_batch(list(images)))
        return self.model.predict(images)


def _load_pyfunc(path: str) -> PyfuncModel:
    """Load what `register` saved; MLflow finds this function by its name."""
    return PyfuncModel(load_package(path))


@contextlib.contextmanager
def _already_gone() -> Iterator[None]:
    """Let a deletion pass that MLflow's client repeated because the answer to the first was lost."""
    try:
        yield
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise


def _version_of_package(client: MlflowClient, name: str, package_digest: str) -> ModelVersion | None:
    """Return the version that holds this package; twins of a request that was sent twice are deleted."""
    versions = client.search_model_versions(f"name='{name}' and tags.`{PACKAGE_TAG}` = '{package_digest}'")
    if not versions:
        return None
    oldest, *twins = sorted(versions, key=lambda version: int(version.version))
    for twin in twins:
        with _already_gone():
            client.delete_model_version(name, str(twin.version))
    return oldest


def _log_model(
    client: MlflowClient,
    tracking_uri: str,
    name: str,
    package_dir: Path,
    info: Mapping[str, Any],
    package_digest: str,
    run_id: str,
) -> LoggedModel:
    """Upload the package as an MLflow model of the run; nothing is left behind where that fails."""
    experiment_id = (
        client.get_run(run_id).info.experiment_id
        if run_id
        else tracking.find_experiment(client, tracking_uri, TrackingConfig().experiment_name)
    )
    model = client.create_logged_model(
        experiment_id,
        name=name,
        source_run_id=run_id or None,
        tags={PACKAGE_TAG: package_digest, **_protocol_tags(info)},
        params={f"architecture.{key}": str(value) for key, value in info["architecture"].items()},
        model_type="semantic segmentation",
    )
    try:
        with tempfile.TemporaryDirectory(prefix="segfleet-") as aside, _quiet():
            folder = _save_pyfunc(Path(aside), package_dir, model, run_id)
            client.log_model_artifacts(model.model_id, str(folder))
        model = client.finalize_logged_model(model.model_id, "READY")
        if run_id:
            _log_output(client, run_id, model, step=int(info["epoch"]))
            _link_scores(client, run_id, model, info)
    except BaseException:
        _delete_model(client, model)
        raise
    return model


def _log_output(client: MlflowClient, run_id: str, model: LoggedModel, *, step: int) -> None:
    """Name the model as an output of the run; MLflow refuses it where it has it, as after an answer that was lost."""
    try:
        client.log_outputs(run_id, models=[LoggedModelOutput(model.model_id, step=step)])
    except MlflowException:
        outputs = client.get_run(run_id).outputs
        if outputs is None or model.model_id not in {output.model_id for output in outputs.model_outputs}:
            raise


def _delete_model(client: MlflowClient, model: LoggedModel) -> None:
    """Delete a half-made model; where the server is gone, it stays there without a version."""
    with contextlib.suppress(MlflowException, OSError):
        client.delete_logged_model(model.model_id)


def _create_version(
    client: MlflowClient,
    name: str,
    model: LoggedModel,
    info: Mapping[str, Any],
    package_digest: str,
    run_id: str,
) -> ModelVersion:
    """Make the version; where that fails, a registered model that was made for it goes, too."""
    try:
        client.create_registered_model(
            name, description="Made by segfleet; each version carries its scores as tags."
        )
        is_new = True
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        is_new = False
    fault("registry.named")
    try:
        client.create_model_version(
            name,
            source=f"models:/{model.model_id}",
            run_id=run_id or None,
            tags={
                **_version_tags(info),
                PACKAGE_TAG: package_digest,
                MODEL_ID_TAG: model.model_id,
                UNFINISHED_TAG: "true",
            },
            description=model_card(info).replace("NAME", name),
            model_id=model.model_id,
            await_creation_for=0,
        )
    except BaseException:
        if is_new:
            with contextlib.suppress(MlflowException, OSError):
                if not client.search_model_versions(f"name='{name}'"):
                    client.delete_registered_model(name)
        raise
    version = _version_of_package(client, name, package_digest)
    assert version is not None, "the registry answered that it made the version"
    versions = json.dumps([{"name": name, "version": version.version}])
    client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": versions})
    return version


def _version_tags(info: Mapping[str, Any]) -> dict[str, str]:
    tags = {"store_digest": info["store_digest"], "epoch": str(info["epoch"])}
    if not info["scores"]:
        return tags
    scores = Scores.from_dict(info["scores"])
    return tags | {
        "miou": f"{scores.miou:.4f}",
        "mean_accuracy": f"{scores.mean_accuracy:.4f}",
        "pixel_accuracy": f"{scores.pixel_accuracy:.4f}",
        "protocol": str(scores.protocol),
        "protocol_digest": scores.protocol.digest,
    }


def _protocol_tags(info: Mapping[str, Any]) -> dict[str, str]:
    return protocol_tags(Scores.from_dict(info["scores"]).protocol) if info["scores"] else {}


def _link_scores(client: MlflowClient, run_id: str, model: LoggedModel, info: Mapping[str, Any]) -> None:
    """Attach the scores to the logged model, so that MLflow shows them on the model's page."""
    if not info["scores"]:
        return
    scores = Scores.from_dict(info["scores"])
    values = {
        "registered/miou": scores.miou,
        "registered/mean_accuracy": scores.mean_accuracy,
        "registered/pixel_accuracy": scores.pixel_accuracy,
    }
    # The same whenever the registration is repeated: with another timestamp the run would have a point twice.
    timestamp = client.get_run(run_id).info.start_time
    metrics = [
        Metric(key, value, timestamp=timestamp, step=int(info["epoch"]), model_id=model.model_id)
        for key, value in values.items()
    ]
    client.log_batch(run_id, metrics=metrics)


def _save_pyfunc(aside: Path, package_dir: Path, model: LoggedModel, run_id: str) -> Path:
    """Write the package as an MLflow model below `aside` and return that folder."""
    # Imported here: it takes seconds and warns, and only who registers needs it.
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    folder, package_copy = aside / "model", aside / PACKAGE_DIR
    shutil.copytree(package_dir, package_copy)
    uint8 = np.dtype(np.uint8)
    mlflow.pyfunc.save_model(
        path=str(folder),
        loader_module=__name__,
        data_path=str(package_copy),
        mlflow_model=Model(
            artifact_path=model.artifact_location,
            model_uuid=model.model_id,
            run_id=run_id or None,
            model_id=model.model_id,
        ),
        signature=ModelSignature(
            inputs=Schema([TensorSpec(uint8, (-1, -1, -1, 3))]),
            outputs=Schema([TensorSpec(uint8, (-1, -1, -1))]),
        ),
        pip_requirements=list(_requirements()),
    )
    return folder


@functools.cache
def _requirements() -> tuple[str, ...]:
    return tuple(f"{package}=={provenance.version_of(package)}" for package in REQUIREMENTS)


@contextlib.contextmanager
def _as_default(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's global store for this block: its registry in a database looks for the model there."""
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else ""
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        # None, which MLflow's annotation forgets, unsets it.
        mlflow.set_tracking_uri(before or None)  # type: ignore[arg-type]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's advice on its own affairs from the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""The MLflow run of a training or a search: one per key for ever, what it is of, and what it holds."""

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pspnet.errors import InputError
from segfleet.config import TrackingConfig
from segfleet.provenance import UNKNOWN, environment_text, origin_tags
from segfleet.tracking_server import check_server, client, plain_errors, resolve_uri

# isort: split
# MLflow comes after tracking_server, which sets its environment
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

Item = TypeVar("Item")

KEY_TAG = "segfleet.key"
NAME_TAG = "mlflow.runName"
CHANGED_TAG = "segfleet.changed."
MAX_BATCH_POINTS = 1000
MAX_BATCH_PARAMS = 100


def open_run(
    tracking: TrackingConfig,
    *,
    run_name: str,
    key: str,
    parent_run_id: str | None,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
) -> str:
    """Return the id of the one run of `key` in the experiment, RUNNING: it is made at the first call only.

    A parameter of an existing run is never rewritten: where it differs now, a tag `segfleet.changed.<name>`
    says so.
    """
    if "'" in key or "\\" in key:
        raise InputError(f"The name of a run must be without quotes and backslashes, but got {key!r}.")
    uri = resolve_uri(tracking)
    check_server(uri)
    with plain_errors(uri):
        mlflow_client = client(uri)
        experiment_id = find_experiment(mlflow_client, uri, tracking.experiment_name)
        runs = _runs_of_key(mlflow_client, experiment_id, key)
        if not runs:
            mlflow_client.create_run(
                experiment_id,
                run_name=run_name,
                tags={KEY_TAG: key, **origin_tags(), **_parent_tag(parent_run_id), **tags},
            )
            runs = _runs_of_key(mlflow_client, experiment_id, key)
        run, *twins = runs
        for twin in twins:  # a request that was sent again because its answer was lost
            mlflow_client.delete_run(twin.info.run_id)
        run_id = str(run.info.run_id)
        if run.info.status != "RUNNING":
            mlflow_client.update_run(run_id, status="RUNNING")
        changes = _log_params(mlflow_client, run, params)
        origin = {name: value for name, value in origin_tags().items() if value != UNKNOWN}
        name = {NAME_TAG: run_name} if (run.info.run_name or "").startswith(f"{run_name}: ") else {}
        wanted = {**origin, **_parent_tag(parent_run_id), **tags, **changes, **name}
        changed = {name: text for name, text in wanted.items() if run.data.tags.get(name) != str(text)}
        _send_tags(mlflow_client, run_id, changed)
        mlflow_client.log_text(run_id, environment_text(), "environment.txt")
    return run_id


def outcome_name(run_name: str, outcome: str) -> dict[str, str]:
    """Return the tag that shows in MLflow's list of runs, whose columns hold no scores, how a run ended.

    `open_run` takes it back.
    """
    return {NAME_TAG: f"{run_name}: {outcome}"}


def unended_runs(tracking: TrackingConfig, parent_run_id: str) -> set[str]:
    """Return the ids of the runs nested under a run that nobody has ended, or that were KILLED in the midst."""
    uri = resolve_uri(tracking)
    with plain_errors(uri):
        mlflow_client = client(uri)
        experiment_id = find_experiment(mlflow_client, uri, tracking.experiment_name)
        runs: set[str] = set()
        for status in ("RUNNING", "KILLED"):
            filter_string = (
                f"attributes.status = '{status}' AND tags.`mlflow.parentRunId` = '{parent_run_id}'"
            )
            page_token: str | None = None
            while page_token != "":
                page = mlflow_client.search_runs([experiment_id], filter_string, page_token=page_token)
                runs |= {run.info.run_id for run in page}
                page_token = page.token or ""
    return runs


def log_dataset(
    uri: str, run_id: str, *, name: str, digest: str, source: str, splits: Mapping[str, int]
) -> None:
    """Name the store as the run's data set: its digest, where it is, and the number of images in each split.

    MLflow keeps 36 characters of a digest; the profile and the tag `segfleet.store_digest` hold all of it.
    """
    profile = json.dumps({"digest": digest, "splits": dict(splits)})
    dataset = Dataset(
        name=name,
        digest=digest[:36],
        source_type="local",
        source=json.dumps({"uri": source}),
        profile=profile,
    )
    tag = InputTag("mlflow.data.context", "training")
    with plain_errors(uri):
        client(uri).log_inputs(run_id, datasets=[DatasetInput(dataset=dataset, tags=[tag])])
        client(uri).set_tag(run_id, "segfleet.store_digest", digest)


@dataclass(frozen=True)
class Point:
    """One value of a curve."""

    step: int
    value: float
    timestamp: int


def points(uri: str, run_id: str) -> dict[str, list[Point]]:
    """Return every curve of the run as the server has it, each in the order of its steps."""
    with plain_errors(uri):
        mlflow_client = client(uri)
        keys = mlflow_client.get_run(run_id).data.metrics
        return {
            key: sorted(
                (Point(m.step, m.value, m.timestamp) for m in mlflow_client.get_metric_history(run_id, key)),
                key=lambda point: (point.step, point.timestamp),
            )
            for key in keys
        }


def add_points(mlflow_client: MlflowClient, run_id: str, named_points: Sequence[tuple[str, Point]]) -> None:
    """Add each point to the curve of its name."""
    metrics = [Metric(name, point.value, point.timestamp, point.step) for name, point in named_points]
    for some in _parts(metrics, MAX_BATCH_POINTS):
        mlflow_client.log_batch(run_id, metrics=some)


def add_file(mlflow_client: MlflowClient, run_id: str, path: Path, artifact_dir: str) -> None:
    """Add the file at `path` to the run's artifacts; one that vanishes has been sent by another process meanwhile."""
    try:
        mlflow_client.log_artifact(run_id, str(path), artifact_dir or None)
    except (OSError, MlflowException):
        if path.exists():
            raise


def set_end(
    mlflow_client: MlflowClient, run_id: str, *, status: str, tags: Mapping[str, str], timestamp: int
) -> None:
    """Set the tags of a run, its status and when it ended."""
    _send_tags(mlflow_client, run_id, tags)
    mlflow_client.set_terminated(run_id, status=status, end_time=timestamp)


def find_experiment(mlflow_client: MlflowClient, uri: str, name: str) -> str:
    """Return the id of the experiment of that name, made where there is none."""
    experiment = mlflow_client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(
                mlflow_client.create_experiment(
                    name,
                    artifact_location=_artifact_location(uri),
                    # MLflow's UI then opens with what trains models, not with what judges language models.
                    tags={"mlflow.experimentKind": "custom_model_development"},
                )
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = mlflow_client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise InputError(
            f"tracking.experiment_name must be an experiment that is not deleted, but {name!r} is in MLflow's "
            "bin. Restore it, or give another name."
        )
    return str(experiment.experiment_id)


def _artifact_location(uri: str) -> str | None:
    """Return where artifacts go: beside the database; a server decides for itself."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / uuid.uuid4().hex[:12]).as_uri()


def _runs_of_key(mlflow_client: MlflowClient, experiment_id: str, key: str) -> list[Run]:
    """Return the runs of `key`, the oldest first."""
    runs = mlflow_client.search_runs([experiment_id], filter_string=f"tags.`{KEY_TAG}` = '{key}'")
    return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def _log_params(mlflow_client: MlflowClient, run: Run, params: Mapping[str, Any]) -> dict[str, str]:
    """Log the parameters that the run lacks; return tags for those that differ from what it has."""
    texts = {name: str(value) for name, value in params.items()}
    missing = [Param(name, text) for name, text in texts.items() if name not in run.data.params]
    for some in _parts(missing, MAX_BATCH_PARAMS):
        mlflow_client.log_batch(run.info.run_id, params=some)
    return {
        CHANGED_TAG + name: text
        for name, text in texts.items()
        if name in run.data.params and run.data.params[name] != text
    }


def _send_tags(mlflow_client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    for some in _parts([RunTag(name, str(text)) for name, text in tags.items()], MAX_BATCH_PARAMS):
        mlflow_client.log_batch(run_id, tags=some)


def _parts(items: list[Item], most: int) -> Iterator[list[Item]]:
    """Yield the items in lists of at most `most`: what a request may hold."""
    for start in range(0, len(items), most):
        yield items[start : start + most]


def _parent_tag(parent_run_id: str | None) -> dict[str, str]:
    return {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}

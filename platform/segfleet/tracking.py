"""The MLflow run of a training or a search: one per key for ever, and durable while the server is away.

Points and pictures go to a local spool first, which is synced; a thread sends them on with the timestamps
they got there. What could not be sent is sent by the next writer of the run, by `ship_spool` or by
jobs/sync_tracking.py.

spool/
  <run id>.points.jsonl   one line a call of `log_metrics`: step, timestamp in ms, values
  <run id>.files.jsonl    one line a file or text, whose copy lies in files/ until it is sent
  <run id>.….sent         how many bytes of that file the server has
"""

import contextlib
import functools
import importlib.metadata
import itertools
import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "8")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

# after the environment above, which it reads when it is imported
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from pspnet.errors import InputError
from pspnet.json_values import parse_json, typed
from segfleet.config import TrackingConfig
from segfleet.faults import fault, halves
from segfleet.secret import first_line, masked, unmasked
from segfleet.torsos import set_aside

Value = TypeVar("Value")
Status = Literal["FINISHED", "FAILED", "KILLED"]

KEY_TAG = "segfleet.key"
NAME_TAG = "mlflow.runName"
UNKNOWN = "unknown"
CHANGED_TAG = "segfleet.changed."
CHECK_TIMEOUT_S = 5.0
MAX_BATCH_POINTS = 1000
MAX_BATCH_PARAMS = 100
RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_ENTRIES = (
    {"step": int, "timestamp": int, "values": dict[str, float]},
    {"status": Status, "timestamp": int, "tags": dict[str, Any]},
    {"file": str, "artifact_dir": str},
)
"""Fields of the entries of a spool: points, the end of a run, a file."""
PATIENCE_S = 1800.0
AWAY_CODES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
"""What MLflow calls a connection that broke, a locked database, a server that is too busy."""
DENIED_CODES = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED")
"""What MLflow calls it where a server with accounts does not let in."""
VERSIONS_OF = ("torch", "torchvision", "ray", "optuna", "mlflow", "pyarrow", "numpy", "pillow", "safetensors")


def resolve_uri(tracking: TrackingConfig) -> str:
    """Return where runs go: the setting, else MLFLOW_TRACKING_URI, else a database below `storage_dir`.

    The path of a database is made absolute, so that every process means the same file.
    """
    uri = unmasked(tracking.tracking_uri, "tracking.tracking_uri") or os.environ.get(
        "MLFLOW_TRACKING_URI", ""
    )
    if not uri:
        return f"sqlite:///{Path(tracking.storage_dir).expanduser().absolute() / 'mlflow.db'}"
    scheme = urllib.parse.urlsplit(uri).scheme
    if scheme == "sqlite":
        path = uri.removeprefix("sqlite:///")
        if path == uri or path in ("", ":memory:"):
            raise InputError(
                f"tracking.tracking_uri must name a file after sqlite:///, but got {uri!r}. "
                "For example sqlite:////data/mlflow.db."
            )
        return f"sqlite:///{Path(path).expanduser().absolute()}"
    if scheme not in ("http", "https", "postgresql", "mysql", "databricks"):
        raise InputError(
            "tracking.tracking_uri must be an MLflow server (http://…, https://…) or a database "
            "(sqlite:///…, "
            f"postgresql://…), but got {shown(uri)!r}. A server is started with `mlflow server`."
        )
    return uri


def check_server(uri: str) -> None:
    """Raise InputError within 10 seconds where the server does not answer or the database cannot be made."""
    scheme = urllib.parse.urlsplit(uri).scheme
    if scheme in ("http", "https"):
        _check_http(uri)
    if scheme == "sqlite":
        folder = Path(uri.removeprefix("sqlite:///")).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"The tracking database must lie in a folder one can write to, but {folder} cannot be made "
                f"({error.strerror}). Give another tracking.tracking_uri or tracking.storage_dir."
            ) from error
    with plain_errors(uri):
        client(uri).search_experiments(max_results=1)


def client(uri: str) -> MlflowClient:
    """Return a client of the tracking server and of the registry behind it."""
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


class AwayError(InputError):
    """The tracking server gives no answer now; it may later."""


def patiently(call: Callable[[], Value], limit_s: float = PATIENCE_S) -> Value:
    """Return what `call` returns, called again for `limit_s` while the server is away.

    For jobs in their midst: what they begin with does not wait. `call` may find done what it is to do, since an
    answer can be lost.
    """
    deadline, said = time.monotonic() + limit_s, ""
    for pause_s in itertools.chain(RETRY_S, itertools.repeat(RETRY_S[-1])):
        try:
            return call()
        except AwayError as error:
            if time.monotonic() + pause_s > deadline:
                raise
            if said != (said := str(error)):
                print(f"tracking: waiting up to {limit_s:.0f} s: {said}", flush=True)
        time.sleep(pause_s)
    raise AssertionError("there is always another pause")


@contextlib.contextmanager
def plain_errors(uri: str) -> Iterator[None]:
    """Turn what a tracking server refuses or fails to answer into an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except (MlflowException, OSError) as error:
        if not isinstance(error, OSError) and error.error_code in DENIED_CODES:
            raise InputError(
                f"The MLflow server at {shown(uri)} must know who asks and let them, but {first_line(error)[:200]}. "
                "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ~/.mlflow/credentials on every node, "
                "to an account that may."
            ) from error
        is_away = isinstance(error, OSError) or error.error_code in AWAY_CODES
        raise (AwayError if is_away else InputError)(
            f"The MLflow server at {shown(uri)} must take and give records, but {first_line(error)}. "
            "Start it, or set tracking.tracking_uri or MLFLOW_TRACKING_URI to one that answers."
        ) from error


def shown(uri: str) -> str:
    """Return `uri` without a password in it."""
    return masked(uri)


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
                tags={KEY_TAG: key, **_origin_tags(), **_parent_tag(parent_run_id), **tags},
            )
            runs = _runs_of_key(mlflow_client, experiment_id, key)
        run, *twins = runs
        for twin in twins:  # a request that was sent again because its answer was lost
            mlflow_client.delete_run(twin.info.run_id)
        run_id = str(run.info.run_id)
        if run.info.status != "RUNNING":
            mlflow_client.update_run(run_id, status="RUNNING")
        changes = _log_params(mlflow_client, run, params)
        origin = {name: value for name, value in _origin_tags().items() if value != UNKNOWN}
        name = {NAME_TAG: run_name} if (run.info.run_name or "").startswith(f"{run_name}: ") else {}
        wanted = {**origin, **_parent_tag(parent_run_id), **tags, **changes, **name}
        _set_tags(mlflow_client, run, wanted)
        mlflow_client.log_text(run_id, environment_text(), "environment.txt")
    return run_id


def outcome_name(run_name: str, outcome: str) -> dict[str, str]:
    """Return the tag that shows in MLflow's list of runs, whose columns hold no scores, how a run ended.

    `open_run` takes it back.
    """
    return {NAME_TAG: f"{run_name}: {outcome}"}


def end_run(
    uri: str, run_id: str, *, status: Status, tags: Mapping[str, str], spool_dir: str | Path | None = None
) -> bool:
    """Set the run's status and tags and return True; where the server is away say so and return False.

    With `spool_dir` the ending is kept there for `ship_spool` and jobs/sync_tracking.py. Never raises.
    """
    entry = {"status": status, "tags": dict(tags), "timestamp": _now_ms()}
    if spool_dir is not None:
        _Channel(Path(spool_dir), run_id, "points").append(entry)
        return ship_spool(uri, run_id, spool_dir)
    try:
        _send_state(client(uri), run_id, entry)
    except Exception as error:  # whatever the server's driver raises, training goes on
        print(f"tracking: the end of run {run_id} is not recorded: {first_line(error)}", flush=True)
        return False
    return True


def unended_runs(tracking: TrackingConfig, parent_run_id: str) -> set[str]:
    """Return the ids of the runs nested under a run that nobody has ended."""
    uri = resolve_uri(tracking)
    with plain_errors(uri):
        mlflow_client = client(uri)
        experiment_id = find_experiment(mlflow_client, uri, tracking.experiment_name)
        filter_string = f"attributes.status = 'RUNNING' AND tags.`mlflow.parentRunId` = '{parent_run_id}'"
        runs: set[str] = set()
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


class RunWriter:
    """Writes to a run without ever waiting for the server or raising: the spool first, a thread sends it on.

    A point is written once: where a resumed training comes to a (metric, step) that the spool has, the first
    stays.
    """

    def __init__(self, tracking_uri: str, run_id: str, spool_dir: str | Path) -> None:
        self._uri = tracking_uri
        self._run_id = run_id
        self._points = _Channel(Path(spool_dir), run_id, "points")
        self._files = _Channel(Path(spool_dir), run_id, "files")
        is_whole = self._points.mend()
        self._files.mend()
        self._seen = {
            (name, entry["step"]) for entry in self._points.entries() for name in entry.get("values", {})
        }
        if not is_whole:  # the server may have points that the spool lost
            with contextlib.suppress(InputError):
                curves = points(tracking_uri, run_id)
                self._seen |= {(name, point.step) for name, curve in curves.items() for point in curve}
        self._changed = threading.Condition()
        self._num_wanted, self._num_shipped = 1, 0  # the first: what an earlier writer could not send
        self._closed = False
        self._thread = threading.Thread(target=self._ship_for_ever, name="tracking", daemon=True)
        self._thread.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add one point to each curve; a value that is not finite is left out."""
        values = {
            metric_name(name): float(value)
            for name, value in metrics.items()
            if math.isfinite(value) and (metric_name(name), step) not in self._seen
        }
        if not values:
            return
        self._seen |= {(name, step) for name in values}
        self._points.append({"step": int(step), "timestamp": _now_ms(), "values": values})
        self._wake()

    def log_artifact(self, path: str | Path, artifact_dir: str = "") -> None:
        """Add the file at `path`, as it is now, to the run's artifacts in `artifact_dir`."""
        self._files.append_file(Path(path), artifact_dir)
        self._wake()

    def log_text(self, text: str, artifact_file: str) -> None:
        """Add `text` to the run's artifacts under the name `artifact_file`."""
        folder, _, name = artifact_file.rpartition("/")
        self._files.append_text(text, name, folder)
        self._wake()

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait at most `timeout_s` until the server has everything, and return whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_shipped == self._num_wanted, timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """Flush and end the thread; say where what could not be sent is kept."""
        is_sent = self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if not is_sent:
            print(
                f"tracking: {shown(self._uri)} did not take all of run {self._run_id} yet; the rest is kept "
                "in "
                f"{self._points.folder} and sent by the next start or by jobs/sync_tracking.py",
                flush=True,
            )

    def _wake(self) -> None:
        with self._changed:
            self._num_wanted += 1
            self._changed.notify_all()

    def _ship_for_ever(self) -> None:
        num_failures, said = 0, ""
        while (num_wanted := self._next_wanted()) is not None:
            try:
                _ship(self._uri, self._run_id, self._points, self._files)
            except Exception as error:  # whatever the server's driver raises, training goes on
                if said != (said := first_line(error)):
                    print(f"tracking: waiting for {shown(self._uri)}: {said}", flush=True)
                with self._changed:
                    pause_s = RETRY_S[min(num_failures, len(RETRY_S) - 1)]
                    self._changed.wait_for(lambda: self._closed, pause_s)
                num_failures += 1
                continue
            num_failures, said = 0, ""
            with self._changed:
                self._num_shipped = num_wanted
                self._changed.notify_all()

    def _next_wanted(self) -> int | None:
        """Wait until there is something to ship and return how many calls it takes in; None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._num_shipped != self._num_wanted)
            return None if self._closed else self._num_wanted


def ship_spool(uri: str, run_id: str, spool_dir: str | Path) -> bool:
    """Send what the spool of the run still holds; return whether the server has everything. Never raises."""
    folder = Path(spool_dir)
    try:
        _ship(uri, run_id, _Channel(folder, run_id, "points"), _Channel(folder, run_id, "files"))
    except Exception as error:  # whatever the server's driver raises, training goes on
        print(f"tracking: run {run_id} is kept in {folder}: {first_line(error)}", flush=True)
        return False
    return True


def unsent_runs(storage_dir: str | Path) -> dict[str, Path]:
    """Return the spool folder of each run below `storage_dir` of which the server lacks something."""
    found = {}
    for path in sorted(Path(storage_dir).rglob("*.points.jsonl")) + sorted(
        Path(storage_dir).rglob("*.files.jsonl")
    ):
        run_id, kind, _ = path.name.rsplit(".", 2)
        if _Channel(path.parent, run_id, kind).has_unsent():
            found[run_id] = path.parent
    return found


def metric_name(name: str) -> str:
    """Return `name` with each character that MLflow refuses replaced by an underscore."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)


def commit() -> tuple[str, bool]:
    """Return the commit this code is at and whether it differs from it; ("", False) where that is not known.

    SEGFLEET_COMMIT, taken where a job is submitted (the cluster gets no .git), goes first: "<sha>" or
    "<sha>-dirty".
    """
    given = os.environ.get("SEGFLEET_COMMIT", "")
    if given:
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    return _commit_of_checkout(Path(__file__).parent)


def environment_text() -> str:
    """Return the Python, the host's kind and the version of every installed package."""
    packages = sorted(
        {
            (dist.metadata["Name"] or "").lower(): dist.version for dist in importlib.metadata.distributions()
        }.items()
    )
    sha, is_dirty = commit()
    lines = [
        f"python=={platform.python_version()}",
        f"platform=={platform.platform()}",
        f"commit=={sha or 'unknown'}{'-dirty' if is_dirty else ''}",
        *(f"{name}=={version}" for name, version in packages if name),
    ]
    return "\n".join(lines) + "\n"


class _Channel:
    """A file of JSON lines that is only ever appended to, and how far the server has it."""

    def __init__(self, folder: Path, run_id: str, kind: str) -> None:
        self.folder = folder
        self._run_id = run_id
        self._path = folder / f"{run_id}.{kind}.jsonl"
        self._sent_path = folder / f"{run_id}.{kind}.sent"
        self._unwritten = b""
        self._said = False

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write and sync one line; what a full disk refuses is kept in memory for the next call."""
        self._unwritten += json.dumps(entry).encode() + b"\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                if self._ends_torn():
                    self._unwritten = b"\n" + self._unwritten
                first, rest = halves("spool.line", self._unwritten)
                if first:
                    file.write(first)
                    file.flush()
                    fault("spool.line")
                file.write(rest)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if not self._said:
                print(f"tracking: the spool {self._path} cannot be written ({error.strerror})", flush=True)
            self._said = True
            return
        self._unwritten, self._said = b"", False
        fault("spool.written")

    def append_file(self, path: Path, artifact_dir: str) -> None:
        """Keep a copy of the file at `path` and note where it goes."""
        self._append_copy(path.name, artifact_dir, lambda copy: shutil.copyfile(path, copy))

    def append_text(self, text: str, name: str, artifact_dir: str) -> None:
        """Keep `text` as a file and note where it goes."""
        self._append_copy(name, artifact_dir, lambda copy: copy.write_text(text))

    def entries(self) -> list[dict[str, Any]]:
        """Return all entries that were ever written."""
        return [entry for entry, _ in self._read(0)]

    def unsent(self) -> list[tuple[dict[str, Any], int]]:
        """Return the entries that the server lacks, each with the position after it."""
        return self._read(self._sent())

    def has_unsent(self) -> bool:
        """Whether the server lacks an entry."""
        return bool(self.unsent())

    def mend(self) -> bool:
        """Name what is damaged, and send all again where the file lost what the server has; return whether it is whole.

        A dead writer's torso stays, in a line of its own that nobody reads: another writer may be appending.
        """
        is_whole = True
        with contextlib.suppress(OSError):  # nothing there, or nothing that can be read: `append` says so
            if self._ends_torn():
                print(
                    f"tracking: {self._path} ended in the midst of a line, which is passed over", flush=True
                )
                is_whole = False
            if self._sent() > self._path.stat().st_size:
                set_aside(
                    self._sent_path, f"it says {self._sent()} bytes were sent, {self._path.name} has fewer"
                )
                is_whole = False
        return is_whole

    def mark_sent(self, position: int) -> None:
        """Note that the server has everything before `position`."""
        aside = self._sent_path.with_name(f"{self._sent_path.name}-{uuid.uuid4().hex[:8]}")
        aside.write_text(str(position))
        os.replace(aside, self._sent_path)

    def _append_copy(self, name: str, artifact_dir: str, make: Any) -> None:
        copy = self.folder / "files" / uuid.uuid4().hex / name
        try:
            copy.parent.mkdir(parents=True)
            make(copy)
        except OSError as error:
            print(f"tracking: {name} cannot be kept for the run ({error.strerror})", flush=True)
            return
        self.append({"file": str(copy.relative_to(self.folder)), "artifact_dir": artifact_dir})

    def _sent(self) -> int:
        try:
            position = int(self._sent_path.read_text())
        except OSError:
            return 0
        except ValueError as error:
            with contextlib.suppress(FileNotFoundError):
                set_aside(self._sent_path, str(error))
            return 0
        return position if position >= 0 else 0

    def _ends_torn(self) -> bool:
        """Whether a writer died in the middle of its line."""
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"

    def _read(self, start: int) -> list[tuple[dict[str, Any], int]]:
        try:
            with self._path.open("rb") as file:
                if start >= file.seek(0, os.SEEK_END):  # a damaged mark may lie where no file can reach
                    return []
                file.seek(start)
                content = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return []
        found, position = [], start
        *lines, _ = content.split(b"\n")  # what follows the last end of line is still being written
        for line in lines:
            position += len(line) + 1
            entry = _entry(line)
            if entry is not None:
                found.append((entry, position))
        return found


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return the entry of a spool in this line; None for the torn line of a writer that died, and for any other."""
    try:
        entry: dict[str, Any] = typed(dict[str, Any], parse_json(line, "It"), "It")
        fields = next(fields for fields in _ENTRIES if fields.keys() <= entry.keys())
        for name, hint in fields.items():
            typed(hint, entry[name], name)
    except (InputError, StopIteration):
        return None
    if "file" in entry and not _is_copy(entry["file"], entry["artifact_dir"]):
        return None
    return entry


def _is_copy(file: str, artifact_dir: str) -> bool:
    """Whether a file's names are what `_Channel` writes: the copy is sent, and then its folder is deleted."""
    parts = file.split("/")
    is_ours = len(parts) == 3 and parts[0] == "files" and "" not in parts
    return (
        is_ours and not {".", ".."} & {*parts, *artifact_dir.split("/")} and "\0" not in file + artifact_dir
    )


def _ship(uri: str, run_id: str, points_channel: _Channel, files_channel: _Channel) -> None:
    """Send everything unsent, oldest first; raises what the server or the network raises."""
    mlflow_client = client(uri)
    waiting = points_channel.unsent()
    while waiting:
        batch: list[Metric] = []
        while waiting and "values" in waiting[0][0]:
            entry, after = waiting[0]
            if len(batch) + len(entry["values"]) > MAX_BATCH_POINTS and batch:
                break
            batch += [
                Metric(name, value, entry["timestamp"], entry["step"])
                for name, value in entry["values"].items()
            ]
            position = after
            waiting.pop(0)
        for start in range(0, len(batch), MAX_BATCH_POINTS):
            mlflow_client.log_batch(run_id, metrics=batch[start : start + MAX_BATCH_POINTS])
        if not batch:
            entry, position = waiting.pop(0)
            _send_state(mlflow_client, run_id, entry)
        fault("spool.sent")
        points_channel.mark_sent(position)
    for entry, position in files_channel.unsent():
        copy = files_channel.folder / entry["file"]
        try:
            mlflow_client.log_artifact(run_id, str(copy), entry["artifact_dir"] or None)
        except (OSError, MlflowException):
            if copy.exists():
                raise  # else another process that ends this run has sent it meanwhile
        files_channel.mark_sent(position)
        shutil.rmtree(copy.parent, ignore_errors=True)


def _send_state(mlflow_client: MlflowClient, run_id: str, entry: Mapping[str, Any]) -> None:
    tags = [RunTag(name, str(value)) for name, value in entry["tags"].items()]
    for start in range(0, len(tags), MAX_BATCH_PARAMS):
        mlflow_client.log_batch(run_id, tags=tags[start : start + MAX_BATCH_PARAMS])
    mlflow_client.set_terminated(run_id, status=entry["status"], end_time=entry["timestamp"])


def _check_http(uri: str) -> None:
    """Ask the server for its health: MLflow's own client would try for minutes."""
    try:
        parts = urllib.parse.urlsplit(uri)
        address = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
        with urllib.request.urlopen(address.rstrip("/") + "/health", timeout=CHECK_TIMEOUT_S):
            return
    except urllib.error.HTTPError:
        return  # it answers; what it refuses, it says at the first real request
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", error)
        raise AwayError(
            f"The MLflow server must answer, but there is no answer from {shown(uri)} ({cause}). "
            "Start it (`mlflow server`), or set tracking.tracking_uri or MLFLOW_TRACKING_URI to one that "
            "answers."
        ) from error


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
    for start in range(0, len(missing), MAX_BATCH_PARAMS):
        mlflow_client.log_batch(run.info.run_id, params=missing[start : start + MAX_BATCH_PARAMS])
    return {
        CHANGED_TAG + name: text
        for name, text in texts.items()
        if name in run.data.params and run.data.params[name] != text
    }


def _set_tags(mlflow_client: MlflowClient, run: Run, wanted: Mapping[str, str]) -> None:
    tags = [RunTag(name, str(text)) for name, text in wanted.items() if run.data.tags.get(name) != str(text)]
    for start in range(0, len(tags), MAX_BATCH_PARAMS):
        mlflow_client.log_batch(run.info.run_id, tags=tags[start : start + MAX_BATCH_PARAMS])


def _parent_tag(parent_run_id: str | None) -> dict[str, str]:
    return {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}


def _origin_tags() -> dict[str, str]:
    """Return which code this is: its commit, the job, the versions that decide the numbers."""
    sha, is_dirty = commit()
    tags = {f"version.{name}": version_of(name) for name in VERSIONS_OF} | {
        "version.python": platform.python_version(),
        "segfleet.commit": sha or UNKNOWN,
        "segfleet.dirty": str(is_dirty).lower() if sha else UNKNOWN,
        "mlflow.source.name": Path(sys.argv[0]).name or "python",
        "mlflow.source.type": "JOB",
    }
    return tags | ({"mlflow.source.git.commit": sha} if sha else {})


def version_of(package: str) -> str:
    """Return the installed version of a package, "absent" where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def _commit_of_checkout(folder: Path) -> tuple[str, bool]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no") != ""
    except (OSError, subprocess.SubprocessError):
        return "", False


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)

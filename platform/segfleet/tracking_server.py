"""The MLflow server that records go to: its address, a client of it, and what it refuses in plain words."""

import contextlib
import itertools
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "8")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

# after the environment above, which it reads when it is imported
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pspnet.errors import InputError
from segfleet.config import TrackingConfig
from segfleet.secret import first_line, masked, unmasked

Value = TypeVar("Value")

CHECK_TIMEOUT_S = 5.0
RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)
PATIENCE_S = 1800.0
AWAY_CODES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
"""What MLflow calls a connection that broke, a locked database, a server that is too busy."""
DENIED_CODES = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED")
"""What MLflow calls it where a server with accounts does not let in."""


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
            f"postgresql://…), but got {masked(uri)!r}. A server is started with `mlflow server`."
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
                f"The MLflow server at {masked(uri)} must know who asks and let them, but {first_line(error)[:200]}. "
                "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ~/.mlflow/credentials on every node, "
                "to an account that may."
            ) from error
        is_away = isinstance(error, OSError) or error.error_code in AWAY_CODES
        raise (AwayError if is_away else InputError)(
            f"The MLflow server at {masked(uri)} must take and give records, but {first_line(error)}. "
            "Start it, or set tracking.tracking_uri or MLFLOW_TRACKING_URI to one that answers."
        ) from error


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
            f"The MLflow server must answer, but there is no answer from {masked(uri)} ({cause}). "
            "Start it (`mlflow server`), or set tracking.tracking_uri or MLFLOW_TRACKING_URI to one that "
            "answers."
        ) from error


logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)

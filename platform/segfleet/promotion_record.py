"""Promotions in the registry: one at a time, each kept with its numbers, and the way back.

A decision is a tag of the registered model, promotion.0001 and so on, as JSON. While one is made, a registered model
<name>.promoting exists: creating it is the one step of a registry of MLflow that only one caller can win.
"""

import contextlib
import fcntl
import getpass
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil

from pspnet.errors import InputError
from segfleet import tracking_server
from segfleet.faults import fault
from segfleet.registry import CHAMPION

from mlflow.exceptions import MlflowException  # isort: skip  (after tracking_server, which sets MLflow's environment)

_TAG, _LOCK_SUFFIX, _HOLDER = "promotion.", ".promoting", "segfleet.holder"
MAX_TAG_CHARACTERS = 5000
TAKEN = "RESOURCE_ALREADY_EXISTS"


@dataclass(frozen=True, kw_only=True)
class PromotionEntry:
    """A decision on who is champion."""

    decision: Literal["promoted", "refused", "rolled back"]
    version: int
    """The version that was decided on."""
    champion_before: int | None
    champion_after: int | None
    reasons: list[str]
    protocol: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    """What the person said who asked for it."""
    who: str = field(default_factory=lambda: f"{getpass.getuser()}@{socket.gethostname()}")
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def history(tracking_uri: str, name: str) -> list[PromotionEntry]:
    """Return all decisions on a registered model, the oldest first."""
    with tracking_server.plain_errors(tracking_uri):
        tags = tracking_server.client(tracking_uri).get_registered_model(name).tags
    return [PromotionEntry(**json.loads(tags[key])) for key in sorted(tags) if key.startswith(_TAG)]


def record(tracking_uri: str, name: str, entry: PromotionEntry) -> None:
    """Write a decision on the version and move the champion's alias if it moves; last, add it to the history."""
    fault("promotion.held")
    with tracking_server.plain_errors(tracking_uri):
        client = tracking_server.client(tracking_uri)
        version = str(entry.version)
        client.set_model_version_tag(name, version, "promotion", entry.decision)
        client.set_model_version_tag(
            name, version, "promotion_reason", "; ".join(entry.reasons)[:MAX_TAG_CHARACTERS]
        )
        if entry.champion_before is not None and entry.champion_before != entry.version:
            told = f"{entry.decision}: version {version} at {entry.at}"
            client.set_model_version_tag(name, str(entry.champion_before), "promotion_of_other", told)
        fault("promotion.tagged")
        if entry.champion_after is not None and entry.champion_after != entry.champion_before:
            client.set_registered_model_alias(name, CHAMPION, str(entry.champion_after))
    fault("promotion.moved")
    append(tracking_uri, name, entry)
    fault("promotion.recorded")


def append(tracking_uri: str, name: str, entry: PromotionEntry) -> None:
    """Add a decision to the history; numbers that do not fit into a tag are left out."""
    text = json.dumps(asdict(entry), allow_nan=False)
    if len(text) > MAX_TAG_CHARACTERS:
        shorter = asdict(entry) | {"numbers": {}, "reasons": [entry.reasons[0][:1000]]}
        text = json.dumps(shorter, allow_nan=False)
    with tracking_server.plain_errors(tracking_uri):
        number = len(history(tracking_uri, name)) + 1
        tracking_server.client(tracking_uri).set_registered_model_tag(name, f"{_TAG}{number:04d}", text)


def history_table(entries: list[PromotionEntry]) -> str:
    """Return the decisions as lines of text."""
    return "\n".join(
        f"{entry.at}  {entry.who}  version {entry.version} {entry.decision}, champion "
        f"{entry.champion_before or 'none'} -> {entry.champion_after or 'none'}: {'; '.join(entry.reasons)}"
        + (f" ({entry.why})" if entry.why else "")
        for entry in entries
    )


@contextlib.contextmanager
def alone(tracking_uri: str, name: str) -> Iterator[None]:
    """Hold the right to decide on a registered model; InputError says who holds it.

    What a killed process of this machine held is taken over.
    """
    lock, client = name + _LOCK_SUFFIX, tracking_server.client(tracking_uri)
    with _one_of_this_machine(f"{tracking_uri} {name}"):
        try:
            _create(client, tracking_uri, lock)
        except _TakenError:
            with tracking_server.plain_errors(tracking_uri):
                holder = json.loads(client.get_registered_model(lock).tags.get(_HOLDER, "{}"))
            if not _has_ended(holder):
                raise InputError(
                    f"Promotions of {name!r} must be decided one after another, but {holder.get('who', 'somebody')} "
                    f"has been at it since {holder.get('at', 'a while ago')} (process {holder.get('pid')}). Wait for "
                    f"it; if it is gone for good, delete the registered model {lock!r}."
                ) from None
            with tracking_server.plain_errors(tracking_uri):
                client.delete_registered_model(lock)
            _create(client, tracking_uri, lock)
    try:
        yield
    finally:
        with tracking_server.plain_errors(tracking_uri):
            client.delete_registered_model(lock)


class _TakenError(Exception):
    """There is such a registered model."""


def _create(client: Any, tracking_uri: str, lock: str) -> None:
    own = psutil.Process()
    holder = {
        "who": f"{getpass.getuser()}@{socket.gethostname()}",
        "host": socket.gethostname(),
        "pid": own.pid,
        "started": own.create_time(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with tracking_server.plain_errors(tracking_uri):
        try:
            client.create_registered_model(
                lock,
                tags={_HOLDER: json.dumps(holder)},
                description="Exists while a promotion is decided.",
            )
        except MlflowException as error:
            if error.error_code == TAKEN:
                raise _TakenError from error
            raise


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether the holder is a process of this machine that is gone."""
    if holder.get("host") != socket.gethostname():
        return False
    try:
        return bool(psutil.Process(holder["pid"]).create_time() != holder["started"])
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def _one_of_this_machine(what: str) -> Iterator[None]:
    """Let the processes of this machine take over what another held one after another."""
    path = (
        Path(tempfile.gettempdir())
        / f"segfleet-{os.getuid()}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.lock"
    )
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # held for a few questions to the registry, which end by themselves
        yield

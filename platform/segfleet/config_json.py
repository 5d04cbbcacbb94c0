"""Configurations as JSON, stored with each run and loaded again: without passwords, and told apart by a digest."""

import dataclasses
import hashlib
import json
from pathlib import Path

from pspnet.errors import InputError
from pspnet.json_values import parse_json
from segfleet.config import TrainingConfig
from segfleet.override import Config, flat, override, replaced
from segfleet.search_config import SearchConfig
from segfleet.secret import masked


def to_json(config: TrainingConfig | SearchConfig) -> str:
    """Return the configuration as indented JSON; `from_json` reads it back to an equal one."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(kind: type[Config], text: str) -> Config:
    """Return the configuration that `to_json` wrote; fields that it lacks keep their defaults."""
    values = parse_json(text, "A stored configuration")
    if not isinstance(values, dict):
        raise InputError(f"A stored configuration must be a JSON object, but got {type(values).__name__}.")
    return replaced(kind(), values)


def load_config(kind: type[Config], path: str | Path) -> Config:
    """Return the configuration stored in the JSON file at `path`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"The configuration file must be readable, but {path} is not: {cause}.") from error
    return from_json(kind, text)


def without_passwords(config: Config) -> Config:
    """Return `config` as it may be stored and shown: see `segfleet.secret`."""
    addresses = {
        path: masked(value)
        for path, value in flat(config).items()
        if path.endswith(("tracking_uri", "study_storage"))
    }
    return override(config, addresses)


def digest(config: TrainingConfig | SearchConfig) -> str:
    """Return 12 hex digits that differ when anything that decides the result differs (not where it goes)."""
    values = {path: value for path, value in flat(config).items() if "tracking." not in path}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

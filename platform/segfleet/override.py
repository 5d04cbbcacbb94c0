"""The one way to vary a configuration, for flags, trials and files alike: values by dotted path, checked by type."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pspnet.errors import InputError
from pspnet.json_values import shown
from segfleet.config import TrainingConfig
from segfleet.search_config import SearchConfig

Config = TypeVar("Config", bound=TrainingConfig | SearchConfig)


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return `config` with the fields at dotted paths such as "optim.base_lr" replaced; every check runs again.

    Raises InputError for an unknown path, a value of another type or a combination that the checks refuse.
    """
    nested: dict[str, Any] = {}
    for path, value in changes.items():
        level = nested
        *parents, name = path.split(".")
        for parent in parents:
            level = level.setdefault(parent, {})
            if not isinstance(level, dict):
                raise InputError(f"{parent} is a group of settings, but got a value for it beside {path}.")
        level[name] = value
    return replaced(config, nested)


def replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """Return `config` with the values of a nested mapping, such as {"optim": {"base_lr": 0.02}}; as `override` else."""
    return typing.cast(Config, _replaced(config, values, prefix=""))


def differences(base: Config, config: Config) -> dict[str, Any]:
    """Return the changes for which `override(base, changes)` is `config`: dotted path to value."""
    old, new = flat(base), flat(config)
    return {path: value for path, value in new.items() if value != old[path]}


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return every leaf of a configuration by its dotted path."""
    leaves: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            leaves |= flat(value, prefix + item.name + ".")
        else:
            leaves[prefix + item.name] = value
    return leaves


def _replaced(config: Any, values: Mapping[str, Any], *, prefix: str) -> Any:
    hints = typing.get_type_hints(type(config))
    unknown = sorted(set(values) - set(hints))
    if unknown:
        near = difflib.get_close_matches(unknown[0], hints, n=1)
        raise InputError(
            f"There is no setting {prefix}{unknown[0][:60]}. "
            + (f"Did you mean {prefix}{near[0]}?" if near else f"There are: {', '.join(sorted(hints))}.")
        )
    changes = {}
    for name, value in values.items():
        path, current = prefix + name, getattr(config, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise InputError(
                    f"{path} is a group of settings, but got {shown(value)}. Name one of them: {path}.…."
                )
            changes[name] = _replaced(current, value, prefix=path + ".")
        else:
            changes[name] = _checked(value, hints[name], path)
    return dataclasses.replace(config, **changes)


def _checked(value: Any, kind: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if not any(value == item and type(value) is type(item) for item in arguments):
            raise InputError(
                f"{path} must be one of {', '.join(map(str, arguments))}, but got {shown(value)}."
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{path} must be a list, but got {shown(value)}.")
        return tuple(_checked(item, arguments[0], path) for item in value)
    if origin is types.UnionType:
        if type(value) not in arguments:
            names = " or ".join(it.__name__ for it in arguments)
            raise InputError(f"{path} must be of type {names}, but got {shown(value)}.")
        return value
    if kind is float and type(value) is int and abs(value) < 2**1000:
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{path} must be of type {kind.__name__}, but got {shown(value)}.")
    if kind is str and "\0" in value:
        raise InputError(f"{path} must be text without zero bytes, but got {shown(value)}.")
    if kind is int and not -(2**63) <= value < 2**63:
        raise InputError(f"{path} must be a number of 64 bits, but got {shown(value)}.")
    return value

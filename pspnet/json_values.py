"""JSON that somebody else may have written: read into exactly the types that are asked for, or refused by name."""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pspnet.errors import InputError

Record = TypeVar("Record")

_SURROGATE = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]|\\u[dD][c-fC-F]|[\ud800-\udfff]")
_SHOWN = 60
"""Characters of a refused value that a message repeats."""


def parse_json(content: bytes | str, what: str, *, allow_nan: bool = False) -> Any:
    """Return the values in `content`, which a message calls `what`.

    Raises InputError for what is no JSON (RFC 8259): NaN and Infinity (but with `allow_nan`), half a pair of
    surrogates, bytes that are not UTF-8, numbers of more than 4300 digits, more nesting than Python's stack holds.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        values = json.loads(text, parse_constant=float if allow_nan else _refuse_constant)
        if _SURROGATE.search(text):
            json.dumps(values, ensure_ascii=False).encode()  # which half a pair cannot be
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} must be JSON, but is not ({shown(error)}).") from error
    return values


def read_record(kind: type[Record], values: object, what: str) -> Record:
    """Return the dataclass whose fields `values`, a JSON object, names; those with a default may be absent.

    Raises InputError, which calls it `what`, for a field that is unknown, absent or of another type.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{what} must be a JSON object, but is {shown(values)}.")
    hints = typing.get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(map(str, values)) - set(fields))
    if unknown:
        raise InputError(f"{what} has no field {shown(unknown[0])}. There are: {', '.join(fields)}.")
    absent = [
        name
        for name, item in fields.items()
        if name not in values
        and item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
    ]
    if absent:
        raise InputError(f"{what} must have the field {absent[0]}, but has not.")
    return kind(**{name: typed(hints[name], value, f"{what}, {name},") for name, value in values.items()})


def typed(hint: Any, value: Any, what: str) -> Any:
    """Return `value` where it is of the type `hint` (numbers are finite; a tuple is stored as a list); else InputError.

    Understood are bool, int, float, str, Any, Literal, list[…], tuple[…, ...], dict[str, …] and unions of them.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Literal and any(value == item and type(value) is type(item) for item in arguments):
        return value
    if origin in (types.UnionType, typing.Union):
        for argument in arguments:
            try:
                return typed(argument, value, what)
            except InputError:
                continue
    if origin in (list, tuple) and isinstance(value, list):
        return origin(typed(arguments[0], item, what) for item in value)
    if origin is dict and isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: typed(arguments[1], item, what) for name, item in value.items()}
    if hint is float and type(value) in (int, float):
        try:
            if math.isfinite(float(value)):
                return float(value)
        except OverflowError:
            pass
    if origin is None and type(value) is hint and hint is not float:
        return value
    if hint in (None, type(None)) and value is None:
        return None
    expected = hint.__name__ if isinstance(hint, type) and origin is None else str(hint)
    raise InputError(f"{what} must be of type {expected}, but is {shown(value)}.")


def shown(value: object) -> str:
    """Return the beginning of a value that is refused: a message must not be as long as what it refuses."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except (ValueError, RecursionError):  # a number of too many digits, a list in lists
        return f"a {type(value).__name__}"
    text = text.replace("\n", " ")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")

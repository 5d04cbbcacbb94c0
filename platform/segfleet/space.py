"""What a search varies: three dimensions of its own and any other setting, each checked before a trial starts."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pspnet.errors import InputError
from pspnet.sizes import notation
from segfleet.config import TrainingConfig
from segfleet.override import flat, override
from segfleet.search_config import SpaceConfig

Kind = Literal["log", "linear", "choice"]
Value = float | int | str | bool

_NOTATION = "PATH=log:LOW..HIGH, PATH=linear:LOW..HIGH or PATH=choice:A,B,…, such as optim.weight_decay=log:1e-5..1e-3"
_OWN = ("optim.base_lr", "optim.aux_loss_weight", "data.crop_size")
_NOT_VARIED = ("tracking.", "workers.", "data.store", "data.train_split", "data.val_split", "schedule.")
_VARIED_ALL_THE_SAME = ("schedule.global_batch_size",)


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One setting that varies: a range from `low` to `high`, both included, or a choice."""

    path: str
    """Dotted path in the training configuration."""
    name: str
    """What the study calls it."""
    kind: Kind
    low: float = math.nan
    high: float = math.nan
    is_integer: bool = False
    choices: tuple[Value, ...] = ()

    def ends(self) -> tuple[Value, ...]:
        """Return the values at which a range is checked, or all choices."""
        if self.kind == "choice":
            return self.choices
        return (int(self.low), int(self.high)) if self.is_integer else (self.low, self.high)

    def grid(self, num_points: int) -> list[Value]:
        """Return all choices, or up to `num_points` values of the range, evenly spread on its scale."""
        if self.kind == "choice":
            return list(self.choices)
        spread = [index / max(1, num_points - 1) for index in range(num_points)]
        if self.kind == "log":
            values = [self.low * (self.high / self.low) ** share for share in spread]
        else:
            values = [self.low + (self.high - self.low) * share for share in spread]
        inside = [min(max(value, self.low), self.high) for value in values]
        return sorted({round(value) if self.is_integer else value for value in inside})


def dimensions(space: SpaceConfig, base: TrainingConfig) -> list[Dimension]:
    """Return what varies; InputError where a value of it cannot be put into `base`.

    The weight of the auxiliary loss does not where no network that is searched has an auxiliary head.
    """
    own = [
        Dimension(path=_OWN[0], name="base_lr", kind="log", low=space.min_base_lr, high=space.max_base_lr),
        Dimension(
            path=_OWN[1],
            name="aux_loss_weight",
            kind="linear",
            low=space.min_aux_loss_weight,
            high=space.max_aux_loss_weight,
        ),
        Dimension(path=_OWN[2], name="crop_size", kind="choice", choices=space.crop_sizes),
    ]
    more = [_parsed(text, flat(base)) for text in space.also]
    paths = [dimension.path for dimension in more]
    if not base.model.has_aux_head and "model.has_aux_head" not in paths:
        del own[1]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(
                f"space.also must name each setting once, but names {path} twice. Leave one out."
            )
    for dimension in own + more:
        for value in dimension.ends():
            override(base, {dimension.path: value})
    return own + more


def narrowed(space: SpaceConfig, base: TrainingConfig, narrow: Sequence[str]) -> SpaceConfig:
    """Return the part of `space` that `narrow` names; InputError where it is not a part."""
    by_name = {dimension.name: dimension for dimension in dimensions(space, base)}
    changes: dict[str, Any] = {}
    also = {text.partition("=")[0]: text for text in space.also}
    for text in narrow:
        name, _, values = text.partition("=")
        if name not in by_name:
            raise InputError(
                f"narrow must name what the study varies, but got {name!r}. There are: {', '.join(by_name)}."
            )
        kind = by_name[name].kind
        path = by_name[name].path
        part = _parsed_values(path, kind, values, flat(base)[path], text)
        if not all(_is_in(by_name[name], end) for end in part.ends()):
            raise InputError(
                f"narrow must name a part of what the study varies, but {text!r} goes beyond its "
                f"{' to '.join(map(str, by_name[name].ends()))}. Give a part of that, or begin another study."
            )
        if name in also:
            also[name] = f"{name}={kind}:{values}"
        elif name == "crop_size":
            changes["crop_sizes"] = tuple(part.choices)
        else:
            changes |= {f"min_{name}": part.low, f"max_{name}": part.high}
    return replace(space, **changes, also=tuple(also.values()))


def _is_in(dimension: Dimension, value: Value) -> bool:
    if dimension.kind == "choice":
        return value in dimension.choices
    return isinstance(value, int | float) and dimension.low <= value <= dimension.high


def _parsed(text: str, settings: Mapping[str, Any]) -> Dimension:
    path, _, values = text.partition("=")
    kind, _, values = values.partition(":")
    if path in _OWN:
        raise InputError(
            f"space.also must name other settings than the three that are always searched, but got {path}. "
            "Set their limits by --space.min-base-lr and its neighbours."
        )
    if path not in settings:
        raise InputError(
            f"space.also must name a setting of the training, but there is no {path!r}. It is written {_NOTATION}; "
            "--print-config shows all settings."
        )
    if path.startswith(_NOT_VARIED) and path not in _VARIED_ALL_THE_SAME:
        raise InputError(
            f"space.also must leave alone what trials are compared on, but got {path}. Give it as a flag, for all "
            "trials."
        )
    if kind == "choice" and len(set(values.split(","))) < len(values.split(",")):
        raise InputError(f"A choice must have different values, but got {text!r}. Leave the second one out.")
    return _parsed_values(path, kind, values, settings[path], text)


def _parsed_values(path: str, kind: str, values: str, present: Any, text: str) -> Dimension:
    """Return the dimension whose values, as `text` writes them, are of the type of the setting's present value."""
    if kind == "choice":
        words = values.split(",")
        choices = tuple(notation(word) if path == _OWN[2] else _value(word, present) for word in words)
        return Dimension(path=path, name=path, kind="choice", choices=choices)
    low, is_range, high = values.partition("..")
    try:
        limits = float(low), float(high)
    except ValueError:
        is_range = ""
    if kind not in ("log", "linear") or not is_range:
        raise InputError(f"space.also must be written {_NOTATION}, but got {text!r}.")
    is_number = isinstance(present, int | float) and not isinstance(present, bool)
    if not is_number or not limits[0] <= limits[1] or (kind == "log" and limits[0] <= 0):
        raise InputError(
            f"A range must be of a number, with low <= high, above 0 on a log scale, but got {text!r} for the value "
            f"{present!r}."
        )
    return Dimension(
        path=path,
        name=path,
        kind="log" if kind == "log" else "linear",
        low=limits[0],
        high=limits[1],
        is_integer=isinstance(present, int),
    )


def _value(word: str, example: Any) -> Value:
    """Return a choice as the type of the setting's present value."""
    if isinstance(example, str):
        return word
    try:
        value: Value = json.loads(word.lower() if isinstance(example, bool) else word)
    except json.JSONDecodeError:
        return word  # `override` refuses it, and names the type
    return float(value) if isinstance(example, float) and isinstance(value, int) else value

"""Fields of a config: their limits, and dataclasses to plain JSON values and back. Imports no torch."""

import copy
import dataclasses
import difflib
import math
import types
import typing
from typing import Any


def nearest_name(name: str, known: list[str]) -> str:
    """The name of `known` that is most like `name`."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def require(condition: bool, field: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{field} must {rule}, got {value!r}")


def require_int(owner: object, prefix: str, minimums: dict[str, int]) -> None:
    for field, minimum in minimums.items():
        value = getattr(owner, field)
        legal = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
        require(legal, prefix + field, f"be an int of at least {minimum}", value)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def require_choice(owner: object, prefix: str, field: str) -> None:
    choices = typing.get_args(typing.get_type_hints(type(owner))[field])
    value = getattr(owner, field)
    require(value in choices, prefix + field, f"be one of {', '.join(map(repr, choices))}", value)


def require_path(owner: object, prefix: str, *fields: str) -> None:
    """An empty path would be the current folder, which nobody means by it."""
    for field in fields:
        value = getattr(owner, field)
        legal = value is None or (isinstance(value, str) and bool(value.strip()))
        require(legal, prefix + field, "not be empty", value)


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def build(part: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'config'} must be a JSON object, got {values!r}")
    hints = typing.get_type_hints(part)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(
                f"key must be a field of the config, got {prefix + key!r}; "
                f"did you mean {prefix + nearest_name(key, list(hints))!r}?"
            )
        if dataclasses.is_dataclass(hints[key]):
            arguments[key] = build(hints[key], value, f"{prefix}{key}.")
        else:
            arguments[key] = _typed(hints[key], value, prefix + key)
    missing = [
        field.name
        for field in dataclasses.fields(part)
        if field.name not in arguments
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{prefix + missing[0]} must be given, got a config without it")
    return part(**arguments)


_JSON_TYPES = {bool: "true or false", str: "a string", tuple: "a list", dict: "a JSON object"}


def _typed(hint: Any, value: Any, name: str) -> Any:
    """Checks the kinds whose limits no `__post_init__` checks; JSON's list becomes the tuple of the field."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    if value is None and type(None) in choices:
        return None
    kind = typing.get_origin(choices[0]) or choices[0]
    if kind in _JSON_TYPES:
        accepted = (list, tuple) if kind is tuple else kind
        require(isinstance(value, accepted), name, f"be {_JSON_TYPES[kind]}", value)
    return tuple(value) if kind is tuple else copy.deepcopy(value)

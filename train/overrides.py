"""Dotted overrides of a `TrainConfig`: `optimizer.lr_peak=1e-4`, typed by the fields they name."""

import copy
import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from .config import TrainConfig
from .fields import nearest_name

_BOOLEANS = {"true": True, "false": False}


def override(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """A copy of `config` with the fields at these dotted names replaced, all at once.

    A name may go on inside a dict field (`optimizer.lr_scale.vision`, `data.options.split`). All limits are
    checked again. ValueError names the nearest valid key for an unknown one."""
    tree = config.to_dict()
    for key, value in values.items():
        field_path, inner_path = _resolve(key)
        branch = tree
        for name in (field_path + inner_path)[:-1]:
            branch = branch.setdefault(name, {})
            if not isinstance(branch, dict):
                raise ValueError(f"key must go on inside an object only, got {key!r}: {name!r} is {branch!r}")
        branch[(field_path + inner_path)[-1]] = copy.deepcopy(value)
    return TrainConfig.from_dict(tree)


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """`key=value` words -> {dotted key: value of the field's type}; ValueError for anything else.

    `none` is None where the field allows it, a tuple is written with commas, a dict as JSON; values inside a
    dict field are JSON where they can be and text otherwise."""
    values = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ValueError(f"override must be key=value, got {argument!r}")
        if key in values:
            raise ValueError(f"override must be given once, got {key!r} twice")
        field_path, inner_path = _resolve(key)
        values[key] = _loose(text) if inner_path else _parse(key, text, _field_type(field_path))
    return values


def _fields_of(part: type) -> dict[str, Any]:
    return typing.get_type_hints(part)


def _field_names(part: type, prefix: str = "") -> list[str]:
    names = []
    for name, hint in _fields_of(part).items():
        if dataclasses.is_dataclass(hint):
            names += _field_names(hint, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _resolve(key: str) -> tuple[list[str], list[str]]:
    """Splits a dotted key into the path of its field and the path inside that field, if it is a dict."""
    part, path = TrainConfig, key.split(".")
    for depth, name in enumerate(path):
        hint = _fields_of(part).get(name)
        if hint is None or not all(path):
            break
        if dataclasses.is_dataclass(hint):
            part = hint
            continue
        inner = path[depth + 1 :]
        if inner and typing.get_origin(hint) is not dict:
            break
        return path[: depth + 1], inner
    known = _field_names(TrainConfig)
    raise ValueError(
        f"key must be a field of the config, got {key!r}; did you mean {nearest_name(key, known)!r}?"
    )


def _field_type(path: list[str]) -> Any:
    hint: Any = TrainConfig
    for name in path:
        hint = _fields_of(hint)[name]
    return hint


def _parse(key: str, text: str, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none":
            return None
        return _parse(key, text, next(choice for choice in arguments if choice is not type(None)))
    if origin is typing.Literal:
        for choice in arguments:
            if text == str(choice):
                return choice
        raise ValueError(f"{key} must be one of {', '.join(map(str, arguments))}, got {text!r}")
    if origin is tuple:
        return [_parse(key, item.strip(), arguments[0]) for item in text.split(",")]
    if origin is dict:
        value = _loose(text)
        if not isinstance(value, dict):
            raise ValueError(f"{key} must be a JSON object, got {text!r}")
        return value
    if hint is bool:
        if text.lower() not in _BOOLEANS:
            raise ValueError(f"{key} must be true or false, got {text!r}")
        return _BOOLEANS[text.lower()]
    if hint is str:
        return text
    try:
        return hint(text)
    except ValueError:
        raise ValueError(f"{key} must be {'an int' if hint is int else 'a number'}, got {text!r}") from None


def _loose(text: str) -> Any:
    for read in (json.loads, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text

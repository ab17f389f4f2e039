"""Says what is wrong with a folder of safetensors before they are loaded, from their headers alone."""

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from .checks import is_finite

FLOATING = ("BF16", "F16", "F32", "F64")
"""Types, in safetensors' words, that are converted to the model's."""
INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that hold the model's weights; ValueError names a file that the index misses."""
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("model*.safetensors"))
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        by_file = {file: name for name, file in reversed(list(names.items()))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"directory must hold a readable index of its shards, got {str(index)!r}: {error!r}"
        ) from error
    for file, name in by_file.items():
        if not (folder / file).is_file():
            raise ValueError(
                f"directory must hold every file of its index, got {str(folder)!r} "
                f"without {file!r} (with {name})"
            )
    return [folder / file for file in sorted(by_file)]


def check_folder(folder: Path, model: nn.Module) -> None:
    """ValueError unless the folder's model*.safetensors are exactly `model`'s weights, floating and whole.

    Only headers are read; `model` may be on the meta device. The message names the folder, the file and the
    first tensors concerned."""
    weights = model.state_dict(keep_vars=True)
    with contextlib.ExitStack() as stack:
        files = {}
        for path in weight_files(folder):
            try:
                opened = stack.enter_context(safe_open(path, framework="pt"))
                files |= {name: (path, opened) for name in opened.keys()}  # noqa: SIM118  it is no dict
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"directory must hold undamaged safetensors, got {str(path)!r}: {error}"
                ) from error
        loaded = {id(weights[name]) for name in files if name in weights}  # tied weights are stored once
        missing = [name for name, weight in weights.items() if id(weight) not in loaded]
        _refuse(missing, str(folder), "every weight of its config.json", "without")
        unexpected = [f"{name} ({path.name})" for name, (path, _) in files.items() if name not in weights]
        _refuse(unexpected, str(folder), "no other weight than its config.json's", "with")
        misshapen, integer = [], []
        for name, (path, opened) in files.items():
            part = opened.get_slice(name)
            if part.get_dtype() not in FLOATING:
                integer.append(f"{name} {part.get_dtype()} ({path.name})")
            if part.get_shape() != list(weights[name].shape):
                misshapen.append(f"{name} {part.get_shape()} for {list(weights[name].shape)} ({path.name})")
        _refuse(integer, str(folder), "floating weights", "with")
        _refuse(misshapen, str(folder), "weights of the shapes in its config.json", "with")


def refuse_loading_info(info: Mapping[str, Any], name: str) -> None:
    """ValueError where transformers only warns: weights that were missing, unexpected or misshapen."""
    _refuse(info["missing_keys"], name, "every weight of its config.json", "without")
    _refuse(info["unexpected_keys"], name, "no other weight than its config.json's", "with")
    misshapen = [str(entry[0]) for entry in info["mismatched_keys"]]
    _refuse(misshapen, name, "weights of the shapes in its config.json", "with others for")


def check_finite(model: nn.Module, name: str) -> None:
    """ValueError for NaN or infinity in a weight; weights that were left on the disk are not read."""
    bad = [weight for weight, value in model.named_parameters() if not value.is_meta and not is_finite(value)]
    _refuse(bad, name, "finite weights", "with NaN or infinity in")


def _refuse(names: Iterable[str], folder: str, rule: str, found: str) -> None:
    names = sorted(names)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        shown = ", ".join(names[:3]) + more
        raise ValueError(f"directory must hold {rule}, got {folder!r} {found} {shown}")

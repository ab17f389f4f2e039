"""Reads a model's safetensors tensor by tensor and says what is wrong with them."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .checks import is_finite

FLOATING = ("BF16", "F16", "F32", "F64")
"""Types, in safetensors' words, that are converted to the model's."""


def load_weights(model: nn.Module, directory: Path) -> None:
    """Copies the tensors of `directory`'s model*.safetensors into `model`, which has to have all of them.

    One tensor is in memory at a time. ValueError names the folder and the first weights that are missing,
    unexpected, of another shape, not floating or not finite, or the file that is damaged; the model is then
    changed in part at most."""
    weights = model.state_dict(keep_vars=True)
    with contextlib.ExitStack() as stack:
        files = {}
        for path in sorted(directory.glob("model*.safetensors")):
            try:
                opened = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"directory must hold undamaged safetensors, got {str(path)!r}: {error}"
                ) from error
            files |= dict.fromkeys(opened.keys(), opened)
        loaded = {id(weights[name]) for name in files if name in weights}  # tied weights are stored once
        missing = [name for name, weight in weights.items() if id(weight) not in loaded]
        _refuse(missing, directory, "every weight of its config.json", "without")
        _refuse(files.keys() - weights.keys(), directory, "no other weight than its config.json's", "with")
        misshapen, integer = [], []
        for name, opened in files.items():
            part = opened.get_slice(name)
            if part.get_dtype() not in FLOATING:
                integer.append(f"{name} {part.get_dtype()}")
            if part.get_shape() != list(weights[name].shape):
                misshapen.append(f"{name} {part.get_shape()} for {list(weights[name].shape)}")
        _refuse(integer, directory, "floating weights", "with")
        _refuse(misshapen, directory, "weights of the shapes in its config.json", "with")
        not_finite = []
        with torch.no_grad():
            for name, opened in files.items():
                tensor = opened.get_tensor(name)
                if not is_finite(tensor):
                    not_finite.append(name)
                weights[name].copy_(tensor)
        _refuse(not_finite, directory, "finite weights", "with NaN or infinity in")


def _refuse(names: Iterable[str], directory: Path, rule: str, found: str) -> None:
    names = sorted(names)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        shown = ", ".join(names[:3]) + more
        raise ValueError(f"directory must hold {rule}, got {str(directory)!r} {found} {shown}")

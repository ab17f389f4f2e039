"""Files of a run: written whole or not at all, so that a run that was ended goes on where it stood."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .sizes import Size

VERSION = 2
"""Of the pages, questions and trainings: a run of another version is not gone on with."""


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a file beside `path`, which then takes its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_tensors(path: Path, value: Any) -> None:
    write_whole(path, lambda file: torch.save(value, file))


def load_tensors(path: Path, *, mmap: bool = False) -> Any:
    """ValueError naming the file where it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch has no class of its own for a damaged file
        raise ValueError(
            f"{path} cannot be read ({error}); delete it and run the same command again"
        ) from error


def save_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write_text(text))


def load_json(path: Path) -> Any:
    """ValueError naming the file where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); delete it and run the same command again"
        ) from error


def claim(folder: Path, size: Size) -> None:
    """Makes `folder` a run of this size; ValueError where it holds one of other settings."""
    settings = json.loads(json.dumps({"version": VERSION, **dataclasses.asdict(size)}))
    path = folder / "settings.json"
    if not path.exists():
        save_json(path, settings)
        return
    found = load_json(path)
    other = sorted(key for key in {*settings, *found} if settings.get(key) != found.get(key))
    if other:
        raise ValueError(
            f"--output must be a new folder or one of the same settings, got {str(folder)!r}, which differs "
            f"in {', '.join(other)}"
        )

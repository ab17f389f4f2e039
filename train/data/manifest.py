"""Manifests: which sets a stage reads, how, and how often."""

import json
import typing
from pathlib import Path
from typing import Any

from ..config import nearest_name
from .augment import TextAugmented
from .mixture import Mixture
from .registry import make_dataset
from .samples import Prompt

SET_KEYS = ("name", "reader", "path", "image_root", "options", "prompt", "weight", "augment", "comment")
AUGMENT_KEYS = ("seed", "num_questions")
_FILE_OPTIONS = ("annotations",)


def load_manifest(path: str | Path, image_root: str | None = None) -> Mixture:
    """The mixture that a JSON file describes: {"sets": [{"name": "gqa", "reader": "vqa", "path": "gqa.json",
    "image_root": "images", "options": {"form": "gqa"}, "prompt": "vicuna_v1", "weight": 471000,
    "augment": {"seed": 0}}, ...]}.

    `reader` is a value of `data.name`; `path` (for shards a list too), `image_root` and `options` go to it.
    Relative files start at the manifest's folder; a set without an `image_root` takes the argument's. Without
    a `weight` a set counts with its number of samples. `augment` (true, or an object) paints text on its
    images (`train.data.augment`). ValueError, naming the set, for anything that does not fit."""
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"data.path must be an existing file, got {str(path)!r}")
    try:
        content = json.loads(source.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"data.path must be a JSON manifest, got {str(path)!r}: {error}") from error
    sets = content.get("sets") if isinstance(content, dict) else None
    if not isinstance(sets, list) or not sets:
        raise ValueError(f"data.path must be a manifest with a list 'sets', got {str(path)!r}")
    names: list[str] = []
    datasets, weights, prompts = [], [], []
    for number, entry in enumerate(sets, start=1):
        name = entry.get("name") if isinstance(entry, dict) else None
        here = f"{source} set {name!r}" if name else f"{source} set {number}"
        try:
            _check(entry, names)
            dataset = _dataset(entry, source.parent, image_root)
        except ValueError as error:
            raise ValueError(f"{here}: {error}") from error
        names.append(name)
        datasets.append(dataset)
        weight = entry.get("weight")
        weights.append(len(dataset) if weight is None else weight)
        prompts.append(entry.get("prompt"))
    try:
        return Mixture(datasets, weights, names=names, prompts=prompts)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _check(entry: Any, names: list[str]) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"set must be a JSON object, got {entry!r}")
    for key in entry:
        if key not in SET_KEYS:
            nearest = nearest_name(key, list(SET_KEYS))
            raise ValueError(
                f"key must be one of {', '.join(SET_KEYS)}, got {key!r}; did you mean {nearest!r}?"
            )
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"name must be a text, got {name!r}")
    if name in names:
        raise ValueError(f"name must be another one than those before it, got {name!r}")
    if entry.get("reader") == "manifest" or not isinstance(entry.get("reader"), str):
        raise ValueError(f"reader must be the name of a dataset, not a manifest, got {entry.get('reader')!r}")
    prompt, known = entry.get("prompt"), typing.get_args(Prompt)
    if prompt is not None and prompt not in known:
        raise ValueError(f"prompt must be one of {', '.join(map(repr, known))}, got {prompt!r}")
    if not isinstance(entry.get("options", {}), dict):
        raise ValueError(f"options must be a JSON object, got {entry['options']!r}")
    augment = entry.get("augment", False)
    if not isinstance(augment, (bool, dict)):
        raise ValueError(f"augment must be true, false or a JSON object, got {augment!r}")
    for key in augment if isinstance(augment, dict) else ():
        if key not in AUGMENT_KEYS:
            raise ValueError(f"augment must have the keys {' and '.join(AUGMENT_KEYS)}, got {key!r}")


def _dataset(entry: dict[str, Any], folder: Path, image_root: str | None) -> Any:
    arguments: dict[str, Any] = {}
    if entry.get("path") is not None:
        arguments["path"] = _under(folder, entry["path"])
    if entry.get("image_root") is not None:
        arguments["image_root"] = _under(folder, entry["image_root"])
    elif image_root is not None and entry["reader"] not in ("webdataset", "painted"):
        arguments["image_root"] = image_root
    for name, value in entry.get("options", {}).items():
        arguments[name] = _under(folder, value) if name in _FILE_OPTIONS else value
    dataset = make_dataset(entry["reader"], arguments, "data.")
    augment = entry.get("augment", False)
    if augment is False:
        return dataset
    return TextAugmented(dataset, **(augment if isinstance(augment, dict) else {}))


def _under(folder: Path, name: Any) -> Any:
    """Names of files, from the manifest's folder on; what is no text is left for the reader to refuse."""
    if isinstance(name, list):
        return [_under(folder, each) for each in name]
    return str(folder / name) if isinstance(name, str) else name

"""Reads a checkpoint tensor by tensor: one file or shards, safetensors or torch's pickles alike."""

import contextlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checks import is_finite, require

FLOATING = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The types of weights that are read, in safetensors' words."""
_TORCH_NAMES = {dtype: name for name, dtype in FLOATING.items()}
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_BASE_NAMES = ("model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
_SHARD = re.compile(r"(?P<base>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
_WRAPPERS = ("state_dict", "model", "module")
"""Keys under which training programs store the weights, beside a step and an optimizer's state."""


class Source:
    """The weights in a file or a folder; `names` in the files' order. A context manager.

    ValueError names the file, and the tensor, that is missing, damaged or no weight."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        require(self.path.exists(), "SRC", "be an existing file or folder", str(path))
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.beside: list[str] = []
        """Entries of a training program's file that are no weights."""
        self._stack = contextlib.ExitStack()
        self._files: dict[str, _SafetensorsFile | _TorchFile] = {}
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()

    @property
    def names(self) -> list[str]:
        return list(self._files)

    @property
    def files(self) -> list[Path]:
        """The weight files, without an index."""
        return list(dict.fromkeys(file.path for file in self._files.values()))

    def where(self, name: str) -> str:
        """File and tensor, for messages."""
        return f"{name} in {str(self._files[name].path)!r}"

    def file_of(self, name: str) -> Path:
        return self._files[name].path

    def shape(self, name: str) -> list[int]:
        return self._files[name].shape(name)

    def dtype(self, name: str) -> str:
        """In safetensors' words; "BF16", "F16", "F32" and "F64" are weights."""
        return self._files[name].dtype(name)

    def tensor(self, name: str) -> Tensor:
        """A finite floating tensor, mapped from the file where the format allows it."""
        rule = "be floating weights of 16, 32 or 64 bits"
        require(self.dtype(name) in FLOATING, self.where(name), rule, self.dtype(name))
        try:
            tensor = self._files[name].tensor(name)
        except (SafetensorError, RuntimeError, OSError, ValueError) as error:
            raise _damaged(self._files[name].path, f"{name}: {error}") from error
        require(is_finite(tensor), self.where(name), "be finite", "NaN or infinity")
        return tensor

    def _open(self) -> None:
        paths, index = _weight_files(self.path)
        for path in paths:
            file = self._stack.enter_context(_open(path))
            for name in file.names:
                other = self._files.get(name)
                where = f"{name} in {str(path)!r}"
                require(other is None, where, "be stored once", other and f"{str(other.path)!r} too")
                self._files[name] = file
            self.beside += file.beside
        if index is not None:
            _compare_with_index(index, self._files)


class _SafetensorsFile(contextlib.AbstractContextManager):
    beside: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._opened = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
        self.names = list(self._opened.keys())

    def __exit__(self, *_: object) -> None:
        self._opened.__exit__(None, None, None)

    def shape(self, name: str) -> list[int]:
        return self._opened.get_slice(name).get_shape()

    def dtype(self, name: str) -> str:
        return self._opened.get_slice(name).get_dtype()

    def tensor(self, name: str) -> Tensor:
        return self._opened.get_tensor(name)


class _TorchFile(contextlib.AbstractContextManager):
    """A pickle of tensors, mapped into memory; code in it is refused by torch's own reader of weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors, self.beside = _unwrapped(path, _load(path))
        self.names = list(self._tensors)

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()

    def shape(self, name: str) -> list[int]:
        return list(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        dtype = self._tensors[name].dtype
        return _TORCH_NAMES.get(dtype, str(dtype).removeprefix("torch."))

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()


def _load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about the file's age
        try:
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                # the format before torch 1.6
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises what it likes
            reason = (
                str(error).partition("\n")[0].partition(". ")[0]
            )  # torch goes on to advise unsafe loading
            raise _damaged(path, f"{type(error).__name__}: {reason}") from error


def _unwrapped(path: Path, content: Any) -> tuple[dict[str, Tensor], list[str]]:
    beside = []
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            beside = sorted(str(name) for name in content if name != key)
            content = content[key]
            break
    rule = "hold a state dict (tensors by name)"
    require(
        isinstance(content, Mapping) and len(content) > 0, f"SRC {str(path)!r}", rule, type(content).__name__
    )
    for name, value in content.items():
        legal = isinstance(name, str) and isinstance(value, Tensor)
        require(legal, f"{name} in {str(path)!r}", "be a tensor", type(value).__name__)
    return dict(content), beside


def _open(path: Path) -> _SafetensorsFile | _TorchFile:
    if path.suffix == ".safetensors":
        return _SafetensorsFile(path)
    return _TorchFile(path)


def _damaged(path: Path, reason: object) -> ValueError:
    text = " ".join(str(reason).split())
    return ValueError(f"SRC must hold undamaged weight files, got {str(path)!r}: {text}")


def _weight_files(path: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The files that hold the weights, and the index's file for each tensor where there is an index."""
    if path.is_dir():
        return _in_folder(path)
    if path.name.endswith(".index.json"):
        return _from_index(path)
    suffixes = (".safetensors", *TORCH_SUFFIXES)
    require(path.suffix in suffixes, "SRC", f"end with {', '.join(suffixes)} or .index.json", str(path))
    if _SHARD.fullmatch(path.name):
        raise ValueError(f"SRC must name the folder of a sharded checkpoint, got one shard, {str(path)!r}")
    return [path], None


def _in_folder(folder: Path) -> tuple[list[Path], dict[str, Path] | None]:
    for suffix in (".safetensors", ".bin"):
        for base in _BASE_NAMES:
            path = folder / f"{base}{suffix}"
            index = folder / f"{base}{suffix}.index.json"
            if index.is_file():
                return _from_index(index)
            if path.is_file():
                return [path], None
    for suffix in (".safetensors", *TORCH_SUFFIXES):
        found = sorted(folder.glob(f"*{suffix}"))
        if len(found) == 1 and not _SHARD.fullmatch(found[0].name):
            return found, None
        if found:
            return _complete_shards(folder, found), None
    raise ValueError(
        f"SRC must be a folder with weights (.safetensors, {', '.join(TORCH_SUFFIXES)}), got {str(folder)!r}"
    )


def _complete_shards(folder: Path, found: list[Path]) -> list[Path]:
    """`found` if they are all shards of one checkpoint, which then needs no index."""
    shards = [_SHARD.fullmatch(path.name) for path in found]
    sets = {(shard["base"], shard["count"]) for shard in shards if shard}
    if None in shards or len(sets) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise ValueError(
            f"SRC must name one of the weight files in {str(folder)!r}, got the folder with {names}"
        )
    (base, count), suffix = sets.pop(), found[0].suffix
    for number in range(1, int(count) + 1):
        _require_shard(folder / f"{base}-{number:05}-of-{count}{suffix}")
    return found


def _require_shard(path: Path) -> None:
    require(path.is_file(), "SRC", "hold all shards of its checkpoint", f"no file {str(path)!r}")


def _from_index(path: Path) -> tuple[list[Path], dict[str, Path]]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {name: path.parent / file for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"no index with a weight_map ({type(error).__name__}: {error})") from error
    shards = sorted(set(files.values()))
    require(bool(shards), f"SRC {str(path)!r}", "name the file of every tensor", weight_map)
    for shard in shards:
        require(shard.parent == path.parent, f"SRC {str(path)!r}", "name files of its own folder", str(shard))
        _require_shard(shard)
    return shards, files


def _compare_with_index(
    index: Mapping[str, Path], files: Mapping[str, "_SafetensorsFile | _TorchFile"]
) -> None:
    for name, path in index.items():
        held = name in files and files[name].path == path
        require(held, "SRC", f"hold {name} in {str(path)!r}, as its index says", "a file without it")
    for name, file in files.items():
        require(
            name in index, "SRC", f"list {name} of {str(file.path)!r} in its index", "an index without it"
        )


def read_json(folder: Path, *names: str) -> dict[str, Any]:
    """The first of the JSON files that `folder` has; {} where it has none."""
    for path in (folder / name for name in names):
        if path.is_file():
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ValueError(f"SRC must hold readable JSON, got {str(path)!r}: {error}") from error
            require(
                isinstance(values, dict), f"SRC {str(path)!r}", "hold a JSON object", type(values).__name__
            )
            return values
    return {}


def shown(names: Iterable[str], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

"""Writes safetensors as they come: a full shard goes to disk, so that no model is in memory whole."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..checks import is_finite, require, require_choice

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(size: int | str) -> int:
    """5_000_000, "5MB" or "2GiB" as a number of bytes."""
    rule = "be a positive number of bytes such as 500MB or 5GB"
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", str(size))
    require(found is not None and found[2].upper() in _UNITS, "max_shard_size", rule, size)
    number = int(float(found[1]) * _UNITS[found[2].upper()])
    require(number > 0, "max_shard_size", rule, size)
    return number


def dtype_of(name: str) -> torch.dtype | None:
    """The type that is called `name`; None for "auto"."""
    require_choice("--dtype", name, ("auto", *DTYPES))
    return DTYPES.get(name)


class ShardWriter:
    """`add` tensors one by one, then `finish`: `model.safetensors`, or shards and their index.

    A tensor that is larger than `max_shard_size` bytes gets a shard of its own. `dtype` is what all are
    written in, None each tensor's own; `widest_dtype` holds all that were written exactly."""

    def __init__(self, folder: Path, max_shard_size: int, dtype: torch.dtype | None = None) -> None:
        self.folder, self.max_shard_size, self.dtype = folder, max_shard_size, dtype
        self.total_size = 0
        self.widest_dtype: torch.dtype | None = None
        self._shards: list[list[str]] = []
        self._waiting: dict[str, Tensor] = {}
        self._waiting_size = 0

    def add(self, name: str, tensor: Tensor) -> None:
        dtype = self.dtype or tensor.dtype
        size = tensor.numel() * dtype.itemsize
        if self._waiting and self._waiting_size + size > self.max_shard_size:
            self._flush()
        tensor = tensor.to(dtype).contiguous()
        if self.dtype is not None:
            rule = f"be wide enough for {name}"
            require(is_finite(tensor), "--dtype", rule, str(dtype).removeprefix("torch."))
        self.widest_dtype = torch.promote_types(self.widest_dtype or dtype, dtype)
        if tensor.data_ptr() in {other.data_ptr() for other in self._waiting.values()}:
            tensor = tensor.clone()  # the format refuses shared memory, which torch's files may hold
        self._waiting[name] = tensor
        self._waiting_size += size
        self.total_size += size

    def finish(self) -> None:
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._temporary(0).rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._temporary(number).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total_size}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        path = self._temporary(len(self._shards))
        try:
            save_file(self._waiting, path, metadata={"format": "pt"})
        except SafetensorError as error:  # its word for a full disk too
            raise OSError(
                f"DST must have room for {self._waiting_size} bytes, got {str(path)!r}: {error}"
            ) from error
        self._shards.append(list(self._waiting))
        self._waiting, self._waiting_size = {}, 0

    def _temporary(self, number: int) -> Path:
        return self.folder / f"shard-{number}.unfinished"


def check_destination(path: str | Path) -> Path:
    """`path` if nothing stands there, or an empty folder."""
    path = Path(path)
    free = not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir()))
    require(free, "DST", "be a new or an empty folder", str(path))
    return path


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends well and else goes away."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.unfinished-", dir=path.parent))
    try:
        yield temporary
        mask = _umask()  # mkdtemp's folder and safetensors' files are their owner's alone
        temporary.chmod(0o777 & ~mask)
        for file in temporary.iterdir():
            file.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

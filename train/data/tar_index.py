"""Where the files of a tar shard stand, kept beside the shard."""

import contextlib
import dataclasses
import os
import re
import tarfile
import uuid
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

IMAGE, TEXT, JSON = range(3)
"""Kinds of members, and their places in `ShardIndex.members`."""

MISSING, CUT, DUPLICATE = -1, -2, -3
"""Sizes of members that cannot be read: not there, cut off with the shard, several of a kind."""

_KINDS = dict.fromkeys(
    ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "jp2"), IMAGE
) | {"txt": TEXT, "json": JSON}
_VERSION = 1
_BLOCK = tarfile.BLOCKSIZE


class Member(NamedTuple):
    offset: int
    size: int
    """In bytes, or one of `MISSING`, `CUT` and `DUPLICATE`."""


@dataclasses.dataclass(slots=True)
class ShardIndex:
    """The keys of a shard, in its order."""

    spans: np.ndarray
    """[keys, 3, 2] int64: offset and size of the image, the text and the JSON."""
    names: np.ndarray
    """All keys in UTF-8, one after the other."""
    name_ends: np.ndarray
    """[keys] int64."""
    notes: list[str]

    def __len__(self) -> int:
        return len(self.spans)

    def key(self, place: int) -> str:
        start = int(self.name_ends[place - 1]) if place else 0
        return bytes(self.names[start : self.name_ends[place]]).decode("utf-8", "backslashreplace")

    def members(self, place: int) -> list[Member]:
        return [Member(int(offset), int(size)) for offset, size in self.spans[place]]


def open_index(shard: Path) -> ShardIndex:
    """The index from the file beside the shard, if it fits the shard's size and time; else it is made, and
    written there where that is possible. ValueError if the shard is no plain tar file."""
    try:
        state = shard.stat()
    except OSError as error:
        raise ValueError(f"data.path must name readable shards, got {str(shard)!r}: {error}") from error
    stamp = [_VERSION, state.st_size, state.st_mtime_ns]
    beside = shard.with_name(shard.name + ".index.npz")
    found = _read(beside, stamp)
    if found is None:
        found = _make(shard, state.st_size)
        _write(beside, stamp, found)
    return found


def _read(beside: Path, stamp: list[int]) -> ShardIndex | None:
    try:
        with np.load(beside, allow_pickle=False) as stored:
            if stored["stamp"].tolist() != stamp:
                return None
            notes = stored["notes"].tolist()
            return ShardIndex(stored["spans"], stored["names"], stored["name_ends"], notes)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # not there, or damaged: made again
        return None


def _write(beside: Path, stamp: list[int], index: ShardIndex) -> None:
    """In one piece, so that several ranks may do it at once. Not in a folder that cannot be written."""
    temporary = beside.with_name(f".{beside.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            np.savez(
                file,
                stamp=np.array(stamp, np.int64),
                spans=index.spans,
                names=index.names,
                name_ends=index.name_ends,
                notes=np.array(index.notes, dtype=np.str_),
            )
        os.replace(temporary, beside)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _make(shard: Path, file_size: int) -> ShardIndex:
    spans: list[list[list[int]]] = []
    keys: list[str] = []
    damage = "" if file_size else "no bytes"
    try:
        if file_size:
            with tarfile.open(shard, "r:") as tar:
                damage = _collect(tar, file_size, spans, keys)
    except (tarfile.TarError, EOFError) as error:
        if not keys:
            rule = "data.path must name tar files that are not compressed"
            raise ValueError(f"{rule}, got {str(shard)!r}: {error}") from error
        damage = str(error)
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    return ShardIndex(
        np.array(spans, np.int64).reshape(len(keys), 3, 2),
        np.frombuffer(b"".join(encoded), np.uint8),
        np.cumsum([len(name) for name in encoded], dtype=np.int64),
        [f"{shard} is damaged or cut off ({damage}); {len(keys)} keys were found"] if damage else [],
    )


def _collect(tar: tarfile.TarFile, file_size: int, spans: list, keys: list[str]) -> str:
    """Adds keys and spans; returns what ended the shard before its end, or ""."""
    while (member := tar.next()) is not None:
        tar.members = []  # tarfile would keep them all, for access that is not needed here
        place = re.match(r"((?:.*/|)[^.]+)[.]([^/]*)$", member.name, re.DOTALL)
        if not member.isreg() or place is None or re.match(r"__[^/]*__($|/)", member.name):
            continue
        key, suffix = place.groups()
        if not keys or keys[-1] != key:
            keys.append(key)
            spans.append([[0, MISSING], [0, MISSING], [0, MISSING]])
        kind = _KINDS.get(suffix.lower())
        if kind is None:
            continue
        span = spans[-1][kind]
        size = member.size if member.offset_data + member.size <= file_size else CUT
        span[:] = [member.offset_data, size if span[1] == MISSING else DUPLICATE]
    # tarfile takes the end of the file, or a block that is no header, for the end of the archive
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(_BLOCK)
    if block != bytes(_BLOCK):
        return "no end mark" if len(block) < _BLOCK else f"no header at byte {tar.offset}"
    return ""

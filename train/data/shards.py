"""Image-text pairs in WebDataset's tar shards, read at random by an index of each shard."""

import collections
import glob
import json
import re
import threading
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from .images import FilePart
from .samples import IMAGE_MARK, BadSample, RecordDataset, Sample, short
from .tar_index import CUT, DUPLICATE, IMAGE, JSON, MISSING, TEXT, ShardIndex, open_index

_LONGEST_TEXT = 1 << 24
"""Bytes of a caption or its JSON."""
_OPEN_INDICES = 64
"""Shards whose index stays in memory."""


class WebDataset(RecordDataset):
    """LAION's and COYO's pairs: for every key an image (`.jpg`, `.png`, `.webp`, ...) and its caption.

    `path`: a name, several of them, or a pattern with braces ("{000..010}.tar", "{a,b}.tar") or * and ?.
    Shards are not compressed. A file belongs to the key before the first dot of its name, and files of one
    key stand next to each other, as the `webdataset` library writes and reads them. The caption is the
    `.txt` file, or the field `caption_key` of the `.json` file where that is given or there is no `.txt`
    (then "caption"). `question` stands between the image and its caption.

    The index of a shard is made once and kept beside it as `NAME.tar.index.npz`, where the folder can be
    written. A shard that was cut off keeps its whole files; `notes` tell of it. A key without a whole image
    and caption is a `BadSample`."""

    def __init__(self, path: str | Sequence[str], caption_key: str | None = None, question: str = "") -> None:
        for name, value in (("caption_key", caption_key), ("question", question)):
            if not isinstance(value, (str, type(None))):
                raise ValueError(f"data.options.{name} must be a text, got {value!r}")
        self.caption_key, self.question = caption_key, question
        self.shards = expand(path)
        self._open: collections.OrderedDict[int, ShardIndex] = collections.OrderedDict()
        self._lock = threading.Lock()
        notes, counts = [], []
        for number in range(len(self.shards)):
            index = self._index(number)
            counts.append(len(index))
            notes += index.notes
        self.notes = notes
        self._ends = np.cumsum(counts)
        if not len(self):
            raise ValueError(f"data.path must hold at least one record, got none in {short(path)}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def num_images(self, index: int) -> int:
        """1, without a look at the shard: a global batch has thousands of pairs."""
        return 1

    def _index(self, number: int) -> ShardIndex:
        with self._lock:
            index = self._open.get(number)
            if index is None:
                index = self._open[number] = open_index(self.shards[number])
                if len(self._open) > _OPEN_INDICES:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(number)
        return index

    def _sample(self, index: int) -> Sample:
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard, found = self.shards[number], self._index(number)
        place = index - (int(self._ends[number - 1]) if number else 0)
        key = found.key(place)
        origin = f"{shard} key {short(key)}"
        members = found.members(place)
        for member, kind in zip(members, ("image", "text", "JSON"), strict=True):
            if member.size == DUPLICATE:
                raise BadSample("duplicate_file", f"{origin}: key must have one {kind}, got several")
        image = members[IMAGE]
        if image.size < 0:
            got = "one that was cut off" if image.size == CUT else "none"
            raise BadSample("missing_image", f"{origin}: key must have an image, got {got}")
        caption = self._caption(shard, members, origin)
        if not caption.strip():
            raise BadSample("empty_answer", f"{origin}: caption must not be empty, got {short(caption)}")
        part = FilePart(f"{shard} key {short(key)}", shard, image.offset, image.size)
        return Sample([part], [(IMAGE_MARK + self.question, caption.strip())], origin=origin)

    def _caption(self, shard: Path, members: Sequence, origin: str) -> str:
        wants_json = self.caption_key is not None or members[TEXT].size == MISSING
        member = members[JSON] if wants_json else members[TEXT]
        if member.size < 0:
            got = "one that was cut off" if member.size == CUT else "none"
            raise BadSample("missing_text", f"{origin}: key must have a caption, got {got}")
        if member.size > _LONGEST_TEXT:
            rule = f"caption must have at most {_LONGEST_TEXT} bytes"
            raise BadSample("bad_text", f"{origin}: {rule}, got {member.size}")
        raw = FilePart("", shard, member.offset, member.size).read()
        if not wants_json:
            try:
                return raw.decode()
            except UnicodeDecodeError as error:
                rule = f"caption must be UTF-8, got {short(raw)}"
                raise BadSample("bad_text", f"{origin}: {rule}: {error}") from None
        try:
            record = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BadSample(
                "bad_json", f"{origin}: JSON must be readable, got {short(raw)}: {error}"
            ) from None
        name = "caption" if self.caption_key is None else self.caption_key
        caption = record.get(name) if isinstance(record, dict) else None
        if not isinstance(caption, str):
            raise BadSample("missing_text", f"{origin}: JSON must have a text {name!r}, got {short(record)}")
        return caption


def expand(path: str | Sequence[str]) -> list[Path]:
    """The files that a name with braces, * and ?, or several such names, stand for; ValueError for one that
    is not there."""
    names = [path] if isinstance(path, (str, Path)) else path
    legal = isinstance(names, (list, tuple)) and names and all(isinstance(n, (str, Path)) for n in names)
    if not legal:
        raise ValueError(f"data.path must be the name of shards or a list of them, got {path!r}")
    found = []
    for name in names:
        for one in _braces(str(name)):
            matches = (
                sorted(glob.glob(one)) if re.search(r"[*?\[]", one) and not Path(one).exists() else [one]
            )
            if not matches or not all(Path(match).is_file() for match in matches):
                raise ValueError(f"data.path must name existing shards, got {one!r}")
            found += map(Path, matches)
    return found


def _braces(name: str) -> list[str]:
    parts = re.split(r"\{([^{}]*)\}", name)
    choices = []
    for number, part in enumerate(parts):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part) if number % 2 else None
        if span:
            first, last = span.groups()
            if int(first) > int(last):
                raise ValueError(f"data.path must count upwards in braces, got {name!r}")
            choices.append([f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(",") if number % 2 else [part])
    return ["".join(chosen) for chosen in product(*choices)]

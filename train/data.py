"""Samples and where they come from: the dataset protocol, the order of reading, LLaVA conversations.

A dataset is anything with `len(dataset)` and `dataset[i] -> Sample`. It may be endless: `len` then returns a
huge number and the index decides the random draw, so that any sample can be made again."""

import array
import dataclasses
import importlib
import json
import mmap
from codecs import BOM_UTF8
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from .config import DataConfig, nearest_name

IMAGE_MARK = "<image>"
_MASK = (1 << 64) - 1
_FEISTEL_ROUNDS = 6


@dataclasses.dataclass(slots=True)
class Sample:
    """One conversation about at most one image."""

    image: Any
    """What `model.ImageProcessor` reads (path, PIL image, array [height, width, 3]), or None."""
    turns: Sequence[tuple[str, str]]
    """Questions and answers in order; the image stands before the first question."""
    origin: str = ""
    """Where it was read, for error messages ("vqa.jsonl line 12")."""


class Dataset(Protocol):
    """Read from several threads at once when `data.workers` > 1."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class BadSample(ValueError):
    """A sample that cannot be trained on; `reason` is the short name it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


DATASETS = {
    "conversations": "train.data:ConversationDataset",
    "painted": "train.demo.painted:PaintedPhotographs",
}
"""Values of `data.name`, as module:class; the module is imported when the name is used."""


def build_dataset(config: DataConfig) -> Dataset:
    """The dataset that `config` names, made with `path` and `image_root`, where given, and `options`."""
    if config.name not in DATASETS:
        nearest = nearest_name(config.name, list(DATASETS))
        raise ValueError(
            f"data.name must be one of {', '.join(DATASETS)}, got {config.name!r}; did you mean {nearest!r}?"
        )
    module, _, attribute = DATASETS[config.name].partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ValueError(
            f"data.name must be a dataset whose packages are installed, got {config.name!r}: {error}"
        ) from error
    given = {"path": config.path, "image_root": config.image_root}
    arguments = {name: value for name, value in given.items() if value is not None} | config.options
    try:
        return factory(**arguments)
    except TypeError as error:
        raise ValueError(
            f"data.options must fit dataset {config.name!r}, got {arguments}: {error}"
        ) from error


def sample_index(position: int, length: int, *, seed: int = 0, shuffle: bool = True) -> int:
    """Index of the sample that is read at `position` of an endless reading of a dataset of `length` samples.

    Every epoch (`length` positions) reads every sample once. With `shuffle` the order is a permutation fixed
    by (seed, epoch). It is computed, not stored: a Feistel network permutes the next power of four, and
    walking its cycle until the value falls below `length` restricts it (Black & Rogaway 2002), so that a
    step's samples are known without the steps before it and endless datasets cost no memory."""
    epoch, offset = divmod(position, length)
    if not shuffle or length == 1:
        return offset
    half_bits = ((length - 1).bit_length() + 1) // 2
    half_mask = (1 << half_bits) - 1
    key = _mix(_mix(seed) ^ epoch)
    while True:
        left, right = offset >> half_bits, offset & half_mask
        for round_number in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix((key + round_number) ^ (right << 8)) & half_mask)
        offset = (left << half_bits) | right
        if offset < length:
            return offset


def _mix(value: int) -> int:
    """Spreads the low 64 bits of `value` over 64 bits: two xor-shift and multiply steps."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 32)) * 0xD6E8FEB86659FD93) & _MASK
    value = ((value ^ (value >> 32)) * 0xD6E8FEB86659FD93) & _MASK
    return value ^ (value >> 32)


class ConversationDataset:
    """LLaVA conversations, one JSON record a line:
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nquestion"},
    {"from": "gpt", "value": "answer"}, ...]}. Blank lines and a UTF-8 byte-order mark are skipped.

    `image` may be missing; with it `<image>` stands exactly once, in the first question. Image paths start at
    `image_root` (default: the file's folder). Records are checked when they are read: a bad one is a
    `BadSample` that names file, line, rule and value. ValueError if the file is missing, empty or one JSON
    array."""

    def __init__(self, path: str | Path, image_root: str | Path | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"data.path must be an existing file, got {str(path)!r}")
        self.image_root = self.path.parent if image_root is None else Path(image_root)
        if not self.image_root.is_dir():
            raise ValueError(f"data.image_root must be an existing folder, got {str(image_root)!r}")
        # of every record: its first byte, and its line's number from 1
        self._starts, self._lines = array.array("q"), array.array("q")
        with self.path.open("rb") as file:
            start = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
            file.seek(start)
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    self._starts.append(start)
                    self._lines.append(number)
                start += len(line)
            if not self._starts:
                raise ValueError(f"data.path must hold at least one record, got none in {str(path)!r}")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._line(0).lstrip()[:1] == b"[":
            raise ValueError(f"data.path must hold one JSON record a line, got a JSON array in {str(path)!r}")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        origin = f"{self.path} line {self._lines[index]}"
        line = self._line(index)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadSample(
                "bad_json", f"{origin}: record must be JSON, got {_short(line)}: {error}"
            ) from None
        if not isinstance(record, dict):
            raise BadSample("bad_json", f"{origin}: record must be a JSON object, got {_short(record)}")
        image = self._image_path(record.get("image"), origin)
        return Sample(image, _turns(record.get("conversations"), image is not None, origin), origin)

    def _line(self, index: int) -> bytes:
        start = self._starts[index]
        end = self._bytes.find(b"\n", start)
        return self._bytes[start:] if end < 0 else self._bytes[start:end]

    def _image_path(self, name: Any, origin: str) -> Path | None:
        if name is None:
            return None
        if not isinstance(name, str) or not name:
            raise BadSample("missing_image", f"{origin}: image must be a file name, got {_short(name)}")
        path = self.image_root / name
        try:
            exists = path.is_file()
        except (OSError, ValueError):  # a name too long for the file system, or with a NUL in it
            exists = False
        if not exists:
            raise BadSample(
                "missing_image", f"{origin}: image must be an existing file, got {_short(str(path))}"
            )
        return path


def _turns(conversation: Any, has_image: bool, origin: str) -> list[tuple[str, str]]:
    if not isinstance(conversation, list) or not conversation or len(conversation) % 2:
        rule = "conversations must be a list of pairs of messages"
        raise BadSample("bad_conversation", f"{origin}: {rule}, got {_short(conversation)}")
    texts = []
    for number, message in enumerate(conversation):
        sender = "gpt" if number % 2 else "human"
        if not isinstance(message, dict) or message.get("from") != sender:
            rule = f"message {number + 1} must be from {sender!r}"
            raise BadSample("bad_conversation", f"{origin}: {rule}, got {_short(message)}")
        if not isinstance(message.get("value"), str):
            rule = f"message {number + 1} must have a text value"
            raise BadSample("bad_conversation", f"{origin}: {rule}, got {_short(message)}")
        texts.append(message["value"])
    marks = [text.count(IMAGE_MARK) for text in texts]
    if marks[0] != has_image or any(marks[1:]):
        rule = (
            f"<image> must stand {'once, in the first question' if has_image else 'nowhere without an image'}"
        )
        raise BadSample("image_marks", f"{origin}: {rule}, got {marks} by message")
    texts = [text.replace(IMAGE_MARK, "").strip() for text in texts]
    for number, text in enumerate(texts):
        if not text:
            name = "answer" if number % 2 else "question"
            raise BadSample(
                f"empty_{name}", f"{origin}: {name} {number // 2 + 1} must not be empty, got {text!r}"
            )
    return list(zip(texts[::2], texts[1::2], strict=True))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."

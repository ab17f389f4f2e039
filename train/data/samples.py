"""What a dataset gives: samples, and named refusals of records that cannot be one."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

IMAGE_MARK = "<image>"

Prompt = Literal["vicuna_v1", "plain"]


@dataclasses.dataclass(slots=True)
class Sample:
    """A conversation about any number of images, or a document with images between its texts."""

    images: Sequence[Any]
    """What `model.ImageProcessor` reads (path, open file, PIL image, array [height, width, 3]), in the order
    of their marks."""
    turns: Sequence[tuple[str, str]]
    """Questions and answers in order; an `<image>` in a question is the place of the next image. A document
    has the images that stand before a text as its question: ("<image>", "text that follows")."""
    prompt: Prompt | None = None
    """Form of the prompt where it is not the stage's (`data.prompt`)."""
    origin: str = ""
    """Where it was read, for error messages ("vqa.jsonl line 12")."""


class Dataset(Protocol):
    """Random access, from several threads at once when `data.workers` > 1.

    A dataset may have three methods more. `num_images(index)` gives the number of the sample's images and
    `image_sizes(index)` their (height, width), both without decoding them: `train.batch.StepReader` balances
    by them, and asks for a whole global batch on every rank. What cannot be known or read counts nothing.
    `indices_at(positions, seed, shuffle)` gives the indices that are read at positions, where that is not a
    permutation of the whole an epoch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class BadSample(ValueError):
    """A sample that cannot be trained on; `reason` is the short name it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_turns(sample: Sample) -> None:
    """`BadSample` unless there are as many marks as images and every answer has a text."""
    marks = sum(question.count(IMAGE_MARK) for question, _ in sample.turns)
    if marks != len(sample.images):
        rule = f"{IMAGE_MARK} must stand in the questions as often as there are images, {len(sample.images)}"
        raise BadSample("image_marks", f"{sample.origin}: {rule}, got {marks}")
    for number, (_, answer) in enumerate(sample.turns, start=1):
        if not answer.strip():
            raise BadSample("empty_answer", f"{sample.origin}: answer {number} must not be empty")


class RecordDataset(abc.ABC):
    """A dataset over records on disk: an index in memory, each record checked when it is read."""

    notes: Sequence[str] = ()
    """What was noticed while the index was made, a sentence each (a cut file, records left out)."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def _sample(self, index: int) -> Sample:
        """The sample at a valid index; `BadSample` naming file, place, rule and value."""

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        return self._sample(index)

    @abc.abstractmethod
    def num_images(self, index: int) -> int:
        """Images of the sample as its record tells; nothing else is looked at, so that a whole global batch
        may be asked for."""

    def image_sizes(self, index: int) -> list[tuple[int, int]]:
        """(height, width) of the sample's readable images, from their headers; nothing for a bad sample."""
        from .images import image_size

        try:
            sizes = [image_size(image) for image in self[index].images]
        except BadSample:
            return []
        return [size for size in sizes if size is not None]


def short(value: Any) -> str:
    """`repr`, cut to fit an error message."""
    if isinstance(value, (str, bytes)) and len(value) > 200:
        value = value[:200]
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."

"""A question as all sets have it, and how the readers make them."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.data.samples import BadSample, short


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question of a set; `bad` if its record cannot be asked."""

    id: str
    """Unique in the set; resuming and submissions find the answer by it."""
    text: str = ""
    images: tuple[Any, ...] = ()
    """Paths, or what else `model.picture.load_pixels` reads."""
    answers: tuple[str, ...] = ()
    """Known ones, all annotators'; a letter of `options` in multiple choice. Empty in a test split."""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Letter -> text."""
    hint: str = ""
    """Stands before the question."""
    group: str = ""
    """Subtask, split or kind that is scored by itself."""
    unit: str = ""
    """What questions are scored together: the image of MME, the circle of MMBench. Empty: the question."""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What a submission repeats of the record."""
    bad: tuple[str, str] | None = None
    """(reason, message) where the record is damaged."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a set lies on the disk."""

    path: Path
    """The file of the questions, or the folder of a set that is one."""
    images: Path
    split: str
    annotations: Path | None = None


def options_of(texts: Iterable[str]) -> dict[str, str]:
    """A, B, C ... -> the texts."""
    return {chr(ord("A") + number): text for number, text in enumerate(texts)}


def letter_of(index: Any, options: Mapping[str, str], origin: str) -> str:
    """The letter of an answer that is published as its index from 0."""
    letters = list(options)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(letters):
        rule = f"answer must be an index in 0..{len(letters) - 1}"
        raise BadSample("bad_record", f"{origin}: {rule}, got {short(index)}")
    return letters[index]


def read_each(
    number: int,
    place: Callable[[int], str],
    read: Callable[[int], Question | list[Question]],
    group: Callable[[int], str] = lambda index: "",
) -> list[Question]:
    """`read(index)` of all records, a question or several; a record that cannot be one is a bad question
    of `group(index)` whose id is its place."""
    found: list[Question] = []
    for index in range(number):
        try:
            made = read(index)
        except BadSample as error:
            bad = (error.reason, str(error))
            made = Question(id=f"bad record: {place(index)}", group=group(index), bad=bad)
        found += [made] if isinstance(made, Question) else made
    return found


def checked(questions: Sequence[Question], origin: str) -> list[Question]:
    """The questions, those without an answer marked bad where others have one.

    ValueError if there is none, or if two have one id."""
    if not questions:
        raise ValueError(f"--data must hold at least one question of the split, got none in {origin!r}")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise ValueError(f"question ids must be unique, got {question.id!r} twice in {origin!r}")
        seen.add(question.id)
    labelled = any(question.answers for question in questions)
    return [
        dataclasses.replace(question, bad=("no_answer", f"{origin}: question {question.id} has no answer"))
        if labelled and not question.answers and question.bad is None
        else question
        for question in questions
    ]


def limited(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """About `limit` questions spread evenly over the set, with all questions of a unit or none."""
    if limit is None or limit >= len(questions):
        return list(questions)
    units: dict[str, list[Question]] = {}
    for question in questions:
        units.setdefault(question.unit or question.id, []).append(question)
    members = list(units.values())
    wanted = max(1, round(limit * len(members) / len(questions)))
    return [question for i in range(wanted) for question in members[i * len(members) // wanted]]


def digest(texts: Iterable[str]) -> str:
    """Short SHA-256 of texts and their order."""
    found = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:16]

"""Checked access to the fields of a record; what is wrong is a `BadSample` naming place, field and value."""

from array import array
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from .samples import BadSample, short


def text_of(record: Mapping[str, Any], name: str, origin: str) -> str:
    """A text that is not empty, without white space around it."""
    value = record.get(name)
    if not isinstance(value, str):
        raise BadSample("bad_record", f"{origin}: {name} must be a text, got {short(value)}")
    if not value.strip():
        raise BadSample(f"empty_{name}", f"{origin}: {name} must not be empty, got {short(value)}")
    return value.strip()


def list_of(record: Mapping[str, Any], name: str, origin: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list):
        raise BadSample("bad_record", f"{origin}: {name} must be a list, got {short(value)}")
    return value


def majority(answers: Any, origin: str) -> str:
    """The answer that most annotators gave, upper and lower case apart; of several the one given first.

    `answers`: a text, or a list of texts or of {"answer": text}."""
    listed = [answers] if isinstance(answers, str) else answers
    if not isinstance(listed, list):
        raise BadSample("bad_record", f"{origin}: answers must be a list, got {short(answers)}")
    texts = [each.get("answer") if isinstance(each, dict) else each for each in listed]
    if not all(isinstance(text, str) for text in texts):
        raise BadSample("bad_record", f"{origin}: answers must be texts, got {short(answers)}")
    stripped = [text.strip() for text in texts if text.strip()]
    if not stripped:
        raise BadSample("empty_answer", f"{origin}: answers must hold one, got {short(answers)}")
    counts = Counter(text.lower() for text in stripped)
    most = counts.most_common(1)[0][0]  # in the order of first occurrence where counts are equal
    return next(text for text in stripped if text.lower() == most)


def filled(template: str, record: Mapping[str, Any], origin: str) -> str:
    """The image's name from `template`, whose {fields} are the record's texts and whole numbers."""
    scalars = {name: value for name, value in record.items() if isinstance(value, (str, int))}
    try:
        return template.format_map(scalars)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        rule = f"record must have the fields of the image's name {template!r}"
        raise BadSample(
            "bad_record", f"{origin}: {rule}, got {short(dict(record))} ({short(str(error))})"
        ) from None


class IdTable:
    """Places of records by their whole-number ids; 16 bytes a record."""

    def __init__(self) -> None:
        self._ids, self._places, self._number = array("q"), array("q"), 0

    def add(self, record: Any, name: str) -> None:
        """The next record; one without such an id is never found."""
        value = record.get(name) if isinstance(record, dict) else None
        if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
            self._ids.append(value)
            self._places.append(self._number)
        self._number += 1

    def close(self) -> None:
        """Sorts what was added; the first of several with one id is the one that is found."""
        ids = np.array(self._ids, dtype=np.int64)
        order = np.argsort(ids, kind="stable")
        self._ids, self._places = ids[order], np.array(self._places, dtype=np.int64)[order]

    def find(self, value: Any) -> int | None:
        if not isinstance(value, int) or not -(2**63) <= value < 2**63:
            return None
        place = int(np.searchsorted(self._ids, value))
        return int(self._places[place]) if place < len(self._ids) and self._ids[place] == value else None

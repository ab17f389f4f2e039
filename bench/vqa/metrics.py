"""Exact match and ANLS; the version of all metrics of this folder."""

import re
from collections.abc import Sequence

METRIC_VERSION = "1"
"""Changes with anything that could change a score; it stands in every score line."""

ANLS_THRESHOLD = 0.5

_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = re.compile(r"[^\w\s]|_")


def plain_text(
    text: str, *, ignore_case: bool = True, ignore_punctuation: bool = True, ignore_articles: bool = False
) -> str:
    """`text` without white space around it and with single spaces inside, and without what is ignored.

    Punctuation is every character that is neither letter, digit nor white space; it goes without leaving a
    space ("it's" -> "its"). Articles are the words a, an and the, in lower case."""
    if ignore_case:
        text = text.lower()
    if ignore_punctuation:
        text = _PUNCTUATION.sub("", text)
    words = text.split()
    return " ".join(word for word in words if not (ignore_articles and word in _ARTICLES))


def exact_match(prediction: str, answers: Sequence[str], **ignored: bool) -> float:
    """1.0 if the prediction is one of the answers, else 0.0; `ignored` as in `plain_text`.

    ValueError without an answer."""
    _require_answers(answers)
    given = plain_text(prediction, **ignored)
    return float(any(given == plain_text(answer, **ignored) for answer in answers))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein: the least number of characters to insert, delete or replace."""
    if len(a) < len(b):
        a, b = b, a
    above = list(range(len(b) + 1))
    for row, character in enumerate(a, start=1):
        left = row
        current = [left]
        for column, other in enumerate(b, start=1):
            left = min(left + 1, above[column] + 1, above[column - 1] + (character != other))
            current.append(left)
        above = current
    return above[-1]


def anls(prediction: str, answers: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Average normalised Levenshtein similarity of one question, 0..1: its best answer's.

    1 - NL where NL = distance / length of the longer text is below `threshold`, else 0; so an NL of exactly
    0.5 gives 0. Both are compared in lower case, stripped, with single spaces, and these are the lengths; two
    empty texts are equal. Biten et al. 2019, "Scene Text Visual Question Answering", equation 1.
    ValueError without an answer."""
    _require_answers(answers)
    given = _spaced(prediction)
    return max(_similarity(given, _spaced(answer), threshold) for answer in answers)


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(a: str, b: str, threshold: float) -> float:
    longer = max(len(a), len(b))
    if longer == 0:
        return 1.0
    if abs(len(a) - len(b)) >= threshold * longer:  # a lower bound: spares an answer that runs on its square
        return 0.0
    distance = edit_distance(a, b) / longer
    return 1 - distance if distance < threshold else 0.0


def _require_answers(answers: Sequence[str]) -> None:
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers must be a list of at least one text, got {answers!r}")

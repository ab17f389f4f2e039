"""The VQA score: agreement with several annotators, as the VQAv2 evaluation computes it."""

import re
from collections.abc import Sequence
from typing import Literal

from .contractions import ARTICLES, CONTRACTIONS, NUMBERS

Normalisation = Literal["official", "plain"]

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The evaluation's expression has a mistyped look-behind, `(?!<=\d)`, that never holds a match back: also the
# period behind a digit goes, unless a digit follows.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""The evaluation passes `re.UNICODE`, which is 32, in the place of the count."""


def normalised_answer(text: str, *, official: bool = True) -> str:
    """An answer as it is compared: without punctuation and articles, numbers up to ten as digits, apostrophes
    put back, lower case.

    A mark of punctuation goes without a trace if somewhere in the text it stands beside a space, or if the
    text has a comma between digits; otherwise it leaves a space. Periods go unless a digit follows, with
    `official` the first 32 of them (and only those), as the official evaluation does by mistake."""
    return _spoken(_without_marks(_one_line(text), _MOST_PERIODS if official else 0))


def vqa_score(prediction: str, answers: Sequence[str], *, official: bool = True) -> float:
    """Agreement of a prediction with the annotators' `answers`, 0..1.

    The mean, over leaving out each annotator in turn, of min(1, others that gave the prediction / 3); of ten
    annotators 0, 1, 2, 3 or more than 3 give 0, 0.3, 0.6, 0.9, 1. With fewer than four it cannot be 1.
    `official=True` is the evaluation of VQAv2 (Goyal et al. 2017; visualqa.org), quirks included: texts are
    normalised only where the annotators disagree, otherwise compared as they are, case and all.
    `official=False` always normalises both, without the limit on periods. ValueError without an answer."""
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers must be a list of at least one text, got {answers!r}")
    given, known = _one_line(prediction), [_one_line(answer) for answer in answers]
    if not official or len(set(known)) > 1:
        given = normalised_answer(given, official=official)
        known = [normalised_answer(answer, official=official) for answer in known]
    same, all_of_them = known.count(given), len(known)
    # those who gave the prediction lose themselves when they are left out
    thirds = same * min(3, same - 1) + (all_of_them - same) * min(3, same)
    return thirds / (3 * all_of_them)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_marks(text: str, most_periods: int) -> str:
    number = _COMMA_IN_NUMBER.search(text) is not None
    spaces = {ord(mark): "" if number or f"{mark} " in text or f" {mark}" in text else " " for mark in _MARKS}
    return _PERIOD.sub("", text.translate(spaces), count=most_periods)


def _spoken(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)

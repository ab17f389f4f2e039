"""Score lines of a set from its answers, each with its 95% interval and how it was made.

A question without an answer, as its image or record was damaged, counts as wrong everywhere."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .intervals import interval, resampled
from .metrics import METRIC_VERSION, anls, exact_match
from .metrics_choice import CHOICE_PARSER, OPEN_PARSER, circular_score, open_match, parse_choice
from .metrics_vqa import vqa_score
from .metrics_yes_no import (
    MME_GROUPS,
    MME_PARSER,
    POPE_PARSER,
    POPE_SPLITS,
    f1_score,
    mme_answer,
    mme_score,
    pope_answer,
    pope_counts,
)
from .questions import Question
from .readers_choice import CIRCLE

EXACT = "case and punctuation ignored"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One line of the table."""

    metric: str
    value: float
    """In percent; MME in points."""
    low: float
    high: float
    """Ends of the 95% interval: bootstrap over the units."""
    count: int
    unit: str
    """What was counted and drawn again: questions, images, circles."""
    parser: str
    """How an answer was read or compared."""
    version: str = METRIC_VERSION


Answers = Mapping[str, str]
"""Question id -> answer; damaged questions are absent."""
Scorer = Callable[[Sequence[Question], Answers, int], list[Score]]
"""(questions, answers, seed) -> lines."""


def _resampled(rows: Sequence[Sequence[float]], statistic: Callable, seed: int, name: str) -> np.ndarray:
    """Every line has its own random numbers, whichever other lines there are."""
    return resampled(np.array(rows, dtype=np.float64), statistic, [seed, zlib.crc32(name.encode())])


def _mean(metric: str, values: Sequence[float], parser: str, seed: int, unit: str = "questions") -> Score:
    samples = _resampled([[v] for v in values], lambda sums, n: 100 * sums[..., 0] / n, seed, metric)
    low, high = interval(samples)
    value = 100 * float(np.mean(values))
    return Score(metric=metric, value=value, low=low, high=high, count=len(values), unit=unit, parser=parser)


def _each(
    questions: Sequence[Question], answers: Answers, right: Callable[[str, Question], float]
) -> list[float]:
    return [right(answers[q.id], q) if q.id in answers and q.answers else 0.0 for q in questions]


def vqa(questions: Sequence[Question], answers: Answers, seed: int) -> list[Score]:
    """The official normalisation, quirks included, and the plain one."""
    lines = []
    for name, official in (("official", True), ("plain", False)):
        values = _each(questions, answers, lambda a, q, o=official: vqa_score(a, q.answers, official=o))
        lines.append(_mean(f"VQA score, {name}", values, f"{name} normalisation", seed))
    return lines


def exact(questions: Sequence[Question], answers: Answers, seed: int) -> list[Score]:
    values = _each(questions, answers, lambda a, q: exact_match(a, q.answers))
    return [_mean("exact match", values, EXACT, seed)]


def text_similarity(questions: Sequence[Question], answers: Answers, seed: int) -> list[Score]:
    values = _each(questions, answers, lambda a, q: anls(a, q.answers))
    return [_mean("ANLS", values, "threshold 0.5, below it only", seed)]


def _by_kind(
    free: Callable[[str, Question], float], parser: str
) -> Callable[[Sequence[Question], Answers, int], list[Score]]:
    """Accuracy over all questions and over each kind of them; `free` judges those without options."""

    def right(answer: str, question: Question) -> float:
        if question.options:
            return float(parse_choice(answer, question.options) == question.answers[0])
        return free(answer, question)

    def lines(questions: Sequence[Question], answers: Answers, seed: int) -> list[Score]:
        values = _each(questions, answers, right)
        found = [_mean("accuracy", values, parser, seed)]
        kinds = sorted({question.group for question in questions} - {""})
        for kind in kinds:
            part = [v for v, question in zip(values, questions, strict=True) if question.group == kind]
            found.append(_mean(f"accuracy, {kind}", part, parser, seed))
        return found

    return lines


scienceqa = _by_kind(lambda answer, question: 0.0, CHOICE_PARSER)
iconqa = _by_kind(
    lambda answer, question: exact_match(answer, question.answers), f"{CHOICE_PARSER}; blanks: {EXACT}"
)
mmmu = _by_kind(
    lambda answer, question: open_match(answer, question.answers), f"{CHOICE_PARSER}; {OPEN_PARSER}"
)


def mmbench(questions: Sequence[Question], answers: Answers, seed: int) -> list[Score]:
    """Accuracy of the options as published, and of whole circles where the file has rotations."""
    right = _each(questions, answers, lambda a, q: float(parse_choice(a, q.options) == q.answers[0]))
    circles: dict[str, list[bool]] = {}
    first = []
    for question, value in zip(questions, right, strict=True):
        circles.setdefault(question.unit or question.id, []).append(bool(value))
        if not question.unit or int(question.id) < CIRCLE:
            first.append(value)
    lines = [_mean("accuracy, options as published", first, CHOICE_PARSER, seed)] if first else []
    if len(circles) < len(questions):
        whole = [circular_score(rotations) for rotations in circles.values()]
        lines.append(_mean("circular accuracy", whole, CHOICE_PARSER, seed, "circles"))
    return lines


def mme(questions: Sequence[Question], answers: Answers, seed: int) -> list[Score]:
    """Points of every subtask, and the sums of perception and cognition; drawn again by images."""
    pairs: dict[str, dict[str, list[bool]]] = {}
    for question in questions:
        right = question.bad is None and mme_answer(answers.get(question.id, "")) == question.answers[0]
        images = pairs.setdefault(question.group, {})
        images.setdefault(question.unit or question.id, []).append(right)
    points, samples, counts = {}, {}, {}
    for subtask, images in pairs.items():
        # a file whose questions could not be read is one image, both answers wrong
        both = [[*given, False][:2] for given in images.values()]
        points[subtask], counts[subtask] = mme_score(both), len(both)
        rows = [[sum(given), all(given)] for given in both]
        samples[subtask] = _resampled(rows, _mme_statistic, seed, subtask)
    lines = []
    for name, subtasks in MME_GROUPS.items():
        here = [subtask for subtask in subtasks if subtask in pairs]
        if not here:
            continue
        whole = "" if len(here) == len(subtasks) else f" ({len(here)} of {len(subtasks)} subtasks)"
        total = sum(samples[subtask] for subtask in here)
        lines.append(
            _points(f"MME {name}{whole}", sum(points[s] for s in here), total, sum(counts[s] for s in here))
        )
        lines += [_points(f"  {s}", points[s], samples[s], counts[s]) for s in here]
    return lines


def _mme_statistic(sums: np.ndarray, images: int) -> np.ndarray:
    return 100 * sums[..., 0] / (2 * images) + 100 * sums[..., 1] / images


def _points(metric: str, value: float, samples: np.ndarray, count: int) -> Score:
    low, high = interval(samples)
    return Score(
        metric=metric, value=value, low=low, high=high, count=count, unit="images", parser=MME_PARSER
    )


def pope(questions: Sequence[Question], answers: Answers, seed: int) -> list[Score]:
    """F1 of every split, yes being positive, and their mean."""
    lines, values, samples, number = [], [], [], 0
    for split in POPE_SPLITS:
        asked = [question for question in questions if question.group == split]
        if not asked:
            continue
        rows = []
        for question in asked:
            given = pope_answer(answers[question.id]) if question.id in answers else None
            rows.append(pope_counts(given, question.answers[0] if question.answers else "yes"))
        values.append(100 * f1_score(*(sum(row[i] for row in rows) for i in range(3))))
        samples.append(_resampled(rows, _f1_statistic, seed, split))
        number += len(asked)
        lines.append(_f1(f"F1, {split}", values[-1], samples[-1], len(asked)))
    whole = "" if len(lines) == len(POPE_SPLITS) else f" of {len(lines)} splits"
    return [_f1(f"F1, mean{whole}", float(np.mean(values)), np.mean(samples, axis=0), number), *lines]


def _f1(metric: str, value: float, samples: np.ndarray, count: int) -> Score:
    low, high = interval(samples)
    return Score(
        metric=metric, value=value, low=low, high=high, count=count, unit="questions", parser=POPE_PARSER
    )


def _f1_statistic(sums: np.ndarray, questions: int) -> np.ndarray:
    true_positives, false_positives, false_negatives = (sums[..., i] for i in range(3))
    whole = 2 * true_positives + false_positives + false_negatives
    return 100 * 2 * true_positives / np.where(whole == 0, 1, whole)

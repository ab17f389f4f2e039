"""Metrics against independent implementations on random answers; every difference has a stated rule."""

import functools
import random

import anls as other_anls
import pytest
from anls.metrics.dist import levenshtein_distance

from bench.vqa.contractions import ARTICLES, CONTRACTIONS, NUMBERS
from bench.vqa.metrics import anls, edit_distance
from bench.vqa.metrics_vqa import normalised_answer, vqa_score

COUNTS = [5_000, pytest.param(50_000, marks=pytest.mark.long)]
PIECES = [
    *"abcdeXYZ0123456789",
    *";/[]\"{}()=+\\_-><@`,?!.'$%:&*#~|^",
    *(" ", " ", " ", "  ", "\t", "\n", "\u00a0"),
    *("\u00df", "\ufb01", "\u0130", "\u0663", "\u00c9", "\u4e2d"),  # upper case of two letters, a digit, ...
    *("the ", "a ", "An ", "one", "Ten ", "none", "yes", "no", "3.5", "1,000", ",,", "..", "."),
]
WORDS = [*CONTRACTIONS, *NUMBERS, *ARTICLES, "cat", "Dog's"]


def texts(seed: int, count: int):
    """Pieces glued together, words with spaces between, and now and then a row of periods."""
    draw = random.Random(seed)
    for _ in range(count):
        kind = draw.random()
        if kind < 0.7:
            text = "".join(draw.choices(PIECES, k=draw.randrange(0, 12)))
        else:
            text = " ".join(draw.choices(WORDS, k=draw.randrange(1, 4)))
            text += draw.choice(PIECES)
        yield text + "." * draw.randrange(25, 45) if draw.random() < 0.02 else text


def slow_normalised(text: str, official: bool) -> str:
    """Character by character, after the rules of the evaluation's documentation and source."""
    characters = [" " if c in "\n\t" else c for c in text]
    while characters and characters[0].isspace():
        del characters[0]
    while characters and characters[-1].isspace():
        del characters[-1]
    number = False
    for left, middle, right in zip(characters, characters[1:], characters[2:], strict=False):
        number = number or (left.isdecimal() and middle == "," and right.isdecimal())
    lonely = set()
    for left, right in zip(characters, characters[1:], strict=False):
        if left == " ":
            lonely.add(right)
        if right == " ":
            lonely.add(left)
    without_marks = []
    for c in characters:
        if c in ';/[]"{}()=+\\_-><@`,?!':
            if not number and c not in lonely:
                without_marks.append(" ")
        else:
            without_marks.append(c)
    kept, dropped = [], 0
    for i, c in enumerate(without_marks):
        digit_follows = i + 1 < len(without_marks) and without_marks[i + 1].isdecimal()
        if c == "." and not digit_follows and (not official or dropped < 32):
            dropped += 1
        else:
            kept.append(c)
    words, word = [], ""
    for c in "".join(kept).lower() + " ":
        if not c.isspace():
            word += c
            continue
        if word in NUMBERS:
            word = NUMBERS[word]
        if word and word not in ARTICLES:
            words.append(CONTRACTIONS.get(word, word))
        word = ""
    return " ".join(words)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("official", [True, False])
def test_normalisation_is_that_of_a_second_implementation(count, official):
    changed = 0
    for text in texts(1, count):
        expected = slow_normalised(text, official)
        assert normalised_answer(text, official=official) == expected, repr(text)
        changed += expected != text
    assert changed > count // 2


def slow_vqa_score(prediction: str, answers: list[str], official: bool) -> float:
    """The mean over the annotators left out, in so many words."""
    prediction, answers = (
        prediction.replace("\n", " ").replace("\t", " ").strip(),
        [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers],
    )
    if not official or any(answer != answers[0] for answer in answers):
        prediction = slow_normalised(prediction, official)
        answers = [slow_normalised(answer, official) for answer in answers]
    accuracies = []
    for i in range(len(answers)):
        others = answers[:i] + answers[i + 1 :]
        accuracies.append(min(1.0, sum(other == prediction for other in others) / 3))
    return sum(accuracies) / len(accuracies)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("official", [True, False])
def test_vqa_score_is_that_of_a_second_implementation(count, official):
    """Equal but for the order of the sums: 1e-12."""
    draw, scores = random.Random(2), set()
    pool = ["yes", "Yes", "yes.", "no", "No", "2", "two", "a dog", "dog", "dont know", "don't know"]
    for text in texts(3, count // 10):
        for _ in range(10):
            few = draw.sample([*pool, text], draw.randrange(1, 5))
            answers = draw.choices(few, k=draw.choice([1, 2, 3, 5, 10, 10, 10]))
            prediction = draw.choice([*few, text])
            score = vqa_score(prediction, answers, official=official)
            assert abs(score - slow_vqa_score(prediction, answers, official)) < 1e-12, (prediction, answers)
            scores.add(round(score, 6))
    assert {0.0, 0.3, 0.6, 0.9, 1.0} <= scores


def pairs(seed: int, count: int):
    """An answer and what a model might make of it: equal, with edits, cut, or something else."""
    draw = random.Random(seed)
    for text in texts(seed + 1, count):
        characters = list(text)
        for _ in range(draw.randrange(0, 5)):
            place = draw.randrange(len(characters) + 1)
            characters[place : place + draw.randrange(0, 2)] = draw.choice([[], ["x"], [" "], ["\u00df"]])
        yield text, "".join(characters)


@pytest.mark.parametrize("count", COUNTS)
def test_anls_is_that_of_the_package(count):
    """The one difference: the package divides by the length of the texts in upper case, which is longer where
    a character becomes two there (\u00df -> SS). The definition says the length of the text itself."""
    different = at_half = 0
    for text, prediction in pairs(5, count):
        score = anls(prediction, [text, "cat"])
        expected = other_anls.anls_score(prediction, [text, "cat"])
        spaced = [" ".join(t.lower().split()) for t in (prediction, text)]
        longer = max(map(len, spaced))
        at_half += longer > 0 and 2 * levenshtein_distance(*spaced) == longer
        if score != expected:
            assert any(len(t) != len(t.upper()) for t in spaced), (text, prediction)
            one = [levenshtein_distance(spaced[0], other) for other in (spaced[1], "cat")]
            lengths = [max(len(spaced[0]), len(other)) for other in (spaced[1], "cat")]
            shares = [d / n if n else 0.0 for d, n in zip(one, lengths, strict=True)]
            assert score == max(1 - share if share < 0.5 else 0.0 for share in shares)
            different += 1
    assert different > 0 and at_half > 0  # both rules were met


@pytest.mark.parametrize("count", COUNTS)
def test_edit_distance_is_that_of_the_package(count):
    for a, b in pairs(7, count):
        assert edit_distance(a, b) == levenshtein_distance(a, b), (a, b)


def test_edit_distance_is_that_of_its_recursive_definition():
    def slow(a: str, b: str) -> int:
        @functools.cache
        def rest(i: int, j: int) -> int:
            if i == len(a) or j == len(b):
                return len(a) - i + len(b) - j
            if a[i] == b[j]:
                return rest(i + 1, j + 1)
            return 1 + min(rest(i + 1, j), rest(i, j + 1), rest(i + 1, j + 1))

        return rest(0, 0)

    for a, b in pairs(9, 1_000):
        assert edit_distance(a, b) == slow(a, b), (a, b)

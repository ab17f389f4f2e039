"""MME and POPE by hand."""

import pytest

from bench.vqa.metrics_yes_no import (
    COGNITION,
    PERCEPTION,
    f1_score,
    mme_answer,
    mme_score,
    pope_answer,
    pope_counts,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("yes", "yes"),
        ("No", "no"),
        ("no", "no"),
        ("No, there is not.", "no"),
        ("There is not a dog", "no"),
        ("Yes. No dog", "yes"),
        ("NO", "yes"),  # only these spellings
        ("nothing", "yes"),
        ("there is no", "no"),
        ("", "yes"),
        ("No.", "no"),
        ("Nope", "yes"),
        ("No!", "yes"),
    ],
)
def test_pope_answer(text, answer):
    assert pope_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("  yes, it is", "yes"),
        ("No.", "no"),
        ("not", "no"),
        ("noyes", "no"),
        ("I do", "other"),
        ("", "other"),
        ("It is no", "other"),
        ("'Yes'", "yes"),
    ],
)
def test_mme_answer(text, answer):
    assert mme_answer(text) == answer


def test_f1():
    assert f1_score(3, 1, 2) == 6 / 9
    assert f1_score(0, 0, 0) == 0.0
    assert f1_score(5, 0, 0) == 1.0


def test_pope_counts():
    assert pope_counts("yes", "yes") == (1, 0, 0, 0)
    assert pope_counts("yes", "no") == (0, 1, 0, 0)
    assert pope_counts("no", "yes") == (0, 0, 1, 0)
    assert pope_counts("no", "no") == (0, 0, 0, 1)
    assert pope_counts(None, "yes") == (0, 0, 1, 0)  # no answer is a wrong one
    assert pope_counts(None, "no") == (0, 1, 0, 0)


def test_mme_score():
    """Three images: both right, one right, none: 3 of 6 questions and 1 of 3 images."""
    assert mme_score([(True, True), (True, False), (False, False)]) == pytest.approx(50 + 100 / 3)
    assert mme_score([(True, True)]) == 200
    assert (len(PERCEPTION) * 200, len(COGNITION) * 200) == (2000, 800)
    with pytest.raises(ValueError, match="images must have two questions each, got 1"):
        mme_score([(True,)])
    with pytest.raises(ValueError, match="images must be at least one"):
        mme_score([])

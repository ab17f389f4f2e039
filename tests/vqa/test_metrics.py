"""Exact match, ANLS and the VQA score against tables computed by hand from their definitions."""

import pytest

from bench.vqa.contractions import CONTRACTIONS
from bench.vqa.metrics import anls, edit_distance, exact_match
from bench.vqa.metrics_vqa import normalised_answer, vqa_score


@pytest.mark.parametrize(
    ("agreeing", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)]
)
@pytest.mark.parametrize("official", [True, False])
def test_vqa_score_of_ten_annotators(agreeing, score, official):
    answers = ["cat"] * agreeing + [f"other{i}" for i in range(10 - agreeing)]
    assert vqa_score("cat", answers, official=official) == score


@pytest.mark.parametrize(
    ("answers", "score"),
    [
        (["cat"], 0.0),  # nobody is left to agree with
        (["cat", "dog"], 1 / 6),  # without cat 0, without dog 1/3
        (["cat", "cat"], 1 / 3),
        (["cat"] * 3, 2 / 3),
        (["cat"] * 4, 1.0),
        (["cat"] * 3 + ["dog"], 3 / 4),  # three times 2/3, once 1
        (["dog"] * 12, 0.0),
    ],
)
def test_vqa_score_of_any_number_of_annotators(answers, score):
    assert vqa_score("cat", answers) == pytest.approx(score, abs=1e-15)


def test_official_compares_as_written_where_all_annotators_agree():
    ten = ["Yes."] * 10
    assert vqa_score("yes", ten) == 0.0 and vqa_score("yes", ten, official=False) == 1.0
    assert vqa_score("Yes.", ten) == 1.0
    nine = ["Yes."] * 9 + ["no"]
    assert vqa_score("yes", nine) == 1.0 == vqa_score("yes", nine, official=False)
    spaced = ["yes\n"] * 5 + [" yes"] * 5  # white space around it is no disagreement
    assert vqa_score("\tyes ", spaced) == 1.0 and vqa_score("Yes", spaced) == 0.0


NORMALISED = [
    ("A Cat", "cat"),
    ("the end of an era", "end of era"),
    ("none", "0"),
    ("Ten men", "10 men"),
    ("twenty one", "twenty 1"),
    ("dont", "don't"),
    ("DONT", "don't"),
    ("wed", "wed"),
    ("wed've", "we'd've"),
    ("couldnt've couldn'tve", "couldn't've couldn't've"),
    ("somebody'd", "somebodyd"),  # the table has it the wrong way round
    ("yes!", "yes"),  # at the end: a space that is dropped
    ("well-known", "well known"),
    ("well- known", "well known"),
    ("a-b -c", "ab c"),  # the mark stands beside a space once, so it goes everywhere
    ("1,000", "1000"),
    ("1,000-2", "10002"),  # a comma between digits takes all marks away
    ("1,b", "1 b"),
    ("3.5", "3.5"),
    ("3.", "3"),
    (".5", ".5"),
    ("a.b", "ab"),
    ("St. Mary's", "st mary's"),
    ("$5", "$5"),
    ("up\nand\tdown", "up and down"),
    ("", ""),
    ("...", ""),
    ("the", ""),
]


@pytest.mark.parametrize(("text", "expected"), NORMALISED)
def test_normalised_answer(text, expected):
    assert normalised_answer(text) == expected == normalised_answer(text, official=False)


def test_official_drops_32_periods_and_no_more():
    assert normalised_answer("." * 40 + "x") == "." * 8 + "x"
    assert normalised_answer("." * 40 + "x", official=False) == "x"
    assert normalised_answer("." * 32 + "x") == "x"


def test_the_contractions_are_lower_case_and_without_their_apostrophes():
    assert len(CONTRACTIONS) == 114
    for written, meant in CONTRACTIONS.items():
        assert written == written.lower() and written != meant
        assert written.replace("'", "") == meant.replace("'", "")


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("cat", ["cat"], 1.0),
        ("cat", ["dog", "cat"], 1.0),
        ("ab", ["ac"], 0.0),  # a distance of exactly 0.5
        ("abc", ["abd"], 1 - 1 / 3),
        ("  coca   cola  ", ["Coca Cola"], 1.0),
        ("coca\ncola", ["coca cola"], 1.0),
        ("cocacola", ["coca cola"], 1 - 1 / 9),
        ("", [""], 1.0),
        ("", ["a"], 0.0),
        ("a", ["  "], 0.0),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("abcd", ["abxy", "abcx"], 0.75),
        ("x" * 5000, ["x"], 0.0),
    ],
)
def test_anls(prediction, answers, score):
    assert anls(prediction, answers) == score


def test_anls_with_another_threshold():
    assert anls("ab", ["ac"], threshold=0.6) == 0.5


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "abc", 0),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("ab", "ba", 2),
    ],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == distance == edit_distance(b, a)


@pytest.mark.parametrize(
    ("prediction", "answer", "ignored", "score"),
    [
        ("Cat.", "cat", {}, 1.0),
        ("  a   cat ", "a cat", {}, 1.0),
        ("it's", "its", {}, 1.0),
        ("well-known", "wellknown", {}, 1.0),
        ("a_b", "ab", {}, 1.0),
        ("cats", "cat", {}, 0.0),
        ("the cat", "cat", {}, 0.0),
        ("the cat", "cat", {"ignore_articles": True}, 1.0),
        ("Cat", "cat", {"ignore_case": False}, 0.0),
        ("cat.", "cat", {"ignore_punctuation": False}, 0.0),
        ("", "cat", {}, 0.0),
    ],
)
def test_exact_match(prediction, answer, ignored, score):
    assert exact_match(prediction, [answer], **ignored) == score
    assert exact_match(prediction, ["no such", answer], **ignored) == score


@pytest.mark.parametrize("metric", [vqa_score, anls, exact_match])
@pytest.mark.parametrize("answers", [[], "cat"])
def test_metrics_refuse_what_is_no_list_of_answers(metric, answers):
    with pytest.raises(ValueError, match="answers must be a list of at least one text, got"):
        metric("cat", answers)

"""Which option an answer names; open questions; circles."""

import pytest

from bench.vqa.metrics_choice import circular_score, open_match, parse_choice

ANIMALS = {"A": "cat", "B": "black dog", "C": "a bird", "D": "I do not know."}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        # 1: a letter alone
        ("A", "A"),
        ("b", "B"),
        ("(C)", "C"),
        ("D.", "D"),
        ("**B**", "B"),
        (' "A" ', "A"),
        ("A)", "A"),
        ("[B]", "B"),
        ("E", None),
        # 2: an option's text
        ("cat", "A"),
        ("Black  Dog.", "B"),
        ("i do not know", "D"),
        ("a bird", "C"),
        ("bird", None),
        ("a black dog", None),
        # 3: a letter first, whatever text follows
        ("B. cat", "B"),
        ("(C) something", "C"),
        ("A) cat", "A"),
        ("D: nothing", "D"),
        ("A cat", None),
        ("b. cat", None),
        ("E. cat", None),
        # 4: a stated letter, the last one
        ("Answer: A", "A"),
        ("The answer is A", "A"),
        ("The answer is (B).", "B"),
        ("the correct option is C because it flies", "C"),
        ("Answer: A? No, the answer is D.", "D"),
        ("The answer is A cat", None),
        ("The answer is a", None),
        ("ANSWER: B", "B"),
        ("Option B is right", "B"),
        ("Answer: **C**", "C"),
        ("The answer is A\nbecause of this", "A"),
        ("The answer is Both", None),
        ("The answer is E", None),
        # 5: a stated text
        ("The answer is cat.", "A"),
        ("Answer: a bird", "C"),
        ("The answer is: black dog", "B"),
        ("answer: fish", None),
        # nothing
        ("", None),
        ("I think it could be anything", None),
        ("cat or black dog", None),
        ("?", None),
    ],
)
def test_parse_choice(answer, letter):
    assert parse_choice(answer, ANIMALS) == letter


def test_a_letter_wins_over_a_text_and_a_shared_text_names_none():
    assert parse_choice("b", {"A": "b", "B": "a"}) == "B"
    assert parse_choice("x", {"A": "x", "B": "y"}) == "A"  # no letter of the options
    assert parse_choice("same", {"A": "same", "B": "Same."}) is None
    assert parse_choice("", {"A": "", "B": "."}) is None


def test_options_have_capital_letters():
    with pytest.raises(ValueError, match="options must have single capital letters A to Z, got 'a'"):
        parse_choice("A", {"a": "x"})


@pytest.mark.parametrize(
    ("answer", "known", "score"),
    [
        ("It is 7.", ["7"], 1.0),
        ("first 3, then 7", ["3"], 0.0),
        ("about 1,234.5 m", ["1234.5"], 1.0),
        ("3.14159", ["3.14"], 1.0),
        ("-2", ["2"], 0.0),
        ("-2", ["-2.00"], 1.0),
        ("nothing", ["2"], 0.0),
        ("The Left Ventricle, I think", ["left ventricle"], 1.0),
        ("leftventricle", ["left ventricle"], 0.0),
        ("b", ["a", "b"], 1.0),
        ("", ["a"], 0.0),
        ("-", ["-"], 0.0),
    ],
)
def test_open_match(answer, known, score):
    assert open_match(answer, known) == score


def test_open_match_wants_answers():
    with pytest.raises(ValueError, match="known must be a list of at least one text"):
        open_match("x", [])


def test_a_circle_is_right_as_a_whole():
    assert circular_score([True, True, True, True]) == 1.0
    assert circular_score([True, False, True, True]) == 0.0
    with pytest.raises(ValueError, match="right must be a list of at least one rotation"):
        circular_score([])

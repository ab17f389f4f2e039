"""The demo's data: the same everywhere, split without leaks, and its answers are what was painted."""

import numpy as np
import pytest

from train.data.painting import COLOUR_NAMES, COLOUR_VALUES
from train.demo.evaluate import evaluation_set
from train.demo.painted import (
    PHOTOGRAPHS,
    SIDES,
    PaintedPhotographs,
    PaintedString,
    glyph,
    is_held_out,
    photographs,
    question_and_answer,
)


def test_a_sample_depends_on_seed_and_index_alone():
    a, b, other = PaintedPhotographs(seed=3), PaintedPhotographs(seed=3), PaintedPhotographs(seed=4)
    b[17]
    assert np.array_equal(a[5].images, b[5].images) and a[5].turns == b[5].turns
    assert not np.array_equal(a[5].images, other[5].images)
    assert np.array_equal(a[5].images[0], a.painted(5).pixels)
    assert len(a) > 10**12


def test_photographs_and_strings_of_the_evaluation_were_never_trained_on():
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["held_out"])
    assert len(photographs("train")) > 30 and len(photographs("held_out")) >= 8
    train, held_out = PaintedPhotographs(), evaluation_set()
    for i in range(150):
        assert not any(is_held_out(s.text) for s in train.painted(i).strings)
        assert all(is_held_out(s.text) for s in held_out.painted(i).strings if len(s.text) > 1)


def test_strings_stand_left_top_and_right_bottom_in_two_colours_on_the_grid():
    for i in range(100):
        image = PaintedPhotographs().painted(i)
        (left, top), (right, bottom) = image.strings[0].box[:2], image.strings[1].box[2:]
        assert left % 7 == 0 and top % 7 == 0 and left <= 7 and top <= 7
        assert image.strings[1].box[0] % 7 == 0 and image.strings[1].box[1] % 7 == 0
        assert right > 112 - 16 and bottom > 112 - 16
        assert image.strings[0].colour != image.strings[1].colour


def test_off_grid_moves_the_strings_and_nothing_else():
    """The jitter once came from the common generator, so that the off-grid set had other strings too."""
    for i in range(40):
        on, off = evaluation_set().painted(i), evaluation_set(off_grid=True).painted(i)
        assert [(s.text, s.font_size) for s in on.strings] == [(s.text, s.font_size) for s in off.strings]
        assert on.pixels.shape == off.pixels.shape


def test_off_grid_strings_stand_anywhere():
    offsets = {
        tuple(n % 7 for n in evaluation_set(off_grid=True).painted(i).strings[0].box[:2]) for i in range(300)
    }
    assert len(offsets) > 40


def test_the_paint_is_where_and_what_the_answers_say():
    """The pixels of a string's strokes have its colour."""
    image = PaintedPhotographs(font_sizes=(21,)).painted(0)
    for string in image.strings:
        left, top = string.box[:2]
        coverage = glyph(string.text[0], 21)
        strokes = image.pixels[top : top + coverage.shape[0], left : left + coverage.shape[1]][
            coverage > 0.99
        ]
        assert len(strokes) > 10
        distance = np.abs(strokes.astype(float) - COLOUR_VALUES[string.colour]).max()
        assert distance < 40, COLOUR_NAMES[string.colour]


def test_glyphs_of_all_digits_share_a_cell_and_none_is_clipped():
    """A cell measured on '0' alone cut the bar off '7': every digit must fit its cell."""
    for size in (10, 14, 21):
        cells = [glyph(digit, size) for digit in "0123456789"]
        assert len({cell.shape for cell in cells}) == 1
        for digit, cell in zip("0123456789", cells, strict=True):
            assert cell[-1].max() == 0 and cell.max() > 0.5, digit


def test_questions_ask_for_characters_colour_and_count():
    string = PaintedString("7305", COLOUR_NAMES.index("blue"), 10, (0, 0, 1, 1))
    answers = [question_and_answer(kind, 0, string)[1] for kind in ("characters", "colour", "count")]
    assert answers == ["7 3 0 5", "blue", "four"]
    assert all(SIDES[1] in question_and_answer(k, 1, string)[0] for k in ("characters", "colour", "count"))
    turns = PaintedPhotographs()[0].turns
    assert len(turns) == 4 and all(question and answer for question, answer in turns)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(split="test"), "split must be one of .*, got 'test'"),
        (dict(off_grid=1.5), "off_grid must lie in 0..1, got 1.5"),
        (dict(lengths=(0, 1)), r"lengths must lie in 1..4, got \(0, 1\)"),
        (dict(lengths=()), r"lengths must lie in 1..4, got \(\)"),
        (dict(canvases=((5, 5),)), r"canvases must be \(height, width\) between .*, got \(5, 5\)"),
        (dict(canvases=((9999, 112),)), r"canvases must be \(height, width\) between .*, got \(9999, 112\)"),
        (dict(canvases=()), r"canvases must name at least one size, got \(\)"),
        (dict(font_sizes=()), r"font_sizes must be positive, got \(\)"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PaintedPhotographs(**arguments)
    with pytest.raises(ValueError, match="kind must be one of .*, got 'size'"):
        question_and_answer("size", 0, PaintedString("1", 0, 10, (0, 0, 1, 1)))

"""The generated pages and their questions."""

import dataclasses
import itertools

import numpy as np
import pytest

from bench.miniature.pages import (
    COUNTS,
    INK,
    KINDS,
    PLACES,
    Pages,
    Word,
    draw_turns,
    label_size,
    margin,
    questions,
    random_words,
    tokenizer,
)
from train.data.painting import COLOUR_NAMES, COLOUR_VALUES
from train.demo.painted import glyph, is_held_out

PAGES = Pages(size=128, font_sizes=(16, 22, 44))


def test_a_page_depends_on_its_number_alone():
    assert np.array_equal(PAGES[5].pixels, PAGES[5].pixels) and PAGES[5].words == PAGES[5].words
    assert PAGES[5].words != PAGES[6].words
    assert PAGES[5].words != dataclasses.replace(PAGES, seed=1)[5].words


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_words_stand_in_quarters_of_their_own(split):
    pages = dataclasses.replace(PAGES, split=split)
    lefts, sizes = set(), set()
    for page in (pages[i] for i in range(60)):
        assert page.pixels.shape == (128, 128, 3) and page.pixels.dtype == np.uint8
        assert 2 <= len(page.words) <= 4
        assert len({w.colour for w in page.words}) == len({w.place for w in page.words}) == len(page.words)
        assert list(page.words) == sorted(page.words, key=lambda w: w.place)
        for word in page.words:
            assert is_held_out(word.text) == (split == "held_out")
            height, width = label_size(word.font_size)
            row, column = divmod(word.place, 2)
            assert 64 * column <= word.left and word.left + width <= 64 * (column + 1)
            assert 64 * row <= word.top and word.top + height <= 64 * (row + 1)
            lefts.add(word.left % 8)
            sizes.add(word.font_size)
    assert lefts == set(range(8)), "text stands on the patch grid"
    assert sizes == {16, 22, 44}


def test_a_label_has_its_colour_and_its_text():
    for page in (PAGES[i] for i in range(20)):
        for word in page.words:
            coverage, edge = glyph(word.text[0], word.font_size), margin(word.font_size)
            top, left = word.top + edge, word.left + edge
            cell = page.pixels[top : top + coverage.shape[0], left : left + coverage.shape[1]].astype(float)
            nearest = np.abs(COLOUR_VALUES - cell[coverage < 0.1].mean(0)).sum(1).argmin()
            assert nearest == word.colour
            assert np.abs(cell[coverage > 0.9] - INK).max() < 30


def test_answers():
    words = [Word("12", 0, 12, 0), Word("34", 1, 12, 1), Word("56", 2, 12, 3)]
    found = {q.text: (q.kind, q.answer) for q in questions(words)}
    first, second, third = (COLOUR_NAMES[i] for i in range(3))
    assert found == {
        "how many words": ("count", "three"),
        f"what is {first}": ("read", "1 2"),
        f"what is {second}": ("read", "3 4"),
        f"what is {third}": ("read", "5 6"),
        "what is at top-left": ("place", "1 2"),
        "what is at top-right": ("place", "3 4"),
        "what is at bottom-right": ("place", "5 6"),
        "what colour is at top-left": ("colour", first),
        "what colour is at top-right": ("colour", second),
        "what colour is at bottom-right": ("colour", third),
        f"what is right of {first}": ("right_of", "3 4"),
        f"what is below {second}": ("below", "5 6"),
    }


def test_turns_give_no_answer_away():
    """A word whose text was spelled before would be copied, not read."""
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(200):
        words = random_words(rng, "train", (12,))
        turns = draw_turns(rng, words, 4)
        assert len(turns) == 4 and len({t.text for t in turns}) == 4
        spelled = [t.target for t in turns if t.kind not in ("colour", "count")]
        assert len(spelled) == len(set(spelled))
        kinds |= {t.kind for t in turns}
    assert kinds == set(KINDS)


def test_every_question_is_in_the_vocabulary():
    tokens = tokenizer()
    texts = set()
    for places in itertools.chain.from_iterable(itertools.combinations(range(4), n) for n in (2, 3, 4)):
        words = [Word("07", i, 12, place) for i, place in enumerate(places)]
        texts |= {t for q in questions(words) for t in (q.text, q.answer)}
    for text in texts:
        assert tokens.decode(tokens(text).input_ids) == text
    assert len(PLACES) == 4 and len(COUNTS) == 3


def test_words_must_fit():
    with pytest.raises(ValueError, match=r"font_sizes must fit words of 2 digits into quarters of 64 pixels"):
        Pages(size=128, font_sizes=(12, 90))


def test_large_pages_have_small_photographs_enlarged():
    """Photographs have 400 pixels: a page of 448 must not need a piece of that size."""
    page = Pages(size=448, font_sizes=(40,))[3]
    assert page.pixels.shape == (448, 448, 3)

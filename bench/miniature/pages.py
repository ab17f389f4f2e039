"""Generated pages with words of known size in known places, and questions about them.

A page is a plain sheet or a piece of a photograph, with two to four words of two digits, each on a label of a
colour of its own, in one of several sizes, anywhere inside a quarter of its own. Photographs are split as in
`train.demo.painted`, words by a hash: what is evaluated was never trained on."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from train.data.painting import COLOUR_NAMES, shade
from train.demo.painted import DIGITS, crop, glyph, paint, random_string
from train.demo.vocabulary import build_tokenizer

PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
"""Quarters of a page, row by row; one token each."""
COUNTS = ("two", "three", "four")
WORD_LENGTH = 2
KINDS = ("read", "place", "right_of", "below", "colour", "count")
"""What a question asks for: the word of a colour; the word in a place; the word beside or under the one of a
colour; the colour in a place; how many words there are."""
POSITION_KINDS = ("place", "right_of", "below", "colour")
"""Kinds whose answer depends on where a word stands."""

LARGEST_GROUND = 240
"""Pixels of a side that photographs are cut at."""

INK = 12.0
"""Grey value of all text. One ink on labels of all colours is learnt in half of the steps that text in all
colours takes, and the labels still have to be told apart."""

VOCABULARY = (
    *("what", "is", "at", "of", "how", "many", "words", "right", "below", "."),
    *PLACES,
    *COUNTS,
    *DIGITS,
    "colour",
    *COLOUR_NAMES,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Word:
    text: str
    colour: int
    """Index into COLOUR_NAMES; no two words of a page share one."""
    font_size: int
    """Em in pixels of the page."""
    place: int
    """Index into PLACES."""
    left: int = 0
    """Of its label, in pixels, like `top`."""
    top: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    pixels: np.ndarray
    """[size, size, 3] uint8."""
    words: tuple[Word, ...]
    """In the order of their places."""


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    kind: str
    text: str
    """Ends in what is looked up, without a question mark: an LLM this small then learns in some hundred steps
    to look it up, and does not in thousands otherwise."""
    answer: str
    """Words of the vocabulary between single spaces."""
    target: int | None
    """Index of the word whose text or colour is the answer; None where the whole page is."""


def tokenizer():
    """A token for every word of `VOCABULARY`, ids of the special ones as in the model's `tiny` preset."""
    return build_tokenizer(VOCABULARY)


def questions(words: Sequence[Word]) -> list[Question]:
    """All questions that have an answer on a page with these words."""
    at = {word.place: i for i, word in enumerate(words)}
    found = [Question("count", "how many words", COUNTS[len(words) - 2], None)]
    for i, word in enumerate(words):
        spelled, colour = " ".join(word.text), COLOUR_NAMES[word.colour]
        found.append(Question("read", f"what is {colour}", spelled, i))
        found.append(Question("place", f"what is at {PLACES[word.place]}", spelled, i))
        found.append(Question("colour", f"what colour is at {PLACES[word.place]}", colour, i))
        left, above = at.get(word.place - 1), at.get(word.place - 2)
        if word.place % 2 == 1 and left is not None:
            beside = COLOUR_NAMES[words[left].colour]
            found.append(Question("right_of", f"what is right of {beside}", spelled, i))
        if word.place >= 2 and above is not None:
            over = COLOUR_NAMES[words[above].colour]
            found.append(Question("below", f"what is below {over}", spelled, i))
    return found


def draw_turns(rng: np.random.Generator, words: Sequence[Word], count: int) -> list[Question]:
    """`count` different questions in random order, no word's text asked twice: an earlier answer, which
    stands in the sequence, must not give a later one away."""
    chosen: list[Question] = []
    spelled: set[int] = set()
    candidates = questions(words)
    # kinds are drawn first, so that rare ones are asked as often
    by_kind = {kind: [q for q in candidates if q.kind == kind] for kind in KINDS}
    kinds = [kind for kind in KINDS if by_kind[kind]]
    while len(chosen) < count and kinds:
        kind = kinds[rng.integers(len(kinds))]
        free = [
            q
            for q in by_kind[kind]
            if q not in chosen and (kind in ("colour", "count") or q.target not in spelled)
        ]
        if not free:
            kinds.remove(kind)
            continue
        question = free[rng.integers(len(free))]
        chosen.append(question)
        if kind not in ("colour", "count"):
            spelled.add(question.target)
    return chosen


def random_words(rng: np.random.Generator, split: str, font_sizes: Sequence[int]) -> list[Word]:
    """Two to four words without pixels: texts, colours, sizes and places."""
    count = int(rng.integers(2, len(PLACES) + 1))
    places = sorted(rng.choice(len(PLACES), size=count, replace=False))
    colours = rng.choice(len(COLOUR_NAMES), size=count, replace=False)
    return [
        Word(random_string(rng, WORD_LENGTH, split), int(colour), int(rng.choice(font_sizes)), int(place))
        for place, colour in zip(places, colours, strict=True)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pages:
    """An endless set: `pages[i]` is drawn from a generator seeded with (seed, i), the same everywhere.

    ValueError where a quarter is too small for a word of the largest type."""

    size: int
    """Side in pixels."""
    font_sizes: tuple[int, ...]
    split: str = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        room = self.size // 2
        if max(label_size(max(self.font_sizes))) > room:
            raise ValueError(
                f"font_sizes must fit words of {WORD_LENGTH} digits into quarters of {room} pixels, "
                f"got {self.font_sizes}"
            )

    def __getitem__(self, index: int) -> Page:
        rng = np.random.default_rng([self.seed, index])
        canvas = ground(rng, self.split, self.size)
        words: list[Word] = []
        for word in random_words(rng, self.split, self.font_sizes):
            height, width = label_size(word.font_size)
            room = self.size // 2
            row, column = divmod(word.place, 2)
            left = column * room + int(rng.integers(room - width + 1))
            top = row * room + int(rng.integers(room - height + 1))
            paint_label(canvas, word.text, word.font_size, left, top, shade(rng, word.colour))
            words.append(dataclasses.replace(word, left=left, top=top))
        return Page(np.clip(canvas, 0, 255).astype(np.uint8), tuple(words))


def margin(font_size: int) -> int:
    """Pixels between a word and the edge of its label."""
    return max(1, font_size // 8)


def label_size(font_size: int) -> tuple[int, int]:
    """Height and width in pixels."""
    height, advance = glyph("0", font_size).shape
    return height + 2 * margin(font_size), advance * WORD_LENGTH + 2 * margin(font_size)


def paint_label(
    canvas: np.ndarray, text: str, font_size: int, left: int, top: int, colour: np.ndarray
) -> None:
    """A word on its label, into `canvas` [height, width, 3] float32 in place; it must fit."""
    height, width = label_size(font_size)
    canvas[top : top + height, left : left + width] = colour
    edge = margin(font_size)
    paint(canvas, text, font_size, left + edge, top + edge, np.full(3, INK, np.float32))


def ground(rng: np.random.Generator, split: str, size: int) -> np.ndarray:
    """A sheet of paper with faint lines, or a piece of a photograph; [size, size, 3] float32.

    Photographs are small: a larger ground is drawn at a fraction of the size and enlarged."""
    factor = -(-size // LARGEST_GROUND)
    if factor > 1:
        part = ground(rng, split, -(-size // factor))
        return np.ascontiguousarray(part.repeat(factor, 0).repeat(factor, 1)[:size, :size])
    if rng.random() < 0.5:
        return np.ascontiguousarray(crop(rng, split, size, size))
    sheet = np.full((size, size, 3), rng.uniform(215, 255), np.float32)
    sheet *= rng.uniform(0.94, 1.0, 3).astype(np.float32)
    spacing, first = int(rng.integers(9, 25)), int(rng.integers(9))
    sheet[first::spacing] *= rng.uniform(0.85, 1.0)
    return sheet + rng.normal(0.0, 2.5, (size, size, 1)).astype(np.float32)

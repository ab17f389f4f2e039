"""The text-oriented augmentation of InfiMM-HD (section 4.1 and Figure 6 of the paper) for any set."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .painting import COLOURS, choose_colour, shade
from .samples import BadSample, Dataset, Sample

CHARACTERS = "abcdefghijkmnpqrstuvwxyz23456789"
"""Without the ones that a sans-serif typeface draws alike: l and 1, o and 0."""
LENGTHS = (2, 8)
NAMED_COLOURS = COLOURS | {"black": (10, 10, 10)}
PLACES = ("left top", "right bottom")
QUESTIONS = {
    "characters": "Which characters are at the {place} of the image?",
    "colour": "What colour are the characters at the {place} of the image?",
    "count": "How many characters are at the {place} of the image?",
}
_VALUES = np.array(list(NAMED_COLOURS.values()), dtype=np.float32)
_FONT_SHARES = (0.05, 0.12)
"""Smallest and largest em of the text, in parts of the image's shorter side."""
_SMALLEST_EM, _WIDEST = 9, 0.48


@dataclasses.dataclass(frozen=True, slots=True)
class PaintedText:
    text: str
    colour: str
    box: tuple[int, int, int, int]
    """left, top, right, bottom in pixels of the image."""


class TextAugmented:
    """`dataset` with two random strings painted on the first image of every sample, one left top and one
    right bottom, in different colours, and `num_questions` questions about them behind the sample's own:
    which characters, what colour, how many.

    A sample depends on (seed, index) alone. One without an image, or with one too small for legible text, is
    a `BadSample`, like an unreadable image."""

    def __init__(self, dataset: Dataset, seed: int = 0, num_questions: int = 2) -> None:
        if type(seed) is not int or seed < 0:
            raise ValueError(f"augment.seed must be an int of at least 0, got {seed!r}")
        most = len(QUESTIONS) * len(PLACES)
        if type(num_questions) is not int or not 1 <= num_questions <= most:
            raise ValueError(f"augment.num_questions must lie in 1..{most}, got {num_questions!r}")
        self.dataset, self.seed, self.num_questions = dataset, seed, num_questions
        # sizes and numbers of images stay; whoever asks whether they are known asks the dataset
        for name in ("indices_at", "image_sizes", "num_images"):
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))

    @property
    def notes(self) -> Sequence[str]:
        return getattr(self.dataset, "notes", ())

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        origin = sample.origin or f"sample {index}"
        if not sample.images:
            raise BadSample("no_image", f"{origin}: sample must have an image to paint on, got none")
        rng = np.random.default_rng([self.seed, index])
        pixels, painted = paint_texts(rng, sample.images[0], origin)
        asked = [(kind, place) for kind in QUESTIONS for place in range(len(PLACES))]
        turns = list(sample.turns)
        for i in rng.permutation(len(asked))[: self.num_questions]:
            kind, place = asked[i]
            turns.append((QUESTIONS[kind].format(place=PLACES[place]), _answer(kind, painted[place])))
        return dataclasses.replace(sample, images=[pixels, *sample.images[1:]], turns=turns, origin=origin)


def paint_texts(
    rng: np.random.Generator, image: object, origin: str
) -> tuple[np.ndarray, tuple[PaintedText, PaintedText]]:
    """The image [height, width, 3] uint8 with a string left top and one right bottom, and what they are."""
    from model.picture import load_pixels

    try:
        canvas = Image.fromarray(load_pixels(image))
    except ValueError as error:
        raise BadSample("unreadable_image", f"{origin}: {error}") from error
    taken: list[int] = []
    painted = []
    for place in range(len(PLACES)):
        text, em = _random_text(rng, canvas.size, origin)
        font = _font(em)
        left, top, right, bottom = font.getbbox(text)
        margin = em // 4
        x, y = margin, margin
        if place == 1:
            x, y = canvas.width - (right - left) - margin, canvas.height - (bottom - top) - margin
        box = (x, y, x + right - left, y + bottom - top)
        colour = choose_colour(rng, np.asarray(canvas.crop(box), np.float32), tuple(taken), _VALUES)
        fill = tuple(int(value) for value in shade(rng, colour, _VALUES))
        ImageDraw.Draw(canvas).text((x - left, y - top), text, fill=fill, font=font)
        taken.append(colour)
        painted.append(PaintedText(text, list(NAMED_COLOURS)[colour], box))
    return np.asarray(canvas), (painted[0], painted[1])


def _random_text(rng: np.random.Generator, size: tuple[int, int], origin: str) -> tuple[str, int]:
    """A string and its em in pixels, such that it takes less than half of the width and of the height."""
    width, height = size
    low, high = LENGTHS
    text = "".join(CHARACTERS[i] for i in rng.integers(len(CHARACTERS), size=rng.integers(low, high + 1)))
    em = max(_SMALLEST_EM, round(min(width, height) * rng.uniform(*_FONT_SHARES)))
    while em > _SMALLEST_EM and _width(text, em) > _WIDEST * width:
        em -= 1
    while len(text) > low and _width(text, em) > _WIDEST * width:
        text = text[:-1]
    if _width(text, em) > _WIDEST * width or 2 * em > _WIDEST * height:
        rule = f"image must be large enough for text of {_SMALLEST_EM} pixels"
        raise BadSample("small_image", f"{origin}: {rule}, got {width} x {height}")
    return text, em


def _width(text: str, em: int) -> float:
    left, _, right, _ = _font(em).getbbox(text)
    return right - left + em / 4


@functools.lru_cache(maxsize=64)
def _font(em: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(em)


def _answer(kind: str, painted: PaintedText) -> str:
    return {"characters": painted.text, "colour": painted.colour, "count": str(len(painted.text))}[kind]

"""Photographs with two painted strings, and questions about them: the paper's text-oriented augmentation.

The photographs are the ones inside scikit-image's wheel, split by photograph into train and held-out;
strings are split by a hash of their characters. One string stands left top, one right bottom, in different
colours; the questions ask for the characters, the colour and the number of characters (InfiMM-HD, section
3.3 and Figure 6)."""

import dataclasses
import functools
import sys
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import skimage
from PIL import Image, ImageDraw, ImageFont

from train.data import Sample

PHOTOGRAPHS = {
    "train": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "coffee.png",
        "color.png",
        "grass.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "page.png",
        "retina.jpg",
    ),
    "held_out": ("chelsea.png", "coins.png", "gravel.png", "rocket.jpg"),
}
SHORT_SIDES = (150, 240, 400)
"""Each photograph is used at these scales, pixels of its shorter side, as far as it is large enough."""

DIGITS = "0123456789"
COLOURS = {
    "red": (230, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 60, 240),
    "yellow": (240, 230, 30),
    "magenta": (230, 40, 220),
    "white": (250, 250, 250),
}
COLOUR_NAMES = tuple(COLOURS)
COLOUR_VALUES = np.array([COLOURS[name] for name in COLOUR_NAMES], dtype=np.float32)
MIN_COLOUR_DISTANCE = 130.0
"""A string's colour differs from the mean ground under it by at least this (sum over the three channels)."""

SIDES = ("left top", "right bottom")
KINDS = ("characters", "colour", "count")
NUMBER_WORDS = ("one", "two", "three", "four")
FONT_SIZES = {"small": 10, "medium": 14, "large": 21}
"""Em of DejaVu Sans Mono Bold in pixels."""


@dataclasses.dataclass(frozen=True, slots=True)
class PaintedString:
    text: str
    colour: int
    """Index into COLOUR_NAMES."""
    font_size: int
    box: tuple[int, int, int, int]
    """left, top, right, bottom in pixels of the canvas."""


@dataclasses.dataclass(frozen=True, slots=True)
class PaintedImage:
    pixels: np.ndarray
    """[height, width, 3] uint8."""
    strings: tuple[PaintedString, PaintedString]
    """Left top, right bottom."""


def question_and_answer(kind: str, side: int, string: PaintedString) -> tuple[str, str]:
    """One question of `KINDS` about the string on `SIDES[side]`, and its answer, as space-separated words."""
    if kind == "characters":
        return f"which characters at {SIDES[side]} ?", " ".join(string.text)
    if kind == "colour":
        return f"what colour at {SIDES[side]} ?", COLOUR_NAMES[string.colour]
    if kind == "count":
        return f"how many at {SIDES[side]} ?", NUMBER_WORDS[len(string.text) - 1]
    raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")


def is_held_out(text: str) -> bool:
    """A fifth of the strings of two and more characters is kept from training."""
    return len(text) > 1 and zlib.crc32(text.encode()) % 5 == 0


def random_string(rng: np.random.Generator, length: int, split: str) -> str:
    while True:
        text = "".join(DIGITS[i] for i in rng.integers(10, size=length))
        if length == 1 or is_held_out(text) == (split == "held_out"):
            return text


@functools.cache
def photographs(split: str) -> tuple[np.ndarray, ...]:
    """All photographs of a split at all scales, [height, width, 3] float32 in 0..255."""
    if split not in PHOTOGRAPHS:
        raise ValueError(f"split must be one of {sorted(PHOTOGRAPHS)}, got {split!r}")
    folder = Path(skimage.__file__).parent / "data"
    scaled = []
    for name in PHOTOGRAPHS[split]:
        with Image.open(folder / name) as opened:
            picture = opened.convert("RGB")
        for short_side in SHORT_SIDES:
            scale = short_side / min(picture.size)
            if scale <= 1.6:
                size = (round(picture.width * scale), round(picture.height * scale))
                scaled.append(np.asarray(picture.resize(size, Image.Resampling.LANCZOS), dtype=np.float32))
    return tuple(scaled)


@functools.cache
def glyph(character: str, font_size: int) -> np.ndarray:
    """Coverage of one digit in its cell, [height, advance] float32 in 0..1."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"
    font = ImageFont.truetype(str(path), font_size)
    boxes = [font.getbbox(digit) for digit in DIGITS]
    top, bottom = min(box[1] for box in boxes), max(box[3] for box in boxes)
    cell = Image.new("L", (round(font.getlength("0")), bottom - top + 1))
    ImageDraw.Draw(cell).text((0, -top), character, fill=255, font=font)
    return np.asarray(cell, dtype=np.float32) / 255.0


def crop(rng: np.random.Generator, split: str, height: int, width: int) -> np.ndarray:
    """A random piece of a random photograph, mirrored and dimmed at random; [height, width, 3] float32."""
    fitting = [p for p in photographs(split) if p.shape[0] >= height and p.shape[1] >= width]
    photograph = fitting[rng.integers(len(fitting))]
    top = rng.integers(photograph.shape[0] - height + 1)
    left = rng.integers(photograph.shape[1] - width + 1)
    piece = photograph[top : top + height, left : left + width]
    if rng.random() < 0.5:
        piece = piece[:, ::-1]
    if split == "train" and rng.random() < 0.3:
        piece = piece[::-1]
    return piece * rng.uniform(0.75, 1.1)


def choose_colour(rng: np.random.Generator, ground: np.ndarray, taken: tuple[int, ...] = ()) -> int:
    """A colour that stands out from the ground, not one of `taken`."""
    distance = np.abs(COLOUR_VALUES - ground.mean((0, 1))).sum(1)
    free = [i for i in range(len(COLOUR_NAMES)) if i not in taken]
    distinct = [i for i in free if distance[i] > MIN_COLOUR_DISTANCE]
    return int(rng.choice(distinct or free))


def paint(canvas: np.ndarray, text: str, font_size: int, left: int, top: int, colour: np.ndarray) -> None:
    """Blends `text` into `canvas` [height, width, 3] float32 in place; it must fit."""
    for character in text:
        coverage = glyph(character, font_size)[:, :, None]
        height, width = coverage.shape[:2]
        ground = canvas[top : top + height, left : left + width]
        ground += coverage * (colour - ground)
        left += width


def shade(rng: np.random.Generator, colour: int) -> np.ndarray:
    return np.clip(COLOUR_VALUES[colour] + rng.normal(0.0, 8.0, 3), 0, 255).astype(np.float32)


@dataclasses.dataclass(kw_only=True)
class PaintedPhotographs:
    """An endless set: `dataset[i]` is drawn from a generator seeded with (seed, i), the same everywhere.

    `canvases` lists the (height, width) in pixels a sample may have. A string's corner is a multiple of
    `snap` pixels from its corner of the canvas; with probability `off_grid` it is moved by up to `snap - 1`
    pixels more, so that it starts anywhere. A sample asks both strings for their colour and for their
    characters (three times in four) or their number."""

    split: str = "train"
    canvases: tuple[tuple[int, int], ...] = ((112, 112),)
    font_sizes: tuple[int, ...] = tuple(FONT_SIZES.values())
    lengths: tuple[int, ...] = (1, 2, 3, 4)
    snap: int = 7
    off_grid: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        photographs(self.split)
        if not 0.0 <= self.off_grid <= 1.0:
            raise ValueError(f"off_grid must lie in 0..1, got {self.off_grid!r}")
        if min(self.lengths) < 1 or max(self.lengths) > len(NUMBER_WORDS):
            raise ValueError(f"lengths must lie in 1..{len(NUMBER_WORDS)}, got {self.lengths!r}")

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, index])
        image = self.draw(rng)
        turns = []
        for side, string in enumerate(image.strings):
            kind = "characters" if rng.random() < 0.75 else "count"
            turns += [question_and_answer(kind, side, string), question_and_answer("colour", side, string)]
        return Sample(image=image.pixels, turns=[turns[i] for i in rng.permutation(len(turns))])

    def painted(self, index: int) -> PaintedImage:
        """The picture behind `dataset[index]`, with what was painted where."""
        return self.draw(np.random.default_rng([self.seed, index]))

    def draw(self, rng: np.random.Generator) -> PaintedImage:
        height, width = self.canvases[rng.integers(len(self.canvases))]
        canvas = crop(rng, self.split, height, width)
        strings: list[PaintedString] = []
        for side in range(len(SIDES)):
            font_size = int(rng.choice(self.font_sizes))
            cell_height, cell_width = glyph("0", font_size).shape
            longest = max(n for n in self.lengths if n * cell_width <= width or n == min(self.lengths))
            text = random_string(rng, min(int(rng.choice(self.lengths)), longest), self.split)
            text_width = cell_width * len(text)
            shift = self._shift(rng, roomy=min(height, width) >= 16 * self.snap)
            if side == 0:
                left, top = shift
            else:
                left = (width - text_width) // self.snap * self.snap - shift[0]
                top = (height - cell_height) // self.snap * self.snap - shift[1]
            left = min(max(left, 0), width - text_width)
            top = min(max(top, 0), height - cell_height)
            box = (left, top, left + text_width, top + cell_height)
            ground = canvas[box[1] : box[3], box[0] : box[2]]
            colour = choose_colour(rng, ground, tuple(s.colour for s in strings))
            paint(canvas, text, font_size, left, top, shade(rng, colour))
            strings.append(PaintedString(text, colour, font_size, box))
        return PaintedImage(np.clip(canvas, 0, 255).astype(np.uint8), (strings[0], strings[1]))

    def _shift(self, rng: np.random.Generator, roomy: bool) -> tuple[int, int]:
        """Distance in pixels from the string's corner of the canvas, (x, y)."""
        x, y = (int(n) * self.snap for n in rng.integers(2, size=2)) if roomy else (0, 0)
        if rng.random() < self.off_grid:
            jitter = rng.integers(self.snap, size=2)
            x, y = x + int(jitter[0]), y + int(jitter[1])
        return x, y

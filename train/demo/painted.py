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

from train.data import IMAGE_MARK, Sample
from train.data.painting import COLOUR_NAMES, choose_colour, shade

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


def paint(canvas: np.ndarray, text: str, font_size: int, left: int, top: int, colour: np.ndarray) -> None:
    """Blends `text` into `canvas` [height, width, 3] float32 in place; it must fit."""
    for character in text:
        coverage = glyph(character, font_size)[:, :, None]
        height, width = coverage.shape[:2]
        ground = canvas[top : top + height, left : left + width]
        ground += coverage * (colour - ground)
        left += width


@dataclasses.dataclass(kw_only=True)
class PaintedPhotographs:
    """An endless set: `dataset[i]` is drawn from generators seeded with (seed, i), the same everywhere.

    `canvases` lists the (height, width) in pixels a sample may have. A string's corner is a multiple of
    `snap` pixels from its corner of the canvas; with probability `off_grid` it is moved by up to `snap - 1`
    pixels more, so that it starts anywhere. A sample asks both strings for their colour, and for their
    number with probability `count_share`, else for their characters."""

    split: str = "train"
    canvases: tuple[tuple[int, int], ...] = ((112, 112),)
    font_sizes: tuple[int, ...] = tuple(FONT_SIZES.values())
    lengths: tuple[int, ...] = (1, 2, 3, 4)
    snap: int = 7
    off_grid: float = 0.0
    count_share: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        available = photographs(self.split)
        for field in ("off_grid", "count_share"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ValueError(f"{field} must lie in 0..1, got {getattr(self, field)!r}")
        if not self.lengths or min(self.lengths) < 1 or max(self.lengths) > len(NUMBER_WORDS):
            raise ValueError(f"lengths must lie in 1..{len(NUMBER_WORDS)}, got {self.lengths!r}")
        if not self.font_sizes or min(self.font_sizes) < 1:
            raise ValueError(f"font_sizes must be positive, got {self.font_sizes!r}")
        cells = [glyph("0", size).shape for size in self.font_sizes]
        smallest = max(height for height, _ in cells), max(width for _, width in cells) * min(self.lengths)
        largest = max(p.shape[0] for p in available), max(p.shape[1] for p in available)
        if not self.canvases:
            raise ValueError(f"canvases must name at least one size, got {self.canvases!r}")
        for canvas in self.canvases:
            fits = len(canvas) == 2 and all(
                low <= side <= high for low, side, high in zip(smallest, canvas, largest, strict=True)
            )
            if not fits:
                raise ValueError(
                    f"canvases must be (height, width) between {smallest} and {largest}, got {canvas!r}"
                )

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Sample:
        image = self.painted(index)
        rng = np.random.default_rng([self.seed, index, 2])
        turns = []
        for side, string in enumerate(image.strings):
            kind = "count" if rng.random() < self.count_share else "characters"
            turns += [question_and_answer(kind, side, string), question_and_answer("colour", side, string)]
        (question, answer), *others = (turns[i] for i in rng.permutation(len(turns)))
        return Sample([image.pixels], [(f"{IMAGE_MARK} {question}", answer), *others])

    def num_images(self, index: int) -> int:
        return 1

    def image_sizes(self, index: int) -> list[tuple[int, int]]:
        """(height, width) of the sample's picture, which is not painted for it."""
        return [self._canvas(np.random.default_rng([self.seed, index, 0]))]

    def painted(self, index: int) -> PaintedImage:
        """The picture behind `dataset[index]`, with what was painted where."""
        # The jitter has a generator of its own: `off_grid` moves the strings and changes nothing else but the
        # colours, which follow the ground.
        rng, placing = (np.random.default_rng([self.seed, index, stream]) for stream in (0, 1))
        height, width = self._canvas(rng)
        canvas = crop(rng, self.split, height, width)
        roomy = min(height, width) >= 16 * self.snap
        written = [self._string(rng, width) for _ in SIDES]
        shifts = [rng.integers(2, size=2) * self.snap * roomy for _ in SIDES]
        strings: list[PaintedString] = []
        for side, (text, font_size) in enumerate(written):
            cell_height, cell_width = glyph("0", font_size).shape
            room = np.array([width - cell_width * len(text), height - cell_height])
            shift = shifts[side]
            if placing.random() < self.off_grid:
                shift = shift + placing.integers(self.snap, size=2)
            corner = shift if side == 0 else room // self.snap * self.snap - shift
            left, top = (int(n) for n in np.clip(corner, 0, room))
            box = (left, top, left + cell_width * len(text), top + cell_height)
            ground = canvas[box[1] : box[3], box[0] : box[2]]
            colour = choose_colour(placing, ground, tuple(s.colour for s in strings))
            paint(canvas, text, font_size, left, top, shade(placing, colour))
            strings.append(PaintedString(text, colour, font_size, box))
        return PaintedImage(np.clip(canvas, 0, 255).astype(np.uint8), (strings[0], strings[1]))

    def _canvas(self, rng: np.random.Generator) -> tuple[int, int]:
        return tuple(self.canvases[rng.integers(len(self.canvases))])

    def _string(self, rng: np.random.Generator, width: int) -> tuple[str, int]:
        """A string that fits `width` pixels, and its font size."""
        font_size = int(rng.choice(self.font_sizes))
        fitting = [n for n in self.lengths if n * glyph("0", font_size).shape[1] <= width]
        length = min(int(rng.choice(self.lengths)), max(fitting))
        return random_string(rng, length, self.split), font_size

"""Colours of painted text, with names for questions about them."""

import numpy as np

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


def choose_colour(
    rng: np.random.Generator,
    ground: np.ndarray,
    taken: tuple[int, ...] = (),
    values: np.ndarray = COLOUR_VALUES,
) -> int:
    """A row of `values` that stands out from the ground [height, width, 3], not one of `taken`."""
    distance = np.abs(values - ground.mean((0, 1))).sum(1)
    free = [i for i in range(len(values)) if i not in taken]
    distinct = [i for i in free if distance[i] > MIN_COLOUR_DISTANCE]
    return int(rng.choice(distinct or free))


def shade(rng: np.random.Generator, colour: int, values: np.ndarray = COLOUR_VALUES) -> np.ndarray:
    """A variation of a row of `values`, [3] float32."""
    return np.clip(values[colour] + rng.normal(0.0, 8.0, 3), 0, 255).astype(np.float32)

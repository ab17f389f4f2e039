"""95% intervals by the bootstrap: questions (or images) drawn again with replacement, seeded."""

from collections.abc import Callable

import numpy as np

RESAMPLES = 2000
_CHUNK = 1 << 22
"""Numbers in memory at a time."""


def resampled(
    rows: np.ndarray,
    statistic: Callable[[np.ndarray, int], np.ndarray],
    seed: int,
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """`statistic` of `resamples` samples of as many units with replacement, [resamples].

    `rows` [units, columns] are what each unit adds to the sums that the statistic is made of;
    `statistic(sums [..., columns], units)` gives [...]. ValueError without a unit."""
    rows = np.asarray(rows, dtype=np.float64)
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"rows must have shape [units, columns] and not be empty, got {list(rows.shape)}")
    # equal units are drawn together: most metrics give few different values
    different, counts = np.unique(rows, axis=0, return_counts=True)
    random = np.random.default_rng(seed)
    step = max(1, _CHUNK // len(different))
    sums = [
        random.multinomial(len(rows), counts / len(rows), size=min(step, resamples - start)) @ different
        for start in range(0, resamples, step)
    ]
    return statistic(np.concatenate(sums), len(rows))


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The middle 95% of `samples`: percentiles 2.5 and 97.5."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)

"""Several datasets read as one, by weights."""

import bisect
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Sequence

import numpy as np

from .order import mix, sample_indices
from .samples import Dataset, Prompt, Sample

BLOCK = 10_000
"""Positions in which every source has exactly its share."""


class Mixture:
    """Sources side by side: index i counts through the first, then through the second, and so on.

    The order of reading is by `weights`. Every block of `BLOCK` positions holds a fixed number of samples of
    each source, its share rounded by the largest remainder, in an order that the seed permutes; each source
    is read epoch by epoch in a permutation of its own. Nothing is stored: any position takes the same time.

    `prompts` are the prompt forms of the sources (None: the stage's), for samples that name none. ValueError
    for weights that are not positive, or so small that a source would never be read."""

    def __init__(
        self,
        sources: Sequence[Dataset],
        weights: Sequence[float],
        *,
        names: Sequence[str] | None = None,
        prompts: Sequence[Prompt | None] | None = None,
    ) -> None:
        self.names = [str(i) for i in range(len(sources))] if names is None else list(names)
        if not sources or not len(sources) == len(weights) == len(self.names):
            raise ValueError(f"weights must be one for each of the {len(sources)} sources, got {weights!r}")
        self.sources, self.prompts = list(sources), list(prompts or [None] * len(sources))
        self.quotas = _quotas(weights, self.names)
        self._starts = [0, *itertools.accumulate(map(len, self.sources))]
        self._block = functools.lru_cache(maxsize=4)(self._make_block)

    @property
    def notes(self) -> list[str]:
        return [
            f"{name}: {note}"
            for name, source in zip(self.names, self.sources, strict=True)
            for note in getattr(source, "notes", ())
        ]

    def __len__(self) -> int:
        return min(self._starts[-1], sys.maxsize)  # an endless source alone has the largest length there is

    def indices_at(self, positions: Sequence[int], seed: int, shuffle: bool) -> list[int]:
        """The indices that are read at `positions`. Without `shuffle` the sources alternate and are read in
        their own order."""
        positions = np.asarray(positions, np.int64)
        blocks, places = np.divmod(positions, BLOCK)
        sources, draws = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks).tolist():
            own = blocks == block
            source_of, rank_of = self._block(block, seed, shuffle)
            sources[own], draws[own] = source_of[places[own]], rank_of[places[own]]
        draws += blocks * np.array(self.quotas)[sources]
        found = [0] * len(positions)
        for source in np.unique(sources).tolist():
            (own,) = np.nonzero(sources == source)
            indices = reading_order(self.sources[source], draws[own], mix(mix(seed) + source + 1), shuffle)
            for place, index in zip(own.tolist(), indices, strict=True):
                found[place] = self._starts[source] + index
        return found

    def _make_block(self, block: int, seed: int, shuffle: bool) -> tuple[np.ndarray, np.ndarray]:
        """Of every place of a block [BLOCK]: its source, and the how-manieth place of that source it is."""
        spread = np.concatenate([(2 * np.arange(quota) + 1) / quota for quota in self.quotas])
        sources = np.repeat(np.arange(len(self.quotas)), self.quotas)[np.argsort(spread, kind="stable")]
        if shuffle:
            start = block * BLOCK
            sources = sources[sample_indices(range(start, start + BLOCK), BLOCK, seed=mix(seed))]
        ranks = np.empty_like(sources)
        for source, quota in enumerate(self.quotas):
            ranks[sources == source] = np.arange(quota)
        return sources, ranks

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the source and index in it."""
        if not 0 <= index < self._starts[-1]:
            raise IndexError(f"index must be in 0..{self._starts[-1] - 1}, got {index}")
        source = bisect.bisect_right(self._starts, index) - 1
        return source, index - self._starts[source]

    def __getitem__(self, index: int) -> Sample:
        source, own = self.locate(index)
        sample = self.sources[source][own]
        changes = {}
        if sample.prompt is None and self.prompts[source] is not None:
            changes["prompt"] = self.prompts[source]
        if not sample.origin:
            changes["origin"] = f"{self.names[source]} sample {own}"
        return dataclasses.replace(sample, **changes) if changes else sample

    def num_images(self, index: int) -> int:
        source, own = self.locate(index)
        count = getattr(self.sources[source], "num_images", None)
        return 0 if count is None else count(own)

    def image_sizes(self, index: int) -> list[tuple[int, int]]:
        source, own = self.locate(index)
        sizes = getattr(self.sources[source], "image_sizes", None)
        return [] if sizes is None else sizes(own)


def reading_order(dataset: Dataset, positions: Sequence[int], seed: int, shuffle: bool) -> list[int]:
    """The indices that are read at `positions`: the dataset's own `indices_at`, or epoch by epoch."""
    own = getattr(dataset, "indices_at", None)
    if own is not None:
        return own(positions, seed, shuffle)
    return sample_indices(positions, len(dataset), seed=seed, shuffle=shuffle).tolist()


def _quotas(weights: Sequence[float], names: Sequence[str]) -> list[int]:
    for name, weight in zip(names, weights, strict=True):
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not math.isfinite(weight) or weight <= 0:
            raise ValueError(f"weight of {name!r} must be a positive number, got {weight!r}")
    total = sum(weights)
    shares = [BLOCK * weight / total for weight in weights]
    quotas = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda s: (quotas[s] - shares[s], s))
    for source in by_remainder[: BLOCK - sum(quotas)]:
        quotas[source] += 1
    for name, weight, quota in zip(names, weights, quotas, strict=True):
        if quota == 0:
            rule = f"be at least about {total / BLOCK:g}, one of {BLOCK} samples"
            raise ValueError(f"weight of {name!r} must {rule}, got {weight!r}")
    return quotas

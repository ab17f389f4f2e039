"""The order of reading, computed and not stored: any positions, at once."""

from collections.abc import Sequence

import numpy as np

_MASK = (1 << 64) - 1
_FEISTEL_ROUNDS = 6


def sample_index(position: int, length: int, *, seed: int = 0, shuffle: bool = True) -> int:
    """`sample_indices` of one position."""
    return int(sample_indices([position], length, seed=seed, shuffle=shuffle)[0])


def sample_indices(
    positions: Sequence[int] | np.ndarray, length: int, *, seed: int = 0, shuffle: bool = True
) -> np.ndarray:
    """Indices [n] int64 of the samples that are read at `positions` [n] of an endless reading of a dataset of
    `length` samples.

    Every epoch (`length` positions) reads every sample once. With `shuffle` the order is a permutation fixed
    by (seed, epoch). It is computed, not stored: a Feistel network permutes the next power of four, and
    walking its cycle until the value falls below `length` restricts it (Black & Rogaway 2002), so that a
    step's samples are known without the steps before it and endless datasets cost no memory."""
    epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), length)
    if not shuffle or length == 1:
        return offsets
    half_bits = ((length - 1).bit_length() + 1) // 2
    half_mask = np.uint64((1 << half_bits) - 1)
    different, inverse = np.unique(epochs, return_inverse=True)
    keys = np.array([mix(mix(seed) ^ int(epoch)) for epoch in different], np.uint64)[inverse]
    values = offsets.astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        key, value = keys[walking], values[walking]
        left, right = value >> np.uint64(half_bits), value & half_mask
        for round_number in range(_FEISTEL_ROUNDS):
            mixed = _mix((key + np.uint64(round_number)) ^ (right << np.uint64(8)))
            left, right = right, left ^ (mixed & half_mask)
        values[walking] = (left << np.uint64(half_bits)) | right
        walking = walking[values[walking] >= length]
    return values.astype(np.int64)


def mix(value: int) -> int:
    """Spreads the low 64 bits of `value` over 64 bits: two xor-shift and multiply steps."""
    return int(_mix(np.array([value & _MASK], np.uint64))[0])


def _mix(value: np.ndarray) -> np.ndarray:
    """Of [n] uint64, whose arithmetic is modulo 2^64."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    for _ in range(2):
        value = (value ^ (value >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return value ^ (value >> np.uint64(32))

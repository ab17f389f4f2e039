"""How ragged segments become a few batched problems: the host-side half of the reference attention."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from infimm_kernels import checks


class Group(NamedTuple):
    """Segments with the same number of keys, whose queries are padded to `len_q` rows.

    Query rows do not see each other, so padding them is exact; key rows are never padded. A group whose rows
    are consecutive and unpadded has a start and no index and is read as a view.
    """

    num_segments: int
    len_q: int
    len_k: int
    start_q: int
    start_k: int
    rows_q: Tensor | None  # source rows in the packed queries
    slots_q: (
        Tensor | None
    )  # where they go among the num_segments * len_q padded rows; None: in order, no padding
    rows_k: Tensor | None


class Plan(NamedTuple):
    """The groups that have both queries and keys."""

    groups: tuple[Group, ...]
    is_one_view: bool  # a single group, read as a view, is the whole batch
    covers_queries: bool  # every query row is in a group; rows in none get zero and lse = -inf
    covers_keys: bool


# Equal adjacent segments with as many scores as this, per head, are a batch of their own: what a copy next to
# other segments would save in calls is less than its cost.
LONG_RUN = 1 << 16

VARLEN_NAMES = ("cu_seqlens_q", "cu_seqlens_k")
WINDOW_NAMES = ("cu_seqlens", "cu_seqlens")


def check_values(
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    total_q: int,
    total_k: int,
    names: tuple[str, str] = VARLEN_NAMES,
) -> None:
    """Raise ValueError, about the argument called `names`, for values that are not cumulative lengths."""
    checks.cu_seqlens_values(names[0], cu_q, total_q)
    checks.cu_seqlens_values(names[1], cu_k, total_k)


def plan(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    total_q: int,
    total_k: int,
    names: tuple[str, str] = VARLEN_NAMES,
) -> Plan:
    """The plan of a batch, made once and kept for the other layers and the backward of the same batch.

    Reads both tensors, so a CUDA tensor is waited for. Raises ValueError, about the argument called `names`,
    for values that are not cumulative lengths.
    """
    cu_q, cu_k = tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens_k.tolist())
    return _plan(cu_q, cu_k, total_q, total_k, names, cu_seqlens_q.device)


@functools.lru_cache(maxsize=32)
def _plan(
    cu_q: tuple, cu_k: tuple, total_q: int, total_k: int, names: tuple[str, str], device: torch.device
) -> Plan:
    check_values(cu_q, cu_k, total_q, total_k, names)
    buckets: dict[tuple[int, ...], list[int]] = {}
    for run in _runs(cu_q, cu_k):
        len_q, len_k = _lengths(run[0], cu_q, cu_k)
        # Lengths within a factor of two share a batch: fewer calls, at most half of its rows padding.
        key = (len_k, (len_q - 1).bit_length())
        if device.type == "cpu" and len(run) * len_q * len_k >= LONG_RUN:
            key += (run[0],)
        buckets.setdefault(key, []).extend(run)
    groups = tuple(_group(segments, cu_q, cu_k, device) for segments in buckets.values())
    covers_queries, covers_keys = (
        sum(cu[s + 1] - cu[s] for segments in buckets.values() for s in segments) == total
        for cu, total in ((cu_q, total_q), (cu_k, total_k))
    )
    is_view = len(groups) == 1 and groups[0].rows_q is None and groups[0].rows_k is None
    return Plan(groups, is_view and covers_queries and covers_keys, covers_queries, covers_keys)


def _lengths(segment: int, cu_q: tuple, cu_k: tuple) -> tuple[int, int]:
    return cu_q[segment + 1] - cu_q[segment], cu_k[segment + 1] - cu_k[segment]


def _runs(cu_q: tuple, cu_k: tuple) -> Iterator[list[int]]:
    """Adjacent segments of equal lengths, together; those without queries or without keys are left out."""
    segments = (s for s in range(len(cu_q) - 1) if all(_lengths(s, cu_q, cu_k)))
    run: list[int] = []
    for segment in segments:
        if run and (
            _lengths(segment, cu_q, cu_k) != _lengths(run[0], cu_q, cu_k)
            or (cu_q[segment], cu_k[segment]) != (cu_q[run[-1] + 1], cu_k[run[-1] + 1])
        ):
            yield run
            run = []
        run.append(segment)
    if run:
        yield run


@functools.lru_cache(maxsize=32)
def uniform_plan(num_segments: int, len_q: int, len_k: int) -> Plan:
    """The plan of `num_segments` equal segments."""
    empty = num_segments == 0 or len_q == 0 or len_k == 0
    groups = () if empty else (Group(num_segments, len_q, len_k, 0, 0, None, None, None),)
    return Plan(groups, not empty, not empty, not empty)


def _group(segments: list[int], cu_q: tuple, cu_k: tuple, device: torch.device) -> Group:
    lengths = [cu_q[s + 1] - cu_q[s] for s in segments]
    len_q = max(lengths)
    len_k = cu_k[segments[0] + 1] - cu_k[segments[0]]
    padded = min(lengths) != len_q
    consecutive_q = not padded and all(cu_q[b] == cu_q[a + 1] for a, b in itertools.pairwise(segments))
    consecutive_k = all(cu_k[b] == cu_k[a + 1] for a, b in itertools.pairwise(segments))
    rows_q = slots_q = rows_k = None
    if not consecutive_q:
        rows_q = [row for s in segments for row in range(cu_q[s], cu_q[s + 1])]
    if padded:
        slots_q = [i * len_q + j for i, length in enumerate(lengths) for j in range(length)]
    if not consecutive_k:
        rows_k = [row for s in segments for row in range(cu_k[s], cu_k[s + 1])]
    return Group(
        len(segments),
        len_q,
        len_k,
        cu_q[segments[0]],
        cu_k[segments[0]],
        *(None if rows is None else torch.tensor(rows, device=device) for rows in (rows_q, slots_q, rows_k)),
    )

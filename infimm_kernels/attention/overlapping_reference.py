"""Attention of segments whose ranges of keys overlap, in eager PyTorch: the segments one after the other."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from infimm_kernels import checks
from infimm_kernels.attention import reference
from infimm_kernels.attention.plan import uniform_plan
from infimm_kernels.autodiff import compute_dtype


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, key_ranges: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """q [total_q, num_heads, head_dim], k v [total_k, num_kv_heads, head_dim] -> out, lse [heads, total]."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=compute_dtype(q.dtype))
    for queries, keys in visible(cu_seqlens_q, key_ranges, q, k):
        rows = q[queries], k[keys], v[keys]
        out[queries], lse[:, queries] = reference.forward(*rows, softmax_scale, _one_segment(*rows[:2]))
    return out, lse


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    key_ranges: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; a key's shares from the segments that see it are added up in float32 at least."""
    dtype = compute_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    for queries, keys in visible(cu_seqlens_q, key_ranges, q, k):
        rows = q[queries], k[keys], v[keys]
        shares = [torch.empty(x.shape, dtype=dtype, device=x.device) for x in rows]
        grads = None if dout is None else dout[queries], None if dlse is None else dlse[:, queries]
        reference.backward(*grads, *rows, softmax_scale, _one_segment(*rows[:2]), *shares)
        dq[queries] = shares[0]
        dk[keys] += shares[1]
        dv[keys] += shares[2]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def dense(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, key_ranges: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """`forward` from differentiable operations alone; memory grows with total_q * total_k."""
    # Rows that no segment holds see nothing.
    nothing = key_ranges.new_zeros((1, 2))
    ranges = torch.cat((nothing, key_ranges, nothing))[reference.segments_of(cu_seqlens_q, q)]  # [total_q, 2]
    keys = torch.arange(k.shape[0], device=k.device)
    seen = (keys >= ranges[:, :1]) & (keys < ranges[:, 1:])
    return reference.dense_where(q, k, v, seen, softmax_scale)


def check_values(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    key_ranges: Tensor,
    query_ranges: Tensor,
    total_q: int,
    total_k: int,
) -> None:
    """ValueError for numbers that are no cumulative lengths, or no ranges. Reads all four tensors."""
    checks.cu_seqlens_values("cu_seqlens_q", cu_seqlens_q.tolist(), total_q)
    checks.cu_seqlens_values("cu_seqlens_k", cu_seqlens_k.tolist(), total_k)
    _check_ranges("segment_key_ranges", key_ranges.tolist(), total_k, "keys")
    _check_ranges("segment_query_ranges", query_ranges.tolist(), total_q, "queries")


def _check_ranges(argument: str, ranges: Sequence[Sequence[int]], total: int, what: str) -> None:
    for first, end in ranges:
        if not 0 <= first <= end <= total:
            checks.fail(argument, f"be ranges within the {total} {what}", (first, end))


def visible(cu_seqlens_q: Tensor, key_ranges: Tensor, q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
    """The rows of queries and of keys of each segment that has both. Reads both tensors."""
    ranges = tuple(map(tuple, key_ranges.tolist()))
    return _visible(tuple(cu_seqlens_q.tolist()), ranges, q.shape[0], k.shape[0])


@functools.lru_cache(maxsize=32)
def _visible(cu_q: tuple, ranges: tuple, total_q: int, total_k: int) -> list[tuple[slice, slice]]:
    checks.cu_seqlens_values("cu_seqlens_q", cu_q, total_q)
    _check_ranges("segment_key_ranges", ranges, total_k, "keys")
    pairs = zip(cu_q[:-1], cu_q[1:], ranges, strict=True)
    return [
        (slice(start, stop), slice(first, end))
        for start, stop, (first, end) in pairs
        if stop > start and end > first
    ]


def _one_segment(q: Tensor, k: Tensor):
    return uniform_plan(1, q.shape[0], k.shape[0])

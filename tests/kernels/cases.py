"""Inputs and eager oracles of the kernel tests; the oracles share nothing with the package's reference."""

import math

import torch
from torch import Tensor

from infimm_kernels.testing import packed_lengths

AWKWARD_LENGTHS = ((0,), (1,), (2,), (63,), (64,), (65,), (257,), (1, 0, 65, 2, 64, 0), (3, 63, 3, 63, 5))
HEAD_DIMS = (32, 64, 80, 88, 112, 128)
# Of (x, o and weight, gate): a residual stream wider than the branch that is added to it.
MIXED_DTYPES = (
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float16, torch.float32),
    (torch.float32, torch.float16, torch.float16),
)


def attention_inputs(
    lengths_q, lengths_k, num_heads=2, num_kv_heads=2, head_dim=16, dtype=torch.float64, device="cpu"
) -> tuple[Tensor, ...]:
    """q, k, v that need a gradient, cu_seqlens_q, cu_seqlens_k."""
    q = torch.randn(sum(lengths_q), num_heads, head_dim, dtype=torch.float64)
    k, v = (torch.randn(sum(lengths_k), num_kv_heads, head_dim, dtype=torch.float64) for _ in range(2))
    tensors = (x.to(device, dtype).requires_grad_() for x in (q, k, v))
    return (*tensors, packed_lengths(lengths_q, device), packed_lengths(lengths_k, device))


def eager_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=None) -> tuple[Tensor, Tensor]:
    """Segment by segment and head by head, in the dtype of q throughout."""
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    heads_per_kv_head = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads_per_kv_head, 1), v.repeat_interleave(heads_per_kv_head, 1)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [q[:0]], [q[:0, :, 0].t()]
    for s in range(len(starts_q) - 1):
        qs = q[starts_q[s] : starts_q[s + 1]].transpose(0, 1)
        ks, vs = (x[starts_k[s] : starts_k[s + 1]].transpose(0, 1) for x in (k, v))
        scores = qs @ ks.transpose(1, 2) * scale
        outs.append((scores.softmax(-1) @ vs).transpose(0, 1))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


def masked_attention(q, k, v, hidden: Tensor, softmax_scale=None) -> Tensor:
    """One dense matrix of scores; `hidden` bool [total_q, total_k]. A row that sees nothing is zero."""
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    p = scores.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", p, v)


def eager_position(x, positions, granularity="window", window_shape=None, num_prefix_tokens=0) -> Tensor:
    """The equation of the encoding, one token at a time; float32 tables for shorter dtypes."""
    num_windows, seqlen, hidden = x.shape
    y = x.clone()
    for n, (row, column) in enumerate(positions.tolist()):
        if row < 0 or column < 0:
            continue
        for t in range(num_prefix_tokens if granularity == "token" else 0, seqlen):
            place = (column, row)
            if granularity == "token":
                h, w = window_shape or (math.isqrt(seqlen - num_prefix_tokens),) * 2
                i, j = divmod(t - num_prefix_tokens, w)
                place = (column * w + j, row * h + i)
            dtype = torch.promote_types(x.dtype, torch.float32)
            exponents = torch.arange(0, hidden, 4, dtype=dtype) / hidden
            pe = torch.empty(2, hidden // 4, 2, dtype=dtype)
            for half, coordinate in enumerate(place):
                angles = coordinate / 10000**exponents
                pe[half, :, 0], pe[half, :, 1] = angles.sin(), angles.cos()
            y[n, t] = x[n, t] + pe.flatten().to(x.device, x.dtype)
    return y


def eager_gated(x, o, weight, gate, row_mask=None) -> Tensor:
    update = gate.tanh() * (o @ weight.t())
    return x + (update if row_mask is None else update * row_mask.unsqueeze(-1))


def gated_inputs(rows=(2, 5), hidden=12, inner=8, dtype=torch.float64, device="cpu") -> tuple[Tensor, ...]:
    """x, o, weight, gate that need a gradient; `dtype` of all, or those of (x, o and weight, gate)."""
    stream, branch, gate = dtype if isinstance(dtype, tuple) else (dtype,) * 3
    shapes = (
        ((*rows, hidden), stream),
        ((*rows, inner), branch),
        ((hidden, inner), branch),
        ((hidden,), gate),
    )
    return tuple(
        torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_() for shape, dtype in shapes
    )


def exact(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same numbers as float64 leaves."""
    return tuple(x.detach().double().requires_grad_() for x in tensors)

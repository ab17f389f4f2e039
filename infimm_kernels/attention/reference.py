"""Attention within segments, stated in eager PyTorch: the oracle of the kernels and the path of CPU tensors.

For segment s with queries q, keys k and values v of one head:

    scores = softmax_scale * q k^T
    p = softmax(scores, keys)
    lse = logsumexp(scores, keys)
    out = p v                                    a segment without keys: out = 0, lse = -inf

and for the gradients dout and dlse of the two results:

    dv = p^T dout
    dp = dout v^T
    ds = p * (dp - sum(p * dp, keys) + dlse)
    dq = softmax_scale * ds k,   dk = softmax_scale * ds^T q

sum(p * dp, keys) equals sum(dout * out, head_dim), and p equals exp(scores - lse). Taking either from saved
results costs a float32 gradient a factor of two to three in accuracy and saves no time here, so the inputs
alone are saved.
The compute dtype is ``torch.promote_types(dtype, torch.float32)``. `dense` writes the same with one masked
matrix of scores: slow, but made of differentiable operations alone, for the transforms that a registered op
does not serve.
"""

import torch
from torch import Tensor

from infimm_kernels.attention.plan import Group, Plan
from infimm_kernels.autodiff import compute_dtype

# Scores held at once by the backward: few enough for a core's cache, many enough to fill a GPU.
MAX_SCORES = {"cpu": 1 << 17, "cuda": 1 << 27}


def forward(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, plan: Plan) -> tuple[Tensor, Tensor]:
    """q [total_q, num_heads, head_dim], k v [total_k, num_kv_heads, head_dim] -> out, lse [heads, total]."""
    total_q, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    dtype = compute_dtype(q.dtype)
    if not plan.covers_all:
        out = q.new_zeros((total_q, num_heads, head_dim))
        lse = q.new_full((num_heads, total_q), -torch.inf, dtype=dtype)
    qc, kc, vc = q.to(dtype), k.to(dtype), v.to(dtype)
    for group in plan.groups:
        out_g, lse_g = _softmax_product(
            _queries(qc, group, num_kv_heads), _keys(kc, group), _keys(vc, group), softmax_scale
        )
        out_g = _unfold_queries(out_g, group, num_heads).to(q.dtype)  # [rows, num_heads, head_dim]
        lse_g = _unfold_queries(lse_g.unsqueeze(-1), group, num_heads).squeeze(-1).t()  # [num_heads, rows]
        if plan.covers_all:
            return out_g.contiguous(), lse_g.contiguous()
        _put(out, out_g, group.start_q, group.rows_q)
        _put(lse.t(), lse_g.t(), group.start_q, group.rows_q)
    return out, lse


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    plan: Plan,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write the gradients into dq, dk and dv, which have the shapes of q, k and v and any strides."""
    dtype = compute_dtype(q.dtype)
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    if not plan.covers_all:
        dq.zero_()
    if not plan.covers_all_keys:
        dk.zero_()
        dv.zero_()
    if dout is None:
        dout = torch.zeros_like(q)
    qc, kc, vc, doutc = (x.to(dtype) for x in (q, k, v, dout))
    for group in plan.groups:
        # [batch, rows, head_dim]; batch runs over segments and key heads
        qg, dog = (_queries(x, group, num_kv_heads).flatten(0, 1).contiguous() for x in (qc, doutc))
        kg, vg = (_keys(x, group).flatten(0, 1).contiguous() for x in (kc, vc))
        dlse_g = None
        if dlse is not None:
            dlse_g = _queries(dlse.t().unsqueeze(-1), group, num_kv_heads).flatten(0, 1)
        grads = _softmax_product_backward(dog, dlse_g, qg, kg, vg, softmax_scale)
        dq_g, dk_g, dv_g = (x.unflatten(0, (group.num_segments, num_kv_heads)) for x in grads)
        _put(dq, _unfold_queries(dq_g, group, num_heads), group.start_q, group.rows_q)
        for target, grad in ((dk, dk_g), (dv, dv_g)):
            _put(target, grad.transpose(1, 2).flatten(0, 1), group.start_k, group.rows_k)


def dense(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """The same function from differentiable operations alone; memory grows with total_q * total_k."""
    dtype = compute_dtype(q.dtype)
    groups = q.shape[1] // k.shape[1]
    qc, kc, vc = (x.to(dtype).transpose(0, 1) for x in (q, k, v))  # [heads, tokens, head_dim]
    kc, vc = (x.repeat_interleave(groups, 0) for x in (kc, vc))
    segment_q = torch.searchsorted(
        cu_seqlens_q, torch.arange(q.shape[0], device=q.device, dtype=torch.int32), right=True
    )
    segment_k = torch.searchsorted(
        cu_seqlens_k, torch.arange(k.shape[0], device=q.device, dtype=torch.int32), right=True
    )
    hidden = segment_q[:, None] != segment_k[None, :]  # [total_q, total_k]
    keyless = hidden.all(1)  # [total_q]
    # A keyless row is let through, so that no softmax of an empty set puts a NaN into a gradient, and then
    # zeroed.
    scores = (qc @ kc.transpose(1, 2) * softmax_scale).masked_fill(hidden & ~keyless[:, None], -torch.inf)
    if k.shape[0] == 0:
        scores = torch.cat([scores, scores.new_zeros((*scores.shape[:2], 1))], 2)
        vc = torch.cat([vc, vc.new_zeros((vc.shape[0], 1, vc.shape[2]))], 1)
    out = (scores.softmax(-1) @ vc).masked_fill(keyless[:, None], 0.0)
    lse = scores.logsumexp(-1).masked_fill(keyless, -torch.inf)
    return out.transpose(0, 1).to(q.dtype), lse


def dense_windows(qkv: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """`dense` for equal windows: qkv [num_windows, seqlen, 3, num_heads, head_dim], no masked matrix."""
    q, k, v = (
        qkv.to(compute_dtype(qkv.dtype)).transpose(1, 3).unbind(2)
    )  # each [num_windows, num_heads, seqlen, head_dim]
    scores = q @ k.transpose(2, 3) * softmax_scale
    out = (scores.softmax(-1) @ v).transpose(1, 2).to(qkv.dtype)
    return out, scores.logsumexp(-1).transpose(0, 1).flatten(1)


def _softmax_product(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """[batch, heads, rows, head_dim] -> out of the same shape, lse [batch, heads, rows]."""
    if q.device.type == "cpu":
        # The kernel behind F.scaled_dot_product_attention, which alone hands out the logsumexp.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=softmax_scale)
        # With few keys it takes a row of NaN scores for a masked one and returns out = 0, lse = 0.
        if not bool((lse == 0).any()):
            return out, lse
    scores = torch.matmul(q, k.transpose(2, 3)).mul_(softmax_scale)
    return torch.matmul(scores.softmax(-1), v), scores.logsumexp(-1)


def _softmax_product_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """All [batch, rows, head_dim], but dlse [batch, rows, 1], in the compute dtype."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    step = max(1, MAX_SCORES[q.device.type] // (q.shape[1] * k.shape[1]))
    for lo in range(0, q.shape[0], step):
        part = slice(lo, lo + step)
        p = torch.bmm(q[part], k[part].transpose(1, 2)).mul_(softmax_scale)
        torch.softmax(p, -1, out=p)
        torch.bmm(p.transpose(1, 2), dout[part], out=dv[part])
        ds = torch.bmm(dout[part], v[part].transpose(1, 2)).mul_(p)
        delta = ds.sum(-1, keepdim=True)
        if dlse is not None:
            delta -= dlse[part]
        ds.addcmul_(p, delta, value=-1).mul_(softmax_scale)
        torch.bmm(ds, k[part], out=dq[part])
        torch.bmm(ds.transpose(1, 2), q[part], out=dk[part])
    return dq, dk, dv


def _put(target: Tensor, rows: Tensor, start: int, index: Tensor | None) -> None:
    """Write `rows` into the rows of `target` that a group stands for."""
    if index is None:
        target[start : start + rows.shape[0]] = rows
    else:
        target.index_copy_(0, index, rows.to(target.dtype))


def _queries(x: Tensor, group: Group, num_kv_heads: int) -> Tensor:
    """Packed rows [total, heads, width] -> [segments, num_kv_heads, len_q * heads per key head, width]."""
    num_rows = group.num_segments * group.len_q
    if group.rows_q is None:
        x = x[group.start_q : group.start_q + num_rows]
    else:
        x = x.index_select(0, group.rows_q)
        if group.slots_q is not None:
            # Zero rows: with dout = 0 and delta = 0 they add exactly nothing to dk and dv.
            x = x.new_zeros((num_rows, *x.shape[1:])).index_copy_(0, group.slots_q, x)
    x = x.unflatten(0, (group.num_segments, group.len_q))
    if x.shape[2] == num_kv_heads:
        return x.transpose(1, 2)
    x = x.unflatten(2, (num_kv_heads, -1)).transpose(
        1, 2
    )  # [segments, num_kv_heads, len_q, heads per key head, width]
    return x.flatten(2, 3)


def _keys(x: Tensor, group: Group) -> Tensor:
    """Packed rows [total, num_kv_heads, head_dim] -> [segments, num_kv_heads, len_k, head_dim]."""
    if group.rows_k is None:
        x = x[group.start_k : group.start_k + group.num_segments * group.len_k]
    else:
        x = x.index_select(0, group.rows_k)
    return x.unflatten(0, (group.num_segments, group.len_k)).transpose(1, 2)


def _unfold_queries(x: Tensor, group: Group, num_heads: int) -> Tensor:
    """The inverse of `_queries` without the padding: -> [rows, num_heads, width]."""
    num_kv_heads = x.shape[1]
    x = x.unflatten(2, (group.len_q, num_heads // num_kv_heads)).transpose(1, 2)
    x = x.flatten(2, 3).flatten(0, 1)
    return x if group.slots_q is None else x.index_select(0, group.slots_q)

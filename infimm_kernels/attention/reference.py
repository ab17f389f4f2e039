"""Attention within segments, stated in eager PyTorch: the oracle of the kernels and the path of CPU tensors.

For segment s with queries q, keys k and values v of one head:

    scores = softmax_scale * q k^T
    p = softmax(scores, keys)
    lse = logsumexp(scores, keys)
    out = p v                                    a segment without keys: out = 0, lse = -inf

and for the gradients dout and dlse of the two results:

    dv = p^T dout
    dp = dout v^T
    ds = p * (dp - sum(p * dp, keys)) + p * dlse
    dq = softmax_scale * ds k,   dk = softmax_scale * ds^T q

sum(p * dp, keys) equals sum(dout * out, head_dim), and p equals exp(scores - lse). Taking either from saved
results costs a float32 gradient a factor of two to three in accuracy and saves no time here, so the inputs
alone are saved.
Matrices are multiplied in ``torch.promote_types(dtype, torch.float32)``, or in bfloat16 where the CPU has
instructions for it: several times as fast, with the roundings that eager bfloat16 makes too. `dense` writes
the same with one masked matrix of scores: slow, but made of differentiable operations alone, for the
transforms that a registered op does not serve.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from infimm_kernels.attention.plan import Group, Plan
from infimm_kernels.autodiff import compute_dtype

# Bytes that the backward of one block touches, per thread on a CPU: few enough for its caches, many enough
# that the calls cost little and fill a GPU.
MAX_BLOCK_BYTES = {"cpu": 6 << 20, "cuda": 1 << 30}
# Segments with fewer scores than this are copied next to each other to share a block.
SHORT_SEGMENT = 1 << 14
# With fewer keys the fused CPU kernel can miss a NaN (64 numbers fill the widest vector register there is),
# and products in bfloat16 gain nothing while their errors in so few scores do not average out.
FEW_KEYS = 64
# Below this many scores of a head, converting to float32 is quicker than the more numerous calls of bfloat16.
FEW_SCORES = 1 << 12


def forward(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, plan: Plan) -> tuple[Tensor, Tensor]:
    """q [total_q, num_heads, head_dim], k v [total_k, num_kv_heads, head_dim] -> out, lse [heads, total]."""
    total_q, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if not plan.is_one_view:
        out = q.new_empty((total_q, num_heads, head_dim))
        lse = q.new_empty((num_heads, total_q), dtype=compute_dtype(q.dtype))
        if not plan.covers_queries:
            out.zero_()
            lse.fill_(-torch.inf)
    for group in plan.groups:
        qg, kg, vg = _queries(q, group, num_kv_heads), _keys(k, group), _keys(v, group)
        dtype = _product_dtype(q, group)
        if dtype != q.dtype:
            qg, kg, vg = qg.to(dtype), kg.to(dtype), vg.to(dtype)
        out_g, lse_g = _attend(qg, kg, vg, softmax_scale)
        out_g = _unfold_queries(out_g, group, num_heads)  # [rows, num_heads, head_dim]
        lse_g = _unfold_queries(lse_g, group, num_heads)  # [rows, num_heads]
        if plan.is_one_view:
            return out_g.to(q.dtype).contiguous(), lse_g.t().contiguous()
        _put(out, out_g, group.start_q, group.rows_q)
        _put(lse.t(), lse_g, group.start_q, group.rows_q)
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
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    if not plan.covers_queries:
        dq.zero_()
    if not plan.covers_keys:
        dk.zero_()
        dv.zero_()
    if dout is None:
        dout = torch.zeros_like(q)
    for group in plan.groups:
        # All [segments, num_kv_heads, rows, width]; a gradient is written in place where a view reaches it.
        qg, dog = (_queries(x, group, num_kv_heads) for x in (q, dout))
        kg, vg = (_keys(x, group) for x in (k, v))
        dlse_g = None if dlse is None else _queries(dlse.t().unsqueeze(-1), group, num_kv_heads)
        in_place_q = group.rows_q is None and num_heads == num_kv_heads
        in_place_k = group.rows_k is None
        dqg = _queries(dq, group, num_kv_heads) if in_place_q else torch.empty_like(qg)
        dkg, dvg = (
            _keys(grad, group) if in_place_k else torch.empty_like(x) for grad, x in ((dk, kg), (dv, vg))
        )
        work: dict[str, Tensor] = {}
        # With bfloat16 products the terms of dlse would miss the error rule.
        dtype = compute_dtype(q.dtype) if dlse is not None else _product_dtype(q, group)
        for block in _blocks(qg, kg, dtype):
            inputs = (x if x is None else _matrices(x, block, dtype) for x in (dog, dlse_g, qg, kg, vg))
            grads = _attend_backward(*inputs, softmax_scale, work)
            for target, grad in zip((dqg, dkg, dvg), grads, strict=True):
                _put_matrices(target, block, grad)
        if not in_place_q:
            _put(dq, _unfold_queries(dqg, group, num_heads), group.start_q, group.rows_q)
        if not in_place_k:
            for target, grad in ((dk, dkg), (dv, dvg)):
                _put(target, grad.transpose(1, 2).flatten(0, 1), group.start_k, group.rows_k)


def dense(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """The same function from differentiable operations alone; memory grows with total_q * total_k."""
    segment_q = segments_of(cu_seqlens_q, q)
    return dense_where(q, k, v, segment_q[:, None] == segments_of(cu_seqlens_k, k)[None, :], softmax_scale)


def segments_of(cu_seqlens: Tensor, rows: Tensor) -> Tensor:
    """cu_seqlens [num_segments + 1] -> [len(rows)], the index of each row's segment plus one."""
    index = torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32)
    return torch.searchsorted(cu_seqlens, index, right=True)


def dense_where(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float):
    """`dense` with visible [total_q, total_k], True where a query sees a key."""
    dtype = compute_dtype(q.dtype)
    groups = q.shape[1] // k.shape[1]
    qc, kc, vc = (x.to(dtype).transpose(0, 1) for x in (q, k, v))  # [heads, tokens, head_dim]
    kc, vc = (x.repeat_interleave(groups, 0) for x in (kc, vc))
    keyless = ~visible.any(1)  # [total_q]
    # A keyless row is let through, so that no softmax of an empty set puts a NaN into a gradient, and then
    # zeroed.
    scores = (qc @ kc.transpose(1, 2) * softmax_scale).masked_fill(~visible & ~keyless[:, None], -torch.inf)
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


@functools.cache
def native_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16."""
    return torch.cpu._is_avx512_bf16_supported()


def _product_dtype(x: Tensor, group: Group) -> torch.dtype:
    """The dtype of the matrices that are multiplied for inputs like x."""
    enough = group.len_k >= FEW_KEYS and group.len_q * group.len_k >= FEW_SCORES
    if enough and x.dtype == torch.bfloat16 and x.device.type == "cpu" and native_bfloat16():
        return x.dtype
    return compute_dtype(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """[segments, heads, rows, head_dim] -> out of the same shape, lse [segments, heads, rows]."""
    if q.device.type == "cpu" and q.dtype != torch.bfloat16:
        # The kernel behind F.scaled_dot_product_attention, which alone hands out the logsumexp.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=softmax_scale)
        # With few keys it takes a row of NaN scores for a masked one and returns out = 0, lse = 0.
        if k.shape[2] >= FEW_KEYS or bool(lse.all()):
            return out, lse
    num_segments, num_heads, rows, head_dim = q.shape
    out = q.new_empty((num_segments, rows, num_heads, head_dim)).transpose(1, 2)
    lse = q.new_empty((num_heads, num_segments, rows), dtype=compute_dtype(q.dtype)).transpose(0, 1)
    work: dict[str, Tensor] = {}
    for block in _blocks(q, k, q.dtype):
        qb, kb, vb = (_matrices(x, block, q.dtype) for x in (q, k, v))
        scores = _bmm(qb, kb.transpose(1, 2), work, "scores").mul_(softmax_scale)
        largest = scores.amax(-1)
        p = torch.softmax(scores, -1, dtype=lse.dtype)
        _put_matrices(out, block, torch.bmm(scores.copy_(p), vb))
        # The largest p is exp(0) over the sum of exp(scores - largest).
        _put_matrices(lse, block, largest - p.amax(-1).log_())
    return out, lse


def _attend_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, work: dict
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, which live in `work`; all [batch, rows, head_dim], but dlse [batch, rows, 1]."""
    # Scaled as eager does, not by a gemm's alpha: errors stay like eager's, and alpha = 0 would lose a NaN.
    p = _bmm(q, k.transpose(1, 2), work, "p").mul_(softmax_scale)  # [batch, rows, len_k]
    torch.softmax(p, -1, out=p)
    dv = _bmm(p.transpose(1, 2), dout, work, "dv")
    ds = _bmm(dout, v.transpose(1, 2), work, "ds")
    # p * (ds - sum(p * ds)) in one pass
    torch.ops.aten._softmax_backward_data.out(ds, p, -1, ds.dtype, grad_input=ds)
    if dlse is not None:
        ds.addcmul_(p, dlse)
    ds.mul_(softmax_scale)
    return _bmm(ds, k, work, "dq"), _bmm(ds.transpose(1, 2), q, work, "dk"), dv


def _bmm(a: Tensor, b: Tensor, work: dict[str, Tensor], name: str) -> Tensor:
    """a @ b in a tensor that equal blocks share, since new memory is in no cache."""
    shape = (a.shape[0], a.shape[1], b.shape[2])
    if name not in work or work[name].shape != shape:
        work[name] = a.new_empty(shape)
    return torch.bmm(a, b, out=work[name])


def _blocks(q: Tensor, k: Tensor, dtype: torch.dtype) -> Iterator[tuple]:
    """Indices of (segments, heads), equal parts within MAX_BLOCK_BYTES, or twice that, or of one matrix."""
    num_segments, num_heads, rows, width = q.shape
    len_k = k.shape[2]
    on_cpu = q.device.type == "cpu"
    threads = torch.get_num_threads() if on_cpu else 1
    # p and ds; q, dout, dq; k, v, dk, dv
    numbers = 2 * rows * len_k + 3 * rows * width + 4 * len_k * width
    budget = MAX_BLOCK_BYTES[q.device.type]
    most = budget * threads // (numbers * dtype.itemsize)
    # A matrix for each thread, even a somewhat large one: threads that share a matrix wait for each other.
    if most > threads or numbers * dtype.itemsize <= 2 * budget:
        most = max(1, most // threads) * threads
    most = max(1, most)
    # Several heads of several segments are no view of three dimensions, so a copy must pay: where the calls
    # cost more than it, and where products in a short dtype copy anyway.
    joined = not on_cpu or num_heads == 1 or q.element_size() < 4 or num_heads * rows * len_k < SHORT_SEGMENT
    segments = _equal_part(num_segments, max(1, most // num_heads)) if joined else 1
    heads = _equal_part(num_heads, most)
    for segment in range(0, num_segments, segments):
        for head in range(0, num_heads, heads):
            yield (
                segment if segments == 1 else slice(segment, segment + segments),
                head if heads == 1 and segments > 1 else slice(head, head + heads),
            )


def _equal_part(total: int, most: int) -> int:
    """The size of the parts when `total` is cut into the fewest equal parts of at most `most`."""
    return -(-total // -(-total // most))


def _matrices(x: Tensor, block: tuple, dtype: torch.dtype) -> Tensor:
    """That block of [segments, heads, rows, width] as [matrices, rows, width]."""
    x = x[block]
    if x.dim() == 4:
        x = x.flatten(0, 1)
    if x.dtype != dtype:
        return x.to(dtype)
    # An expanded gradient would be multiplied one matrix at a time.
    return x if x.stride(2) == 1 and x.stride(1) >= x.shape[2] else x.contiguous()


def _put_matrices(target: Tensor, block: tuple, matrices: Tensor) -> None:
    """The inverse of `_matrices`, with or without the width."""
    target = target[block]
    target.copy_(matrices.view(target.shape))


def _put(target: Tensor, rows: Tensor, start: int, index: Tensor | None) -> None:
    """Write `rows` into the rows of `target` that a group stands for."""
    if index is None:
        target[start : start + rows.shape[0]] = rows
    else:
        target.index_copy_(0, index, rows.to(target.dtype))


def _queries(x: Tensor, group: Group, num_kv_heads: int) -> Tensor:
    """Packed rows [total, heads, width] -> [segments, num_kv_heads, len_q * heads per key head, width]."""
    num_rows = group.num_segments * group.len_q
    if group.rows_q is not None:
        x = x.index_select(0, group.rows_q)
        if group.slots_q is not None:
            # Zero rows: with dout = 0 and delta = 0 they add exactly nothing to dk and dv.
            x = x.new_zeros((num_rows, *x.shape[1:])).index_copy_(0, group.slots_q, x)
    elif num_rows != x.shape[0]:
        x = x[group.start_q : group.start_q + num_rows]
    _, num_heads, width = x.shape
    if num_heads == num_kv_heads:
        return x.view(group.num_segments, group.len_q, num_heads, width).transpose(1, 2)
    x = x.view(group.num_segments, group.len_q, num_kv_heads, num_heads // num_kv_heads, width)
    return x.transpose(1, 2).flatten(2, 3)


def _keys(x: Tensor, group: Group) -> Tensor:
    """Packed rows [total, num_kv_heads, head_dim] -> [segments, num_kv_heads, len_k, head_dim]."""
    num_rows = group.num_segments * group.len_k
    if group.rows_k is not None:
        x = x.index_select(0, group.rows_k)
    elif num_rows != x.shape[0]:
        x = x[group.start_k : group.start_k + num_rows]
    return x.view(group.num_segments, group.len_k, *x.shape[1:]).transpose(1, 2)


def _unfold_queries(x: Tensor, group: Group, num_heads: int) -> Tensor:
    """[segments, num_kv_heads, len_q * heads per key head, ...] -> [rows, num_heads, ...] without padding."""
    num_kv_heads = x.shape[1]
    if num_heads != num_kv_heads:
        x = x.unflatten(2, (group.len_q, num_heads // num_kv_heads)).transpose(1, 2).flatten(2, 3)
    else:
        x = x.transpose(1, 2)  # [segments, len_q, num_heads, ...]
    x = x.flatten(0, 1)
    return x if group.slots_q is None else x.index_select(0, group.slots_q)

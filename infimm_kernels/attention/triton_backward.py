"""Triton backward of attention inside segments: five products for a pair of tiles, as in FlashAttention-2.

With p = exp(softmax_scale q k^T - lse) and delta = rowsum(out * dout) - dlse

    dv = p^T dout,   ds = p * (dout v^T - delta),   dk = softmax_scale ds^T q,   dq = softmax_scale ds k

Three launches:

    prepare  per tile of queries: delta; dq starts with the share of the prefix keys, whose own dk and dv are
             summed per tile: q, out and dout are at hand
    main     per tile of keys behind the prefix: dk, dv, and atomic float32 additions to dq; the prefix
             queries come first, one as vector work, several as one small tile
    finish   dq to the dtype of q; the prefix keys' dk and dv from their sums

In deterministic mode the main kernel leaves dq out, and a kernel per tile of queries computes it: seven
products instead of five, and the same bits in every run. Each key head sums over its query heads in order.
`prepare` and `finish` are in triton_backward_sums.py.
"""

import triton
import triton.language as tl

from infimm_kernels.attention.triton_tiles import (
    LOG2_E,
    add_outer,
    atomic_add_product,
    atomic_add_vector,
    dot_channels,
    dot_rows,
    dot_vector,
    load_rows,
    load_vector,
    probabilities,
    scale_rows,
    store_rows,
    sum_rows,
    tile_of,
    zero_rows,
)


@triton.jit
def _add_queries(
    k, v, gradients, pointers, strides, rows, num_rows, key_mask, scale,
    MASKED: tl.constexpr, EVEN_K: tl.constexpr, WITH_DQ: tl.constexpr, FUSED_SCALE: tl.constexpr,
    PIECES: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """gradients (dk, dv) with one tile of queries added, the first num_rows of it where it is MASKED.

    pointers: to q, dout, lse, delta and dq_sum of its first row; strides: of q, dout and dq_sum. Everything
    is transposed: scores [keys, queries].
    """
    q_ptr, dout_ptr, lse_ptr, delta_ptr, dq_sum_ptr = pointers
    stride_q, stride_dout, stride_sum = strides
    dk, dv = gradients
    row_mask = rows < num_rows
    inside = tl.minimum(rows, num_rows - 1) if MASKED else rows
    q = load_rows(q_ptr, inside, stride_q, PIECES, HEAD_DIM)
    dout = load_rows(dout_ptr, inside, stride_dout, PIECES, HEAD_DIM)
    lse = tl.load(lse_ptr + inside)
    delta = tl.load(delta_ptr + inside)
    p = probabilities(dot_channels(k, q), lse[None, :], scale, FUSED_SCALE)
    if MASKED:
        p = tl.where(row_mask[None, :], p, 0.0)
    dv = dot_rows(p.to(k[0].dtype), dout, dv)
    ds = p * (dot_channels(v, dout) - delta[None, :])
    if MASKED:
        ds = tl.where(row_mask[None, :], ds, 0.0)
    if WITH_DQ and not EVEN_K:
        ds = tl.where(key_mask[:, None], ds, 0.0)  # keys past the end repeat the last one
    ds = ds.to(k[0].dtype)
    dk = dot_rows(ds, q, dk)
    if WITH_DQ:
        atomic_add_product(dq_sum_ptr, tl.trans(ds), k, rows, stride_sum, row_mask, MASKED, PIECES, HEAD_DIM)
    return dk, dv


@triton.jit
def _add_one_query(
    k, v, gradients, pointers, key_mask, scale,
    WITH_DQ: tl.constexpr, FUSED_SCALE: tl.constexpr, PIECES: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The same for one query in vector work."""
    q_ptr, dout_ptr, lse_ptr, delta_ptr, dq_sum_ptr = pointers
    dk, dv = gradients
    q = load_vector(q_ptr, PIECES, HEAD_DIM)
    dout = load_vector(dout_ptr, PIECES, HEAD_DIM)
    p = probabilities(dot_vector(k, q), tl.load(lse_ptr), scale, FUSED_SCALE)
    ds = p * (dot_vector(v, dout) - tl.load(delta_ptr))
    if WITH_DQ:
        atomic_add_vector(dq_sum_ptr, sum_rows(tl.where(key_mask, ds, 0.0), k), PIECES, HEAD_DIM)
    return add_outer(dk, ds, q), add_outer(dv, p, dout)


@triton.jit
def _advance(pointers, strides, num_rows, WITH_DQ: tl.constexpr):
    q_ptr, dout_ptr, lse_ptr, delta_ptr, dq_sum_ptr = pointers
    stride_q, stride_dout, stride_sum = strides
    if WITH_DQ:
        dq_sum_ptr = dq_sum_ptr + num_rows * stride_sum
    return (
        q_ptr + num_rows * stride_q,
        dout_ptr + num_rows * stride_dout,
        lse_ptr + num_rows,
        delta_ptr + num_rows,
        dq_sum_ptr,
    )


@triton.jit(do_not_specialize=["total_q", "total_k", "num_segments", "seqlen", "num_tiles"])
def attention_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_sum_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    query_ranges_ptr,
    stride_q_head,
    stride_k_head,
    stride_v_head,
    stride_dout_head,
    stride_dk_token,
    stride_dk_head,
    stride_dv_token,
    stride_dv_head,
    total_q,
    total_k,
    num_segments,
    seqlen,
    num_tiles,
    softmax_scale,
    NUM_HEADS: tl.constexpr,
    HEADS_PER_KV_HEAD: tl.constexpr,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    STRIDE_DOUT: tl.constexpr,
    NUM_PREFIX: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    FUSED_SCALE: tl.constexpr,
    WITH_DQ: tl.constexpr,
):
    """One tile of keys behind the prefix, all queries of its segment, all query heads of its key head."""
    tile, start_k, len_k, start_q, len_q = tile_of(
        cu_seqlens_k_ptr, cu_seqlens_q_ptr, query_ranges_ptr, total_k, total_q, num_segments, seqlen,
        num_tiles, BLOCK_N,
    )  # fmt: skip
    kv_head = tl.program_id(1).to(tl.int64)
    prefix_q = NUM_PREFIX if EVEN_Q else tl.minimum(NUM_PREFIX, len_q)
    prefix_k = NUM_PREFIX if EVEN_K else tl.minimum(NUM_PREFIX, len_k)
    first_key = tile * BLOCK_N
    num_keys = len_k - prefix_k - first_key
    if tile < 0 or num_keys <= 0:
        return
    scale = softmax_scale * LOG2_E if FUSED_SCALE else softmax_scale
    base_k = (start_k + prefix_k + first_key).to(tl.int64)
    keys = tl.arange(0, BLOCK_N)
    key_mask = keys < num_keys
    inside = keys if EVEN_K else tl.minimum(keys, num_keys - 1)
    k_ptr += kv_head * stride_k_head + base_k * STRIDE_K
    v_ptr += kv_head * stride_v_head + base_k * STRIDE_V
    k = load_rows(k_ptr, inside, STRIDE_K, PIECES, HEAD_DIM)
    v = load_rows(v_ptr, inside, STRIDE_V, PIECES, HEAD_DIM)
    gradients = (zero_rows(BLOCK_N, PIECES), zero_rows(BLOCK_N, PIECES))
    STRIDE_SUM: tl.constexpr = NUM_HEADS * HEAD_DIM
    strides = (STRIDE_Q, STRIDE_DOUT, STRIDE_SUM)
    base_q = start_q.to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    for group in range(HEADS_PER_KV_HEAD):
        head = kv_head * HEADS_PER_KV_HEAD + group
        pointers = (
            q_ptr + head * stride_q_head + base_q * STRIDE_Q,
            dout_ptr + head * stride_dout_head + base_q * STRIDE_DOUT,
            lse_ptr + head * total_q + base_q,
            delta_ptr + head * total_q + base_q,
            # Without dq something that is not None, which Triton 3.6 does not take in a tuple.
            dq_sum_ptr + base_q * STRIDE_SUM + head * HEAD_DIM if WITH_DQ else delta_ptr,
        )
        if NUM_PREFIX > 0:
            if prefix_q > 0:
                if NUM_PREFIX == 1:
                    gradients = _add_one_query(
                        k, v, gradients, pointers, key_mask, scale, WITH_DQ, FUSED_SCALE, PIECES, HEAD_DIM
                    )
                else:
                    gradients = _add_queries(
                        k, v, gradients, pointers, strides, tl.arange(0, 16), prefix_q, key_mask, scale,
                        True, EVEN_K, WITH_DQ, FUSED_SCALE, PIECES, HEAD_DIM,
                    )  # fmt: skip
        pointers = _advance(pointers, strides, tl.cast(prefix_q, tl.int64), WITH_DQ)
        num_rows = len_q - prefix_q
        num_full = num_rows if EVEN_Q else num_rows // BLOCK_M * BLOCK_M
        if not EVEN_Q:
            if num_full < num_rows:
                # Before the whole tiles: nothing has to be kept in registers for it during their loop.
                last = _advance(pointers, strides, tl.cast(num_full, tl.int64), WITH_DQ)
                gradients = _add_queries(
                    k, v, gradients, last, strides, rows, num_rows - num_full, key_mask, scale,
                    True, EVEN_K, WITH_DQ, FUSED_SCALE, PIECES, HEAD_DIM,
                )  # fmt: skip
        # Running pointers: addresses made from the loop's variable would tie all products of the loop
        # together, and Triton would lay out dq, whose tile is of another shape, like the rest.
        for _ in range(0, num_full, BLOCK_M):
            gradients = _add_queries(
                k, v, gradients, pointers, strides, rows, BLOCK_M, key_mask, scale,
                False, EVEN_K, WITH_DQ, FUSED_SCALE, PIECES, HEAD_DIM,
            )  # fmt: skip
            pointers = _advance(pointers, strides, BLOCK_M, WITH_DQ)
    dk, dv = gradients
    dk_ptr += kv_head * stride_dk_head + base_k * stride_dk_token
    dv_ptr += kv_head * stride_dv_head + base_k * stride_dv_token
    store_rows(dk_ptr, scale_rows(dk, softmax_scale), keys, stride_dk_token, key_mask, PIECES, HEAD_DIM)
    store_rows(dv_ptr, dv, keys, stride_dv_token, key_mask, PIECES, HEAD_DIM)


@triton.jit
def _add_keys(
    q, dout, lse, delta, dq, k_ptr, v_ptr, stride_k, stride_v, columns, num_columns, scale,
    MASKED: tl.constexpr, FUSED_SCALE: tl.constexpr, PIECES: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """dq with one tile of keys added."""
    inside = tl.minimum(columns, num_columns - 1) if MASKED else columns
    k = load_rows(k_ptr, inside, stride_k, PIECES, HEAD_DIM)
    v = load_rows(v_ptr, inside, stride_v, PIECES, HEAD_DIM)
    p = probabilities(dot_channels(q, k), lse[:, None], scale, FUSED_SCALE)
    ds = p * (dot_channels(dout, v) - delta[:, None])
    if MASKED:
        ds = tl.where((columns < num_columns)[None, :], ds, 0.0)
    return dot_rows(ds.to(k[0].dtype), k, dq)


@triton.jit(do_not_specialize=["total_q", "total_k", "num_segments", "seqlen", "num_tiles"])
def attention_backward_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_sum_ptr,
    dq_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    key_ranges_ptr,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_dout_token,
    stride_dout_head,
    stride_dq_token,
    stride_dq_head,
    total_q,
    total_k,
    num_segments,
    seqlen,
    num_tiles,
    softmax_scale,
    HEADS_PER_KV_HEAD: tl.constexpr,
    NUM_PREFIX: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    FUSED_SCALE: tl.constexpr,
):
    """Deterministic dq: one tile of the queries of a segment, prefix included, over the keys behind the
    prefix. The prefix keys' share is in dq_sum, None without a prefix."""
    tile, start_q, len_q, start_k, len_k = tile_of(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, key_ranges_ptr, total_q, total_k, num_segments, seqlen, num_tiles,
        BLOCK_M,
    )  # fmt: skip
    num_heads = tl.num_programs(1)
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // HEADS_PER_KV_HEAD
    first = tile * BLOCK_M
    num_rows = len_q - first
    if tile < 0 or num_rows <= 0:
        return
    scale = softmax_scale * LOG2_E if FUSED_SCALE else softmax_scale
    base = (start_q + first).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    inside = tl.minimum(rows, num_rows - 1)
    q_ptr += head * stride_q_head + base * stride_q_token
    dout_ptr += head * stride_dout_head + base * stride_dout_token
    q = load_rows(q_ptr, inside, stride_q_token, PIECES, HEAD_DIM)
    dout = load_rows(dout_ptr, inside, stride_dout_token, PIECES, HEAD_DIM)
    lse = tl.load(lse_ptr + head * total_q + base + inside)
    delta = tl.load(delta_ptr + head * total_q + base + inside)
    if dq_sum_ptr is not None:
        stride_sum = num_heads * HEAD_DIM
        dq_sum_ptr += base * stride_sum + head * HEAD_DIM
        dq = load_rows(dq_sum_ptr, inside, stride_sum, PIECES, HEAD_DIM)
    else:
        dq = zero_rows(BLOCK_M, PIECES)
    prefix_k = tl.minimum(NUM_PREFIX, len_k)
    base_k = (start_k + prefix_k).to(tl.int64)
    k_ptr += kv_head * stride_k_head + base_k * stride_k_token
    v_ptr += kv_head * stride_v_head + base_k * stride_v_token
    num_keys = len_k - prefix_k
    columns = tl.arange(0, BLOCK_N)
    num_full = num_keys if EVEN_K else num_keys // BLOCK_N * BLOCK_N
    for first_key in range(0, num_full, BLOCK_N):
        at = tl.cast(first_key, tl.int64)
        dq = _add_keys(
            q, dout, lse, delta, dq, k_ptr + at * stride_k_token, v_ptr + at * stride_v_token,
            stride_k_token, stride_v_token, columns, BLOCK_N, scale, False, FUSED_SCALE, PIECES, HEAD_DIM,
        )  # fmt: skip
    if not EVEN_K:
        left = num_keys - num_full
        if left > 0:
            at = tl.cast(num_full, tl.int64)
            dq = _add_keys(
                q, dout, lse, delta, dq, k_ptr + at * stride_k_token, v_ptr + at * stride_v_token,
                stride_k_token, stride_v_token, columns, left, scale, True, FUSED_SCALE, PIECES, HEAD_DIM,
            )  # fmt: skip
    dq_ptr += head * stride_dq_head + base * stride_dq_token
    store_rows(dq_ptr, scale_rows(dq, softmax_scale), rows, stride_dq_token, row_mask, PIECES, HEAD_DIM)

"""What comes before and after the main kernel of the attention backward, `prepare` and `finish` of
triton_backward.py. Both are bound by memory, and deterministic."""

import triton
import triton.language as tl

from infimm_kernels.attention.triton_tiles import (
    LOG2_E,
    add_outer,
    add_rows,
    dot_vector,
    load_rows,
    load_vector,
    probabilities,
    scale_rows,
    store_rows,
    store_vector,
    sum_rows,
    tile_of,
    zero_rows,
)


@triton.jit(do_not_specialize=["total_q", "total_k", "num_segments", "seqlen", "num_tiles"])
def attention_backward_prepare_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    dq_sum_ptr,
    prefix_sum_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_dout_token,
    stride_dout_head,
    stride_out_token,
    stride_out_head,
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
    FUSED_SCALE: tl.constexpr,
):
    """One tile of the queries of a segment, prefix included.

    dq_sum: float32 [total_q, heads, HEAD_DIM], None where nothing is to be added up; prefix_sum: float32
    [slots, heads, NUM_PREFIX, 2, HEAD_DIM], this tile's share of dk and dv of the prefix keys.
    """
    tile, start_q, len_q, start_k, len_k = tile_of(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, None, total_q, total_k, num_segments, seqlen, num_tiles, BLOCK_M
    )
    num_heads = tl.num_programs(1)
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // HEADS_PER_KV_HEAD
    first = tile * BLOCK_M
    num_rows = len_q - first
    if tile < 0 or num_rows <= 0:
        return
    base = (start_q + first).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    inside = tl.minimum(rows, num_rows - 1)
    out_ptr += head * stride_out_head + base * stride_out_token
    dout_ptr += head * stride_dout_head + base * stride_dout_token
    dout = load_rows(dout_ptr, inside, stride_dout_token, PIECES, HEAD_DIM)
    out = load_rows(out_ptr, inside, stride_out_token, PIECES, HEAD_DIM)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(len(PIECES)):
        delta += tl.sum(out[i].to(tl.float32) * dout[i].to(tl.float32), 1)
    row_ptr = head * total_q + base
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row_ptr + inside)
    tl.store(delta_ptr + row_ptr + rows, delta, mask=row_mask)
    if dq_sum_ptr is not None:
        dq = zero_rows(BLOCK_M, PIECES)
        if NUM_PREFIX > 0:
            scale = softmax_scale * LOG2_E if FUSED_SCALE else softmax_scale
            q_ptr += head * stride_q_head + base * stride_q_token
            q = load_rows(q_ptr, inside, stride_q_token, PIECES, HEAD_DIM)
            lse = tl.load(lse_ptr + row_ptr + inside)
            k_ptr += kv_head * stride_k_head + start_k.to(tl.int64) * stride_k_token
            v_ptr += kv_head * stride_v_head + start_k.to(tl.int64) * stride_v_token
            prefix_sum_ptr += (tl.program_id(0).to(tl.int64) * num_heads + head) * (NUM_PREFIX * 2 * HEAD_DIM)
            for j in range(NUM_PREFIX):
                if j < len_k:
                    k = load_vector(k_ptr + j * stride_k_token, PIECES, HEAD_DIM)
                    v = load_vector(v_ptr + j * stride_v_token, PIECES, HEAD_DIM)
                    p = tl.where(row_mask, probabilities(dot_vector(q, k), lse, scale, FUSED_SCALE), 0.0)
                    ds = tl.where(row_mask, p * (dot_vector(dout, v) - delta), 0.0)
                    dq = add_outer(dq, ds, k)
                    dk_ptr = prefix_sum_ptr + j * (2 * HEAD_DIM)
                    store_vector(dk_ptr, sum_rows(ds, q), PIECES, HEAD_DIM)
                    store_vector(dk_ptr + HEAD_DIM, sum_rows(p, dout), PIECES, HEAD_DIM)
        stride_sum = num_heads * HEAD_DIM
        dq_sum_ptr += base * stride_sum + head * HEAD_DIM
        store_rows(dq_sum_ptr, dq, rows, stride_sum, row_mask, PIECES, HEAD_DIM)


@triton.jit(do_not_specialize=["total_q", "total_k", "num_segments", "seqlen", "num_tiles"])
def attention_backward_finish_kernel(
    dq_sum_ptr,
    prefix_sum_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_dq_token,
    stride_dq_head,
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
    HEADS_PER_KV_HEAD: tl.constexpr,
    NUM_PREFIX: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WITH_DQ: tl.constexpr,
):
    """The tiles of `prepare`; the program of a segment's first one also sums dk and dv of its prefix keys."""
    tile, start_q, len_q, start_k, len_k = tile_of(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, None, total_q, total_k, num_segments, seqlen, num_tiles, BLOCK_M
    )
    if tile < 0:
        return
    num_heads = tl.num_programs(1)
    head = tl.program_id(1).to(tl.int64)
    if NUM_PREFIX > 0:
        if tile == 0 and head % HEADS_PER_KV_HEAD == 0:
            kv_head = head // HEADS_PER_KV_HEAD
            dk_ptr += kv_head * stride_dk_head + start_k.to(tl.int64) * stride_dk_token
            dv_ptr += kv_head * stride_dv_head + start_k.to(tl.int64) * stride_dv_token
            ROW: tl.constexpr = NUM_PREFIX * 2 * HEAD_DIM
            prefix_sum_ptr += (tl.program_id(0).to(tl.int64) * num_heads + head) * ROW
            for j in range(NUM_PREFIX):
                if j < len_k:
                    dk = zero_rows(1, PIECES)
                    dv = zero_rows(1, PIECES)
                    for t in range(0, tl.cdiv(len_q, BLOCK_M)):
                        for group in range(HEADS_PER_KV_HEAD):
                            row = tl.cast(t, tl.int64) * num_heads + group
                            sum_ptr = prefix_sum_ptr + row * ROW + j * (2 * HEAD_DIM)
                            dk = add_rows(dk, load_vector(sum_ptr, PIECES, HEAD_DIM))
                            dv = add_rows(dv, load_vector(sum_ptr + HEAD_DIM, PIECES, HEAD_DIM))
                    at = tl.cast(j, tl.int64)
                    store_vector(
                        dk_ptr + at * stride_dk_token, scale_rows(dk, softmax_scale), PIECES, HEAD_DIM
                    )
                    store_vector(dv_ptr + at * stride_dv_token, dv, PIECES, HEAD_DIM)
    if WITH_DQ:
        first = tile * BLOCK_M
        num_rows = len_q - first
        if num_rows > 0:
            base = (start_q + first).to(tl.int64)
            rows = tl.arange(0, BLOCK_M)
            stride_sum = num_heads * HEAD_DIM
            dq_sum_ptr += base * stride_sum + head * HEAD_DIM
            inside = tl.minimum(rows, num_rows - 1)
            dq = scale_rows(load_rows(dq_sum_ptr, inside, stride_sum, PIECES, HEAD_DIM), softmax_scale)
            dq_ptr += head * stride_dq_head + base * stride_dq_token
            store_rows(dq_ptr, dq, rows, stride_dq_token, rows < num_rows, PIECES, HEAD_DIM)

"""Triton forward of attention inside segments, for packed q, k and v of any strides with a unit last one.

One program computes BLOCK_M queries of one head of one segment with the online softmax (Milakov and
Gimelshein 2018). The first NUM_PREFIX tokens of a segment (a CLS token) are peeled off, so that 1025 tokens
are eight tiles of 128 and not nine:

    as keys, they start the running softmax of every query: max = s, sum = 1, acc = v for one of them;
    as queries, they ride with the program of the first tile, which reads all keys and values anyway.

One prefix token is vector work in float32; more of them share small tiles on the tensor cores. A running
softmax is a tuple (acc, row_max, row_sum).
"""

import triton
import triton.language as tl

from infimm_kernels.attention.triton_tiles import (
    LN_2,
    LOG2_E,
    LOWEST,
    add_outer,
    dot_channels,
    dot_rows,
    dot_vector,
    load_rows,
    load_vector,
    power,
    scale_rows,
    scaled,
    scaled_later,
    store_rows,
    store_vector,
    tile_of,
    zero_rows,
)

# Rows in which the sum over values of one prefix query is kept: enough that each thread adds to its own.
FOLD: tl.constexpr = tl.constexpr(16)
# The prefix queries, when they are several, as the narrow side of an MMA.
FEW: tl.constexpr = tl.constexpr(8)


@triton.jit
def _softmax_step(q, k, v, state, scale, num_keys, MASKED: tl.constexpr, FUSED_SCALE: tl.constexpr):
    """A tile of keys, of which the first num_keys count where it is MASKED."""
    acc, row_max, row_sum = state
    scores = scaled(dot_channels(q, k), scale, FUSED_SCALE)
    if MASKED:
        scores = tl.where((tl.arange(0, scores.shape[1]) < num_keys)[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, scaled_later(tl.max(scores, 1), scale, FUSED_SCALE))
    p = power(scaled_later(scores, scale, FUSED_SCALE) - new_max[:, None], FUSED_SCALE)
    shrink = power(row_max - new_max, FUSED_SCALE)
    acc = dot_rows(p.to(v[0].dtype), v, scale_rows(acc, shrink[:, None]))
    return acc, new_max, row_sum * shrink + tl.sum(p, 1)


@triton.jit
def _softmax_step_of_one(q, k, v, state, scale, num_keys, MASKED: tl.constexpr, FUSED_SCALE: tl.constexpr):
    """The same for one query in vector work: acc [FOLD, width], row_max and row_sum numbers."""
    acc, row_max, row_sum = state
    scores = dot_vector(k, q) * scale
    if MASKED:
        scores = tl.where(tl.arange(0, scores.shape[0]) < num_keys, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 0))
    p = power(scores - new_max, FUSED_SCALE)
    shrink = power(row_max - new_max, FUSED_SCALE)
    total = ()
    for i in tl.static_range(len(v)):
        product = p[:, None] * v[i].to(tl.float32)
        folded = tl.reshape(product, [product.shape[0] // FOLD, FOLD, product.shape[1]])
        total += (acc[i] * shrink + tl.sum(folded, 0),)
    return total, new_max, row_sum * shrink + tl.sum(p, 0)


@triton.jit
def _softmax_step_of_few(q, k, v, state, scale, num_keys, MASKED: tl.constexpr, FUSED_SCALE: tl.constexpr):
    """The same for FEW queries, with everything transposed: scores [keys, FEW], acc [width, FEW]."""
    acc, row_max, row_sum = state
    scores = scaled(dot_channels(k, q), scale, FUSED_SCALE)
    if MASKED:
        scores = tl.where((tl.arange(0, scores.shape[0]) < num_keys)[:, None], scores, float("-inf"))
    new_max = tl.maximum(row_max, scaled_later(tl.max(scores, 0), scale, FUSED_SCALE))
    p = power(scaled_later(scores, scale, FUSED_SCALE) - new_max[None, :], FUSED_SCALE)
    shrink = power(row_max - new_max, FUSED_SCALE)
    half = p.to(v[0].dtype)
    total = ()
    for i in tl.static_range(len(v)):
        total += (tl.dot(tl.trans(v[i]), half, acc[i] * shrink[None, :], input_precision="ieee"),)
    return total, new_max, row_sum * shrink + tl.sum(p, 0)


@triton.jit
def _both_steps(
    q, few_q, k, v, state, few, scale, num_keys,
    MASKED: tl.constexpr, FUSED_SCALE: tl.constexpr, NUM_PREFIX: tl.constexpr,
):  # fmt: skip
    state = _softmax_step(q, k, v, state, scale, num_keys, MASKED, FUSED_SCALE)
    if NUM_PREFIX == 1:
        few = _softmax_step_of_one(few_q, k, v, few, scale, num_keys, MASKED, FUSED_SCALE)
    elif NUM_PREFIX > 1:
        few = _softmax_step_of_few(few_q, k, v, few, scale, num_keys, MASKED, FUSED_SCALE)
    return state, few


@triton.jit
def _attend(
    q, few_q, k_ptr, v_ptr, stride_k, stride_v, num_keys, state, few, scale,
    BLOCK_N: tl.constexpr, EVEN_K: tl.constexpr, ONE_LOOP: tl.constexpr, FUSED_SCALE: tl.constexpr,
    NUM_PREFIX: tl.constexpr, PIECES: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """All keys behind the prefix for q, and with NUM_PREFIX > 0 for the prefix queries few_q as well.

    Whole tiles come first, without masks; with ONE_LOOP all tiles are masked alike, in fewer registers.
    """
    columns = tl.arange(0, BLOCK_N)
    num_full = num_keys if EVEN_K or ONE_LOOP else num_keys // BLOCK_N * BLOCK_N
    for first in range(0, num_full, BLOCK_N):
        at = tl.cast(first, tl.int64)
        rows = tl.minimum(columns, num_keys - first - 1) if ONE_LOOP else columns
        k = load_rows(k_ptr + at * stride_k, rows, stride_k, PIECES, HEAD_DIM)
        v = load_rows(v_ptr + at * stride_v, rows, stride_v, PIECES, HEAD_DIM)
        here = num_keys - first
        state, few = _both_steps(q, few_q, k, v, state, few, scale, here, ONE_LOOP, FUSED_SCALE, NUM_PREFIX)
    if not EVEN_K and not ONE_LOOP:
        left = num_keys - num_full
        if left > 0:
            # Rows past the end repeat the last one, and their scores are masked.
            at = tl.cast(num_full, tl.int64)
            last = tl.minimum(columns, left - 1)
            k = load_rows(k_ptr + at * stride_k, last, stride_k, PIECES, HEAD_DIM)
            v = load_rows(v_ptr + at * stride_v, last, stride_v, PIECES, HEAD_DIM)
            state, few = _both_steps(q, few_q, k, v, state, few, scale, left, True, FUSED_SCALE, NUM_PREFIX)
    return state, few


@triton.jit
def _log_sum(row_max, row_sum, FUSED_SCALE: tl.constexpr):
    if FUSED_SCALE:
        row_max *= LN_2
    return row_max + tl.log(row_sum)


@triton.jit
def _zero_columns(PIECES: tl.constexpr):
    rows = zero_rows(FEW, PIECES)
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        tiles += (tl.trans(rows[i]),)
    return tiles


@triton.jit
def _store_one(
    out_ptr, lse_ptr, state, FUSED_SCALE: tl.constexpr, PIECES: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """The result of `_softmax_step_of_one`."""
    acc, row_max, row_sum = state
    out = ()
    for i in tl.static_range(len(PIECES)):
        out += (tl.sum(acc[i], 0, keep_dims=True) / row_sum,)
    store_vector(out_ptr, out, PIECES, HEAD_DIM)
    tl.store(lse_ptr, _log_sum(row_max, row_sum, FUSED_SCALE))


@triton.jit
def _store_few(
    out_ptr, lse_ptr, stride_out, state, num_queries,
    FUSED_SCALE: tl.constexpr, PIECES: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The result of `_softmax_step_of_few`."""
    acc, row_max, row_sum = state
    rows = tl.arange(0, FEW)
    out = ()
    for i in tl.static_range(len(PIECES)):
        out += (tl.trans(acc[i] / row_sum[None, :]),)
    store_rows(out_ptr, out, rows, stride_out, rows < num_queries, PIECES, HEAD_DIM)
    tl.store(lse_ptr + rows, _log_sum(row_max, row_sum, FUSED_SCALE), mask=rows < num_queries)


@triton.jit
def _store_empty(
    out_ptr, lse_ptr, stride_out, num_rows, ROWS: tl.constexpr, PIECES: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """The result of queries without keys."""
    rows = tl.arange(0, ROWS)
    store_rows(out_ptr, zero_rows(ROWS, PIECES), rows, stride_out, rows < num_rows, PIECES, HEAD_DIM)
    tl.store(lse_ptr + rows, tl.full([ROWS], float("-inf"), tl.float32), mask=rows < num_rows)


# Sizes that change with every batch: specialising on them would compile again for multiples of 16, and for 1.
@triton.jit(do_not_specialize=["total_q", "total_k", "num_segments", "seqlen", "num_tiles"])
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    key_ranges_ptr,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_out_token,
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
    PREFIX_BLOCK_N: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    FUSED_SCALE: tl.constexpr,
):
    """out, lse are contiguous. EVEN_Q, EVEN_K: behind the prefix every segment is one or more whole tiles."""
    scale = softmax_scale * LOG2_E if FUSED_SCALE else softmax_scale
    tile, start_q, len_q, start_k, len_k = tile_of(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, key_ranges_ptr, total_q, total_k, num_segments, seqlen, num_tiles,
        BLOCK_M,
    )  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // HEADS_PER_KV_HEAD
    prefix_q = tl.minimum(NUM_PREFIX, len_q)
    prefix_k = tl.minimum(NUM_PREFIX, len_k)
    first = tile * BLOCK_M
    num_rows = len_q - prefix_q - first
    if tile < 0 or (num_rows <= 0 and (tile > 0 or prefix_q == 0)):
        return

    # The rows of this tile, and from `few` on those of the prefix.
    base = (start_q + prefix_q + first).to(tl.int64)
    few_base = start_q.to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    # Rows past the end repeat the last one and are not stored. Without any row that is the last prefix token.
    inside = rows if EVEN_Q else tl.minimum(rows, num_rows - 1)
    out_ptr += head * HEAD_DIM
    lse_ptr += head * total_q
    tile_out_ptr = out_ptr + base * stride_out_token
    few_out_ptr = out_ptr + few_base * stride_out_token
    if not EVEN_K:
        if len_k == 0:
            _store_empty(tile_out_ptr, lse_ptr + base, stride_out_token, num_rows, BLOCK_M, PIECES, HEAD_DIM)
            if NUM_PREFIX > 0:
                if tile == 0:
                    few_lse_ptr = lse_ptr + few_base
                    _store_empty(few_out_ptr, few_lse_ptr, stride_out_token, prefix_q, FEW, PIECES, HEAD_DIM)
            return

    q_ptr += head * stride_q_head
    q = load_rows(q_ptr + base * stride_q_token, inside, stride_q_token, PIECES, HEAD_DIM)
    few_q_ptr = q_ptr + few_base * stride_q_token
    k_ptr += kv_head * stride_k_head + start_k.to(tl.int64) * stride_k_token
    v_ptr += kv_head * stride_v_head + start_k.to(tl.int64) * stride_v_token
    rest_k_ptr = k_ptr + prefix_k.to(tl.int64) * stride_k_token
    rest_v_ptr = v_ptr + prefix_k.to(tl.int64) * stride_v_token
    num_keys = len_k - prefix_k

    state = (
        zero_rows(BLOCK_M, PIECES),
        tl.full([BLOCK_M], LOWEST, tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
    )
    if NUM_PREFIX == 1:
        prefix_key = load_vector(k_ptr, PIECES, HEAD_DIM)
        prefix_value = load_vector(v_ptr, PIECES, HEAD_DIM)
        scores = dot_vector(q, prefix_key) * scale
        one = power(scores - scores, FUSED_SCALE)  # not 1 but NaN for a score that is no finite number
        state = (add_outer(state[0], one, prefix_value), scores, one)
    elif NUM_PREFIX > 1:
        tokens = tl.minimum(tl.arange(0, 16), prefix_k - 1)  # the shortest tile that an MMA sums over
        prefix_key = load_rows(k_ptr, tokens, stride_k_token, PIECES, HEAD_DIM)
        prefix_value = load_rows(v_ptr, tokens, stride_v_token, PIECES, HEAD_DIM)
        state = _softmax_step(q, prefix_key, prefix_value, state, scale, prefix_k, True, FUSED_SCALE)

    if NUM_PREFIX > 0 and tile == 0:
        if NUM_PREFIX == 1:
            few_q = load_vector(few_q_ptr, PIECES, HEAD_DIM)
            score = tl.sum(dot_vector(few_q, prefix_key), 0) * scale
            few_one = power(score - score, FUSED_SCALE)
            only_first = tl.where(tl.arange(0, FOLD) == 0, few_one, 0.0)
            few = (add_outer(zero_rows(FOLD, PIECES), only_first, prefix_value), score, few_one)
        else:
            few_rows = tl.minimum(tl.arange(0, FEW), prefix_q - 1)
            few_q = load_rows(few_q_ptr, few_rows, stride_q_token, PIECES, HEAD_DIM)
            few = (_zero_columns(PIECES), tl.full([FEW], LOWEST, tl.float32), tl.zeros([FEW], tl.float32))
            few = _softmax_step_of_few(
                few_q, prefix_key, prefix_value, few, scale, prefix_k, True, FUSED_SCALE
            )
        state, few = _attend(
            q, few_q, rest_k_ptr, rest_v_ptr, stride_k_token, stride_v_token, num_keys, state, few, scale,
            PREFIX_BLOCK_N, EVEN_K, ONE_LOOP, FUSED_SCALE, NUM_PREFIX, PIECES, HEAD_DIM,
        )  # fmt: skip
        if NUM_PREFIX == 1:
            _store_one(few_out_ptr, lse_ptr + few_base, few, FUSED_SCALE, PIECES, HEAD_DIM)
        else:
            few_lse_ptr = lse_ptr + few_base
            _store_few(
                few_out_ptr, few_lse_ptr, stride_out_token, few, prefix_q, FUSED_SCALE, PIECES, HEAD_DIM
            )
    else:
        state, no_prefix = _attend(
            q, q, rest_k_ptr, rest_v_ptr, stride_k_token, stride_v_token, num_keys, state, state, scale,
            BLOCK_N, EVEN_K, ONE_LOOP, FUSED_SCALE, 0, PIECES, HEAD_DIM,
        )  # fmt: skip
    acc, row_max, row_sum = state
    out = scale_rows(acc, (1.0 / row_sum)[:, None])
    store_rows(tile_out_ptr, out, rows, stride_out_token, row_mask, PIECES, HEAD_DIM)
    tl.store(lse_ptr + base + rows, _log_sum(row_max, row_sum, FUSED_SCALE), mask=row_mask)

"""Triton: a few new tokens against cached vision keys and values, gate and residual included, in two kernels.

Few queries leave a GPU idle unless the keys of a sample are shared out (Dao et al. 2023, Flash-Decoding):

    decode_attention_kernel    a share of the keys of one head of one sample -> partial sums in float32
    decode_projection_kernel   a few columns of the result: adds up the shares, head by head, as it multiplies
                               them with the weight; then tanh gate and residual

Both derive the shares from the sample's range of keys and from num_splits, on the device, so that nothing is
read on the host and no hint can make a number wrong. The result of a share is (acc, row_max, row_sum) of the
online softmax, not divided yet; a share without keys is neither written nor read.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from infimm_kernels.attention.triton_config import float32_scale, fused_scale
from infimm_kernels.attention.triton_tiles import LOG2_E, LOWEST, power, scaled, scaled_later
from infimm_kernels.backends import AotConfig
from infimm_kernels.checks import unit_last_stride
from infimm_kernels.gated_cross_attention.triton_decode_config import (
    MAX_PROJECTION_ROWS,
    attention_config,
    padded,
    projection_config,
    splits_for,
)
from infimm_kernels.gated_residual.triton_elementwise import tanh

PROJECTION_ROWS: tl.constexpr = tl.constexpr(MAX_PROJECTION_ROWS)


@triton.jit
def _key_range(key_ranges_ptr, sample, in_batch, total_k):
    """First key and number of keys of samples, inside the tensor whatever key_ranges holds."""
    first = tl.load(key_ranges_ptr + 2 * sample, mask=in_batch, other=0)
    end = tl.load(key_ranges_ptr + 2 * sample + 1, mask=in_batch, other=0)
    first = tl.minimum(tl.maximum(first, 0), total_k)
    end = tl.minimum(tl.maximum(end, first), total_k)
    return first, end - first


@triton.jit
def _keys_per_split(num_keys, num_splits, BLOCK_N: tl.constexpr):
    """Whole tiles, so that only the last one of a sample is cut."""
    return tl.cdiv(tl.cdiv(num_keys, BLOCK_N), num_splits) * BLOCK_N


# Sizes that change with every batch: specialising on them would compile again for multiples of 16, and for 1.
@triton.jit(do_not_specialize=["batch", "total_k", "num_splits"])
def decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_ranges_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    stride_q_sample,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    batch,
    total_k,
    num_splits,
    softmax_scale,
    TEXT_LEN: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FUSED_SCALE: tl.constexpr,
):
    """acc [num_splits, batch * text_len, num_heads, head_dim], max and sum the same without head_dim.

    The rows of a program are queries that share its keys: text_len times the query heads of the key head, or
    BLOCK_M of those.
    """
    num_blocks_m: tl.constexpr = (TEXT_LEN * GROUP + BLOCK_M - 1) // BLOCK_M
    sample = tl.program_id(0) // num_splits
    split = tl.program_id(0) % num_splits
    kv_head = tl.program_id(1) // num_blocks_m
    first, num_keys = _key_range(key_ranges_ptr, sample, sample < batch, total_k)
    share = _keys_per_split(num_keys, num_splits, BLOCK_N)
    start = split * share
    stop = tl.minimum(start + share, num_keys)
    if start >= stop:
        return

    scale = softmax_scale * LOG2_E if FUSED_SCALE else softmax_scale
    rows = tl.program_id(1) % num_blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    row_in = rows < TEXT_LEN * GROUP
    channels = tl.arange(0, WIDTH)
    channel_in = channels < HEAD_DIM
    q_ptr += tl.cast(sample, tl.int64) * stride_q_sample
    q_rows = tokens.to(tl.int64) * stride_q_token + heads.to(tl.int64) * stride_q_head
    q_mask = row_in[:, None] & channel_in[None, :]
    q = tl.load(q_ptr + q_rows[:, None] + channels[None, :], mask=q_mask, other=0.0)

    columns = tl.arange(0, BLOCK_N)
    keys = (first + start + columns).to(tl.int64)
    k_ptrs = k_ptr + tl.cast(kv_head, tl.int64) * stride_k_head
    k_ptrs += keys[:, None] * stride_k_token + channels[None, :]
    v_ptrs = v_ptr + tl.cast(kv_head, tl.int64) * stride_v_head
    v_ptrs += keys[:, None] * stride_v_token + channels[None, :]
    k_step = tl.cast(stride_k_token, tl.int64) * BLOCK_N
    v_step = tl.cast(stride_v_token, tl.int64) * BLOCK_N
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for at in range(start, stop, BLOCK_N):
        inside = columns < stop - at
        mask = inside[:, None] & channel_in[None, :]
        k = tl.load(k_ptrs, mask=mask, other=0.0)
        v = tl.load(v_ptrs, mask=mask, other=0.0)
        scores = scaled(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, FUSED_SCALE)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, scaled_later(tl.max(scores, 1), scale, FUSED_SCALE))
        p = power(scaled_later(scores, scale, FUSED_SCALE) - new_max[:, None], FUSED_SCALE)
        shrink = power(row_max - new_max, FUSED_SCALE)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        row_sum = row_sum * shrink + tl.sum(p, 1)
        row_max = new_max
        k_ptrs += k_step
        v_ptrs += v_step

    out_rows = (tl.cast(split, tl.int64) * batch + sample) * TEXT_LEN + tokens
    out_rows = out_rows * NUM_HEADS + heads
    tl.store(acc_ptr + out_rows[:, None] * HEAD_DIM + channels[None, :], acc, mask=q_mask)
    tl.store(max_ptr + out_rows, row_max, mask=row_in)
    tl.store(sum_ptr + out_rows, row_sum, mask=row_in)


@triton.jit(do_not_specialize=["num_rows", "total_k", "num_splits"])
def decode_projection_kernel(
    x_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    weight_ptr,
    gate_ptr,
    key_ranges_ptr,
    y_ptr,
    stride_x_row,
    stride_weight_row,
    stride_y_row,
    num_rows,
    total_k,
    num_splits,
    hidden,
    TEXT_LEN: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS_BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NUM_BLOCKS_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FUSED_SCALE: tl.constexpr,
):
    """ROWS rows and BLOCK_N columns of x + tanh(gate) * (attention @ weight^T).

    The shares of BLOCK_S splits are added up at once, as one tile of BLOCK_S * ROWS rows; NUM_BLOCKS_S such
    blocks hold all splits.
    """
    num_blocks_n = tl.cdiv(hidden, BLOCK_N)
    block_m = tl.program_id(0) // num_blocks_n
    block_n = tl.program_id(0) % num_blocks_n
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_in = columns < hidden
    channels = tl.arange(0, WIDTH)
    channel_in = channels < HEAD_DIM
    weight_rows = tl.minimum(columns, hidden - 1).to(tl.int64)
    weight_ptrs = weight_ptr + weight_rows[None, :] * stride_weight_row + channels[:, None]

    # Row i of a tile is split i // ROWS of row i % ROWS.
    index = tl.arange(0, BLOCK_S * ROWS)
    rows = block_m * ROWS + index % ROWS
    _, num_keys = _key_range(key_ranges_ptr, rows // TEXT_LEN, rows < num_rows, total_k)
    share = _keys_per_split(num_keys, num_splits, KEYS_BLOCK_N)
    # Splits that begin before the keys end; those are the ones that were written.
    used = tl.where(num_keys > 0, tl.cdiv(num_keys, tl.maximum(share, 1)), 0)
    # A row without keys has no sum to be divided by.
    first_sum = tl.where(tl.max(tl.reshape(used, [BLOCK_S, ROWS]), 0) == 0, 1.0, 0.0)
    splits = index // ROWS
    partial_rows = (splits.to(tl.int64) * num_rows + rows) * NUM_HEADS
    block_step = tl.cast(num_rows, tl.int64) * (BLOCK_S * NUM_HEADS)
    out = tl.zeros([PROJECTION_ROWS, BLOCK_N], tl.float32)
    for _head in range(NUM_HEADS):
        row_max = tl.full([ROWS], LOWEST, tl.float32)
        row_sum = first_sum
        total = tl.zeros([ROWS, WIDTH], tl.float32)
        for block in tl.static_range(NUM_BLOCKS_S):
            here = splits + block * BLOCK_S < used
            at = partial_rows + block * block_step
            split_max = tl.load(max_ptr + at, mask=here, other=LOWEST)
            split_sum = tl.load(sum_ptr + at, mask=here, other=0.0)
            mask = here[:, None] & channel_in[None, :]
            acc = tl.load(acc_ptr + at[:, None] * HEAD_DIM + channels[None, :], mask=mask, other=0.0)
            new_max = tl.maximum(row_max, tl.max(tl.reshape(split_max, [BLOCK_S, ROWS]), 0))
            spread = tl.reshape(tl.broadcast_to(new_max[None, :], [BLOCK_S, ROWS]), [BLOCK_S * ROWS])
            grow = power(split_max - spread, FUSED_SCALE)
            shrink = power(row_max - new_max, FUSED_SCALE)
            total *= shrink[:, None]
            total += tl.sum(tl.reshape(acc * grow[:, None], [BLOCK_S, ROWS, WIDTH]), 0)
            row_sum = row_sum * shrink + tl.sum(tl.reshape(split_sum * grow, [BLOCK_S, ROWS]), 0)
            row_max = new_max
        weight = tl.load(weight_ptrs, mask=channel_in[:, None], other=0.0)
        o = (total / row_sum[:, None]).to(weight.dtype)
        o = tl.broadcast_to(o[None, :, :], [PROJECTION_ROWS // ROWS, ROWS, WIDTH])
        o = tl.reshape(o, [PROJECTION_ROWS, WIDTH])
        out = tl.dot(o, weight, out, input_precision="ieee")
        partial_rows += 1
        weight_ptrs += HEAD_DIM

    index = tl.arange(0, PROJECTION_ROWS)
    rows = block_m * ROWS + index % ROWS
    row_in = (index < ROWS) & (rows < num_rows)
    _, num_keys = _key_range(key_ranges_ptr, rows // TEXT_LEN, row_in, total_k)
    gate = tl.load(gate_ptr + columns, mask=column_in, other=0.0).to(tl.float32)
    update = out * tanh(gate)[None, :]
    unchanged = (update == 0.0) | (num_keys == 0)[:, None]
    mask = row_in[:, None] & column_in[None, :]
    rows = rows.to(tl.int64)
    x = tl.load(x_ptr + rows[:, None] * stride_x_row + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.where(unchanged, x, x + update).to(y_ptr.dtype.element_ty)  # -0.0 + 0.0 would be 0.0
    tl.store(y_ptr + rows[:, None] * stride_y_row + columns[None, :], y, mask=mask)


@functools.lru_cache(maxsize=32)
def _num_sms(device: torch.device) -> int:
    """Of a CUDA device; in the interpreter those of an A100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 108


def launch_decode(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out_weight: Tensor,
    attn_gate: Tensor,
    key_ranges: Tensor,
    max_keys: int,
    softmax_scale: float,
) -> Tensor:
    """x [batch, text_len, hidden], query [batch, text_len, num_heads, head_dim], key, value
    [total, num_kv_heads, head_dim], out_weight [hidden, num_heads * head_dim], key_ranges int32 [batch, 2] ->
    like x. Neighbouring channels of all but x are neighbours in memory."""
    batch, text_len, num_heads, head_dim = query.shape
    num_kv_heads, hidden = key.shape[1], x.shape[2]
    num_rows = batch * text_len
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows_x, rows_y = unit_last_stride(x.reshape(num_rows, hidden)), y.view(num_rows, hidden)
    attn_gate, key_ranges = attn_gate.contiguous(), key_ranges.contiguous()
    splits = splits_for(batch, text_len, num_kv_heads, head_dim, max_keys, _num_sms(x.device))
    softmax_scale = float32_scale(softmax_scale)
    options = {
        "TEXT_LEN": text_len,
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "WIDTH": padded(head_dim),
        "FUSED_SCALE": fused_scale(query.dtype, softmax_scale),
    }
    group = num_heads // num_kv_heads
    tile = attention_config(text_len * group, head_dim, query.dtype)
    projection = projection_config(num_rows, splits, head_dim, out_weight.dtype)
    acc = torch.empty((splits, num_rows, num_heads, head_dim), dtype=torch.float32, device=x.device)
    row_max, row_sum = torch.empty((2, splits, num_rows, num_heads), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        row_blocks = triton.cdiv(text_len * group, tile.block_m)
        decode_attention_kernel[batch * splits, num_kv_heads * row_blocks](
            *(query, key, value, key_ranges, acc, row_max, row_sum),
            *query.stride()[:3],
            *key.stride()[:2],
            *value.stride()[:2],
            *(batch, key.shape[0], splits, softmax_scale),
            GROUP=group,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **options,
        )
        programs = triton.cdiv(num_rows, projection.rows) * triton.cdiv(hidden, projection.block_n)
        decode_projection_kernel[(programs,)](
            *(rows_x, acc, row_max, row_sum, out_weight, attn_gate, key_ranges, rows_y),
            *(rows_x.stride(0), out_weight.stride(0), rows_y.stride(0)),
            *(num_rows, key.shape[0], splits, hidden),
            KEYS_BLOCK_N=tile.block_n,
            ROWS=projection.rows,
            BLOCK_S=projection.block_s,
            NUM_BLOCKS_S=projection.num_blocks_s,
            BLOCK_N=projection.block_n,
            num_warps=projection.num_warps,
            num_stages=projection.num_stages,
            **options,
        )
    return y


def aot_configs() -> Iterator[AotConfig]:
    """Tiles of the launches above for 10,250 keys and hidden 5120: one sample and a batch of 64."""
    bf16, fp16, fp32 = (torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")
    # dtype, batch, text_len, num_heads, num_kv_heads, head_dim
    shapes = (
        (bf16, 1, 1, 12, 12, 64),
        (bf16, 1, 8, 12, 12, 64),
        (bf16, 64, 1, 12, 12, 64),
        (bf16, 1, 1, 16, 16, 112),
        (bf16, 1, 1, 16, 4, 128),
        (fp16, 1, 1, 12, 12, 64),
        (fp32, 1, 1, 12, 12, 64),
    )
    for capability, num_sms in (((8, 0), 108), ((9, 0), 132)):
        for (dtype, name), batch, text_len, num_heads, num_kv_heads, head_dim in shapes:
            splits = splits_for(batch, text_len, num_kv_heads, head_dim, 10250, num_sms)
            projection = projection_config(batch * text_len, splits, head_dim, dtype)
            group = num_heads // num_kv_heads
            tile = attention_config(text_len * group, head_dim, dtype)
            both = {
                "TEXT_LEN": text_len,
                "NUM_HEADS": num_heads,
                "HEAD_DIM": head_dim,
                "WIDTH": padded(head_dim),
                "FUSED_SCALE": dtype != torch.float32,
            }
            pointers = {f"{tensor}_ptr": "*fp32" for tensor in ("acc", "max", "sum")}
            pointers |= {"key_ranges_ptr": "*i32"}
            label = f"batch={batch} text_len={text_len} heads={num_heads}/{num_kv_heads} d={head_dim} {name}"
            strides = [f"{tensor}_{of}" for tensor in "kv" for of in ("token", "head")]
            strides += [f"q_{of}" for of in ("sample", "token", "head")]
            yield AotConfig(
                decode_attention_kernel,
                f"decode_attention {label}",
                pointers
                | {f"{tensor}_ptr": f"*{name}" for tensor in "qkv"}
                | {f"stride_{stride}": "i32" for stride in strides}
                | {"batch": "i32", "total_k": "i32", "num_splits": "i32", "softmax_scale": "fp32"},
                both
                | {
                    "GROUP": group,
                    "BLOCK_M": tile.block_m,
                    "BLOCK_N": tile.block_n,
                },
                tile.num_warps,
                tile.num_stages,
                capability,
                head_dim=head_dim,
                dtype=name,
            )
            yield AotConfig(
                decode_projection_kernel,
                f"decode_projection {label}",
                pointers
                | {f"{tensor}_ptr": f"*{name}" for tensor in ("x", "weight", "gate", "y")}
                | {f"stride_{tensor}_row": "i32" for tensor in ("x", "weight", "y")}
                | {"num_rows": "i32", "total_k": "i32", "num_splits": "i32", "hidden": "i32"},
                both
                | {
                    "KEYS_BLOCK_N": tile.block_n,
                    "ROWS": projection.rows,
                    "BLOCK_S": projection.block_s,
                    "NUM_BLOCKS_S": projection.num_blocks_s,
                    "BLOCK_N": projection.block_n,
                },
                projection.num_warps,
                projection.num_stages,
                capability,
                head_dim=head_dim,
                dtype=name,
            )

"""Triton forward of attention inside segments, for packed q, k and v of any strides with a unit last one.

One program computes BLOCK_M queries of one head of one segment with the online softmax. The grid needs no
lengths, only the number of tokens and of segments: segment s owns the slots from cu_seqlens_q[s] // BLOCK_M +
s on, which is enough for its queries, and each program finds its segment by bisection. So no launch waits for
the GPU, and no hint can give a wrong number. Values of cu_seqlens are clamped to the tokens there are:
nothing is read or written out of bounds.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from infimm_kernels.backends import AotConfig


@triton.jit
def _slot(cu_seqlens_ptr, segment, total, BLOCK_M: tl.constexpr):
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + segment), 0), total)
    return start // BLOCK_M + segment


@triton.jit
def _bounds(cu_seqlens_ptr, segment, total):
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + segment), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + segment + 1), start), total)
    return start, end - start


# Sizes that change with every batch; specialising on them would compile again for a multiple of 16, and for
# 1.
@triton.jit(do_not_specialize=["total_q", "total_k", "num_segments", "num_search_steps"])
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_out_token,
    stride_out_head,
    stride_lse_head,
    total_q,
    total_k,
    num_segments,
    num_search_steps,
    heads_per_kv_head,
    softmax_scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    LN_2: tl.constexpr = 0.6931471805599453
    slot = tl.program_id(0)
    head = tl.program_id(1)
    low = 0
    high = num_segments - 1
    for _ in range(num_search_steps):  # the last segment whose first slot is not after this one
        middle = (low + high + 1) // 2
        after = _slot(cu_seqlens_q_ptr, middle, total_q, BLOCK_M) > slot
        low = tl.where(after, low, middle)
        high = tl.where(after, tl.maximum(middle - 1, low), high)
    start_q, len_q = _bounds(cu_seqlens_q_ptr, low, total_q)
    block_start = (slot - _slot(cu_seqlens_q_ptr, low, total_q, BLOCK_M)) * BLOCK_M
    if block_start >= len_q:
        return
    start_k, len_k = _bounds(cu_seqlens_k_ptr, low, total_k)

    rows = block_start + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    row_mask = rows < len_q
    channel_mask = channels < HEAD_DIM
    kv_head = (head // heads_per_kv_head).to(tl.int64)
    head = head.to(tl.int64)
    token_q = (start_q + rows).to(tl.int64)
    q = tl.load(
        q_ptr + head * stride_q_head + token_q[:, None] * stride_q_token + channels[None, :],
        mask=row_mask[:, None] & channel_mask[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]
    k_head_ptr = k_ptr + kv_head * stride_k_head + start_k.to(tl.int64) * stride_k_token
    v_head_ptr = v_ptr + kv_head * stride_v_head + start_k.to(tl.int64) * stride_v_token

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)  # of the scores in units of log 2
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for column_start in range(0, len_k, BLOCK_N):
        token_k = (column_start + columns).to(tl.int64)
        column_mask = column_start + columns < len_k
        k = tl.load(
            k_head_ptr + token_k[None, :] * stride_k_token + channels[:, None],
            mask=column_mask[None, :] & channel_mask[:, None],
            other=0.0,
        )  # [BLOCK_D, BLOCK_N]
        scores = tl.dot(q, k, input_precision="ieee") * softmax_scale_log2
        scores = tl.where(column_mask[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen nothing but -inf stays empty instead of becoming NaN.
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(scores - finite_max[:, None])
        rescale = tl.exp2(row_max - finite_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        v = tl.load(
            v_head_ptr + token_k[:, None] * stride_v_token + channels[None, :],
            mask=column_mask[:, None] & channel_mask[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_D]
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")

    has_keys = len_k > 0
    row_sum = tl.where(has_keys, row_sum, 1.0)
    out = acc / row_sum[:, None]
    lse = tl.where(has_keys, row_max * LN_2 + tl.log(row_sum), float("-inf"))
    tl.store(
        out_ptr + head * stride_out_head + token_q[:, None] * stride_out_token + channels[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=row_mask[:, None] & channel_mask[None, :],
    )
    tl.store(lse_ptr + head * stride_lse_head + token_q, lse, mask=row_mask)


class Config(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def block_d(head_dim: int) -> int:
    """head_dim rounded up to the power of two that a Triton tile needs."""
    return max(16, triton.next_power_of_2(head_dim))


def config(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Config:
    """The tile for a GPU of this compute capability; chosen for registers, its speed is not measured."""
    width = block_d(head_dim)
    if dtype == torch.float32:
        # Exact float32 products run outside the tensor cores; larger tiles spill by the kilobyte.
        by_width = {16: Config(64, 32, 4, 1), 32: Config(64, 32, 4, 1), 64: Config(64, 32, 8, 1)}
        return by_width.get(width) or (Config(16, 32, 4, 1) if width == 128 else Config(16, 16, 4, 1))
    if width > 128:
        return Config(64, 32, 4, 1)
    if capability[0] in (9, 10):  # the GPUs with more than 200 KB of shared memory
        return Config(128, 128, 8, 2)
    return Config(128, 64, 8, 2)


def launch_varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """q [total_q, num_heads, head_dim], k v [total_k, num_kv_heads, head_dim] -> out, lse [heads, total]."""
    total_q, num_heads, head_dim = q.shape
    num_segments = cu_seqlens_q.shape[0] - 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, total_q), dtype=torch.float32, device=q.device)
    if total_q == 0 or num_segments == 0:
        return out, lse
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
    tile = config(head_dim, q.dtype, capability)
    grid = (total_q // tile.block_m + num_segments, num_heads)
    with torch.cuda.device_of(q):
        attention_forward_kernel[grid](
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens_q.contiguous(),
            cu_seqlens_k.contiguous(),
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *out.stride()[:2],
            lse.stride(0),
            total_q,
            k.shape[0],
            num_segments,
            num_segments.bit_length(),
            num_heads // k.shape[1],
            softmax_scale * math.log2(math.e),
            HEAD_DIM=head_dim,
            BLOCK_D=block_d(head_dim),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out, lse


def aot_configs() -> Iterator[AotConfig]:
    """Every configuration that `launch_varlen_attention` can choose, per dtype."""
    strides = [
        "stride_q_token",
        "stride_q_head",
        "stride_k_token",
        "stride_k_head",
        "stride_v_token",
        "stride_v_head",
        "stride_out_token",
        "stride_out_head",
        "stride_lse_head",
    ]
    sizes = ["total_q", "total_k", "num_segments", "num_search_steps", "heads_per_kv_head"]
    for capability in ((8, 0), (9, 0)):
        for dtype, pointer in ((torch.float16, "*fp16"), (torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
            for head_dim in (16, 32, 64, 112, 128, 256):
                tile = config(head_dim, dtype, capability)
                signature = {name: pointer for name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr")}
                signature |= {"lse_ptr": "*fp32", "cu_seqlens_q_ptr": "*i32", "cu_seqlens_k_ptr": "*i32"}
                signature |= {name: "i32" for name in strides + sizes} | {"softmax_scale_log2": "fp32"}
                constexprs = {
                    "HEAD_DIM": head_dim,
                    "BLOCK_D": block_d(head_dim),
                    "BLOCK_M": tile.block_m,
                    "BLOCK_N": tile.block_n,
                }
                name = f"attention_forward head_dim={head_dim} {pointer[1:]}"
                yield AotConfig(
                    attention_forward_kernel,
                    name,
                    signature,
                    constexprs,
                    tile.num_warps,
                    tile.num_stages,
                    capability,
                )

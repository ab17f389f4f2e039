"""Triton backward of the keys and values of all layers: one matrix product per gradient, no atomics."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from infimm_kernels.backends import AotConfig, capability_of
from infimm_kernels.checks import unit_last_stride
from infimm_kernels.position_2d.triton_forward import launch_add_position_2d
from infimm_kernels.triton_common import rows_per_sum, tile_of_program
from infimm_kernels.vision_keys_values.triton_forward import (
    DTYPES,
    GROUP_M,
    Config,
    config,
    finish_tile,
)


@triton.jit(do_not_specialize=["num_rows"])
def vision_keys_values_backward_features_kernel(
    dkv_ptr,
    weight_ptr,
    dfeatures_ptr,
    stride_dkv_chunk,
    stride_dkv_row,
    stride_weight_chunk,
    stride_weight_row,
    num_rows,
    num_chunks,
    inner,
    hidden,
    EVEN: tl.constexpr,
    SUM_PER_CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SLICES: tl.constexpr,
):
    """dfeatures [num_rows, hidden] = sum over the chunks of dkv [num_chunks, num_rows, inner] @ weight.

    One loop over the inner channels of all chunks: a loop inside a loop would empty its pipeline every time.
    """
    block_m, block_n = tile_of_program(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(hidden, BLOCK_N), GROUP_M
    )
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inners = tl.arange(0, BLOCK_K)
    column_in = (columns < hidden)[None, :]
    dkv_rows = tl.minimum(rows, num_rows - 1).to(tl.int64) * stride_dkv_row
    dkv_ptrs = dkv_ptr + dkv_rows[:, None] + inners[None, :]
    weight_ptrs = weight_ptr + inners.to(tl.int64)[:, None] * stride_weight_row + columns[None, :]
    blocks_per_chunk = tl.cdiv(inner, BLOCK_K)
    weight_step = tl.cast(stride_weight_row, tl.int64) * BLOCK_K
    # From the last channels of a chunk to the first ones of the next.
    dkv_jump = tl.cast(stride_dkv_chunk, tl.int64) - (blocks_per_chunk - 1) * BLOCK_K
    weight_jump = tl.cast(stride_weight_chunk, tl.int64) - (blocks_per_chunk - 1) * weight_step
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = acc
    left = inner
    for _ in range(0, num_chunks * blocks_per_chunk):
        if EVEN:
            dkv = tl.load(dkv_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            dkv = tl.load(dkv_ptrs, mask=(inners < left)[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=(inners < left)[:, None] & column_in, other=0.0)
        acc = tl.dot(dkv, weight, acc, input_precision="ieee")
        is_last = left <= BLOCK_K
        if SUM_PER_CHUNK:
            total = tl.where(is_last, total + acc, total)
            acc = tl.where(is_last, 0.0, acc)
        dkv_ptrs += tl.where(is_last, dkv_jump, BLOCK_K)
        weight_ptrs += tl.where(is_last, weight_jump, weight_step)
        left = tl.where(is_last, inner, left - BLOCK_K)
    if SUM_PER_CHUNK:
        acc = total
    out_ptr = dfeatures_ptr + tl.cast(block_m, tl.int64) * BLOCK_M * hidden
    row_in = rows < num_rows
    column = block_n * BLOCK_N
    finish_tile(
        acc, column, out_ptr, out_ptr, out_ptr, row_in, row_in, hidden, "none", BLOCK_M, BLOCK_N, SLICES
    )


@triton.jit(do_not_specialize=["num_rows"])
def vision_keys_values_backward_weight_kernel(
    dkv_ptr,
    y_ptr,
    dweight_ptr,
    stride_dkv_chunk,
    stride_dkv_row,
    stride_y_row,
    num_rows,
    num_chunks,
    inner,
    hidden,
    EVEN: tl.constexpr,
    ROWS_PER_SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SLICES: tl.constexpr,
):
    """dweight [num_chunks, inner, hidden] = dkv^T y, with dkv [num_chunks, num_rows, inner], y the features
    with their positions. ROWS_PER_SUM: 0, or the rows after which a new sum begins."""
    blocks_per_chunk = tl.cdiv(inner, BLOCK_M)
    block_m, block_n = tile_of_program(
        tl.program_id(0), num_chunks * blocks_per_chunk, tl.cdiv(hidden, BLOCK_N), GROUP_M
    )
    chunk = (block_m // blocks_per_chunk).to(tl.int64)
    first = (block_m % blocks_per_chunk) * BLOCK_M
    inners = first + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_K)
    inner_in, column_in = inners < inner, columns < hidden
    dkv_rows = tokens.to(tl.int64) * stride_dkv_row
    # In float32 clamped instead of masked, to save registers for the second sum; what they add is not stored.
    dkv_inners = tl.minimum(inners, inner - 1) if ROWS_PER_SUM and not EVEN else inners
    dkv_ptrs = dkv_ptr + chunk * stride_dkv_chunk + dkv_inners[:, None] + dkv_rows[None, :]
    y_ptrs = y_ptr + (tokens.to(tl.int64) * stride_y_row)[:, None] + columns[None, :]
    dkv_step = tl.cast(stride_dkv_row, tl.int64) * BLOCK_K
    y_step = tl.cast(stride_y_row, tl.int64) * BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = acc
    for start in range(0, num_rows, BLOCK_K):
        token_in = tokens < num_rows - start
        if EVEN:
            dkv = tl.load(dkv_ptrs, mask=token_in[None, :], other=0.0)
            y = tl.load(y_ptrs, mask=token_in[:, None], other=0.0)
        else:
            dkv_in = token_in[None, :] if ROWS_PER_SUM else inner_in[:, None] & token_in[None, :]
            dkv = tl.load(dkv_ptrs, mask=dkv_in, other=0.0)
            y = tl.load(y_ptrs, mask=token_in[:, None] & column_in[None, :], other=0.0)
        acc = tl.dot(dkv, y, acc, input_precision="ieee")
        if ROWS_PER_SUM:
            is_last = (start + BLOCK_K) % ROWS_PER_SUM == 0
            total = tl.where(is_last, total + acc, total)
            acc = tl.where(is_last, 0.0, acc)
        dkv_ptrs += dkv_step
        y_ptrs += y_step
    if ROWS_PER_SUM:
        acc += total
    out_ptr = dweight_ptr + (chunk * inner + first) * hidden
    column = block_n * BLOCK_N
    finish_tile(
        acc, column, out_ptr, out_ptr, out_ptr, inner_in, inner_in, hidden, "none", BLOCK_M, BLOCK_N, SLICES
    )


def launch_backward_features(dkv: Tensor, weight: Tensor) -> Tensor:
    """dkv [num_layers, 2, total, inner], weight [num_layers, 2, inner, hidden] -> [total, hidden]."""
    num_rows, (inner, hidden) = dkv.shape[2], weight.shape[2:]
    dfeatures = torch.empty((num_rows, hidden), dtype=weight.dtype, device=weight.device)
    if num_rows == 0:
        return dfeatures
    dkv, chunks = unit_last_stride(dkv.flatten(0, 1)), unit_last_stride(weight.flatten(0, 1))
    tile = config(dkv.dtype, capability_of(dkv), wide=inner % 64 == 0 and hidden % 256 == 0)
    with torch.cuda.device_of(dkv):
        vision_keys_values_backward_features_kernel[
            (triton.cdiv(num_rows, tile.block_m) * triton.cdiv(hidden, tile.block_n),)
        ](
            dkv,
            chunks,
            dfeatures,
            dkv.stride(0),
            dkv.stride(1),
            chunks.stride(0),
            chunks.stride(1),
            num_rows,
            dkv.shape[0],
            inner,
            hidden,
            EVEN=inner % tile.block_k == 0 and hidden % tile.block_n == 0,
            SUM_PER_CHUNK=_sum_per_chunk(dkv.dtype),
            **_tile_arguments(tile),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return dfeatures


def launch_backward_weight(
    dkv: Tensor,
    features: Tensor,
    positions: Tensor | None,
    granularity: str,
    window_shape: tuple[int, int],
    num_prefix_tokens: int,
) -> Tensor:
    """dkv [num_layers, 2, total, inner], features [num_windows, seqlen, hidden] ->
    [num_layers, 2, inner, hidden]."""
    num_rows, inner = dkv.shape[2:]
    hidden = features.shape[2]
    dweight = torch.empty((*dkv.shape[:2], inner, hidden), dtype=features.dtype, device=features.device)
    if num_rows == 0:
        return dweight.zero_()
    y = features
    if positions is not None:
        y = torch.empty(features.shape, dtype=features.dtype, device=features.device)
        launch_add_position_2d(y, features, positions, granularity, window_shape, num_prefix_tokens)
    y, dkv = unit_last_stride(y.flatten(0, 1)), unit_last_stride(dkv.flatten(0, 1))
    tile = config(dkv.dtype, capability_of(dkv), wide=inner % 128 == 0 and hidden % 256 == 0)
    blocks = dkv.shape[0] * triton.cdiv(inner, tile.block_m)
    with torch.cuda.device_of(dkv):
        vision_keys_values_backward_weight_kernel[(blocks * triton.cdiv(hidden, tile.block_n),)](
            dkv,
            y,
            dweight,
            dkv.stride(0),
            dkv.stride(1),
            y.stride(0),
            num_rows,
            dkv.shape[0],
            inner,
            hidden,
            EVEN=inner % tile.block_m == 0 and hidden % tile.block_n == 0,
            ROWS_PER_SUM=rows_per_sum(dkv.dtype),
            **_tile_arguments(tile),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return dweight


def _sum_per_chunk(dtype: torch.dtype) -> bool:
    """In float32 a single running sum over all layers would lose what one sum per layer keeps."""
    return dtype == torch.float32


def _tile_arguments(tile: Config) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": GROUP_M,
        "SLICES": tile.slices,
    }


def aot_configs() -> Iterator[AotConfig]:
    """Every tile that the launchers can choose; a wide one has no tails."""
    for arch in ((8, 0), (9, 0)):
        for dtype, name in DTYPES:
            wide, narrow = (config(dtype, arch, wide) for wide in (True, False))
            tiles = dict.fromkeys(((wide, True), (narrow, True), (narrow, False)))
            for tile, even in tiles:
                constexprs = {"EVEN": even, **_tile_arguments(tile)}
                yield _aot_config(
                    vision_keys_values_backward_features_kernel,
                    ("dkv_ptr", "weight_ptr", "dfeatures_ptr"),
                    ("dkv_chunk", "dkv_row", "weight_chunk", "weight_row"),
                    constexprs | {"SUM_PER_CHUNK": _sum_per_chunk(dtype)},
                    tile,
                    arch,
                    name,
                )
                yield _aot_config(
                    vision_keys_values_backward_weight_kernel,
                    ("dkv_ptr", "y_ptr", "dweight_ptr"),
                    ("dkv_chunk", "dkv_row", "y_row"),
                    constexprs | {"ROWS_PER_SUM": rows_per_sum(dtype)},
                    tile,
                    arch,
                    name,
                )


def _aot_config(kernel, pointers, strides, constexprs, tile, arch, dtype) -> AotConfig:
    signature = dict.fromkeys(pointers, f"*{dtype}") | {f"stride_{stride}": "i32" for stride in strides}
    signature |= dict.fromkeys(("num_rows", "num_chunks", "inner", "hidden"), "i32")
    even = constexprs["EVEN"]
    return AotConfig(
        kernel,
        f"{kernel.__name__.removesuffix('_kernel')} {tile.block_m}x{tile.block_n} {even=} {dtype}",
        signature,
        constexprs,
        tile.num_warps,
        tile.num_stages,
        arch,
        direction="bwd",
        default=even,
        dtype=dtype,
    )

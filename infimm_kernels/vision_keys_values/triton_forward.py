"""Triton forward of the keys and values of all layers: one matrix product, the position in its epilogue.

(x + PE) W = x W + PE W. The encoding is separable: PE W of a window is a table of its columns of patches and
one of its rows. The same kernel makes these tables from the encoding first, in float32.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from infimm_kernels.backends import AotConfig, capability_of
from infimm_kernels.checks import unit_last_stride
from infimm_kernels.position_2d.triton_forward import position_table
from infimm_kernels.triton_common import tile_of_program


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right columns of x [BLOCK_M, BLOCK_N]."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def finish_tile(
    acc,
    column,
    table_ptrs,
    row_table_ptrs,
    out_ptr,
    row_in,
    placed,
    num_columns,
    PLACE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Add the tables to a tile and store it, in 2 or 4 parts, one after the other, to save registers.

    column: the first of the tile; out_ptr: the tile's first row; table_ptrs, row_table_ptrs: each row's
    entries, unless PLACE is "none".
    """
    PART: tl.constexpr = BLOCK_N // SLICES
    left, right = _halves(acc, BLOCK_M, BLOCK_N)
    if SLICES == 2:
        parts = (left, right)
    else:
        parts = _halves(left, BLOCK_M, BLOCK_N // 2) + _halves(right, BLOCK_M, BLOCK_N // 2)
    for i in tl.static_range(SLICES):
        part = parts[i]
        columns = column + i * PART + tl.arange(0, PART)
        column_in = (columns < num_columns)[None, :]
        if PLACE != "none":
            mask = placed[:, None] & column_in
            part += tl.load(table_ptrs[:, None] + columns[None, :], mask=mask, other=0.0)
            if PLACE == "token":
                part += tl.load(row_table_ptrs[:, None] + columns[None, :], mask=mask, other=0.0)
        out_ptrs = out_ptr + (tl.arange(0, BLOCK_M) * num_columns)[:, None] + columns[None, :]
        tl.store(out_ptrs, part.to(out_ptr.dtype.element_ty), mask=row_in[:, None] & column_in)


@triton.jit(do_not_specialize=["num_rows"])
def vision_keys_values_kernel(
    x_ptr,
    weight_ptr,
    table_ptr,
    row_table_ptr,
    positions_ptr,
    out_ptr,
    stride_x_window,
    stride_x_token,
    stride_weight_chunk,
    stride_weight_row,
    num_rows,
    seqlen,
    num_chunks,
    inner,
    hidden,
    width,
    height,
    num_prefix_tokens,
    PLACE: tl.constexpr,
    EVEN_HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SLICES: tl.constexpr,
):
    """out [num_chunks, num_rows, inner]; a chunk is the keys or the values of a layer.

    PLACE: "none"; "window", with table [num_chunks, num_windows, inner]; or "token", with table [num_chunks,
    num_windows * width, inner] and row_table [num_chunks, num_windows * height, inner].
    positions: contiguous [num_windows, 2], unless PLACE is "none".
    """
    blocks_per_chunk = tl.cdiv(inner, BLOCK_N)
    block_m, block_n = tile_of_program(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), num_chunks * blocks_per_chunk, GROUP_M
    )
    chunk = (block_n // blocks_per_chunk).to(tl.int64)
    column = (block_n % blocks_per_chunk) * BLOCK_N

    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_K)
    # Clamped rows instead of masked loads: what they add is never stored, and masks cost registers.
    x_rows = tl.minimum(rows, num_rows - 1)
    x_tokens = (x_rows % seqlen).to(tl.int64) * stride_x_token
    x_rows = (x_rows // seqlen).to(tl.int64) * stride_x_window + x_tokens
    weight_rows = tl.minimum(column + tl.arange(0, BLOCK_N), inner - 1).to(tl.int64) * stride_weight_row
    x_ptrs = x_ptr + x_rows[:, None] + channels[None, :]
    weight_ptrs = weight_ptr + chunk * stride_weight_chunk + weight_rows[None, :] + channels[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, hidden, BLOCK_K):
        if EVEN_HIDDEN:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            channel_in = start + channels < hidden
            x = tl.load(x_ptrs, mask=channel_in[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=channel_in[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    row_in = rows < num_rows
    placed = row_in
    table_ptrs, row_table_ptrs = table_ptr, row_table_ptr
    if PLACE != "none":
        # Without a position nothing is added: the table's zero of it is NaN where weight has an inf.
        position_ptrs = positions_ptr + (rows // seqlen).to(tl.int64) * 2
        placed &= tl.load(position_ptrs, mask=row_in, other=-1) >= 0
        placed &= tl.load(position_ptrs + 1, mask=row_in, other=-1) >= 0
        windows = chunk * (num_rows // seqlen) + rows // seqlen
        if PLACE == "window":
            table_ptrs = table_ptr + windows * inner
        else:
            patches = rows % seqlen - num_prefix_tokens
            placed &= patches >= 0
            table_ptrs = table_ptr + (windows * width + patches % width) * inner
            row_table_ptrs = row_table_ptr + (windows * height + patches // width) * inner
    out_ptr += (chunk * num_rows + block_m * BLOCK_M) * inner
    finish_tile(
        acc,
        column,
        table_ptrs,
        row_table_ptrs,
        out_ptr,
        row_in,
        placed,
        inner,
        PLACE,
        BLOCK_M,
        BLOCK_N,
        SLICES,
    )


class Config(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    slices: int


def config(dtype: torch.dtype, capability: tuple[int, int], wide: bool) -> Config:
    """The tile for operands of this dtype; chosen for registers, its speed is not measured.

    wide: whether tiles of 256 columns fit the product without a tail.
    """
    if dtype == torch.float32:
        return Config(64, 64, 16, 4, 3, 2)
    if capability[0] in (9, 10):  # the GPUs with more than 200 KB of shared memory
        return Config(128, 256, 64, 8, 3, 4) if wide else Config(128, 128, 64, 8, 3, 2)
    return Config(128, 128, 32, 8, 4, 4)


def table_config(dtype: torch.dtype) -> Config:
    """The tile for the tables: so few rows that small tiles are needed to occupy the GPU."""
    return config(dtype, (8, 0), wide=False) if dtype == torch.float32 else Config(64, 64, 64, 4, 3, 2)


GROUP_M = 8


def launch_vision_keys_values(
    features: Tensor,
    weight: Tensor,
    positions: Tensor | None,
    granularity: str,
    window_shape: tuple[int, int],
    num_prefix_tokens: int,
) -> Tensor:
    """features [num_windows, seqlen, hidden], weight [num_layers, 2, inner, hidden] ->
    [num_layers, 2, num_windows * seqlen, inner]."""
    num_windows, seqlen, _ = features.shape
    num_layers, _, inner, _ = weight.shape
    kv = torch.empty(
        (num_layers, 2, num_windows * seqlen, inner), dtype=features.dtype, device=features.device
    )
    if kv.numel() == 0:
        return kv
    features, chunks = unit_last_stride(features), unit_last_stride(weight.flatten(0, 1))
    height, width = window_shape
    place, tables = "none", (None, None, None)
    with torch.cuda.device_of(features):
        if positions is not None and height * width > 0:  # else "token" with prefix tokens alone
            place = granularity
            tables = (*_tables(chunks, positions, place, height, width), positions.contiguous())
        tile = config(features.dtype, capability_of(features), wide=inner % 256 == 0)
        _launch(features, chunks, kv, tile, place, tables, width, height, num_prefix_tokens)
    return kv


def _tables(
    chunks: Tensor, positions: Tensor, granularity: str, height: int, width: int
) -> tuple[Tensor | None, Tensor | None]:
    """table and row_table of the kernel; chunks [num_layers * 2, inner, hidden]."""
    half = chunks.shape[2] // 2
    pe = position_table(positions, width, height, half)  # [num_windows, width + height, half]
    pe = pe.to(chunks.dtype)
    if granularity == "window":  # its two entries are the channels of the whole encoding in order
        return _table(pe.view(-1, 1, 2 * half), chunks), None
    return _table(pe[:, :width], chunks[..., :half]), _table(pe[:, width:], chunks[..., half:])


def _table(pe: Tensor, chunks: Tensor) -> Tensor:
    """pe [num_windows, entries, channels], chunks [num_chunks, inner, channels] ->
    [num_chunks, num_windows * entries, inner]."""
    shape = (chunks.shape[0], pe.shape[0] * pe.shape[1], chunks.shape[1])
    table = torch.empty(shape, dtype=torch.float32, device=pe.device)
    _launch(pe, chunks, table, table_config(pe.dtype))
    return table


def _launch(
    x: Tensor,
    chunks: Tensor,
    out: Tensor,
    tile: Config,
    place: str = "none",
    tables: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    width: int = 1,
    height: int = 1,
    num_prefix_tokens: int = 0,
) -> None:
    """x [num_windows, seqlen, hidden], chunks [num_chunks, inner, hidden].

    tables: table, row_table and positions of the kernel.
    """
    num_windows, seqlen, hidden = x.shape
    num_chunks, inner, _ = chunks.shape
    num_rows = num_windows * seqlen
    grid = (triton.cdiv(num_rows, tile.block_m) * num_chunks * triton.cdiv(inner, tile.block_n),)
    vision_keys_values_kernel[grid](
        x,
        chunks,
        *tables,
        out,
        x.stride(0),
        x.stride(1),
        chunks.stride(0),
        chunks.stride(1),
        num_rows,
        seqlen,
        num_chunks,
        inner,
        hidden,
        width,
        height,
        num_prefix_tokens,
        PLACE=place,
        EVEN_HIDDEN=hidden % tile.block_k == 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=GROUP_M,
        SLICES=tile.slices,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


DTYPES = ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32"))
TABLES = {"none": (), "window": ("table_ptr",), "token": ("table_ptr", "row_table_ptr")}


def aot_configs() -> Iterator[AotConfig]:
    """Every tile that `launch_vision_keys_values` can choose, with the tables of each granularity."""
    for arch in ((8, 0), (9, 0)):
        for dtype, name in DTYPES:
            wide, narrow = (config(dtype, arch, wide) for wide in (True, False))
            for place in TABLES:
                yield _aot_config(arch, name, name, place, True, wide)
            yield _aot_config(arch, name, name, "token", False, wide)
            if narrow != wide:
                yield _aot_config(arch, name, name, "token", True, narrow)
            if dtype != torch.float32:  # whose tables take the tile that the result takes
                yield _aot_config(arch, name, "fp32", "none", True, table_config(dtype))


def _aot_config(
    arch: tuple[int, int], dtype: str, out_dtype: str, place: str, even_hidden: bool, tile: Config
) -> AotConfig:
    signature = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "out_ptr": f"*{out_dtype}"}
    signature |= dict.fromkeys(TABLES[place], "*fp32")
    if place != "none":
        signature["positions_ptr"] = "*i32"
    integers = ("stride_x_window", "stride_x_token", "stride_weight_chunk", "stride_weight_row", "num_rows")
    integers += ("seqlen", "num_chunks", "inner", "hidden", "width", "height", "num_prefix_tokens")
    signature |= dict.fromkeys(integers, "i32")
    constexprs = {
        "PLACE": place,
        "EVEN_HIDDEN": even_hidden,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": GROUP_M,
        "SLICES": tile.slices,
    }
    constexprs |= {name: None for name in (*TABLES["token"], "positions_ptr") if name not in signature}
    return AotConfig(
        vision_keys_values_kernel,
        f"vision_keys_values {tile.block_m}x{tile.block_n} {place=!s} {even_hidden=} {dtype}->{out_dtype}",
        signature,
        constexprs,
        tile.num_warps,
        tile.num_stages,
        arch,
        default=even_hidden,
        dtype=dtype,
    )

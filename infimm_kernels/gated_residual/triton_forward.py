"""Triton forward of x + tanh(gate) * (o @ weight^T): one matrix product whose epilogue does the rest.

The product never reaches memory, which saves a write and two reads of [rows, hidden]. Where the product
itself is most of the work, the library's product and one element-wise kernel take its place.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from infimm_kernels.backends import AotConfig, capability_of
from infimm_kernels.checks import unit_last_stride
from infimm_kernels.gated_residual.triton_elementwise import (
    DTYPES,
    Tile,
    add_update,
    aot_config,
    aot_variants,
    flat_row_mask,
    launch_epilogue,
    rows_in,
    tanh,
)
from infimm_kernels.triton_common import tile_of_program


@triton.jit(do_not_specialize=["num_rows"])
def gated_residual_kernel(
    x_ptr,
    o_ptr,
    weight_ptr,
    gate_ptr,
    row_mask_ptr,
    y_ptr,
    stride_x_row,
    stride_o_row,
    stride_weight_row,
    stride_y_row,
    num_rows,
    hidden,
    inner,
    HAS_ROW_MASK: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    blocks_m, blocks_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(hidden, BLOCK_N)
    block_m, block_n = tile_of_program(tl.program_id(0), blocks_m, blocks_n, GROUP_M)
    rows = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inners = tl.arange(0, BLOCK_K)
    row_in = rows < num_rows
    column_in = columns < hidden
    # Clamped rows instead of masked loads: what they add is never stored, and masks cost registers. Where the
    # tile has few rows that exist, the others are not read.
    o_rows = tl.minimum(rows, num_rows - 1)
    weight_rows = tl.minimum(columns, hidden - 1)
    o_ptrs = o_ptr + o_rows[:, None] * stride_o_row + inners[None, :]
    weight_ptrs = weight_ptr + weight_rows[None, :] * stride_weight_row + inners[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inner, BLOCK_K):
        if EVEN_INNER:
            o = tl.load(o_ptrs, mask=row_in[:, None], other=0.0) if MASK_ROWS else tl.load(o_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            inner_in = start + inners < inner
            o = tl.load(o_ptrs, mask=row_in[:, None] & inner_in[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=inner_in[:, None], other=0.0)
        acc = tl.dot(o, weight, acc, input_precision="ieee")
        o_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    gate = tl.load(gate_ptr + columns, mask=column_in, other=0.0).to(tl.float32)
    updated = rows_in(row_mask_ptr, rows, num_rows, HAS_ROW_MASK)
    mask = row_in[:, None] & column_in[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_x_row + columns[None, :], mask=mask, other=0.0)
    y = add_update(x, acc * tanh(gate)[None, :], (updated == 0)[:, None])
    tl.store(y_ptr + rows[:, None] * stride_y_row + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


# Where the product outweighs the element-wise passes it saves, a library's product is the safer choice until
# a GPU has measured both.
LARGE_INNER = 1024
# Up to here a call is bound by reading weight: narrow tiles, so that every multiprocessor reads.
FEW_ROWS = 64
GROUP_M = 8


def uses_library(num_rows: int, inner: int, dtype: torch.dtype) -> bool:
    """Whether the library does the forward's product; in float16 it could overflow before the gate."""
    return inner > LARGE_INNER and num_rows > FEW_ROWS and dtype != torch.float16


def tile_for(num_rows: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """The tile for o and weight of this dtype; chosen for registers, its speed is not measured."""
    if num_rows <= 16:
        return Tile(16, 32, 64, 4, 3) if dtype == torch.float32 else Tile(16, 32, 128, 4, 5)
    if num_rows <= FEW_ROWS:
        return Tile(FEW_ROWS, 32, 32, 4, 3) if dtype == torch.float32 else Tile(FEW_ROWS, 32, 128, 4, 4)
    if dtype == torch.float32:
        return Tile(64, 64, 32, 4, 2)
    if capability[0] in (9, 10):  # the GPUs with more than 200 KB of shared memory
        return Tile(128, 128, 64, 8, 3)
    return Tile(128, 128, 32, 8, 3)


def launch_gated_residual_projection(
    x: Tensor, o: Tensor, weight: Tensor, gate: Tensor, row_mask: Tensor | None
) -> Tensor:
    """x [..., hidden], o [..., inner], weight [hidden, inner], gate [hidden], row_mask [...] -> like x."""
    hidden, inner = weight.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows_x, rows_o = unit_last_stride(x.reshape(-1, hidden)), o.reshape(-1, inner)
    rows_y, gate, row_mask = y.view(-1, hidden), gate.contiguous(), flat_row_mask(row_mask)
    num_rows = rows_x.shape[0]
    if num_rows == 0:
        return y
    if uses_library(num_rows, inner, o.dtype):
        launch_epilogue(rows_x, torch.nn.functional.linear(rows_o, weight), gate, row_mask, rows_y)
        return y
    rows_o, weight = unit_last_stride(rows_o), unit_last_stride(weight)
    tile = tile_for(num_rows, o.dtype, capability_of(x))
    grid = (triton.cdiv(num_rows, tile.block_m) * triton.cdiv(hidden, tile.block_n),)
    with torch.cuda.device_of(x):
        gated_residual_kernel[grid](
            rows_x,
            rows_o,
            weight,
            gate,
            row_mask,
            rows_y,
            rows_x.stride(0),
            rows_o.stride(0),
            weight.stride(0),
            rows_y.stride(0),
            num_rows,
            hidden,
            inner,
            HAS_ROW_MASK=row_mask is not None,
            EVEN_INNER=inner % tile.block_k == 0,
            MASK_ROWS=num_rows <= FEW_ROWS,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=GROUP_M,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y


def aot_configs() -> Iterator[AotConfig]:
    """Every tile that `launch_gated_residual_projection` can choose, per dtype of o and of x.

    The gate is in the dtype of x here; another one changes a single load.
    """
    for capability in ((8, 0), (9, 0)):
        for dtype, branch, stream in DTYPES:
            for num_rows, has_row_mask, even_inner in _aot_cases(branch, stream):
                tile = tile_for(num_rows, dtype, capability)
                constexprs = {
                    "HAS_ROW_MASK": has_row_mask,
                    "EVEN_INNER": even_inner,
                    "MASK_ROWS": num_rows <= FEW_ROWS,
                    "BLOCK_M": tile.block_m,
                    "BLOCK_N": tile.block_n,
                    "BLOCK_K": tile.block_k,
                    "GROUP_M": GROUP_M,
                }
                rows = f" rows<={num_rows}" if num_rows <= FEW_ROWS else ""
                name = (
                    f"gated_residual row_mask={has_row_mask} even_inner={even_inner}{rows} {branch}+{stream}"
                )
                pointers = {"o": branch, "weight": branch, "x": stream, "gate": stream, "y": stream}
                yield aot_config(
                    gated_residual_kernel,
                    name,
                    pointers,
                    constexprs,
                    tile[3:],
                    capability=capability,
                    default=num_rows > FEW_ROWS,
                    dtype=branch,
                )


def _aot_cases(branch: str, stream: str) -> Iterator[tuple[int, bool, bool]]:
    """num_rows, has_row_mask, even_inner."""
    for has_row_mask, even_inner in aot_variants(branch):
        yield FEW_ROWS + 1, has_row_mask, even_inner
    if branch == stream:
        for num_rows in (16, FEW_ROWS):
            yield num_rows, True, True
            if branch == "bf16":
                yield num_rows, False, False

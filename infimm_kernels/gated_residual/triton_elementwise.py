"""Triton passes around a library's matrix product: the gated residual after it, the scaled dy before it.

Also the functions that these kernels share with those that do the product themselves.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from infimm_kernels.backends import AotConfig

# Elements of the branch, of the stream: (o, weight), (x, gate, y).
DTYPES = (
    (torch.bfloat16, "bf16", "bf16"),
    (torch.float16, "fp16", "fp16"),
    (torch.float32, "fp32", "fp32"),
    (torch.bfloat16, "bf16", "fp32"),
    (torch.float16, "fp16", "fp32"),
)


class Tile(NamedTuple):
    """Of a matrix product: rows and columns of the result, depth of a step of the sum."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@triton.jit
def tanh(x):
    """Accurate to float32 near 0 too, where gates live and 1 - exp(-2x) cancels: an odd series below 0.3."""
    y = x * x
    series = -1382.0 / 155925.0
    series = series * y + 62.0 / 2835.0
    series = series * y - 17.0 / 315.0
    series = series * y + 2.0 / 15.0
    series = series * y - 1.0 / 3.0
    e = tl.exp(-2.0 * tl.abs(x))
    ratio = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.3, x + x * y * series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def add_update(x, update, unchanged):
    """x + update in float32; x bit for bit where `unchanged` or the update is zero: -0.0 + 0.0 is 0.0."""
    x = x.to(tl.float32)
    return tl.where(unchanged | (update == 0.0), x, x + update)


@triton.jit
def rows_in(row_mask_ptr, rows, num_rows, HAS_ROW_MASK: tl.constexpr):
    """Which of `rows` exist and are not masked."""
    row_in = rows < num_rows
    if HAS_ROW_MASK:
        row_in = row_in & (tl.load(row_mask_ptr + rows, mask=row_in, other=0) != 0)
    return row_in


@triton.jit(do_not_specialize=["num_rows"])
def gated_residual_epilogue_kernel(
    x_ptr,
    m_ptr,
    gate_ptr,
    row_mask_ptr,
    y_ptr,
    stride_x_row,
    stride_m_row,
    stride_y_row,
    num_rows,
    hidden,
    HAS_ROW_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks_n = tl.cdiv(hidden, BLOCK_N)
    rows = (tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_in = columns < hidden
    updated = rows_in(row_mask_ptr, rows, num_rows, HAS_ROW_MASK)
    inside = (rows < num_rows)[:, None] & column_in[None, :]
    m_ptrs = m_ptr + rows[:, None] * stride_m_row + columns[None, :]
    m = tl.load(m_ptrs, mask=updated[:, None] & column_in[None, :], other=0.0).to(tl.float32)
    x = tl.load(x_ptr + rows[:, None] * stride_x_row + columns[None, :], mask=inside, other=0.0)
    t = tanh(tl.load(gate_ptr + columns, mask=column_in, other=0.0).to(tl.float32))
    y = add_update(x, m * t[None, :], (updated == 0)[:, None])
    y_ptrs = y_ptr + rows[:, None] * stride_y_row + columns[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def gated_residual_scale_kernel(
    dy_ptr,
    gate_ptr,
    row_mask_ptr,
    dm_ptr,
    stride_dy_row,
    stride_dm_row,
    num_rows,
    hidden,
    HAS_ROW_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks_n = tl.cdiv(hidden, BLOCK_N)
    rows = (tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_in = columns < hidden
    kept = rows_in(row_mask_ptr, rows, num_rows, HAS_ROW_MASK)
    dy_ptrs = dy_ptr + rows[:, None] * stride_dy_row + columns[None, :]
    dy = tl.load(dy_ptrs, mask=kept[:, None] & column_in[None, :], other=0.0).to(tl.float32)
    t = tanh(tl.load(gate_ptr + columns, mask=column_in, other=0.0).to(tl.float32))
    dm_ptrs = dm_ptr + rows[:, None] * stride_dm_row + columns[None, :]
    inside = (rows < num_rows)[:, None] & column_in[None, :]
    tl.store(dm_ptrs, (dy * t[None, :]).to(dm_ptr.dtype.element_ty), mask=inside)


# A program's tanh of BLOCK_N gates serves BLOCK_M rows.
BLOCK_M, BLOCK_N, NUM_WARPS = 16, 256, 4


def launch_epilogue(x: Tensor, m: Tensor, gate: Tensor, row_mask: Tensor | None, y: Tensor) -> None:
    """y = x + tanh(gate) * m * row_mask, all [rows, hidden] with neighbouring channels; gate contiguous."""
    num_rows, hidden = x.shape
    grid = (triton.cdiv(num_rows, BLOCK_M) * triton.cdiv(hidden, BLOCK_N),)
    with torch.cuda.device_of(x):
        gated_residual_epilogue_kernel[grid](
            x,
            m,
            gate,
            row_mask,
            y,
            x.stride(0),
            m.stride(0),
            y.stride(0),
            num_rows,
            hidden,
            HAS_ROW_MASK=row_mask is not None,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=NUM_WARPS,
        )


def launch_scale(dy: Tensor, gate: Tensor, row_mask: Tensor | None, dm: Tensor) -> None:
    """dm = dy * tanh(gate) * row_mask in the dtype of dm, [rows, hidden] with neighbouring channels."""
    num_rows, hidden = dy.shape
    grid = (triton.cdiv(num_rows, BLOCK_M) * triton.cdiv(hidden, BLOCK_N),)
    with torch.cuda.device_of(dy):
        gated_residual_scale_kernel[grid](
            dy,
            gate,
            row_mask,
            dm,
            dy.stride(0),
            dm.stride(0),
            num_rows,
            hidden,
            HAS_ROW_MASK=row_mask is not None,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=NUM_WARPS,
        )


def flat_row_mask(row_mask: Tensor | None) -> Tensor | None:
    """uint8 [rows], as the kernels read it."""
    return None if row_mask is None else row_mask.reshape(-1).contiguous().view(torch.uint8)


def aot_config(kernel, name: str, dtypes: dict[str, str], constexprs: dict, tile, **more) -> AotConfig:
    """`dtypes`: of every pointer by its name before _ptr; tile: num_warps and num_stages.

    row_mask_ptr is uint8 where constexprs["HAS_ROW_MASK"], and else the constant None; strides and sizes are
    32 bits wide.
    """
    signature = {f"{pointer}_ptr": f"*{dtype}" for pointer, dtype in dtypes.items()}
    if constexprs.get("HAS_ROW_MASK"):
        signature["row_mask_ptr"] = "*u8"
    for argument in kernel.arg_names:
        if argument.endswith("_ptr") and argument not in signature:
            constexprs = constexprs | {argument: None}
        elif argument not in signature and argument not in constexprs:
            signature[argument] = "i32"
    return AotConfig(kernel, name, signature, constexprs, *tile, **more)


def aot_variants(branch: str) -> tuple[tuple[bool, bool], ...]:
    """has_row_mask, even: the variants of a product that are compiled ahead; float16 is like bfloat16."""
    return ((True, True),) if branch == "fp16" else ((True, True), (False, True), (True, False))


def aot_configs() -> Iterator[AotConfig]:
    for capability in ((8, 0), (9, 0)):
        for _, branch, stream in DTYPES:
            constexprs = {"HAS_ROW_MASK": True, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
            tile, more = (NUM_WARPS, 3), {"capability": capability, "dtype": branch}
            name = f"row_mask=True {branch}+{stream}"
            if branch != "fp16":  # its forward is never the library's
                pointers = {"m": branch, "x": stream, "gate": stream, "y": stream}
                yield aot_config(
                    gated_residual_epilogue_kernel, f"epilogue {name}", pointers, constexprs, tile, **more
                )
            pointers = {"dy": stream, "gate": stream, "dm": branch}
            yield aot_config(
                gated_residual_scale_kernel,
                f"scale {name}",
                pointers,
                constexprs,
                tile,
                direction="bwd",
                **more,
            )

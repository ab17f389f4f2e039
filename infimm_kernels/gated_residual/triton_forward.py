"""Triton forward of x + tanh(gate) * (o @ weight^T): one matrix product whose epilogue does the rest.

The product never reaches memory, which saves a write and two reads of [rows, hidden].
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from infimm_kernels.backends import AotConfig
from infimm_kernels.checks import unit_last_stride


@triton.jit
def _tanh(x):
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Tiles go down GROUP_M row blocks before the next column block, so a group shares its rows of o in the L2
    # cache.
    program = tl.program_id(0)
    num_blocks_m = tl.cdiv(num_rows, BLOCK_M)
    programs_per_group = GROUP_M * tl.cdiv(hidden, BLOCK_N)
    first_m = (program // programs_per_group) * GROUP_M
    group_m = tl.minimum(num_blocks_m - first_m, GROUP_M)
    block_m = first_m + (program % programs_per_group) % group_m
    block_n = (program % programs_per_group) // group_m

    rows = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inners = tl.arange(0, BLOCK_K)
    row_in = rows < num_rows
    column_in = columns < hidden
    # Clamped rows instead of masked loads: what they add is never stored, and masks cost registers.
    o_rows = tl.minimum(rows, num_rows - 1)
    weight_rows = tl.minimum(columns, hidden - 1)
    o_ptrs = o_ptr + o_rows[:, None] * stride_o_row + inners[None, :]
    weight_ptrs = weight_ptr + weight_rows[None, :] * stride_weight_row + inners[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inner, BLOCK_K):
        if EVEN_INNER:
            o = tl.load(o_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            inner_in = start + inners < inner
            o = tl.load(o_ptrs, mask=inner_in[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=inner_in[:, None], other=0.0)
        acc = tl.dot(o, weight, acc, input_precision="ieee")
        o_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    gate = tl.load(gate_ptr + columns, mask=column_in, other=0.0).to(tl.float32)
    update = acc * _tanh(gate)[None, :]
    unchanged = update == 0.0
    if HAS_ROW_MASK:
        keep = tl.load(row_mask_ptr + rows, mask=row_in, other=0) == 0
        unchanged = unchanged | keep[:, None]
    mask = row_in[:, None] & column_in[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_x_row + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.where(unchanged, x, x + update).to(y_ptr.dtype.element_ty)  # -0.0 + 0.0 would be 0.0
    tl.store(y_ptr + rows[:, None] * stride_y_row + columns[None, :], y, mask=mask)


class Config(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def config(dtype: torch.dtype, capability: tuple[int, int]) -> Config:
    """The tile for o and weight of this dtype; chosen for registers, its speed is not measured."""
    if dtype == torch.float32:
        return Config(64, 64, 32, 4, 2)
    if capability[0] in (9, 10):  # the GPUs with more than 200 KB of shared memory
        return Config(128, 128, 64, 8, 3)
    return Config(128, 128, 32, 8, 3)


GROUP_M = 8


def launch_gated_residual_projection(
    x: Tensor, o: Tensor, weight: Tensor, gate: Tensor, row_mask: Tensor | None
) -> Tensor:
    """x [..., hidden], o [..., inner], weight [hidden, inner], gate [hidden], row_mask [...] -> like x."""
    hidden, inner = weight.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows_x, rows_o = unit_last_stride(x.reshape(-1, hidden)), unit_last_stride(o.reshape(-1, inner))
    weight, rows_y = unit_last_stride(weight), y.view(-1, hidden)
    num_rows = rows_x.shape[0]
    if num_rows == 0:
        return y
    tile = config(o.dtype, torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0))
    grid = (triton.cdiv(num_rows, tile.block_m) * triton.cdiv(hidden, tile.block_n),)
    with torch.cuda.device_of(x):
        gated_residual_kernel[grid](
            rows_x,
            rows_o,
            weight,
            gate.contiguous(),
            None if row_mask is None else row_mask.reshape(-1).contiguous().view(torch.uint8),
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
    dtypes = (
        (torch.float16, "fp16", "fp16"),
        (torch.bfloat16, "bf16", "bf16"),
        (torch.float32, "fp32", "fp32"),
        (torch.float16, "fp16", "fp32"),
        (torch.bfloat16, "bf16", "fp32"),
    )
    for capability in ((8, 0), (9, 0)):
        for dtype, branch, stream in dtypes:
            for has_row_mask, even_inner in ((True, True), (False, True), (True, False)):
                tile = config(dtype, capability)
                signature = {f"{name}_ptr": f"*{branch}" for name in ("o", "weight")}
                signature |= {f"{name}_ptr": f"*{stream}" for name in ("x", "gate", "y")}
                signature |= {"row_mask_ptr": "*u8"} if has_row_mask else {}
                signature |= {f"stride_{name}_row": "i32" for name in ("x", "o", "weight", "y")}
                signature |= {"num_rows": "i32", "hidden": "i32", "inner": "i32"}
                constexprs = {
                    "HAS_ROW_MASK": has_row_mask,
                    "EVEN_INNER": even_inner,
                    "BLOCK_M": tile.block_m,
                    "BLOCK_N": tile.block_n,
                    "BLOCK_K": tile.block_k,
                    "GROUP_M": GROUP_M,
                }
                if not has_row_mask:
                    constexprs["row_mask_ptr"] = None
                name = f"gated_residual row_mask={has_row_mask} even_inner={even_inner} {branch}+{stream}"
                yield AotConfig(
                    gated_residual_kernel,
                    name,
                    signature,
                    constexprs,
                    tile.num_warps,
                    tile.num_stages,
                    capability,
                    dtype=branch,
                )

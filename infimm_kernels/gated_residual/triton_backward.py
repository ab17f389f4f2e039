"""Triton backward of x + tanh(gate) * (o @ weight^T) * row_mask, from o, weight and gate alone.

One kernel per matrix product. do = (dm * t) weight has the scaling in its loads; S = dm^T o becomes dweight =
t * S and the sums of weight * S for dgate while it is in registers. Nothing is added up in memory by several
programs: the sums of the tiles are written apart and added in order, so every run gives the same bits.
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
    aot_config,
    aot_variants,
    flat_row_mask,
    launch_scale,
    rows_in,
)
from infimm_kernels.gated_residual.triton_forward import GROUP_M, LARGE_INNER
from infimm_kernels.triton_common import rows_per_sum, tile_of_program


@triton.jit(do_not_specialize=["num_rows"])
def gated_residual_backward_input_kernel(
    dy_ptr,
    weight_ptr,
    t_ptr,
    row_mask_ptr,
    do_ptr,
    stride_dy_row,
    stride_weight_row,
    stride_do_row,
    num_rows,
    hidden,
    inner,
    HAS_ROW_MASK: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    blocks_m, blocks_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(inner, BLOCK_N)
    block_m, block_n = tile_of_program(tl.program_id(0), blocks_m, blocks_n, GROUP_M)
    rows = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_K)
    column_in = columns < inner
    # A masked row is not read, so that no NaN of it meets a zero.
    kept = rows_in(row_mask_ptr, rows, num_rows, HAS_ROW_MASK)
    dy_ptrs = dy_ptr + rows[:, None] * stride_dy_row + channels[None, :]
    weight_ptrs = weight_ptr + channels.to(tl.int64)[:, None] * stride_weight_row + columns[None, :]
    t_ptrs = t_ptr + channels
    weight_step = tl.cast(stride_weight_row, tl.int64) * BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, hidden, BLOCK_K):
        if EVEN:
            dy = tl.load(dy_ptrs, mask=kept[:, None], other=0.0)
            weight = tl.load(weight_ptrs)
            t = tl.load(t_ptrs)
        else:
            channel_in = start + channels < hidden
            dy = tl.load(dy_ptrs, mask=kept[:, None] & channel_in[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=channel_in[:, None] & column_in[None, :], other=0.0)
            t = tl.load(t_ptrs, mask=channel_in, other=0.0)
        dm = (dy.to(tl.float32) * t[None, :]).to(weight.dtype)
        acc = tl.dot(dm, weight, acc, input_precision="ieee")
        dy_ptrs += BLOCK_K
        weight_ptrs += weight_step
        t_ptrs += BLOCK_K
    do_ptrs = do_ptr + rows[:, None] * stride_do_row + columns[None, :]
    tl.store(do_ptrs, acc.to(do_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None] & column_in[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def gated_residual_backward_weight_kernel(
    dy_ptr,
    o_ptr,
    weight_ptr,
    t_ptr,
    row_mask_ptr,
    dweight_ptr,
    sums_ptr,
    stride_dy_row,
    stride_o_row,
    stride_weight_row,
    stride_dweight_row,
    num_rows,
    hidden,
    inner,
    HAS_ROW_MASK: tl.constexpr,
    WITH_DWEIGHT: tl.constexpr,
    WITH_DGATE: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS_PER_SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """sums: float32 [blocks of inner, hidden], the part of rowsum(weight * S) that is in a block.

    ROWS_PER_SUM: 0, or the rows after which a new sum begins.
    """
    blocks_m, blocks_n = tl.cdiv(hidden, BLOCK_M), tl.cdiv(inner, BLOCK_N)
    block_m, block_n = tile_of_program(tl.program_id(0), blocks_m, blocks_n, GROUP_M)
    channels = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_K)
    channel_in, column_in = channels < hidden, columns < inner
    dy_ptrs = dy_ptr + rows.to(tl.int64)[None, :] * stride_dy_row + channels[:, None]
    o_ptrs = o_ptr + rows.to(tl.int64)[:, None] * stride_o_row + columns[None, :]
    dy_step = tl.cast(stride_dy_row, tl.int64) * BLOCK_K
    o_step = tl.cast(stride_o_row, tl.int64) * BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = acc
    for start in range(0, num_rows, BLOCK_K):
        # Both factors of a masked row stay unread: a NaN of either would meet a zero of the other.
        kept = rows_in(row_mask_ptr, start + rows, num_rows, HAS_ROW_MASK)
        if EVEN:
            dy = tl.load(dy_ptrs, mask=kept[None, :], other=0.0)
            o = tl.load(o_ptrs, mask=kept[:, None], other=0.0)
        else:
            dy = tl.load(dy_ptrs, mask=kept[None, :] & channel_in[:, None], other=0.0)
            o = tl.load(o_ptrs, mask=kept[:, None] & column_in[None, :], other=0.0)
        if dy.dtype == o.dtype:
            acc = tl.dot(dy, o, acc, input_precision="ieee")
        else:
            # dgate has no other source than S, so dy keeps 16 bits of its mantissa, in two numbers.
            high = dy.to(tl.bfloat16)
            rest = tl.where(tl.abs(high.to(tl.float32)) == float("inf"), 0.0, dy - high.to(tl.float32))
            low = rest.to(tl.bfloat16)
            acc = tl.dot(low, o, acc, input_precision="ieee")
            acc = tl.dot(high, o, acc, input_precision="ieee")
        if ROWS_PER_SUM:
            is_last = (start + BLOCK_K) % ROWS_PER_SUM == 0
            total = tl.where(is_last, total + acc, total)
            acc = tl.where(is_last, 0.0, acc)
        dy_ptrs += dy_step
        o_ptrs += o_step
    if ROWS_PER_SUM:
        acc += total

    offsets = channels.to(tl.int64)[:, None]
    inside = channel_in[:, None] & column_in[None, :]
    if WITH_DGATE:
        weight_ptrs = weight_ptr + offsets * stride_weight_row + columns[None, :]
        products = acc * tl.load(weight_ptrs, mask=inside, other=0.0).to(tl.float32)
        if not EVEN:  # where an inf of dy met the zero of a column that does not exist, acc is NaN
            products = tl.where(inside, products, 0.0)
        sums_ptrs = sums_ptr + tl.cast(block_n, tl.int64) * hidden + channels
        tl.store(sums_ptrs, tl.sum(products, 1), mask=channel_in)
    if WITH_DWEIGHT:
        t = tl.load(t_ptr + channels, mask=channel_in, other=0.0)
        dweight_ptrs = dweight_ptr + offsets * stride_dweight_row + columns[None, :]
        tl.store(dweight_ptrs, (acc * t[:, None]).to(dweight_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_blocks"])
def gated_residual_backward_gate_kernel(
    sums_ptr, gate_ptr, dgate_ptr, num_blocks, hidden, BLOCK: tl.constexpr
):
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < hidden
    total = tl.zeros([BLOCK], tl.float32)
    sums_ptrs = sums_ptr + channels
    for _ in range(num_blocks):
        total += tl.load(sums_ptrs, mask=mask, other=0.0)
        sums_ptrs += hidden
    # 1 - tanh^2 without the subtraction, which has no digits left at a large gate.
    e = tl.exp(-2.0 * tl.abs(tl.load(gate_ptr + channels, mask=mask, other=0.0).to(tl.float32)))
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    tl.store(dgate_ptr + channels, (total * slope).to(dgate_ptr.dtype.element_ty), mask=mask)


GATE_BLOCK = 128


def _multiplies_in_float32(branch: torch.dtype, stream: torch.dtype) -> bool:
    """Whether S is a product of float32 numbers: a float32 dy may be far outside the range of float16."""
    return stream == torch.float32 and branch != torch.bfloat16


def tiles_for(branch: torch.dtype, stream: torch.dtype, capability: tuple[int, int]) -> tuple[Tile, Tile]:
    """The tiles of do and of S for the dtype of o and weight and that of dy; their speed is not measured."""
    large_memory = capability[0] in (9, 10)  # the GPUs with more than 200 KB of shared memory
    short, float32 = Tile(128, 128, 64 if large_memory else 32, 8, 3), Tile(64, 64, 16, 4, 3)
    return (
        float32 if branch == torch.float32 else short,
        float32 if _multiplies_in_float32(branch, stream) else short,
    )


def launch_gated_residual_backward(
    dy: Tensor,
    o: Tensor,
    weight: Tensor,
    gate: Tensor,
    row_mask: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of o, weight and gate, as `reference.backward` returns them."""
    hidden, inner = weight.shape
    rows_dy, rows_o = unit_last_stride(dy.reshape(-1, hidden)), o.reshape(-1, inner)
    gate, row_mask = gate.contiguous(), flat_row_mask(row_mask)
    t = gate.float().tanh()
    input_tile, weight_tile = tiles_for(o.dtype, dy.dtype, capability_of(dy))
    do = dweight = dgate = None
    if needs[0]:
        do = _input_gradient(rows_dy, weight, gate, t, row_mask, input_tile).view(o.shape)
    if needs[1] or needs[2]:
        rows_o = unit_last_stride(rows_o)
        if _multiplies_in_float32(o.dtype, dy.dtype):
            rows_o = rows_o.float()
        dweight, dgate = _weight_and_gate_gradients(
            rows_dy, rows_o, unit_last_stride(weight), gate, t, row_mask, needs, weight_tile
        )
    return do, dweight, dgate


def _input_gradient(dy, weight, gate, t, row_mask, tile: Tile) -> Tensor:
    """do [rows, inner]; by the library where the forward's product is too."""
    (num_rows, hidden), inner = dy.shape, weight.shape[1]
    if inner > LARGE_INNER and num_rows > 0:
        dm = torch.empty(num_rows, hidden, dtype=weight.dtype, device=dy.device)
        launch_scale(dy, gate, row_mask, dm)
        return dm @ weight
    do, weight = torch.empty(num_rows, inner, dtype=weight.dtype, device=dy.device), unit_last_stride(weight)
    if num_rows == 0:
        return do
    grid = (triton.cdiv(num_rows, tile.block_m) * triton.cdiv(inner, tile.block_n),)
    with torch.cuda.device_of(dy):
        gated_residual_backward_input_kernel[grid](
            dy,
            weight,
            t,
            row_mask,
            do,
            dy.stride(0),
            weight.stride(0),
            do.stride(0),
            num_rows,
            hidden,
            inner,
            HAS_ROW_MASK=row_mask is not None,
            EVEN=hidden % tile.block_k == 0 and inner % tile.block_n == 0,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=GROUP_M,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return do


def _weight_and_gate_gradients(
    dy, o, weight, gate, t, row_mask, needs, tile: Tile
) -> tuple[Tensor | None, Tensor | None]:
    (num_rows, inner), hidden = o.shape, dy.shape[1]
    blocks_n = triton.cdiv(inner, tile.block_n)
    dweight = dgate = sums = None
    if needs[1]:
        dweight = torch.empty(hidden, inner, dtype=weight.dtype, device=dy.device)
    if needs[2]:
        dgate = torch.empty_like(gate)
        sums = torch.empty(blocks_n, hidden, dtype=torch.float32, device=dy.device)
    grid = (triton.cdiv(hidden, tile.block_m) * blocks_n,)
    with torch.cuda.device_of(dy):
        gated_residual_backward_weight_kernel[grid](
            dy,
            o,
            weight,
            t,
            row_mask,
            dweight,
            sums,
            dy.stride(0),
            o.stride(0),
            weight.stride(0),
            inner,
            num_rows,
            hidden,
            inner,
            HAS_ROW_MASK=row_mask is not None,
            WITH_DWEIGHT=needs[1],
            WITH_DGATE=needs[2],
            EVEN=hidden % tile.block_m == 0 and inner % tile.block_n == 0,
            ROWS_PER_SUM=rows_per_sum(o.dtype),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=GROUP_M,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if needs[2]:
            gated_residual_backward_gate_kernel[(triton.cdiv(hidden, GATE_BLOCK),)](
                sums, gate, dgate, blocks_n, hidden, BLOCK=GATE_BLOCK
            )
    return dweight, dgate


def aot_configs() -> Iterator[AotConfig]:
    """Every tile that the launcher can choose, per dtype of o and of dy, with all gradients wanted or not."""
    for capability in ((8, 0), (9, 0)):
        for dtype, branch, stream in DTYPES:
            stream_dtype = torch.float32 if stream == "fp32" else dtype
            tiles = tiles_for(dtype, stream_dtype, capability)
            more = {"capability": capability, "direction": "bwd", "dtype": branch}
            o = "fp32" if _multiplies_in_float32(dtype, stream_dtype) else branch
            for has_row_mask, even in aot_variants(branch):
                flags = {"HAS_ROW_MASK": has_row_mask, "EVEN": even}
                name = f"row_mask={has_row_mask} even={even} {branch}+{stream}"
                pointers = {"dy": stream, "weight": branch, "t": "fp32", "do": branch}
                yield aot_config(
                    gated_residual_backward_input_kernel,
                    f"do {name}",
                    pointers,
                    flags | _blocks(tiles[0]),
                    tiles[0][3:],
                    **more,
                )
                frozen = ("weight", "gate") if branch == "bf16" and has_row_mask and even else ()
                for without in (None, *frozen):
                    flags |= {"WITH_DWEIGHT": without != "weight", "WITH_DGATE": without != "gate"}
                    flags["ROWS_PER_SUM"] = rows_per_sum(torch.float32 if o == "fp32" else dtype)
                    pointers = {"dy": stream, "o": o, "weight": branch, "t": "fp32"}
                    pointers |= {"dweight": branch} if without != "weight" else {}
                    pointers |= {"sums": "fp32"} if without != "gate" else {}
                    yield aot_config(
                        gated_residual_backward_weight_kernel,
                        f"dweight and dgate {name}" + (f" without {without}" if without else ""),
                        pointers,
                        flags | _blocks(tiles[1]),
                        tiles[1][3:],
                        default=without is None,
                        **more,
                    )
            if branch == stream:
                pointers = {"sums": "fp32", "gate": stream, "dgate": stream}
                yield aot_config(
                    gated_residual_backward_gate_kernel,
                    f"dgate {stream}",
                    pointers,
                    {"BLOCK": GATE_BLOCK},
                    (4, 3),
                    **more,
                )


def _blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": GROUP_M}

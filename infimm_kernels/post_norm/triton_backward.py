"""Triton backward of x + LayerNorm(y): dy of a row at a time, and the column sums that dweight and dbias are.

A program walks over many rows with its own sums in registers and leaves them in memory once; a second, small
kernel adds up those of all programs in a fixed order. So there are no atomics and the bits repeat. The next
row is on its way while one is worked on.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from infimm_kernels.backends import AotConfig
from infimm_kernels.checks import unit_last_stride
from infimm_kernels.post_norm.triton_forward import AOT_HIDDEN, DTYPES, load_piece, store_piece
from infimm_kernels.post_norm.triton_forward import tile as forward_tile


@triton.jit
def _load_row(ptr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    row = ()
    for i in tl.static_range(PIECES):
        row += (load_piece(ptr, i, HIDDEN, BLOCK),)
    return row


@triton.jit(do_not_specialize=["num_rows"])
def residual_post_norm_backward_kernel(
    dout_ptr,
    y_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dy_ptr,
    partial_ptr,
    stride_dout_row,
    stride_y_row,
    stride_dy_row,
    stride_partial,
    num_rows,
    NEED_DY: tl.constexpr,
    NEED_SUMS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):
    """partial [num_programs, 2, hidden]: the sums over this program's rows of dout * n and of dout."""
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    dweights = ()
    dbiases = ()
    if NEED_SUMS:
        for _ in tl.static_range(PIECES):
            dweights += (tl.zeros([BLOCK], tl.float32),)
            dbiases += (tl.zeros([BLOCK], tl.float32),)
    inverse: tl.constexpr = 1.0 / HIDDEN
    douts = _load_row(dout_ptr + program.to(tl.int64) * stride_dout_row, HIDDEN, BLOCK, PIECES)
    ys = _load_row(y_ptr + program.to(tl.int64) * stride_y_row, HIDDEN, BLOCK, PIECES)
    for row in range(program, num_rows, num_programs):
        # After the last row the same one again, which costs no mask.
        following = tl.where(row < num_rows - num_programs, row + num_programs, row).to(tl.int64)
        next_douts = _load_row(dout_ptr + following * stride_dout_row, HIDDEN, BLOCK, PIECES)
        next_ys = _load_row(y_ptr + following * stride_y_row, HIDDEN, BLOCK, PIECES)
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        ns = ()
        gs = ()
        new_dweights = ()
        new_dbiases = ()
        for i in tl.static_range(PIECES):
            dout = douts[i].to(tl.float32)
            n = (ys[i].to(tl.float32) - mean) * rstd
            ns += (n,)
            if NEED_SUMS:
                new_dweights += (dweights[i] + dout * n,)
                new_dbiases += (dbiases[i] + dout,)
            if NEED_DY:
                gs += (dout * load_piece(weight_ptr, i, HIDDEN, BLOCK).to(tl.float32),)
        if NEED_SUMS:
            dweights = new_dweights
            dbiases = new_dbiases
        if NEED_DY:
            total_g = gs[0]
            total_gn = gs[0] * ns[0]
            for i in tl.static_range(1, PIECES):
                total_g += gs[i]
                total_gn += gs[i] * ns[i]
            mean_g = tl.sum(total_g, 0) * inverse
            mean_gn = tl.sum(total_gn, 0) * inverse
            dy_row_ptr = dy_ptr + tl.cast(row, tl.int64) * stride_dy_row
            for i in tl.static_range(PIECES):
                dy = (gs[i] - mean_g - ns[i] * mean_gn) * rstd
                store_piece(dy_row_ptr, dy, i, HIDDEN, BLOCK)
        douts = next_douts
        ys = next_ys
    if NEED_SUMS:
        partial_ptr += program.to(tl.int64) * 2 * stride_partial
        for i in tl.static_range(PIECES):
            store_piece(partial_ptr, dweights[i], i, HIDDEN, BLOCK)
            store_piece(partial_ptr + stride_partial, dbiases[i], i, HIDDEN, BLOCK)


@triton.jit(do_not_specialize=["num_programs"])
def residual_post_norm_backward_sums_kernel(
    partial_ptr,
    dweight_ptr,
    dbias_ptr,
    stride_partial,
    num_programs,
    hidden,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds up partial [num_programs, 2, hidden] over the programs."""
    is_bias = tl.program_id(1) == 1
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    programs = tl.arange(0, BLOCK_P)
    channel_in = channels < hidden
    ptrs = partial_ptr + (2 * programs.to(tl.int64)[:, None] + is_bias) * stride_partial + channels[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, num_programs, BLOCK_P):
        mask = (start + programs < num_programs)[:, None] & channel_in[None, :]
        total += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += 2 * BLOCK_P * stride_partial
    result = tl.sum(total, 0)
    grad_ptr = dbias_ptr if is_bias else dweight_ptr
    tl.store(grad_ptr + channels, result.to(grad_ptr.dtype.element_ty), mask=channel_in)


SUMS_BLOCK_P, SUMS_BLOCK_C, SUMS_WARPS = 32, 32, 4
MIN_ROWS = 8  # fewer are not worth a program's sums in memory


def tile(hidden: int) -> tuple[int, int, int]:
    """Warps of a row, channels of a piece, pieces: the sums take the place of half of the channels."""
    num_warps, block, pieces = forward_tile(hidden)
    return min(2 * num_warps, 8), block, pieces


@functools.lru_cache(maxsize=32)
def _num_sms(device: torch.device) -> int:
    """The multiprocessors of a GPU; 1 in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def launch_residual_post_norm_backward(
    dout: Tensor, y: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, need_dy: bool, need_sums: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of y, weight and bias, None where not needed; dout, y [..., hidden]."""
    hidden = y.shape[-1]
    rows_dout, rows_y = (unit_last_stride(t.reshape(-1, hidden)) for t in (dout, y))
    num_rows = rows_y.shape[0]
    dy = dweight = dbias = partial = None
    if need_dy:
        dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if num_rows == 0:
        return dy, *(2 * (torch.zeros_like(weight),) if need_sums else (None, None))
    num_warps, block, pieces = tile(hidden)
    # An SM holds 12 warps at 168 registers, or 8 where the next row, in float32, takes more.
    warps_per_sm = 12 if max(dout.element_size(), y.element_size()) == 2 else 8
    num_programs = min(_num_sms(y.device) * (warps_per_sm // num_warps), triton.cdiv(num_rows, MIN_ROWS))
    if need_sums:
        partial = torch.empty((num_programs, 2, hidden), dtype=torch.float32, device=y.device)
        dweight, dbias = (torch.empty(hidden, dtype=weight.dtype, device=y.device) for _ in range(2))
    with torch.cuda.device_of(y):
        residual_post_norm_backward_kernel[(num_programs,)](
            rows_dout,
            rows_y,
            unit_last_stride(weight),
            mean,
            rstd,
            dy,
            partial,
            rows_dout.stride(0),
            rows_y.stride(0),
            hidden,
            hidden,
            num_rows,
            NEED_DY=need_dy,
            NEED_SUMS=need_sums,
            HIDDEN=hidden,
            BLOCK=block,
            PIECES=pieces,
            num_warps=num_warps,
        )
        if need_sums:
            residual_post_norm_backward_sums_kernel[(triton.cdiv(hidden, SUMS_BLOCK_C), 2)](
                partial,
                dweight,
                dbias,
                hidden,
                num_programs,
                hidden,
                BLOCK_P=SUMS_BLOCK_P,
                BLOCK_C=SUMS_BLOCK_C,
                num_warps=SUMS_WARPS,
            )
    return dy, dweight, dbias


def aot_configs() -> Iterator[AotConfig]:
    """The tile of ViT-E per dtype and wanted gradients, and a wide one with masks."""
    wanted = (
        (AOT_HIDDEN, True, True),
        (AOT_HIDDEN, True, False),
        (AOT_HIDDEN, False, True),
        (8000, True, True),
    )
    for capability in ((8, 0), (9, 0)):
        for stream, branch in DTYPES:
            for hidden, need_dy, need_sums in wanted:
                num_warps, block, pieces = tile(hidden)
                signature = {"dout_ptr": f"*{stream}", "y_ptr": f"*{branch}", "weight_ptr": f"*{branch}"}
                signature |= {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
                signature |= {"dy_ptr": f"*{branch}"} if need_dy else {}
                signature |= {"partial_ptr": "*fp32"} if need_sums else {}
                integers = [f"stride_{name}" for name in ("dout_row", "y_row", "dy_row", "partial")]
                signature |= dict.fromkeys((*integers, "num_rows"), "i32")
                constexprs = {"NEED_DY": need_dy, "NEED_SUMS": need_sums, "HIDDEN": hidden}
                constexprs |= {"BLOCK": block, "PIECES": pieces}
                constexprs |= {} if need_dy else {"dy_ptr": None}
                constexprs |= {} if need_sums else {"partial_ptr": None}
                needs = f"hidden={hidden} dy={need_dy} sums={need_sums}"
                name = f"residual_post_norm_backward {needs} {stream}+{branch}"
                yield AotConfig(
                    residual_post_norm_backward_kernel,
                    name,
                    signature,
                    constexprs,
                    num_warps,
                    3,
                    capability,
                    "bwd",
                    hidden == AOT_HIDDEN and need_dy and need_sums,
                    dtype=branch,
                )
        for dtype in ("bf16", "fp16", "fp32"):
            signature = {"partial_ptr": "*fp32", "dweight_ptr": f"*{dtype}", "dbias_ptr": f"*{dtype}"}
            signature |= dict.fromkeys(("stride_partial", "num_programs", "hidden"), "i32")
            yield AotConfig(
                residual_post_norm_backward_sums_kernel,
                f"residual_post_norm_backward_sums {dtype}",
                signature,
                {"BLOCK_P": SUMS_BLOCK_P, "BLOCK_C": SUMS_BLOCK_C},
                SUMS_WARPS,
                3,
                capability,
                "bwd",
                dtype=dtype,
            )

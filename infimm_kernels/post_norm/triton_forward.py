"""Triton forward of x + LayerNorm(y) [+ PE]: a row is read once, held in registers and written once.

A row is cut into pieces of one block each, so that 1792 channels are 7 pieces of 256 and no lane is idle, and
the pieces are added up before anything crosses lanes. A row of up to 2048 channels belongs to one warp: its
sums need no shared memory and no barrier.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from infimm_kernels.backends import AotConfig
from infimm_kernels.checks import unit_last_stride
from infimm_kernels.position_2d.triton_forward import position_table


@triton.jit
def load_piece(ptr, piece: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """Channels piece * BLOCK and on, in the dtype of memory; 0 behind the last."""
    channels = piece * BLOCK + tl.arange(0, BLOCK)
    if HIDDEN % BLOCK == 0:
        return tl.load(ptr + channels)
    else:
        return tl.load(ptr + channels, mask=channels < HIDDEN, other=0.0)


@triton.jit
def store_piece(ptr, value, piece: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    channels = piece * BLOCK + tl.arange(0, BLOCK)
    value = value.to(ptr.dtype.element_ty)
    if HIDDEN % BLOCK == 0:
        tl.store(ptr + channels, value)
    else:
        tl.store(ptr + channels, value, mask=channels < HIDDEN)


@triton.jit
def residual_post_norm_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    table_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    stride_x_row,
    stride_y_row,
    stride_out_row,
    eps,
    seqlen,
    width,
    height,
    num_prefix_tokens,
    POSITION: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):
    """POSITION: "none", "window" or "token"; table: of `position_table`."""
    row = tl.program_id(0)
    x_ptr += row.to(tl.int64) * stride_x_row
    y_ptr += row.to(tl.int64) * stride_y_row
    out_ptr += row.to(tl.int64) * stride_out_row
    ys = ()
    for i in tl.static_range(PIECES):
        ys += (load_piece(y_ptr, i, HIDDEN, BLOCK).to(tl.float32),)
    xs = ()
    for i in tl.static_range(PIECES):
        xs += (load_piece(x_ptr, i, HIDDEN, BLOCK),)

    # Each term over hidden before it is added: a row of the largest numbers has a mean too.
    half: tl.constexpr = HIDDEN // 2
    inverse: tl.constexpr = 1.0 / HIDDEN
    total = ys[0] * inverse
    for i in tl.static_range(1, PIECES):
        total += ys[i] * inverse
    first_mean = tl.sum(total, 0)
    # The mean is rounded at its own size, which for a row far from zero is the size of its differences. What
    # they still add up to mends that.
    differences = ()
    for i in tl.static_range(PIECES):
        difference = ys[i] - first_mean
        if HIDDEN % BLOCK:
            difference = tl.where(i * BLOCK + tl.arange(0, BLOCK) < HIDDEN, difference, 0.0)
        differences += (difference,)
    total = differences[0]
    squares = differences[0] * differences[0]
    for i in tl.static_range(1, PIECES):
        total += differences[i]
        squares += differences[i] * differences[i]
    shift = tl.sum(total, 0) * inverse
    variance = tl.sum(squares, 0) * inverse - shift * shift
    variance = tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL)
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    tl.store(mean_ptr + row, first_mean + shift)
    tl.store(rstd_ptr + row, rstd)

    has_position = True
    column_offset = (row // seqlen).to(tl.int64) * (width + height) * half
    row_offset = column_offset
    if POSITION == "token":
        # A prefix token has no patch; the addresses of the first one stay inside the table.
        has_position = row % seqlen >= num_prefix_tokens
        patch = tl.maximum(row % seqlen - num_prefix_tokens, 0)
        column_offset += (patch % width) * half
        row_offset += (width - 1 + patch // width) * half
    for i in tl.static_range(PIECES):
        weight = load_piece(weight_ptr, i, HIDDEN, BLOCK).to(tl.float32)
        bias = load_piece(bias_ptr, i, HIDDEN, BLOCK).to(tl.float32)
        out = (differences[i] - shift) * rstd * weight + bias + xs[i].to(tl.float32)
        if POSITION != "none":
            channels = i * BLOCK + tl.arange(0, BLOCK)
            # The second half of the channels is that of another entry, minus the first half.
            if (i + 1) * BLOCK <= half:
                offsets = column_offset + channels
            elif i * BLOCK >= half:
                offsets = row_offset + channels
            else:
                offsets = tl.where(channels < half, column_offset, row_offset) + channels
            mask = tl.full([BLOCK], 1, tl.int1) & has_position
            if HIDDEN % BLOCK:
                mask = mask & (channels < HIDDEN)
            out += tl.load(table_ptr + offsets, mask=mask, other=0.0)
        store_piece(out_ptr, out, i, HIDDEN, BLOCK)


def tile(hidden: int) -> tuple[int, int, int]:
    """Warps of a row, channels of a piece, pieces: at most 64 channels of a row in a thread."""
    power = triton.next_power_of_2(hidden)
    num_warps = 1 if power <= 2048 else power // 1024
    block = 256 * num_warps
    if hidden % block and hidden % (block // 2) == 0:
        block //= 2
    return num_warps, block, triton.cdiv(hidden, block)


def launch_residual_post_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    positions: Tensor | None,
    granularity: str,
    window_shape: tuple[int, int],
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, y [..., hidden], weight, bias [hidden] -> like x, then mean and rstd [...] in float32."""
    hidden = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    rows_x, rows_y = (unit_last_stride(t.reshape(-1, hidden)) for t in (x, y))
    num_rows = rows_x.shape[0]
    if num_rows == 0:
        return out, mean, rstd
    num_warps, block, pieces = tile(hidden)
    place, table, seqlen = "none", None, 1
    height, width = window_shape
    with torch.cuda.device_of(x):
        if positions is not None and height * width > 0:  # else "token" with prefix tokens alone
            place, seqlen = granularity, x.shape[1]
            table = position_table(positions, width, height, hidden // 2)
        residual_post_norm_kernel[(num_rows,)](
            rows_x,
            rows_y,
            unit_last_stride(weight),
            unit_last_stride(bias),
            table,
            out,
            mean,
            rstd,
            rows_x.stride(0),
            rows_y.stride(0),
            hidden,
            eps,
            seqlen,
            width,
            height,
            num_prefix_tokens,
            POSITION=place,
            HIDDEN=hidden,
            BLOCK=block,
            PIECES=pieces,
            num_warps=num_warps,
        )
    return out, mean, rstd


AOT_HIDDEN = 1792
DTYPES = (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16"))  # of x and of y


def aot_configs() -> Iterator[AotConfig]:
    """The tile of ViT-E per dtype and position, with parameters in the dtype of y, and one with masks."""
    for capability in ((8, 0), (9, 0)):
        for stream, branch in DTYPES:
            for hidden, place in (
                (AOT_HIDDEN, "none"),
                (AOT_HIDDEN, "window"),
                (AOT_HIDDEN, "token"),
                (8000, "token"),
            ):
                num_warps, block, pieces = tile(hidden)
                signature = {"x_ptr": f"*{stream}", "out_ptr": f"*{stream}"}
                signature |= {f"{name}_ptr": f"*{branch}" for name in ("y", "weight", "bias")}
                signature |= {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "eps": "fp32"}
                integers = ["stride_x_row", "stride_y_row", "stride_out_row"]
                integers += ["seqlen", "width", "height", "num_prefix_tokens"]
                signature |= dict.fromkeys(integers, "i32")
                constexprs = {
                    "POSITION": place,
                    "HIDDEN": hidden,
                    "BLOCK": block,
                    "PIECES": pieces,
                }
                if place == "none":
                    constexprs["table_ptr"] = None
                else:
                    signature["table_ptr"] = "*fp32"
                name = f"residual_post_norm hidden={hidden} position={place} {stream}+{branch}"
                yield AotConfig(
                    residual_post_norm_kernel,
                    name,
                    signature,
                    constexprs,
                    num_warps,
                    3,
                    capability,
                    default=hidden == AOT_HIDDEN,
                    dtype=branch,
                )

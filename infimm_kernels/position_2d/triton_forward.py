"""Triton forward of add_position_2d: one read and one write of the features, the sines made beside them.

Half of the channels depends on the column of a patch alone and half on its row alone. So a program takes one
half of the channels down one column of patches, or the other half along one row: its sines are made once, for
one coordinate, and stay in registers while the tokens pass. There is no table in memory and one launch.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from infimm_kernels.backends import AotConfig
from infimm_kernels.checks import unit_last_stride


@triton.jit
def sine_and_cosine(angle):
    """Of float32 angles up to 2^63, to float32: whole quarter turns are taken off in float64.

    The library's functions keep an array in local memory for that. The first round leaves a rest that the
    spacing of float64 allows, below 1000 even for the largest angle, the second one below pi/4, where the
    series converge.
    """
    half_pi = tl.full([], 1.5707963267948966, tl.float64)
    half_pi_rest = tl.full([], 6.123233995736766e-17, tl.float64)
    quarters_per_radian = tl.full([], 0.6366197723675814, tl.float64)
    rest = angle.to(tl.float64)
    turns = tl.floor(rest * quarters_per_radian + 0.5)
    rest = tl.fma(-turns, half_pi + tl.zeros_like(turns), rest)
    rest = tl.fma(-turns, half_pi_rest + tl.zeros_like(turns), rest)
    more = tl.floor(rest * quarters_per_radian + 0.5)
    rest = tl.fma(-more, half_pi + tl.zeros_like(turns), rest)
    quarter = (turns.to(tl.int64) + more.to(tl.int64)).to(tl.int32)
    r = rest.to(tl.float32)
    square = r * r
    sine = square * (1.0 / 362880.0) - 1.0 / 5040.0
    sine = sine * square + 1.0 / 120.0
    sine = sine * square - 1.0 / 6.0
    sine = sine * square * r + r
    cosine = square * (-1.0 / 3628800.0) + 1.0 / 40320.0
    cosine = cosine * square - 1.0 / 720.0
    cosine = cosine * square + 1.0 / 24.0
    cosine = cosine * square - 0.5
    cosine = cosine * square + 1.0
    swapped = quarter % 2 != 0
    first, second = tl.where(swapped, cosine, sine), tl.where(swapped, sine, cosine)
    return tl.where((quarter & 2) != 0, -first, first), tl.where(((quarter + 1) & 2) != 0, -second, second)


@triton.jit(do_not_specialize=["num_entries"])
def position_table_kernel(
    positions_ptr,
    frequency_ptr,
    table_ptr,
    stride_position_window,
    stride_position_axis,
    num_entries,
    width,
    height,
    half,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """table [num_windows, width + height, half]: columns, then rows; 0.0 without a position."""
    entries = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    pairs = tl.program_id(1) * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    entry_in = entries < num_entries
    window = (entries // (width + height)).to(tl.int64)
    index = entries % (width + height)
    position_ptrs = positions_ptr + window * stride_position_window
    row = tl.load(position_ptrs, mask=entry_in, other=0).to(tl.int64)
    column = tl.load(position_ptrs + stride_position_axis, mask=entry_in, other=0).to(tl.int64)
    coordinate = tl.where(index < width, column * width + index, row * height + (index - width))
    frequency = tl.load(frequency_ptr + pairs, mask=2 * pairs < half, other=0.0)
    sine, cosine = sine_and_cosine(coordinate.to(tl.float32)[:, None] * frequency[None, :])
    value = tl.interleave(sine, cosine)
    value = tl.where(((row < 0) | (column < 0))[:, None], 0.0, value)
    offsets = entries.to(tl.int64)[:, None] * half + channels[None, :]
    tl.store(table_ptr + offsets, value, mask=entry_in[:, None] & (channels < half)[None, :])


@triton.jit
def add_position_kernel(
    x_ptr,
    positions_ptr,
    frequency_ptr,
    out_ptr,
    stride_x_window,
    stride_x_token,
    stride_out_window,
    stride_out_token,
    stride_position_window,
    stride_position_axis,
    stride_half,
    seqlen,
    width,
    height,
    num_prefix_tokens,
    num_lines,
    num_blocks_t,
    PER_TOKEN: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A line is a run of equally spaced tokens that share one coordinate, for one half of the channels.

    "window": the window itself, twice. "token": its columns for the first half, its rows for the second, and
    twice the prefix tokens, which are copied.
    """
    blocks_c = tl.cdiv(stride_half, BLOCK_C)
    program = tl.program_id(0)
    block_c = program % blocks_c
    program = program // blocks_c
    line = program % num_lines
    program = program // num_lines
    first = (program % num_blocks_t) * BLOCK_T
    window = (program // num_blocks_t).to(tl.int64)
    if PER_TOKEN:
        is_column = line < width
        is_row = (line >= width) & (line < width + height)
        in_second = is_row | (line == width + height + 1)
        row_line = line - width
        start = tl.where(is_column, line, tl.where(is_row, row_line * width, -num_prefix_tokens))
        start += num_prefix_tokens
        step = tl.where(is_column, width, 1)
        count = tl.where(is_column, height, tl.where(is_row, width, num_prefix_tokens))
    else:
        in_second = line == 1
        start = 0
        step = 1
        count = seqlen
    if first < count:
        numbers = first + tl.arange(0, BLOCK_T)
        tokens = start + numbers.to(tl.int64) * step
        block_channels = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
        channels = tl.where(in_second, stride_half, 0) + block_channels
        mask = (numbers < count)[:, None]
        if not EVEN_C:
            mask = mask & (block_channels < stride_half)[None, :]
        x_ptrs = x_ptr + window * stride_x_window + tokens[:, None] * stride_x_token + channels[None, :]
        x = tl.load(x_ptrs, mask=mask)

        position_ptr = positions_ptr + window * stride_position_window
        row = tl.load(position_ptr).to(tl.int64)
        column = tl.load(position_ptr + stride_position_axis).to(tl.int64)
        absent = (row < 0) | (column < 0)
        if PER_TOKEN:
            coordinate = tl.where(is_column, column * width + line, row * height + row_line)
            absent = absent | (line >= width + height)
        else:
            coordinate = tl.where(in_second, row, column)
        pairs = block_c * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
        if EVEN_C:
            frequency = tl.load(frequency_ptr + pairs)
        else:
            frequency = tl.load(frequency_ptr + pairs, mask=2 * pairs < stride_half, other=0.0)
        sine, cosine = sine_and_cosine(coordinate.to(tl.float32) * frequency)
        # x + (-0.0) is x bit for bit; x + 0.0 would turn a -0.0 of x into 0.0. Triton reads -0.0 as 0.0.
        minus_zero = tl.full([], -(2**31), tl.int32).to(tl.float32, bitcast=True)
        pe = tl.where(absent, minus_zero, tl.interleave(sine, cosine))
        out_ptrs = out_ptr + window * stride_out_window + tokens[:, None] * stride_out_token
        out = x.to(tl.float32) + pe[None, :]
        tl.store(out_ptrs + channels[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


TABLE_BLOCK_E, BLOCK_C, NUM_WARPS = 16, 256, 4  # of the table
# A token's block is 16 lanes of 16 bytes in the 16-bit dtypes, and divides the 896 channels of half of ViT-E.
LINE_BLOCK_C = 128


def config(longest_line: int, element_size: int) -> tuple[int, int]:
    """BLOCK_T and the number of warps: 32 or 64 elements of a thread share the sines of its channels."""
    return 32 if longest_line > 16 else 16, 2 if element_size == 2 else 4


@functools.cache  # unbounded: a captured CUDA graph keeps the addresses
def _frequencies(half: int, device: torch.device) -> Tensor:
    """10000^(-2k / half), k < half / 2, rounded once: a rounded exponent would move distant positions."""
    exponent = torch.arange(0, half, 2, dtype=torch.float64) / half
    return torch.pow(10000.0, -exponent).to(device, torch.float32)


def position_table(positions: Tensor, width: int, height: int, half: int) -> Tensor:
    """positions [num_windows, 2] -> float32 [num_windows, width + height, half], columns first.

    With width = height = 1 it is the encoding of each window; the current device must be that of positions.
    """
    num_entries = positions.shape[0] * (width + height)
    shape = (positions.shape[0], width + height, half)
    table = torch.empty(shape, dtype=torch.float32, device=positions.device)
    if num_entries > 0:
        position_table_kernel[(triton.cdiv(num_entries, TABLE_BLOCK_E), triton.cdiv(half, BLOCK_C))](
            positions,
            _frequencies(half, positions.device),
            table,
            *positions.stride(),
            num_entries,
            width,
            height,
            half,
            BLOCK_E=TABLE_BLOCK_E,
            BLOCK_C=BLOCK_C,
            num_warps=NUM_WARPS,
        )
    return table


def launch_add_position_2d(
    out: Tensor,
    x: Tensor,
    positions: Tensor,
    granularity: str,
    window_shape: tuple[int, int],
    num_prefix_tokens: int,
) -> None:
    """x [num_windows, seqlen, hidden], positions [num_windows, 2] -> out like x, which may be x itself."""
    num_windows, seqlen, hidden = x.shape
    if x.numel() == 0:
        return
    x, half = unit_last_stride(x), hidden // 2
    y = unit_last_stride(out)  # a copy where the kernel cannot write
    per_token = granularity == "token"
    width, height, num_lines, longest = 1, 1, 2, seqlen
    if per_token:
        height, width = window_shape
        num_lines, longest = width + height, max(width, height)
        if num_prefix_tokens:
            num_lines, longest = num_lines + 2, max(longest, num_prefix_tokens)
    block_t, num_warps = config(longest, x.element_size())
    num_blocks_t = triton.cdiv(longest, block_t)
    with torch.cuda.device_of(x):
        add_position_kernel[(num_windows * num_lines * num_blocks_t * triton.cdiv(half, LINE_BLOCK_C),)](
            x,
            positions,
            _frequencies(half, x.device),
            y,
            x.stride(0),
            x.stride(1),
            y.stride(0),
            y.stride(1),
            positions.stride(0),
            positions.stride(1),
            half,
            seqlen,
            width,
            height,
            num_prefix_tokens,
            num_lines,
            num_blocks_t,
            PER_TOKEN=per_token,
            EVEN_C=half % LINE_BLOCK_C == 0,
            BLOCK_T=block_t,
            BLOCK_C=LINE_BLOCK_C,
            num_warps=num_warps,
        )
    if y is not out:
        out.copy_(y)


def aot_configs() -> Iterator[AotConfig]:
    """Every configuration that `launch_add_position_2d` and `position_table` can choose, per dtype.

    32-bit positions and whole blocks of channels here; others change a load and a mask.
    """
    place = {"positions_ptr": "*i32", "frequency_ptr": "*fp32"}
    strides = ["stride_position_window", "stride_position_axis"]
    for capability in ((8, 0), (9, 0)):
        sizes = ["num_entries", "width", "height", "half"]
        signature = place | {"table_ptr": "*fp32"} | dict.fromkeys((*strides, *sizes), "i32")
        constexprs = {"BLOCK_E": TABLE_BLOCK_E, "BLOCK_C": BLOCK_C}
        yield AotConfig(
            position_table_kernel, "position_table", signature, constexprs, NUM_WARPS, 1, capability
        )
        for dtype, element_size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
            for per_token, longest, even in ((False, 1025, True), (True, 32, True), (True, 16, False)):
                block_t, num_warps = config(longest, element_size)
                names = ["x_window", "x_token", "out_window", "out_token", "half"]
                sizes = ["seqlen", "width", "height", "num_prefix_tokens", "num_lines", "num_blocks_t"]
                integers = [*(f"stride_{name}" for name in names), *strides, *sizes]
                signature = place | {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
                signature |= dict.fromkeys(integers, "i32")
                constexprs = {
                    "PER_TOKEN": per_token,
                    "EVEN_C": even,
                    "BLOCK_T": block_t,
                    "BLOCK_C": LINE_BLOCK_C,
                }
                name = f"add_position per_token={per_token} block_t={block_t} {dtype}"
                yield AotConfig(
                    add_position_kernel, name, signature, constexprs, num_warps, 3, capability, dtype=dtype
                )

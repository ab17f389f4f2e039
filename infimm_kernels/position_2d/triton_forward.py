"""Triton forward of add_position_2d: small tables first, then one read and one write of the features.

A sine costs more than a hundred instructions, the memory traffic of an element pays for about thirty. The
encoding is separable, so the sines of a window are those of its w columns and h rows, each for half of the
channels; a token adds one entry of each table.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from infimm_kernels.backends import AotConfig
from infimm_kernels.checks import unit_last_stride


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
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    entry_in = entries < num_entries
    channel_in = channels < half
    window = (entries // (width + height)).to(tl.int64)
    index = entries % (width + height)
    position_ptrs = positions_ptr + window * stride_position_window
    row = tl.load(position_ptrs, mask=entry_in, other=0).to(tl.int64)
    column = tl.load(position_ptrs + stride_position_axis, mask=entry_in, other=0).to(tl.int64)
    coordinate = tl.where(index < width, column * width + index, row * height + (index - width))
    frequency = tl.load(frequency_ptr + channels // 2, mask=channel_in, other=0.0)
    angle = coordinate.to(tl.float32)[:, None] * frequency[None, :]
    value = tl.where((channels % 2 == 0)[None, :], tl.sin(angle), tl.cos(angle))
    value = tl.where(((row < 0) | (column < 0))[:, None], 0.0, value)
    offsets = entries.to(tl.int64)[:, None] * half + channels[None, :]
    tl.store(table_ptr + offsets, value, mask=entry_in[:, None] & channel_in[None, :])


@triton.jit
def add_position_kernel(
    x_ptr,
    table_ptr,
    y_ptr,
    stride_x_window,
    stride_x_token,
    seqlen,
    width,
    height,
    half,
    num_prefix_tokens,
    PER_TOKEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks_per_window = tl.cdiv(seqlen, BLOCK_T)
    window = (tl.program_id(0) // blocks_per_window).to(tl.int64)
    tokens = (tl.program_id(0) % blocks_per_window) * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    token_in = tokens < seqlen
    mask = token_in[:, None] & (channels < 2 * half)[None, :]
    first_half = (channels < half)[None, :]
    half_channels = tl.where(channels < half, channels, channels - half)
    window_table_ptr = table_ptr + window * (width + height) * half
    if PER_TOKEN:
        patch = tl.maximum(tokens - num_prefix_tokens, 0)
        entry = tl.where(first_half, (patch % width)[:, None], (width + patch // width)[:, None])
        pe = tl.load(window_table_ptr + entry * half + half_channels[None, :], mask=mask, other=0.0)
        pe = tl.where((tokens < num_prefix_tokens)[:, None], 0.0, pe)
    else:
        # Two entries, one after the other: the channels of the whole encoding in order.
        pe = tl.load(window_table_ptr + channels, mask=channels < 2 * half, other=0.0)[None, :]
    x_offsets = window * stride_x_window + tokens.to(tl.int64)[:, None] * stride_x_token + channels[None, :]
    y_offsets = (window * seqlen + tokens)[:, None] * (2 * half) + channels[None, :]
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
    y = tl.where(pe == 0.0, x, x + pe)  # bit for bit: -0.0 + 0.0 would be 0.0
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


TABLE_BLOCK_E, BLOCK_T, BLOCK_C, NUM_WARPS = 16, 16, 256, 4


@functools.lru_cache(maxsize=8)
def _frequencies(half: int, device: torch.device) -> Tensor:
    """10000^(-2k / half), k < half / 2, rounded once: a rounded exponent would move distant positions."""
    exponent = torch.arange(0, half, 2, dtype=torch.float64) / half
    return torch.pow(10000.0, -exponent).to(device, torch.float32)


def launch_add_position_2d(
    x: Tensor, positions: Tensor, granularity: str, window_shape: tuple[int, int], num_prefix_tokens: int
) -> Tensor:
    """x [num_windows, seqlen, hidden], positions [num_windows, 2] -> like x."""
    num_windows, seqlen, hidden = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    per_token = granularity == "token"
    height, width = window_shape if per_token else (1, 1)
    if height * width == 0:  # "token" with prefix tokens alone
        return y.copy_(x)
    x, half = unit_last_stride(x), hidden // 2
    num_entries = num_windows * (width + height)
    table = torch.empty((num_entries, half), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        position_table_kernel[(triton.cdiv(num_entries, TABLE_BLOCK_E), triton.cdiv(half, BLOCK_C))](
            positions,
            _frequencies(half, x.device),
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
        add_position_kernel[(num_windows * triton.cdiv(seqlen, BLOCK_T), triton.cdiv(hidden, BLOCK_C))](
            x,
            table,
            y,
            x.stride(0),
            x.stride(1),
            seqlen,
            width,
            height,
            half,
            num_prefix_tokens,
            PER_TOKEN=per_token,
            BLOCK_T=BLOCK_T,
            BLOCK_C=BLOCK_C,
            num_warps=NUM_WARPS,
        )
    return y


def aot_configs() -> Iterator[AotConfig]:
    """Every configuration that `launch_add_position_2d` can choose, per dtype."""
    for capability in ((8, 0), (9, 0)):
        for positions in ("*i32", "*i64"):
            signature = {"positions_ptr": positions, "frequency_ptr": "*fp32", "table_ptr": "*fp32"}
            signature |= {
                "stride_position_window": "i32",
                "stride_position_axis": "i32",
                "num_entries": "i32",
            }
            signature |= {"width": "i32", "height": "i32", "half": "i32"}
            constexprs = {"BLOCK_E": TABLE_BLOCK_E, "BLOCK_C": BLOCK_C}
            yield AotConfig(
                position_table_kernel,
                f"position_table {positions[1:]}",
                signature,
                constexprs,
                NUM_WARPS,
                1,
                capability,
            )
        for pointer in ("*fp16", "*bf16", "*fp32"):
            for per_token in (False, True):
                sizes = [
                    "stride_x_window",
                    "stride_x_token",
                    "seqlen",
                    "width",
                    "height",
                    "half",
                    "num_prefix_tokens",
                ]
                signature = {"x_ptr": pointer, "table_ptr": "*fp32", "y_ptr": pointer} | {
                    name: "i32" for name in sizes
                }
                constexprs = {"PER_TOKEN": per_token, "BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C}
                name = f"add_position per_token={per_token} {pointer[1:]}"
                yield AotConfig(
                    add_position_kernel,
                    name,
                    signature,
                    constexprs,
                    NUM_WARPS,
                    3,
                    capability,
                    dtype=pointer[1:],
                )

"""The two-dimensional sinusoidal encoding of Wang & Liu 2021 and its addition, stated in eager PyTorch.

    PE(x, y)[2k]     = sin(x / 10000^(4k / D))
    PE(x, y)[2k + 1] = cos(x / 10000^(4k / D))         k = 0 .. D/4 - 1
    PE(x, y)[D/2 + c] = PE(y, x)[c]                    c = 0 .. D/2 - 1

The sum is separable: half of the channels depends on x alone and half on y alone, so the tables are small and
are added by broadcasting. The gradient is the identity. The compute dtype is ``torch.promote_types(dtype,
torch.float32)``.
"""

import torch
from torch import Tensor

from infimm_kernels.autodiff import compute_dtype


def sinusoid(coordinate: Tensor, num_channels: int, dtype: torch.dtype) -> Tensor:
    """One half of the encoding: coordinate [...] -> [..., num_channels], sin and cos interleaved."""
    # In float64 until here: in float32 the rounding of the exponent would move the angle of a distant
    # position.
    exponent = torch.arange(0, num_channels, 2, dtype=torch.float64, device=coordinate.device) / num_channels
    frequency = torch.pow(10000.0, -exponent).to(dtype)
    angle = coordinate.to(dtype).unsqueeze(-1) * frequency
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)


def coordinates(positions: Tensor, granularity: str, window_shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """positions [num_windows, 2] -> x [num_windows, w], y [num_windows, h]; w = h = 1 for "window"."""
    row, column = positions.long().unbind(1)
    if granularity == "window":
        return column.unsqueeze(1), row.unsqueeze(1)
    height, width = window_shape
    x = column.unsqueeze(1) * width + torch.arange(width, device=positions.device)
    y = row.unsqueeze(1) * height + torch.arange(height, device=positions.device)
    return x, y


def tables(
    positions: Tensor, granularity: str, window_shape: tuple[int, int], hidden: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The two halves of the encoding, [num_windows, 1, w, half] and [num_windows, h, 1, half].

    Where a window has no position they are -0.0: x + (-0.0) is x bit for bit, its negative zeros too.
    """
    absent = (positions < 0).any(1)[:, None, None]
    pe_x, pe_y = (
        sinusoid(coordinate, hidden // 2, dtype).masked_fill(absent, -0.0)
        for coordinate in coordinates(positions, granularity, window_shape)
    )
    return pe_x.unsqueeze(1), pe_y.unsqueeze(2)


def forward(
    x: Tensor, positions: Tensor, granularity: str, window_shape: tuple[int, int], num_prefix_tokens: int
) -> Tensor:
    """x [num_windows, seqlen, hidden], positions [num_windows, 2] -> like x; differentiable."""
    dtype = compute_dtype(x.dtype)
    pe_x, pe_y = tables(positions, granularity, window_shape, x.shape[2], dtype)
    height, width = pe_y.shape[1], pe_x.shape[2]
    pe = torch.cat((pe_x.expand(-1, height, -1, -1), pe_y.expand(-1, -1, width, -1)), 3).flatten(1, 2)
    if granularity == "window":
        return (x.to(dtype) + pe).to(x.dtype)
    placed = (x[:, num_prefix_tokens:].to(dtype) + pe).to(x.dtype)
    return torch.cat((x[:, :num_prefix_tokens], placed), 1) if num_prefix_tokens else placed


def add_into(
    out: Tensor,
    x: Tensor,
    positions: Tensor,
    granularity: str,
    window_shape: tuple[int, int],
    num_prefix_tokens: int,
) -> None:
    """`forward` written into `out`, which may be x; no temporary where x has the compute dtype."""
    dtype = compute_dtype(x.dtype)
    if granularity == "token" and num_prefix_tokens:
        if out is not x:
            out[:, :num_prefix_tokens] = x[:, :num_prefix_tokens]
        out, x = out[:, num_prefix_tokens:], x[:, num_prefix_tokens:]
    pe_x, pe_y = tables(positions, granularity, window_shape, x.shape[2], dtype)
    wide_out, wide_x = (out, x) if x.dtype == dtype else (x.to(dtype),) * 2
    if granularity == "window":
        torch.add(wide_x, torch.cat((pe_x, pe_y), 3).squeeze(1), out=wide_out)
    else:
        halves = (t.unflatten(1, window_shape).tensor_split(2, 3) for t in (wide_out, wide_x))
        for out_half, x_half, pe in zip(*halves, (pe_x, pe_y), strict=True):
            torch.add(x_half, pe, out=out_half)
    if wide_out is not out:
        out.copy_(wide_out)

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


def forward(
    x: Tensor, positions: Tensor, granularity: str, window_shape: tuple[int, int], num_prefix_tokens: int
) -> Tensor:
    """x [num_windows, seqlen, hidden], positions [num_windows, 2] -> like x."""
    dtype = compute_dtype(x.dtype)
    half = x.shape[2] // 2
    absent = (positions < 0).any(1)[:, None, None]
    columns, rows = coordinates(positions, granularity, window_shape)
    # x + (-0.0) is x bit for bit, so a window without a position keeps even its negative zeros.
    pe_x = sinusoid(columns, half, dtype).masked_fill(absent, -0.0)  # [num_windows, w, half]
    pe_y = sinusoid(rows, half, dtype).masked_fill(absent, -0.0)  # [num_windows, h, half]
    prefix = 0 if granularity == "window" else num_prefix_tokens
    if granularity == "window":
        pe = torch.cat((pe_x, pe_y), 2)  # [num_windows, 1, hidden]
    else:
        height, width = window_shape
        pe = torch.cat(
            (
                pe_x.unsqueeze(1).expand(-1, height, -1, -1),
                pe_y.unsqueeze(2).expand(-1, -1, width, -1),
            ),
            3,
        ).flatten(1, 2)  # [num_windows, h * w, hidden]
    placed = (x[:, prefix:].to(dtype) + pe).to(x.dtype)
    return torch.cat((x[:, :prefix], placed), 1) if prefix else placed

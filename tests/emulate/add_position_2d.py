"""csrc/add_position_2d.cu, compiled by g++ behind cuda_shim and called on CPU tensors; and the formula."""

import ctypes
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
GUARD = 1 << 19  # elements around the output that no store may touch; wide, so that a bug ends in them


def build(folder: Path, csrc: Path = CSRC) -> ctypes.CDLL:
    """The launcher in `csrc` and its device code as a CPU library in `folder`."""
    library = folder / "add_position_2d_cpu.so"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-Wno-class-memaccess"]
    command += ["-shared", "-fPIC", "-I", str(HERE / "cuda_shim"), "-I", str(csrc), "-x", "c++"]
    command += [
        str(csrc / "add_position_2d.cu"),
        str(HERE / "add_position_2d_harness.cpp"),
        "-o",
        str(library),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def call(
    library: ctypes.CDLL,
    x: int,
    x_bytes: int,
    out: int,
    out_bytes: int,
    positions: int,
    numbers: Iterable[int],
    grid_limit: int = 2**32 - 1,
) -> int:
    """The launcher's error code. `numbers`: the rest of AddPosition2dParams in order."""
    numbers = list(numbers)
    return library.emulate_add_position_2d(
        ctypes.c_void_p(x),
        ctypes.c_int64(x_bytes),
        ctypes.c_void_p(out),
        ctypes.c_int64(out_bytes),
        ctypes.c_void_p(positions),
        (ctypes.c_int64 * len(numbers))(*numbers),
        ctypes.c_uint(grid_limit),
    )


def run(
    library: ctypes.CDLL,
    x: Tensor,
    positions: Tensor,
    window_shape: tuple[int, int] | None = None,
    num_prefix_tokens: int = 0,
    grid_limit: int = 2**32 - 1,
    out_offset: int = 0,
) -> Tensor:
    """The kernel's result; per token when `window_shape` is given. Raises on an error or a stray store.

    `out_offset`, at most GUARD, moves the output by elements, to take its alignment away.
    """
    num_windows, seqlen, hidden = x.shape
    surrounded = torch.full((x.numel() + 2 * GUARD,), 77.0, dtype=x.dtype)
    begin, end = GUARD + out_offset, GUARD + out_offset + x.numel()
    out = surrounded[begin:end].view(x.shape)
    out.fill_(float("nan"))
    height, width = window_shape or (0, 0)
    numbers = [DTYPE_CODES[x.dtype], positions.dtype == torch.int64, num_windows, seqlen, hidden]
    numbers += [
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        positions.stride(0),
        positions.stride(1),
    ]
    numbers += [window_shape is not None, height, width, num_prefix_tokens]
    x_elements = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    error = call(
        library,
        x.data_ptr(),
        x_elements * x.element_size(),
        out.data_ptr(),
        out.numel() * out.element_size(),
        positions.data_ptr(),
        numbers,
        grid_limit,
    )
    if error != 0:
        raise RuntimeError(f"CUDA error {error}")
    assert (surrounded[:begin] == 77).all() and (surrounded[end:] == 77).all(), "a store outside out"
    return out


def formula(
    x: Tensor,
    positions: Tensor,
    window_shape: tuple[int, int] | None = None,
    num_prefix_tokens: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """x + PE with everything computed in `dtype` (the sum is returned in it); Wang & Liu 2021."""
    num_windows, seqlen, hidden = x.shape
    rows, columns = positions[:, :1].to(dtype), positions[:, 1:].to(dtype)  # [num_windows, 1]
    encoded = ((positions >= 0).all(1, keepdim=True)).expand(num_windows, seqlen).clone()
    if window_shape is None:
        rows, columns = rows.expand(num_windows, seqlen), columns.expand(num_windows, seqlen)
    else:
        height, width = window_shape
        i, j = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        none = torch.zeros(num_prefix_tokens, dtype=torch.int64)
        rows = rows * height + torch.cat([none, i.flatten()]).to(dtype)
        columns = columns * width + torch.cat([none, j.flatten()]).to(dtype)
        encoded[:, :num_prefix_tokens] = False
    exponents = 4 * torch.arange(hidden // 4, dtype=dtype) / hidden
    frequencies = torch.tensor(10000.0, dtype=dtype) ** -exponents
    halves = []
    for coordinate in (columns, rows):
        angles = coordinate[..., None] * frequencies
        halves.append(torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2))
    encoding = torch.cat(halves, dim=-1)
    return x.to(dtype) + torch.where(encoded[..., None], encoding, 0.0)

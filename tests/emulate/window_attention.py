"""csrc/window_attention.cu, compiled by g++ behind cuda_shim, as the extension; and the formula."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from tests.emulate.add_position_2d import CSRC, DTYPE_CODES, HERE

POINTERS = ("q", "k", "v", "out", "lse", "cu_seqlens_q", "cu_seqlens_k")
GUARD = 1 << 14  # bytes around out and lse that no store may touch
DTYPES = {str(dtype).removeprefix("torch."): code for dtype, code in DTYPE_CODES.items()}


def build(folder: Path, csrc: Path = CSRC) -> ctypes.CDLL:
    """The launcher in `csrc` and its device code as a CPU library in `folder`."""
    library = folder / "window_attention_cpu.so"
    _compile(csrc, ["-O2", "-shared", "-fPIC"], library)
    loaded = ctypes.CDLL(str(library))
    loaded.emulate_complaint.restype = ctypes.c_char_p
    return loaded


def build_program(folder: Path) -> Path:
    """A program that runs one problem under the address and undefined-behaviour sanitizers."""
    program = folder / "window_attention_sanitized"
    checks = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DEMULATE_MAIN"]
    copy_kernels(folder / "csrc", [("__nv_bfloat16", head_dim) for head_dim in (64, 112)])
    _compile(folder / "csrc", checks, program)
    return program


def copy_kernels(csrc: Path, kernels: list[tuple[str, int]]) -> None:
    """Copies the sources with these (element type, head_dim) only: the rest costs most of the compilation."""
    shutil.copytree(CSRC, csrc)
    path = csrc / "window_attention.cu"
    source = path.read_text()
    dropped = [
        f"head_dim<{t}>" for t in ("__nv_bfloat16", "__half") if t not in [kernel[0] for kernel in kernels]
    ]
    dropped += [f"<T, {n}>" for n in (64, 112, 128) if n not in [kernel[1] for kernel in kernels]]
    for kernel in dropped:
        call = rf"launch\w*{re.escape(kernel)}\(.*?\)"
        source, count = re.subn(call, "cudaErrorInvalidValue", source)
        assert count == 1, kernel
    path.write_text(source)


def _compile(csrc: Path, flags: list[str], output: Path) -> None:
    command = ["g++", "-std=c++17", "-Wall", "-Wno-unknown-pragmas", "-Wno-class-memaccess", "-Wno-psabi"]
    command += ["-fno-strict-aliasing", *flags]  # as nvcc takes it
    command += ["-I", str(HERE / "cuda_shim"), "-I", str(csrc), "-x", "c++"]
    command += [str(csrc / "window_attention.cu"), str(HERE / "window_attention_harness.cpp")]
    done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class EmulatedExtension:
    """Takes what `_C.window_attention` takes, as integers, and runs the launcher compiled for the CPU.

    num_sms blocks share the work; `seed` picks the order of everything.
    """

    DTYPES = DTYPES

    def __init__(self, library: ctypes.CDLL, num_sms: int = 2, seed: int = 0):
        self.library, self.num_sms, self.seed = library, num_sms, seed
        self.streams = []

    def window_attention(self, *, softmax_scale: float, device: int | None, stream: int, **arguments) -> None:
        assert device is None, "tensors of this test are on the CPU"
        self.streams.append(stream)
        numbers = [value for name, value in arguments.items() if name not in POINTERS]
        rows = arguments["total_q"] * arguments["num_heads"]
        sizes = {"out": rows * arguments["head_dim"] * 2, "lse": rows * 4}
        guarded = {
            name: torch.full((size + 2 * GUARD,), 0xFF, dtype=torch.uint8) for name, size in sizes.items()
        }
        addresses = arguments | {name: buffer.data_ptr() + GUARD for name, buffer in guarded.items()}
        error = self.library.emulate_window_attention(
            (ctypes.c_void_p * len(POINTERS))(*(addresses[name] for name in POINTERS)),
            (ctypes.c_int64 * len(numbers))(*numbers),
            ctypes.c_float(softmax_scale),
            ctypes.c_uint(self.num_sms),
            ctypes.c_uint64(self.seed),
        )
        if error != 0:
            raise RuntimeError(f"CUDA error {error} {self.library.emulate_complaint().decode()}")
        for name, buffer in guarded.items():
            inside = buffer[GUARD:-GUARD]
            assert (buffer[:GUARD] == 0xFF).all() and (buffer[-GUARD:] == 0xFF).all(), (
                f"a store outside {name}"
            )
            ctypes.memmove(arguments[name], inside.data_ptr(), len(inside))


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: list[int],
    cu_seqlens_k: list[int],
    softmax_scale: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in `dtype`; None computes as eager PyTorch does, lse in float32."""
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    group = q.shape[1] // k.shape[1]
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], len(q)), -torch.inf, dtype=dtype or torch.float32)
    for i in range(len(cu_seqlens_q) - 1):
        rows = slice(cu_seqlens_q[i], cu_seqlens_q[i + 1])
        keys = slice(cu_seqlens_k[i], cu_seqlens_k[i + 1])
        if keys.stop == keys.start:
            continue
        queries = q[rows].transpose(0, 1)
        key, value = (x[keys].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scores = queries @ key.mT * softmax_scale
        out[rows] = (scores.softmax(-1) @ value).transpose(0, 1)
        lse[:, rows] = scores.to(lse.dtype).logsumexp(-1)
    return out, lse

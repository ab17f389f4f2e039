"""csrc/decode_attention.cu, compiled by g++ behind cuda_shim, as the extension; and the formula."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from tests.emulate.add_position_2d import CSRC, DTYPE_CODES, HERE

POINTERS = ("x", "out", "query", "key", "value", "out_weight", "attn_gate", "key_ranges", "workspace")
GUARD = 1 << 14  # bytes around out and the workspace that no store may touch
DTYPES = {str(dtype).removeprefix("torch."): code for dtype, code in DTYPE_CODES.items()}


def build(folder: Path, csrc: Path = CSRC) -> ctypes.CDLL:
    """The launcher in `csrc` and its device code as a CPU library in `folder`."""
    library = folder / "decode_attention_cpu.so"
    compile_emulation(csrc, ["-O1", "-shared", "-fPIC"], library)
    return ctypes.CDLL(str(library))


def build_program(folder: Path) -> Path:
    """A program that runs one problem under the address and undefined-behaviour sanitizers."""
    program = folder / "decode_attention_sanitized"
    checks = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DEMULATE_MAIN"]
    copy_for_bfloat16(folder / "csrc", [8, 32])
    compile_emulation(folder / "csrc", checks, program)
    return program


def compile_emulation(csrc: Path, flags: list[str], output: Path) -> None:
    command = ["g++", "-std=c++17", "-Wall", "-Wno-unknown-pragmas", "-Wno-class-memaccess", *flags]
    command += ["-I", str(HERE / "cuda_shim"), "-I", str(csrc), "-x", "c++"]
    command += [str(csrc / "decode_attention.cu"), str(HERE / "decode_attention_harness.cpp")]
    done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def copy_for_bfloat16(csrc: Path, lanes: list[int]) -> None:
    """Copies the sources with some of the kernels only: the rest costs most of the compile time."""
    shutil.copytree(CSRC, csrc)
    path = csrc / "decode_attention.cu"
    source = path.read_text()
    dropped = [
        "head_dim<float>",
        "head_dim<__half>",
        *(f"rows<T, {n}>" for n in (8, 16, 32) if n not in lanes),
    ]
    for kernels in dropped:
        call = rf"return launch_{re.escape(kernels)}\(.*?\);"
        source, count = re.subn(call, "return cudaErrorInvalidValue;", source)
        assert count == 1, kernels
    path.write_text(source)


class EmulatedExtension:
    """Takes what `_C.decode_attention` takes, as integers, and runs the launcher compiled for the CPU.

    num_sms * blocks_per_sm blocks run at once; `seed` picks their order, odd ones by fixed priorities.
    """

    DTYPES = DTYPES

    def __init__(self, library: ctypes.CDLL, num_sms: int = 3, blocks_per_sm: int = 1, seed: int = 0):
        self.library = library
        self.num_sms, self.blocks_per_sm, self.seed = num_sms, blocks_per_sm, seed
        self.streams = []

    def decode_attention(self, *, softmax_scale: float, device: int | None, stream: int, **arguments) -> None:
        assert device is None, "tensors of this test are on the CPU"
        self.streams.append(stream)
        numbers = [value for name, value in arguments.items() if name not in POINTERS]
        element = 4 if arguments["x_dtype"] == DTYPES["float32"] else 2
        out_bytes = arguments["batch"] * arguments["text_len"] * arguments["hidden"] * element
        guarded = {"out": _guarded(out_bytes), "workspace": _guarded(4 * arguments["workspace_floats"])}
        addresses = dict(arguments, **{name: buffer.data_ptr() + GUARD for name, buffer in guarded.items()})
        error = self.library.emulate_decode_attention(
            (ctypes.c_void_p * len(POINTERS))(*(addresses[name] for name in POINTERS)),
            (ctypes.c_int64 * len(numbers))(*numbers),
            ctypes.c_float(softmax_scale),
            ctypes.c_uint(self.num_sms),
            ctypes.c_uint(self.blocks_per_sm),
            ctypes.c_uint64(self.seed),
        )
        if error != 0:
            raise RuntimeError(f"CUDA error {error}")
        for name, buffer in guarded.items():
            assert (buffer[:GUARD] == 0xFF).all() and (buffer[-GUARD:] == 0xFF).all(), (
                f"a store outside {name}"
            )
        ctypes.memmove(arguments["out"], addresses["out"], out_bytes)


def _guarded(count: int) -> Tensor:
    """`count` bytes between guards, everything 0xFF: NaN in every dtype."""
    return torch.full((count + 2 * GUARD,), 0xFF, dtype=torch.uint8)


def formula(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out_weight: Tensor,
    attn_gate: Tensor,
    key_ranges: Tensor,
    softmax_scale: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x + tanh(gate) * (attention @ out_weight^T) in `dtype`; None computes as eager PyTorch does."""
    result = (x if dtype is None else x.to(dtype)).clone()
    if dtype is not None:
        query, key, value, out_weight, attn_gate = (
            tensor.to(dtype) for tensor in (query, key, value, out_weight, attn_gate)
        )
    group = query.shape[2] // key.shape[1]
    for sample, (first, end) in enumerate(key_ranges.clamp(0, len(key)).tolist()):
        if end <= first:
            continue
        k, v = (kv[first:end].repeat_interleave(group, 1).transpose(0, 1) for kv in (key, value))
        q = query[sample].transpose(0, 1)  # [num_heads, text_len, head_dim]
        attention = (q @ k.mT * softmax_scale).softmax(-1) @ v
        update = attention.transpose(0, 1).flatten(1) @ out_weight.T
        result[sample] += (update * attn_gate.tanh()).to(result.dtype)
    return result

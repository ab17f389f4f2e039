"""The kernels of csrc for sm_90a, compiled by g++ behind cuda_shim."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tests.emulate.add_position_2d import CSRC, DTYPE_CODES, HERE

GUARD = 1 << 14  # bytes around a result that no store may touch
DTYPES = {str(dtype).removeprefix("torch."): code for dtype, code in DTYPE_CODES.items()}
TYPES = ("__nv_bfloat16", "__half")


class Kernel(NamedTuple):
    """csrc/<name>.cu with its harness; it is made for these head_dims and both 16-bit types."""

    name: str
    head_dims: tuple[int, ...]

    def build(self, folder: Path, csrc: Path = CSRC) -> ctypes.CDLL:
        """The launcher in `csrc` and its device code as a CPU library in `folder`."""
        library = folder / f"{self.name}_cpu.so"
        self._compile(csrc, ["-O2", "-shared", "-fPIC"], library)
        loaded = ctypes.CDLL(str(library))
        loaded.emulate_complaint.restype = ctypes.c_char_p
        return loaded

    def build_program(self, folder: Path) -> Path:
        """A program that runs one problem under the address and undefined-behaviour sanitizers."""
        program = folder / f"{self.name}_sanitized"
        checks = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DEMULATE_MAIN"]
        self.copy(folder / "csrc", (64, 112))
        self._compile(folder / "csrc", checks, program)
        return program

    def copy(self, csrc: Path, head_dims: tuple[int, ...]) -> None:
        """Copies the sources with bfloat16 and these head_dims only: the rest takes most of the compiler."""
        shutil.copytree(CSRC, csrc)
        path = csrc / f"{self.name}.cu"
        source = path.read_text()
        kernels = [f"head_dim<{TYPES[1]}>", *(f"<T, {n}>" for n in self.head_dims if n not in head_dims)]
        for kernel in kernels:
            source, count = re.subn(rf"launch\w*{re.escape(kernel)}\(.*?\)", "cudaErrorInvalidValue", source)
            assert count == 1, kernel
        path.write_text(source)

    def _compile(self, csrc: Path, flags: list[str], output: Path) -> None:
        command = ["g++", "-std=c++17", "-Wall", "-Wno-unknown-pragmas", "-Wno-class-memaccess", "-Wno-psabi"]
        command += ["-fno-strict-aliasing", *flags]  # as nvcc takes it
        command += ["-I", str(HERE / "cuda_shim"), "-I", str(csrc), "-x", "c++"]
        command += [str(csrc / f"{self.name}.cu"), str(HERE / f"{self.name}_harness.cpp")]
        done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


class Guarded:
    """Results of a launch between guards, NaN in every dtype: `addresses` for the launch, then `copy_back`.

    tensors: by name, contiguous; those in `kept` enter with what they hold.
    """

    def __init__(self, sizes: dict[str, int], kept: dict[str, int] | None = None):
        self._sizes = sizes
        self._buffers: dict[str, Tensor] = {}
        for name, size in sizes.items():
            self._buffers[name] = torch.full((size + 2 * GUARD,), 0xFF, dtype=torch.uint8)
        self.addresses = {name: buffer.data_ptr() + GUARD for name, buffer in self._buffers.items()}
        for name, address in (kept or {}).items():
            ctypes.memmove(self.addresses[name], address, sizes[name])

    def copy_back(self, targets: dict[str, int]) -> None:
        for name, buffer in self._buffers.items():
            assert (buffer[:GUARD] == 0xFF).all() and (buffer[-GUARD:] == 0xFF).all(), (
                f"a store outside {name}"
            )
            ctypes.memmove(targets[name], self.addresses[name], self._sizes[name])


def pointers(addresses: dict, names: tuple[str, ...]) -> ctypes.Array:
    return (ctypes.c_void_p * len(names))(*(addresses[name] for name in names))


def integers(arguments: dict, names: tuple[str, ...]) -> ctypes.Array:
    """What is not among the pointers, in order."""
    values = [value for name, value in arguments.items() if name not in names]
    return (ctypes.c_int64 * len(values))(*values)


def raise_on(error: int, library: ctypes.CDLL) -> None:
    if error != 0:
        raise RuntimeError(f"CUDA error {error} {library.emulate_complaint().decode()}")

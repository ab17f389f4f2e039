"""`python -m bench.wgmma_rate`: multiply-adds per clock and SM of wgmma with N of 64, 112 and 128, as JSON.

Hopper alone (compute capability 9.0), and nvcc on PATH or under CUDA_HOME. csrc/window_attention expects a
multiply-add with N = 112 to be as fast as one with 128; where it is not, padding would cost nothing.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from bench.static.compile import ROOT, find_nvcc

SOURCE = ROOT / "bench" / "wgmma_rate.cu"


def build(folder: Path, nvcc: str) -> Path:
    """The program, compiled for sm_90a."""
    program = folder / "wgmma_rate"
    command = [
        nvcc,
        "-O3",
        "-std=c++17",
        "-gencode",
        "arch=compute_90a,code=sm_90a",
        "-I",
        str(ROOT / "csrc"),
    ]
    subprocess.run([*command, "-o", str(program), str(SOURCE)], check=True, stdout=sys.stderr)
    return program


def main() -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("needs nvcc on PATH or under CUDA_HOME", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run([build(Path(folder), nvcc)]).returncode


if __name__ == "__main__":
    sys.exit(main())

"""Host time of a window_attention call, from Python to the kernel launch, without a GPU.

    python -m bench.host [--json]

The kernels are compiled for sm_90 and called through Triton's own launcher on CPU tensors; the last step, the
driver's launch of a few microseconds, is left out, so nothing is computed. `python -m bench.gpu` measures the
whole on a GPU. Short windows are bound by this time, as FlashAttention's users report. Prints microseconds
per call (the least of several rounds), and how many kernels other numbers of windows compile: none.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable

os.environ.pop("TRITON_INTERPRET", None)  # Triton's decorators read it

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from infimm_kernels import backends, window_attention
from infimm_kernels.attention import triton_launch

CAPABILITY = (9, 0)
SEQLEN, NUM_HEADS, HEAD_DIM = 1025, 16, 112


class Driver:
    """Stands in for a GPU's driver: knows its architecture and no device."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def without_launching() -> list[None]:
    """Make launches do nothing but grow the list that is returned."""
    launches = []
    triton.runtime.driver.set_active(Driver())
    CompiledKernel._init_handles = lambda self: None
    CompiledKernel.run = property(lambda self: lambda *args: launches.append(None))
    CompiledKernel.launch_metadata = lambda self, *args: None
    CompiledKernel.function = None
    backends.why_not_triton = lambda *tensors: None
    triton_launch._capability = lambda x: CAPABILITY
    return launches


def microseconds(call: Callable, rounds: int = 9, calls: int = 300) -> float:
    for _ in range(50):
        call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return 1e6 * min(times)


def compiled_kernels() -> int:
    kernels = [kernel for name, kernel in vars(triton_launch).items() if name.endswith("_kernel")]
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def measure(rounds: int = 9, calls: int = 300) -> dict:
    launches = without_launching()

    def windows(num_windows: int) -> torch.Tensor:
        return torch.zeros(num_windows, SEQLEN, 3, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16)

    def call(qkv: torch.Tensor) -> torch.Tensor:
        return window_attention(qkv, num_prefix_tokens=1, backend="triton")

    qkv, leaf = windows(2), windows(2).requires_grad_()
    out = call(leaf)
    dout = torch.zeros_like(out)

    def backward() -> None:
        torch.autograd.grad(out, leaf, dout, retain_graph=True)

    torch.set_num_threads(1)
    with torch.no_grad():
        forward_us = microseconds(lambda: call(qkv), rounds, calls)
    found = {
        "forward_us": forward_us,
        "forward_with_grad_us": microseconds(lambda: call(leaf), rounds, calls),
        "backward_us": microseconds(backward, rounds, calls),
    }
    backward()
    before = compiled_kernels()
    for num_windows in (1, 3, 4, 16, 17):
        leaf = windows(num_windows).requires_grad_()
        call(leaf).backward(torch.zeros(num_windows, SEQLEN, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16))
    return {
        **{name: round(value, 1) for name, value in found.items()},
        "launches": len(launches),
        "kernels": before,
        "kernels_after_other_numbers_of_windows": compiled_kernels(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "machine": platform.machine(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    found = measure()
    if parser.parse_args(arguments).json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name:<40}{value}" for name, value in found.items()))


if __name__ == "__main__":
    main()

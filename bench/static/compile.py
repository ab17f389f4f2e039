"""Compile the shipped Triton configurations ahead of time, without a GPU, in processes of their own.

Triton's decorators look at TRITON_INTERPRET when they run, so a process that has imported kernels for the
interpreter cannot compile them. Everything here that needs Triton runs in `in_processes`.
"""

import functools
import importlib
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from infimm_kernels.backends import AotConfig

ROOT = Path(__file__).parents[2]
JOBS = max(2, min(8, len(os.sched_getaffinity(0)) // 2))  # a machine with a GPU runs its tests beside these


class Compiled(NamedTuple):
    """shared_bytes: per CTA; assembler, cuobjdump: the paths of Triton's tools."""

    cubin: bytes
    ptx: str
    shared_bytes: int
    assembler: str
    cuobjdump: str


class Usage(NamedTuple):
    """Registers and bytes of local memory per thread, bytes of static shared memory per CTA."""

    registers: int
    local_bytes: int
    shared_bytes: int


class Listing(NamedTuple):
    """A kernel's machine code as text, and what it takes."""

    sass: str
    usage: Usage


def modules() -> list[str]:
    """The modules with `aot_configs`: every triton_*.py of the package that defines it."""
    paths = sorted((ROOT / "infimm_kernels").rglob("triton_*.py"))
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in paths
        if "def aot_configs(" in path.read_text()
    ]


def in_processes(function: Callable, arguments: Iterable[tuple], jobs: int = JOBS) -> list:
    """[function(*a) for a in arguments], in fresh processes that compile instead of interpreting."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare_process) as pool:
        return [future.result() for future in [pool.submit(function, *each) for each in arguments]]


def _prepare_process() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.dup2(2, 1)  # a compiler that fails prints its program, and stdout is the caller's


def shipped(module: str) -> "list[AotConfig]":
    return list(importlib.import_module(module).aot_configs())


def compile_config(config: "AotConfig", arch: int | None = None) -> Compiled:
    """`config` for its own capability, or for `arch` (80, 90, 100).

    Arguments are as the launchers find them: aligned pointers, strides that are multiples of 16 elements.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = config.kernel.arg_names
    signature = {name: config.signature.get(name, "constexpr") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name.startswith("stride_")]
    source = ASTSource(
        config.kernel,
        signature=signature,
        constexprs=config.constexprs,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    arch = arch or 10 * config.capability[0] + config.capability[1]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = triton.knobs.nvidia
    assembler = tools.ptxas_blackwell if arch >= 100 and hasattr(tools, "ptxas_blackwell") else tools.ptxas
    return Compiled(
        compiled.asm["cubin"],
        compiled.asm["ptx"],
        compiled.metadata.shared,
        assembler.path,
        tools.cuobjdump.path,
    )


class AssemblerLog(NamedTuple):
    """What ptxas -v says of one kernel, or of every kernel by its name.

    serialised: the codes of its warnings that wgmma instructions wait for each other (C7510 to C7520).
    """

    spill_bytes: dict[str, int]
    serialised: tuple[str, ...]


def read_log(log: str) -> AssemblerLog:
    spilled = re.findall(
        r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads",
        log,
    )
    codes = sorted(set(re.findall(r"\((C75\d\d)\)", log)))
    return AssemblerLog({name: int(stores) + int(loads) for name, stores, loads in spilled}, tuple(codes))


def assemble_again(compiled: Compiled) -> AssemblerLog:
    """Triton keeps no log of its assembler, so the same PTX goes through it once more."""
    (target,) = re.findall(r"^\.target\s+(sm_\w+)", compiled.ptx, re.MULTILINE)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.ptx)
        file.flush()
        return read_log(
            output([compiled.assembler, "-v", f"--gpu-name={target}", file.name, "-o", os.devnull])
        )


def usage(cubin: bytes, cuobjdump: str) -> dict[str, Usage]:
    """By (mangled) name, what every kernel of a cubin takes."""
    return _usage(_dump(cubin, [cuobjdump, "-res-usage"]))


def disassemble(cubin: bytes, cuobjdump: str) -> dict[str, Listing]:
    """By (mangled) name, every kernel of a cubin."""
    text = _dump(cubin, [cuobjdump, "-sass", "-res-usage"])
    taken = _usage(text)
    codes = re.findall(r"\t\tFunction : (\S+)\n(.*?)(?=\t\tFunction : |\Z)", text, re.DOTALL)
    return {name: Listing(code, taken[name]) for name, code in codes}


def _dump(cubin: bytes, command: list[str]) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return output([*command, file.name])


def _usage(text: str) -> dict[str, Usage]:
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    return {
        name: Usage(int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in found
    }


@functools.lru_cache
def release(tool: str) -> str:
    """The version of one of CUDA's tools, e.g. "12.8.93"."""
    return re.search(r"V(\d+\.\d+\.\d+)", output([tool, "--version"])).group(1)


def find_nvcc() -> str | None:
    """Where setup.py finds it: CUDA_HOME first, then PATH."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")


class CudaKernel(NamedTuple):
    """A bf16 kernel of csrc: its name, its template arguments after the dtype, its code."""

    name: str
    template: tuple[int, ...]
    listing: Listing
    log: AssemblerLog


def compile_cuda(source: Path, arch: str, nvcc: str) -> list[CudaKernel]:
    """The bf16 kernels of one .cu file for `arch` ("80", "90a"), with setup.py's optimisation flags."""
    import triton  # an installation of nvcc may lack cuobjdump, Triton's wheel has one

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [nvcc, "-O3", "-std=c++17", "-I", str(ROOT / "csrc"), "-cubin", f"-arch=sm_{arch}"]
        log = output([*command, "-Xptxas", "-v", "-o", str(cubin), str(source)])
        beside = shutil.which("cuobjdump", path=str(Path(nvcc).resolve().parent))
        kernels = disassemble(cubin.read_bytes(), beside or triton.knobs.nvidia.cuobjdump.path)
    read = read_log(log)
    found = []
    for mangled, listing in kernels.items():
        name, rest = _last_name(mangled)
        if rest.startswith("I13__nv_bfloat16"):
            template = tuple(map(int, re.findall(r"Li(\d+)E", rest)))
            found.append(
                CudaKernel(
                    name, template, listing, read._replace(spill_bytes={name: read.spill_bytes[mangled]})
                )
            )
    return found


def _last_name(mangled: str) -> tuple[str, str]:
    """The function's own name in _ZN<length><name>...<length><name><rest>, and the rest."""
    name, rest = "", mangled.removeprefix("_ZN")
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    return name, rest


def output(command: list[str]) -> str:
    """What `command` prints on both streams; RuntimeError with it where the command fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}: {done.stdout}")
    return done.stdout

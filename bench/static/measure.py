"""The figures of one compiled kernel: registers, spills, shared memory, CTAs per SM, matrix instructions."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from bench.static import compile as aot
from bench.static.sass import Code, MmaRegion, race_flags

if TYPE_CHECKING:
    from infimm_kernels.backends import AotConfig

SHARED_PER_CTA = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
SHARED_RESERVED = 1024  # of every CTA, by the system
REGISTERS_PER_SM = 64 * 1024
WARPS_PER_SM, CTAS_PER_SM = 64, 32
SPILL_OPCODES = ("LDL", "STL")
COPY_OPCODES = ("LDGSTS", "UTMALDG", "UBLKCP")
WAIT_OPCODES = ("WARPGROUP.DEPBAR", "WARPGROUP.WAIT")


class Figures(NamedTuple):
    """Counts of instructions, bytes and registers; `regions` is the matrix work per trip of one warp.

    spills: instructions that read or write spilled registers, in the hot loops among them: those with matrix
    instructions, or all loops of a kernel without. loop_instructions, async_copies (from global to
    shared memory) and wgmma_waits count there too.
    wgmma_serialised: the codes of ptxas' warnings about it, or "no". instructions: of the whole kernel, but
    for padding.
    """

    registers: int
    spills: int
    spills_in_loop: int
    shared_memory: int
    ctas_per_sm: int
    loop_instructions: int
    async_copies: int
    wgmma_waits: int
    wgmma_serialised: str
    race_flags: int
    mma: str
    regions: tuple[MmaRegion, ...]
    instructions: int
    triton: str
    ptxas: str


def ctas_per_sm(registers: int, shared_bytes: int, num_warps: int, arch: int) -> int:
    """How many CTAs fit by registers (given to a warp by 256, to four warps at a time), memory and warps."""
    warps = REGISTERS_PER_SM // (-(-registers * 32 // 256) * 256) // 4 * 4
    by_shared = SHARED_PER_SM[arch] // (shared_bytes + SHARED_RESERVED)
    return min(min(warps, WARPS_PER_SM) // num_warps, by_shared, CTAS_PER_SM)


def figures(
    listing: aot.Listing,
    shared_bytes: int,
    ptx: str,
    spilled: bool,
    serialised: Sequence[str],
    num_warps: int,
    arch: int,
    tools: tuple[str, str],
) -> Figures:
    """spilled: local memory holds registers, not arrays alone; tools: the versions of Triton and ptxas."""
    code = Code(listing.sass)
    if not code.count(("EXIT",)):
        raise ValueError("the compiler made a trap of it: its code has no exit")
    shapes = sum((region.shapes for region in code.mma_regions), Counter())
    return Figures(
        registers=listing.usage.registers,
        spills=code.count(SPILL_OPCODES) if spilled else 0,
        spills_in_loop=code.count(SPILL_OPCODES, code.hot_addresses) if spilled else 0,
        shared_memory=shared_bytes,
        ctas_per_sm=ctas_per_sm(listing.usage.registers, shared_bytes, num_warps, arch),
        loop_instructions=len(code.hot_addresses),
        async_copies=code.count(COPY_OPCODES, code.hot_addresses),
        wgmma_waits=code.count(WAIT_OPCODES, code.hot_addresses),
        wgmma_serialised=" ".join(serialised) or "no",
        race_flags=race_flags(ptx),
        mma=", ".join(f"{shape} x{count}" for shape, count in sorted(shapes.items())) or "none",
        regions=tuple(code.mma_regions),
        instructions=len(code.reachable),
        triton=tools[0],
        ptxas=tools[1],
    )


def measure(config: "AotConfig", arch: int) -> Figures:
    """Compile `config` for `arch` and read it. Needs a process without Triton's interpreter."""
    import triton

    compiled = aot.compile_config(config, arch)
    (listing,) = aot.disassemble(compiled.cubin, compiled.cuobjdump).values()
    # Arrays (the reduction of large angles in sin and cos) are local memory too; rounded up to 8 bytes.
    arrays = sum(map(int, re.findall(r"\.local\s.*__local_depot\d+\[(\d+)\]", compiled.ptx)))
    spilled = listing.usage.local_bytes > -(-arrays // 8) * 8
    serialised = aot.assemble_again(compiled).serialised if "wgmma" in compiled.ptx else ()
    tools = (triton.__version__, aot.release(compiled.assembler))
    return figures(
        listing, compiled.shared_bytes, compiled.ptx, spilled, serialised, config.num_warps, arch, tools
    )


def measure_cuda(
    kernel: aot.CudaKernel, num_threads: int, dynamic_shared: int, arch: int, ptxas: str
) -> Figures:
    spilled, serialised = any(kernel.log.spill_bytes.values()), kernel.log.serialised
    shared_bytes, tools = kernel.listing.usage.shared_bytes + dynamic_shared, ("not used", ptxas)
    return figures(kernel.listing, shared_bytes, "", spilled, serialised, num_threads // 32, arch, tools)

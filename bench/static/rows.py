"""Compile and read everything that is shipped, and make the ledger's rows of it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.static import compile as aot
from bench.static import kernels, work
from bench.static.measure import Figures, measure, measure_cuda

SHARDS = 8  # of every module: small enough to keep all processes busy
ARCHS = {(8, 0): 80, (9, 0): 90, (10, 0): 100}
INFORMATION = (100,)
CUDA_ARCHS = {80: "80", 90: "90a"}
CUDA_SOURCES = {  # and the architectures that each has code for
    "csrc/add_position_2d.cu": (80, 90),
    "csrc/decode_attention.cu": (80, 90),
    "csrc/window_attention.cu": (90,),
    "csrc/window_attention_backward.cu": (90,),
}
CUDA_THREADS = {
    "add_position_2d_kernel": 256,
    "decode_attention_kernel": 256,
    "window_attention_kernel": 384,
    "window_attention_backward_kernel": 384,
}


class Measured(NamedTuple):
    """A configuration on one architecture; `figures` is a sentence where it does not compile."""

    kernel: str
    backend: str
    config: str
    direction: str
    default: bool
    head_dim: int
    tile: dict[str, object]
    num_warps: int
    num_stages: int
    arch: int
    figures: Figures | str


class Ledger(NamedTuple):
    """rows: of what compiled; findings: of what did not, or could not be read; remarks: what is left out."""

    rows: list[dict]
    findings: list[str]
    remarks: list[str]


def collect(default_only: bool = False) -> Ledger:
    """Everything shipped, or the default Triton configurations, compiled and read in processes."""
    shards = [(module, shard, SHARDS, default_only) for module in aot.modules() for shard in range(SHARDS)]
    measured = [each for part in aot.in_processes(measure_shard, shards) for each in part]
    remarks = []
    if default_only:
        remarks.append("default configurations of Triton kernels alone")
    elif aot.find_nvcc() is None:
        remarks.append(f"no nvcc through CUDA_HOME or PATH: no rows for {', '.join(CUDA_SOURCES)}")
    else:
        parts = aot.in_processes(measure_cuda_sources, [(arch,) for arch in CUDA_ARCHS])
        measured += [each for part in parts for each in part]
    return ledger_of(measured, remarks)


def measure_shard(module: str, shard: int, shards: int, default_only: bool) -> list[Measured]:
    """Every shards-th bf16 configuration of a module; needs a process for compiling."""
    configs = [config for config in aot.shipped(module) if config.dtype == "bf16"]
    configs = [config for config in configs if config.default or not default_only]
    return measure_configs(configs[shard::shards])


def measure_configs(configs: Iterable) -> list[Measured]:
    measured = []
    for config in configs:
        if config.capability in ARCHS:
            measured.append(_measure_one(config, ARCHS[config.capability]))
    return measured


def _measure_one(config, arch: int) -> Measured:
    try:
        figures = measure(config, arch)
    except Exception as error:  # a compiler may refuse in any way: the ledger says so and goes on
        figures = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return Measured(
        kernel=config.kernel.__name__,
        backend="triton",
        config=config.name,
        direction=config.direction,
        default=config.default,
        head_dim=config.head_dim,
        tile={name: value for name, value in config.constexprs.items() if _plain(value)},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        arch=arch,
        figures=figures,
    )


def _plain(value: object) -> bool:
    return isinstance(value, int | str) or (isinstance(value, tuple) and all(map(_plain, value)))


def measure_cuda_sources(arch: int) -> list[Measured]:
    """The bf16 kernels of csrc, as setup.py's flags make them; needs nvcc."""
    nvcc = aot.find_nvcc()
    ptxas = aot.release(nvcc)
    sources = [source for source, archs in CUDA_SOURCES.items() if arch in archs]
    return [
        _measured_cuda(kernel, arch, ptxas)
        for source in sources
        for kernel in aot.compile_cuda(aot.ROOT / source, CUDA_ARCHS[arch], nvcc)
    ]


def _measured_cuda(kernel: aot.CudaKernel, arch: int, ptxas: str) -> Measured:
    threads, direction, tile, head_dim, dynamic = CUDA_THREADS[kernel.name], "fwd", {}, 0, 0
    if kernel.name in work.ATTENTION:
        (head_dim,) = kernel.template
        tile = work.window_tile(kernel.name, head_dim)
        dynamic = work.window_shared_bytes(head_dim, tile["NUM_PREFIX"] > 0)
        if "backward" in kernel.name:
            direction, dynamic = "bwd", work.window_backward_shared_bytes(head_dim)
    return Measured(
        kernel=kernel.name,
        backend="cuda",
        config=f"{kernel.name.removesuffix('_kernel')} bf16 template={kernel.template}",
        direction=direction,
        default=False,
        head_dim=head_dim,
        tile=tile,
        num_warps=threads // 32,
        num_stages=tile.get("STAGES", 1),
        arch=arch,
        figures=measure_cuda(kernel, threads, dynamic, arch, ptxas),
    )


def ledger_of(measured: Sequence[Measured], remarks: Sequence[str] = ()) -> Ledger:
    """The rows, and what is wrong with kernels that did not compile or whose work is not understood."""
    ledger = Ledger([], [], list(remarks))
    for each in measured:
        # What is compiled for information cannot fail.
        wrong = ledger.remarks if each.arch in INFORMATION else ledger.findings
        where = f"{each.config} [{each.kernel}, sm_{each.arch}]"
        if isinstance(each.figures, str):
            wrong.append(f"{where} does not compile: {each.figures}")
            continue
        try:
            ledger.rows.extend(_rows(each, measured))
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    return ledger


def _rows(each: Measured, measured: Sequence[Measured]) -> list[dict]:
    if each.kernel not in work.ATTENTION:
        return [_other_row(each)]
    problems = work.problems(each.head_dim, each.tile["NUM_PREFIX"])
    rows = [_row(each, p.head_dim, p.seqlen, *_attention_ratio(each, p, measured)) for p in problems]
    if each.kernel == "attention_forward_kernel" and (share := kernels.short_segment_ratio(each.tile)):
        for row in rows:
            row["bytes_ratio"] = round(share, 4)
    return rows


def _attention_ratio(
    each: Measured, problem: work.Problem, measured: Sequence[Measured]
) -> tuple[float, str]:
    """Useful over issued of the whole pass that `each` is a part of."""
    total, sources = 0.0, set()
    for part in work.parts_of_pass(each.kernel, each.tile, problem):
        serving = [
            other
            for other in [each, *measured]
            if (other.kernel, other.arch, other.head_dim) == (part.kernel, each.arch, each.head_dim)
            and part.matches(other.tile)
            and work.ATTENTION[other.kernel](other.tile, problem) is not None
            and not isinstance(other.figures, str)
        ]
        if not serving:
            raise ValueError(f"no configuration of {part.kernel} completes the pass at {problem}")
        issued = work.issued_macs(
            work.ATTENTION[part.kernel](serving[0].tile, problem),
            serving[0].figures.regions,
            serving[0].tile.get("MATRIX_WARPS", serving[0].num_warps),
        )
        total += issued.macs
        sources.add(issued.source)
    counted = sorted(sources - {work.NO_MATRIX_WORK}) or [work.NO_MATRIX_WORK]
    return work.useful_macs(each.direction, problem) / total, ", ".join(counted)


def _other_row(each: Measured) -> dict:
    """Of a kernel beside attention's, with the figures that the table has for it."""
    kernel = kernels.KERNELS.get(each.kernel)
    if kernel is None:
        raise ValueError("bench/static/kernels.py must say what this kernel does")
    ratio, source = 1.0, work.NO_MATRIX_WORK
    if kernel.work is not None and each.tile:
        useful, tiles = kernel.work(each.tile)
        issued = work.issued_macs(tiles, each.figures.regions, each.num_warps)
        ratio, source = useful / issued.macs, issued.source
    elif each.figures.regions:
        raise ValueError(f"a memory-bound kernel must have no matrix instructions, got {each.figures.mma}")
    row = _row(each, kernel.inner or each.head_dim, 0, ratio, source)
    if kernel.bytes_ratio and each.tile and (share := kernel.bytes_ratio(each.tile)) is not None:
        row["bytes_ratio"] = round(share, 4)
    if kernel.elements and each.tile and each.arch not in INFORMATION:
        elements = kernel.elements(each.tile)
        count = kernels.instructions_per_element(elements, each.figures, each.num_warps)
        row["instructions_per_element"] = round(count, 2)
        row["instruction_budget"] = round(kernels.instruction_budget(row["arch"], elements.bytes), 1)
    return row


def _row(each: Measured, head_dim: int, seqlen: int, ratio: float, source: str) -> dict:
    figures = each.figures._asdict()
    del figures["regions"], figures["instructions"]
    return {
        "kernel": each.kernel,
        "backend": each.backend,
        "pass": each.direction,
        "arch": f"sm_{each.arch}",
        "default": each.default,
        "head_dim": head_dim,
        "seqlen": seqlen,
        "useful_over_issued": round(ratio, 4),
        "work_from": source,
        "config": each.config,
        "gated": each.kernel in work.ATTENTION,
        "num_warps": each.num_warps,
        "num_stages": each.num_stages,
    } | figures

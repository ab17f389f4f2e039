"""Result files of a GPU that does not exist, made by the writer itself, for the tests of the report."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from bench import plan, results
from bench.harness import Case

HEADER = {
    "gpu": "NVIDIA Test 1000",
    "compute_capability": "9.0",
    "driver": "999.1",
    "torch": "2.11.0",
    "cuda": "13.0",
    "triton": "3.6.0",
    "nvcc": "13.0.1",
    "python": "3.12.0",
    "commit": "0" * 40,
    "command": "BUDGET_S=540 python -m bench.gpu",
    "date": "2030-01-02",
    "budget_s": 540.0,
}
# TFLOP/s forward on a full GPU, backward three quarters of it; sdpa_cudnn is wrong and xformers missing.
SPEEDS = {
    "infimm_kernels": 360.0,
    "sdpa_flash": 270.0,
    "sdpa_efficient": 190.0,
    "flex_attention": 300.0,
    "compiled_eager": 90.0,
    "eager": 45.0,
}
USEFUL_FLOPS = {"fwd": 4, "bwd": 10}


def entries_of(case: Case) -> list[dict[str, Any]]:
    shape = case.shape
    if case.op == "matrix_product":
        return [case.entry("torch", "ok", median_us=1400.0, iqr=2.0, repeats=40, tflops=785.0)]
    if case.op == "copy":
        return [case.entry("torch", "ok", median_us=500.0, iqr=2.0, repeats=40, gbps=4300.0)]
    if case.op not in ("window_attention", "varlen_attention"):
        return _other_entries(case)
    if case.metric == "memory":
        sizes = {name: shape["num_windows"] * (20 + 4000 / speed) * 2**20 for name, speed in SPEEDS.items()}
        return [case.entry(name, "ok", peak_bytes=int(size), repeats=1) for name, size in sizes.items()]
    entries = []
    for name, speed in SPEEDS.items():
        share = shape["num_windows"] / (shape["num_windows"] + 8) * shape["seqlen"] / (shape["seqlen"] + 60)
        tflops = speed * share * (0.75 if case.backward else 1.0)
        work = shape["num_windows"] * shape["seqlen"] ** 2 * shape["num_heads"] * shape["head_dim"]
        flops = USEFUL_FLOPS["bwd" if case.backward else "fwd"] * work
        measured = {"median_us": flops / tflops / 1e6, "iqr": 1.0, "repeats": 20, "tflops": tflops}
        entries.append(case.entry(name, "ok", error=1e-3, eager_error=1e-3, **measured))
    entries.append(case.entry("sdpa_cudnn", "wrong", "dk errs by 0.9, eager by 0.01: not timed"))
    return [*entries, case.entry("xformers", "missing", "xformers.ops cannot be imported")]


def _other_entries(case: Case) -> list[dict[str, Any]]:
    """Ours at 100 us, the others slower."""
    others = {
        "gated_cross_attention": ["sdpa_masked"],
        "gated_cross_attention_decode": ["sdpa_cached", "recompute"],
    }
    names = ["infimm_kernels", "eager", "compiled_eager", *others.get(case.op, [])]
    return [
        case.entry(name, "ok", median_us=100.0 + 50 * i, iqr=1.0, repeats=20, tflops=200.0, gbps=3000.0)
        for i, name in enumerate(names)
    ]


def write(
    path: Path,
    finished: bool = True,
    sections: Collection[str] = ("ceilings", "main", "windows", "seqlen", "memory", "float16"),
    **header: Any,
) -> Path:
    """A result file with the cases of these sections of the full plan."""
    writer = results.Writer([path], HEADER | header)
    for case in plan.full_plan():
        if case.section in sections:
            for entry in entries_of(case):
                writer.add(entry)
    if finished:
        writer.finish()
    return path

"""What got worse: the ledger's rows against the hardware's limits, the project's gates, the stored rows."""

import re
from collections.abc import Sequence

from bench.static.kernels import BYTES_GATE, KERNELS, Kernel
from bench.static.measure import SHARED_PER_CTA

Row = dict
KEY = ("kernel", "backend", "pass", "arch", "config", "head_dim", "seqlen")
INFORMATION = ("sm_100",)  # compiled and shown, held to nothing
# Of the default attention at 1025 tokens, one of them a prefix, and head_dim 112.
GATES = {("fwd", "sm_80"): 0.97, ("fwd", "sm_90"): 0.87, ("bwd", "sm_80"): 0.95, ("bwd", "sm_90"): 0.87}
GATED_SHAPE = (112, 1025)
# Of csrc's attention for Hopper, at that shape: it exists for exact products and one wait behind each of
# four. Forward scores and values, of the first and last key tile and in the loop between; backward scores,
# gradients of the weights, dv with dk, and dq. Backward the one prefix query takes a step of 64.
CUDA_ATTENTION_GATES, CUDA_ATTENTION_WAITS = {"fwd": 0.98, "bwd": 0.93}, 4
RATIO_TOLERANCE = 5e-4  # a stored ratio has four digits
LOOP_GROWTH = 1.05
SERIALISED = "ptxas makes wgmma instructions wait for each other"


def key(row: Row) -> tuple:
    return tuple(row[name] for name in KEY)


def label(row: Row) -> str:
    shape = f" at seqlen {row['seqlen']}" if row["seqlen"] else ""
    return f"{row['config']} [{row['kernel']}, {row['arch']}, {row['pass']}]{shape}"


def beyond_limits(rows: Sequence[Row]) -> list[str]:
    """Rows that cannot run, default rows that spill in a hot loop, and gates that are missed."""
    findings = []
    held = [row for row in rows if "rival" not in row and row["arch"] not in INFORMATION]
    for row in held:
        limit = SHARED_PER_CTA[int(row["arch"].removeprefix("sm_"))]
        if row["shared_memory"] > limit:
            findings.append(
                f"{label(row)}: shared_memory is {row['shared_memory']} bytes, the limit is {limit}"
            )
        elif row["ctas_per_sm"] < 1:
            registers, warps = row["registers"], row["num_warps"]
            findings.append(f"{label(row)}: {warps} warps of {registers} registers a thread do not fit an SM")
        if row["default"] and row["spills_in_loop"]:
            findings.append(f"{label(row)}: spills_in_loop is {row['spills_in_loop']}, must be 0")
        if row.get("bytes_ratio", 1.0) < BYTES_GATE:
            ratio = row["bytes_ratio"]
            findings.append(f"{label(row)}: bytes_ratio is {ratio}, must be at least {BYTES_GATE}")
        if (kernel := KERNELS.get(row["kernel"])) is not None:
            findings += _beyond_gates(row, kernel)
        if row["gated"] and row["backend"] == "cuda":
            findings += _beyond_cuda_attention(row)
    for (direction, arch), gate in GATES.items():
        gated = [
            row
            for row in held
            if row["default"]
            and row["gated"]
            and (row["pass"], row["arch"]) == (direction, arch)
            and (row["head_dim"], row["seqlen"]) == GATED_SHAPE
        ]
        if not gated:
            findings.append(
                f"no default attention row for {direction} on {arch} at head_dim 112 and seqlen 1025"
            )
        for row in gated:
            if row["useful_over_issued"] < gate:
                ratio = row["useful_over_issued"]
                findings.append(f"{label(row)}: useful_over_issued is {ratio}, must be at least {gate}")
    return findings


def _beyond_gates(row: Row, kernel: Kernel) -> list[str]:
    """What a kernel beside attention's misses of what the table of kernels asks."""
    findings = []
    if row["default"] and row["spills"]:
        findings.append(f"{label(row)}: spills is {row['spills']}, must be 0")
    held = kernel.product_gate is not None and not (kernel.exempt and kernel.exempt in row["config"])
    if held and row["useful_over_issued"] < kernel.product_gate:
        ratio = row["useful_over_issued"]
        findings.append(
            f"{label(row)}: useful_over_issued is {ratio}, must be at least {kernel.product_gate}"
        )
    if "instructions_per_element" in row and row["instructions_per_element"] > row["instruction_budget"]:
        count, budget = row["instructions_per_element"], row["instruction_budget"]
        findings.append(f"{label(row)}: instructions_per_element is {count}, must be at most {budget}")
    return findings


def _beyond_cuda_attention(row: Row) -> list[str]:
    """What a wgmma kernel of csrc must hold though it is no default: nothing else would notice."""
    findings = []
    gate, ratio = CUDA_ATTENTION_GATES[row["pass"]], row["useful_over_issued"]
    if ratio < gate and (row["head_dim"], row["seqlen"]) == GATED_SHAPE:
        findings.append(f"{label(row)}: useful_over_issued is {ratio}, must be at least {gate}")
    if row["spills"]:
        findings.append(f"{label(row)}: spills is {row['spills']}, must be 0")
    if row["wgmma_waits"] > CUDA_ATTENTION_WAITS:
        waits = row["wgmma_waits"]
        findings.append(f"{label(row)}: wgmma_waits is {waits}, must be at most {CUDA_ATTENTION_WAITS}")
    if row["wgmma_serialised"] != "no":
        findings.append(f"{label(row)}: {SERIALISED} ({row['wgmma_serialised']})")
    scores = "HGMMA.64x128x16" if row["pass"] == "fwd" else "HGMMA.64x64x16"
    for shape in (scores, f"HGMMA.64x{row['head_dim']}x16"):
        if shape not in _shapes(row):
            findings.append(f"{label(row)}: must have the matrix instruction {shape}, has {row['mma']}")
    return findings


def slow_defaults(rows: Sequence[Row]) -> list[str]:
    """Default rows whose wgmma instructions are serialised, stored so or not: worth saying every time."""
    return [
        f"{label(row)}: {SERIALISED} ({row['wgmma_serialised']})"
        for row in rows
        if "rival" not in row and row["default"] and row["wgmma_serialised"] != "no"
    ]


def worse(rows: Sequence[Row], stored: Sequence[Row]) -> list[str]:
    """What is worse than in the stored ledger.

    Registers, shared memory and the like belong to one Triton and one assembler; a row stored with others is
    compared by its ratio alone (`other_tools` says so); `beyond_limits` holds with all of them.
    """
    findings = []
    held = {key(row): row for row in rows if "rival" not in row and row["arch"] not in INFORMATION}
    old_rows = {key(row): row for row in stored if "rival" not in row and row["arch"] not in INFORMATION}
    for lost in old_rows.keys() - held.keys():
        findings.append(f"{label(old_rows[lost])}: is in the stored ledger and no longer shipped")
    for new in held.keys() - old_rows.keys():
        findings.append(f"{label(held[new])}: is not in the stored ledger")
    for shared in held.keys() & old_rows.keys():
        findings += _worse_row(held[shared], old_rows[shared])
    return sorted(findings)


def other_tools(rows: Sequence[Row], stored: Sequence[Row]) -> str | None:
    """A sentence where some rows were stored with another Triton or assembler than the present one."""
    old = {key(row): _tools(row) for row in stored if "rival" not in row}
    changed = {
        (old[key(row)], _tools(row))
        for row in rows
        if "rival" not in row and key(row) in old and old[key(row)] != _tools(row)
    }
    if not changed:
        return None
    pairs = "; ".join(
        f"stored with Triton {before[0]}, ptxas {before[1]}, now Triton {after[0]}, ptxas {after[1]}"
        for before, after in sorted(changed)
    )
    return f"{pairs}: of these rows only useful_over_issued is compared"


def _tools(row: Row) -> tuple[str, str]:
    return row["triton"], row["ptxas"]


def _worse_row(row: Row, old: Row) -> list[str]:
    findings = []

    def higher(name: str, limit: float) -> None:
        if row[name] > limit:
            findings.append(f"{label(row)}: {name} rose from {old[name]} to {row[name]}")

    if row["useful_over_issued"] < old["useful_over_issued"] - RATIO_TOLERANCE:
        findings.append(
            f"{label(row)}: useful_over_issued fell from {old['useful_over_issued']} to "
            f"{row['useful_over_issued']}"
        )
    if row.get("bytes_ratio", 1.0) < old.get("bytes_ratio", 0.0) - RATIO_TOLERANCE:
        old_ratio, ratio = old["bytes_ratio"], row["bytes_ratio"]
        findings.append(f"{label(row)}: bytes_ratio fell from {old_ratio} to {ratio}")
    if _tools(row) != _tools(old):
        return findings
    if "instructions_per_element" in row and "instructions_per_element" in old:
        higher("instructions_per_element", LOOP_GROWTH * old["instructions_per_element"])
    higher("spills_in_loop", old["spills_in_loop"])
    higher("spills", old["spills"])
    higher("wgmma_waits", old["wgmma_waits"])
    higher("race_flags", old["race_flags"])
    higher("loop_instructions", LOOP_GROWTH * old["loop_instructions"])
    if row["ctas_per_sm"] < old["ctas_per_sm"]:
        findings.append(f"{label(row)}: ctas_per_sm fell from {old['ctas_per_sm']} to {row['ctas_per_sm']}")
    if old["wgmma_serialised"] == "no" != row["wgmma_serialised"]:
        findings.append(f"{label(row)}: {SERIALISED} ({row['wgmma_serialised']})")
    if old["async_copies"] and not row["async_copies"]:
        findings.append(f"{label(row)}: the loops no longer copy asynchronously, had {old['async_copies']}")
    lost = sorted(_shapes(old) - _shapes(row))
    if lost:
        findings.append(f"{label(row)}: lost the matrix instruction {', '.join(lost)}, has {row['mma']}")
    return findings


def _shapes(row: Row) -> set[str]:
    return {re.sub(r" x\d+$", "", part) for part in row["mma"].split(", ")} - {"none"}

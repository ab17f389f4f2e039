"""The static ledger: what the shipped kernels issue, hold and spill, read from their machine code. No GPU.

    python -m bench.ledger           a table; what got worse goes to stderr and makes the exit status 1
    python -m bench.ledger --json    the same rows as one JSON list on stdout
    python -m bench.ledger --check   nothing but what got worse
    python -m bench.ledger --default the default configurations of the Triton kernels alone, much quicker
    python -m bench.ledger --write   replace bench/ledger.json, the stored ledger that is compared with

A row is one shipped bf16 configuration on one architecture for one problem: seqlen tokens of head_dim
channels in one head of one window; of 1025 and of 257 tokens one is a prefix token. sm_100 is shown for
information.

    useful_over_issued  2 S^2 D multiply-adds forward and 5 S^2 D backward, over those that all kernels of the
                        pass issue together: matrix instructions with their masked and padded parts, and the
                        scalar work of prefix tokens. A backward's kernels all carry the figure of their pass.
                        The kernels beside attention's: of their matrix product at the sizes of the 13 B
                        model (bench/static/kernels.py); head_dim is the inner size, seqlen 0. Without matrix
                        work they have 1.0, head_dim 0 and seqlen 0.
    bytes_ratio         of a call bound by memory: the bytes that must pass between memory and GPU over those
                        that do, from tiles and trips
    instructions_per_element
                        of an element-wise kernel, per thread; instruction_budget: how many the GPU can issue
                        while the bytes of an element pass at full bandwidth
    work_from           whether issued was read from the machine code, or counted from the tile sizes alone
    spills              instructions that move spilled registers; spills_in_loop: those in the loops with
                        matrix instructions, where loop_instructions, async_copies and wgmma_waits count
    wgmma_serialised    ptxas' warnings that wgmma instructions wait for each other, "no" without
    race_flags          writes to shared memory after a wgmma wait without a barrier between; may be harmless
    default             the configuration that is chosen when nobody asks for another

Rows with `rival` are other libraries', from their tile sizes; "not read" stands for what nobody compiled.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.static import compare, rivals
from bench.static.compile import find_nvcc
from bench.static.rows import collect

STORED = Path(__file__).with_name("ledger.json")
COLUMNS = {
    "config": "configuration",
    "arch": "arch",
    "pass": "pass",
    "seqlen": "S",
    "head_dim": "D",
    "default": "default",
    "useful_over_issued": "useful/issued",
    "bytes_ratio": "bytes",
    "instructions_per_element": "per element",
    "instruction_budget": "budget",
    "registers": "registers",
    "spills": "spills",
    "spills_in_loop": "in loop",
    "shared_memory": "shared",
    "ctas_per_sm": "CTAs/SM",
    "loop_instructions": "loop",
    "async_copies": "copies",
    "wgmma_waits": "waits",
    "wgmma_serialised": "serialised",
    "race_flags": "flags",
    "mma": "matrix instructions",
}
RIVAL_COLUMNS = {
    "rival": "rival",
    "arch": "arch",
    "pass": "pass",
    "seqlen": "S",
    "head_dim": "D",
    "useful_over_issued": "useful/issued",
    "source": "tile sizes from",
}


def table(rows: Sequence[dict], columns: dict[str, str]) -> str:
    cells = [list(columns.values()), *([_cell(row.get(name, "-")) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def to_json(rows: Sequence[dict]) -> str:
    """A list with one row per line, so that a changed figure is one changed line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description="The kernels' static ledger.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--json", action="store_true", help="print the rows as one JSON list")
    choice.add_argument("--check", action="store_true", help="print nothing but what got worse")
    parser.add_argument("--write", action="store_true", help="store the rows in bench/ledger.json")
    parser.add_argument("--default", action="store_true", help="the default Triton configurations alone")
    options = parser.parse_args(arguments)
    if options.default and options.write:
        parser.error("--write stores everything: it cannot go with --default")

    ledger = collect(default_only=True) if options.default else collect()
    ours = sorted(ledger.rows, key=compare.key)
    rows = ours + rivals.rows()
    findings = ledger.findings + compare.beyond_limits(ours)
    remarks = ledger.remarks + compare.slow_defaults(ours)
    if options.write:
        STORED.write_text(to_json(rows))
    elif STORED.exists():
        stored = json.loads(STORED.read_text())
        if find_nvcc() is None:  # nothing to hold those rows against
            stored = [row for row in stored if row["backend"] != "cuda"]
        if options.default:
            stored = [row for row in stored if row["default"]]
        findings += compare.worse(ours, stored)
        remarks += [sentence for sentence in [compare.other_tools(ours, stored)] if sentence]
    else:
        findings.append(f"{STORED.name} does not exist: run python -m bench.ledger --write")

    if options.json:
        sys.stdout.write(to_json(rows))
    elif not options.check:
        print(table(ours, COLUMNS), end="\n\n")
        print(table(rivals.rows(), RIVAL_COLUMNS))
    for sentence in remarks + findings:
        print(sentence, file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

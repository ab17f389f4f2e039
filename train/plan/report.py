"""A plan as tables in the terminal."""

import math
import os
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .paper import PaperPairs, paper_lines
from .stage import StagePlan

GB = 1e9


def show(document: dict[str, Any], plans: list[StagePlan], pairs: PaperPairs | None) -> None:
    """Prints tables of memory and time, what was assumed, and the paper's figures."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 110
    console = Console(width=width, highlight=False)
    offloaded = "" if document["offload"] == "none" else f", {document['offload']} offloaded"
    console.print(f"{document['preset']} on {document['gpus']} x {document['gpu']}{offloaded}\n")
    for table in (_memory(document, plans), _time(document, plans)):
        console.print(table)
    for line in _remarks(document, plans):
        console.print(line)
    lines = [] if pairs is None else paper_lines(plans, pairs)
    if lines:
        console.print()
    for line in lines:
        console.print(line)


def _table(title: str, columns: list[str]) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for name in columns:
        table.add_column(name, justify="left" if name in ("stage", "fits") else "right", no_wrap=True)
    return table


def _memory(document: dict[str, Any], plans: list[StagePlan]) -> Table:
    title = (
        f"Memory of a GPU in GB, {document['usable_bytes'] / GB:.1f} usable; largest: micro batch that fits"
    )
    names = ["weights", "gradients", "optimizer", "buffers", "activations", "peak"]
    has_host = document["offload"] != "none"
    names += ["host"] * has_host
    table = _table(title, ["stage", "ZeRO", "micro", "accum.", *names, "fits", "largest"])
    for plan in plans:
        held = plan.held
        activations = plan.activations.peak + plan.cast_weights
        numbers = [
            held.parameters,
            held.gradients,
            held.optimizer,
            held.buffers,
            activations,
            plan.peak_bytes,
        ]
        numbers += [held.host] * has_host
        table.add_row(
            plan.stage,
            str(plan.zero_stage),
            str(plan.micro_batch),
            str(plan.accumulation),
            *(f"{number / GB:.1f}" for number in numbers),
            "[green]yes[/]" if plan.fits else "[red]no[/]",
            str(plan.largest_micro_batch) if plan.largest_micro_batch else "[red]none[/]",
        )
    return table


def _time(document: dict[str, Any], plans: list[StagePlan]) -> Table:
    names = ["trained", "batch", "windows", "row", "PFLOP/step", "s/step", "steps", "samples", "hours"]
    table = _table(f"Time at {document['mfu']:.0%} of the peak", ["stage", *names])
    for plan in plans:
        table.add_row(
            plan.stage,
            f"{plan.parameters.trainable / 1e9:.2f} of {plan.parameters.total / 1e9:.2f} B",
            f"{plan.global_batch:,}",
            f"{plan.windows_per_image:.1f}",
            f"{plan.row_length:,}",
            _three_digits(plan.step_flops / 1e15),
            _three_digits(plan.step_seconds),
            f"{plan.steps:,}",
            _count(plan.samples),
            _three_digits(plan.hours),
        )
    if len(plans) > 1:
        table.add_row("together", *[""] * (len(names) - 1), _three_digits(document["hours"]))
    return table


def _three_digits(number: float) -> str:
    """Without an exponent, and no digit before the point left out."""
    decimals = max(0, 2 - math.floor(math.log10(number))) if number > 0 else 0
    return f"{number:,.{decimals}f}"


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"


def _remarks(document: dict[str, Any], plans: list[StagePlan]) -> list[str]:
    rates = " and ".join(sorted({f"{rate:g} TFLOP/s" for rate in document["peak_tflops"].values()}))
    lines = [
        f"Peak {rates} of a GPU, dense. {document['mfu']:.0%} of it is assumed, not measured: communication "
        "and reading included.",
        "Rows are as long as the stage allows, all text is answered; memory is that of images with the most "
        "windows,",
        f"{document['headroom']:.0%} of a GPU's is left for CUDA, NCCL and fragmentation.",
    ]
    if document["windows_per_image"] is None and any(plan.most_windows > 1 for plan in plans):
        lines.append(
            "Windows of an image: all grids equally likely; --windows-per-image gives your data's mean."
        )
    for plan in plans:
        if plan.recomputed_flops > 0.1 * plan.step_flops:
            share = plan.recomputed_flops / plan.step_flops
            lines.append(f"{plan.stage}: {share:.0%} of the operations are made again in the backward.")
        lines += [f"{plan.stage}: {note}." for note in plan.notes]
        if not plan.fits:
            lines.append(f"{plan.stage}: does not fit; {_way_out(plan)}.")
    return lines


def _way_out(plan: StagePlan) -> str:
    if plan.largest_micro_batch:
        steps = plan.micro_batch * plan.accumulation // plan.largest_micro_batch
        return f"--micro-batch {plan.largest_micro_batch} does, in {steps} accumulation steps"
    return "no micro batch does: try --zero 3, --offload, gradient_checkpointing=true or more GPUs"

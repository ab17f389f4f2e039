"""`python -m bench.gpu`, what `make gpu` runs: build, test and measure on the GPU at hand in one time budget.

Writes bench/results/<gpu>-<date>.json (and --output) after every step and entry, so that a cut run leaves
what it had. The extension is built in place, without network; the GPU tests and the static ledger run beside
each other. On Hopper compute-sanitizer looks at csrc's attention (bench.hopper) and the rate of its matrix
instructions is taken (bench.wgmma_rate). Then come the whole encoder (bench.encoder) and the cases of
bench.plan, these in a process of their own that is started again when a kernel takes it down. Nothing stops
the run: what fails is recorded.
BUDGET_S (540) bounds the seconds, and GIT_COMMIT names the commit where the files are a copy without history.
"""

import argparse
import os
import shlex
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench import results, steps
from bench.harness import Entry
from bench.report import case_line
from bench.supervise import supervise
from bench.worker import cases_of

DEFAULT_BUDGET_S = 540.0
BUILD_SHARE, CHECK_SHARE, SANITIZER_SHARE, ENCODER_SHARE = 0.2, 0.35, 0.08, 0.2  # of the budget, at most
GPU_TESTS = [
    "-m",
    "gpu",
    "--continue-on-collection-errors",
    "tests/kernels",
    "tests/package/test_cuda_gpu.py",
    "tests/package/test_window_attention_gpu.py",
]
HOPPER = (9, 0)


class Reporter:
    """Puts every entry into the results and prints a line for each case once its entries are together."""

    def __init__(self, writer: results.Writer):
        self._writer = writer
        self._entries: list[Entry] = []

    def add(self, entry: Entry) -> None:
        if self._entries and not _same_case(entry, self._entries[0]):
            self.flush()
        self._entries.append(entry)
        self._writer.add(entry)

    def flush(self) -> None:
        if self._entries:
            print(case_line(self._entries), flush=True)
        self._entries = []


def _same_case(a: Entry, b: Entry) -> bool:
    keys = ("section", "op", "pass", "metric", "shape", "dtype", "deterministic")
    return all(a[key] == b[key] for key in keys)


def prepare(writer: results.Writer, device: torch.device, budget_s: float) -> None:
    """Build, then test while the ledger compiles; then the encoder, the first thing that is timed."""
    if device.type == "cuda":
        archs = steps.archs_of(torch.cuda.get_device_capability(device))
        writer.put("build", steps.build_extension(archs, BUILD_SHARE * budget_s))
        print("build:", writer.document["build"]["status"], flush=True)
    with ThreadPoolExecutor(1) as beside:
        ledger = beside.submit(steps.run_ledger, CHECK_SHARE * budget_s)
        if device.type == "cuda":
            writer.put("tests", steps.run_tests(GPU_TESTS, CHECK_SHARE * budget_s))
            print(
                "tests:",
                {k: v for k, v in writer.document["tests"].items() if k != "skip_reasons"},
                flush=True,
            )
        writer.put("ledger", ledger.result())
    print(
        "ledger:", writer.document["ledger"]["status"], writer.document["ledger"]["reason"] or "", flush=True
    )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER:
        check_hopper(writer, SANITIZER_SHARE * budget_s)
    if device.type == "cuda":  # alone: it is timed
        encoder = steps.run_encoder(ENCODER_SHARE * budget_s, "--device", "cuda", "--repeats", "3")
        writer.put("encoder", encoder)
        print("encoder:", encoder["status"], encoder["reason"] or f"smallest ratio {encoder['min_ratio']}")


def check_hopper(writer: results.Writer, limit_s: float) -> None:
    """What only csrc's wgmma kernels need: the sanitizer's tools, and the rate of their instruction."""
    sanitizer = {tool: steps.run_sanitizer(tool, limit_s) for tool in ("memcheck", "racecheck")}
    writer.put("sanitizer", sanitizer)
    writer.put("wgmma_rate", steps.run_wgmma_rate(limit_s))
    for name, found in {**sanitizer, "wgmma_rate": writer.document["wgmma_rate"]}.items():
        print(f"{name}:", found["status"], found["reason"] or found.get("rows", ""), flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny cases alone, into --output alone")
    parser.add_argument("--output", type=Path, help="write the results here too")
    options = parser.parse_args(arguments)
    budget_s = _budget(parser)
    if options.quick and options.output is None:
        parser.error("--quick needs --output: its numbers mean nothing and stay out of bench/results")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; --device cpu --quick tries the same on the CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and so end what was started
    os.environ.pop("TRITON_INTERPRET", None)  # kernels are to be measured, here and in what is started
    start = time.time()
    device = torch.device(options.device)
    command = f"BUDGET_S={budget_s:g} python -m bench.gpu {shlex.join(_shown(options))}".strip()
    found = results.header(device, command, budget_s)
    paths = [options.output] if options.output else []
    if not options.quick:
        paths.insert(0, results.default_path(found))
    writer = results.Writer(paths, found)
    if not options.quick:
        prepare(writer, device, budget_s)
    reporter = Reporter(writer)

    deadline = start + budget_s

    def worker(events: Path, done: Path) -> list[str]:
        command = [sys.executable, "-m", "bench.worker", str(events), str(done), "--device", options.device]
        return [*command, "--deadline", str(deadline), *(["--quick"] if options.quick else [])]

    supervise(cases_of(options.quick), worker, reporter.add, deadline=deadline)
    reporter.flush()
    writer.finish()
    for path in paths:
        print("written:", path)
    return 0


def _budget(parser: argparse.ArgumentParser) -> float:
    text = os.environ.get("BUDGET_S", str(DEFAULT_BUDGET_S))
    try:
        budget_s = float(text)
    except ValueError:
        budget_s = 0.0
    if not 0 < budget_s < float("inf"):
        parser.error(f"BUDGET_S must be a positive number of seconds, got {text!r}")
    return budget_s


def _shown(options: argparse.Namespace) -> list[str]:
    """The options that change what is measured."""
    shown = ["--device", options.device] if options.device != "cuda" else []
    return shown + (["--quick"] if options.quick else [])


if __name__ == "__main__":
    sys.exit(main())

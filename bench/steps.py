"""What `python -m bench.gpu` does before it measures ops: build, test, sanitize, time the encoder."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.results import ROOT
from bench.supervise import kill


def build_extension(archs: str, limit_s: float) -> dict[str, Any]:
    """Compile infimm_kernels._C into the checkout for `archs`; see setup.py."""
    environment = {"INFIMM_CUDA_ARCHS": archs, **os.environ}
    return _run([sys.executable, "setup.py", "build_ext", "--inplace"], environment, limit_s)


def archs_of(capability: tuple[int, int]) -> str:
    """What INFIMM_CUDA_ARCHS must be for this GPU alone; 9.0 has instructions that only 90a names."""
    number = "{}{}".format(*capability)
    return "90a" if number == "90" else number


def run_tests(arguments: list[str], limit_s: float) -> dict[str, Any]:
    """Run pytest: the counts, and what failed and how. A test that took pytest down has failed."""
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events"
        events.write_text("")
        environment = os.environ | {"BENCH_TEST_EVENTS": str(events)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.pytest_events", *arguments]
        done = _run(command, environment, limit_s)
        outcomes = {}
        for line in events.read_text().splitlines():
            event = json.loads(line)
            outcomes[event["test"]] = event
    by_outcome: dict[str, list[dict[str, str]]] = {"passed": [], "failed": [], "skipped": [], "started": []}
    for event in outcomes.values():
        by_outcome[event["outcome"]].append(event)
    if by_outcome["started"]:  # at most one: the last
        by_outcome["failed"] += [{**e, "message": "pytest ended in this test"} for e in by_outcome["started"]]
    failures = [{"test": e["test"], "message": e["message"]} for e in by_outcome["failed"]]
    skipped = sorted({e["message"] for e in by_outcome["skipped"]})
    counts = {name: len(by_outcome[name]) for name in ("passed", "failed", "skipped")}
    return {**done, **counts, "failures": failures, "skip_reasons": skipped}


def run_ledger(limit_s: float) -> dict[str, Any]:
    """The static ledger as this machine's Triton compiles it: its rows, or why there are none."""
    done, rows = _run_json([sys.executable, "-m", "bench.ledger", "--json"], limit_s)
    return {**done, "rows": rows or []}


def run_encoder(limit_s: float, *options: str) -> dict[str, Any]:
    """bench.encoder: its rows, what is missing in them and the smallest ratio, or why there are none."""
    command = [
        sys.executable,
        "-m",
        "bench.encoder",
        "--json",
        "--budget-s",
        f"{0.7 * limit_s:.0f}",
        *options,
    ]
    done, report = _run_json(command, limit_s)  # a row that began in time may end within the rest
    return {**done, **{key: (report or {}).get(key) for key in ("rows", "missing", "min_ratio")}}


def run_sanitizer(tool: str, limit_s: float) -> dict[str, Any]:
    """bench.hopper under compute-sanitizer's memcheck or racecheck; "missing" where that is not installed."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return {"status": "missing", "reason": "no compute-sanitizer on PATH", "seconds": 0.0}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "bench.hopper"]
    return _run(command, dict(os.environ), limit_s)


def run_wgmma_rate(limit_s: float) -> dict[str, Any]:
    """bench.wgmma_rate: its rows, or why there are none."""
    done, rows = _run_json([sys.executable, "-m", "bench.wgmma_rate"], limit_s)
    return {**done, "rows": rows or []}


def _run_json(command: list[str], limit_s: float) -> tuple[dict[str, Any], Any]:
    """What `_run` says, and the JSON document that the command printed, None without one."""
    done = _run(command, dict(os.environ), limit_s, keep_output=True)
    try:
        return done, json.loads(done.pop("output"))
    except json.JSONDecodeError as error:
        status = "budget" if done["status"] == "budget" else "failed"
        return {**done, "status": status, "reason": done["reason"] or f"no JSON: {error}"}, None


def _run(
    command: list[str], environment: dict[str, str], limit_s: float, keep_output: bool = False
) -> dict[str, Any]:
    """status "ok", "failed" or "budget"; reason, the end of what it said; seconds; output if it is kept."""
    start = time.monotonic()
    found: dict[str, Any] = {"status": "ok", "reason": None}
    output = ""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=max(limit_s, 1.0))
    except subprocess.TimeoutExpired:
        found = {"status": "budget", "reason": f"not over after {limit_s:.0f} s"}
    else:
        if process.returncode != 0:
            said = errors if keep_output else output + "\n" + errors
            lines = [line for line in said.splitlines() if line.strip()]
            reason = f"exit code {process.returncode}: {' | '.join(lines[-8:])[-1500:]}"
            found = {"status": "failed", "reason": reason}
    finally:
        kill(process)
    found["seconds"] = round(time.monotonic() - start, 1)
    return found | ({"output": output} if keep_output else {})

"""What the pytest-benchmark suites share: one implementation of one case, checked before it is timed."""

import time

import pytest
import torch

from bench import baselines, harness, timing
from bench.problem import OURS
from bench.report import shape_label
from infimm_kernels import backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPES = ("bfloat16",) if ON_GPU else ("float32", "bfloat16")
EAGER = ["eager", "compiled_eager"]
SECONDS = 1.0  # of the rounds of one benchmark, about
MIN_ROUNDS, MAX_ROUNDS = 5, 200


def own_names(candidates: tuple[backends.Candidate, ...]) -> list[str]:
    return [OURS, *(f"{OURS}:{candidate.name}" for candidate in candidates)]


def attention_names(candidates: tuple[backends.Candidate, ...]) -> list[str]:
    return own_names(candidates) + [baseline.name for baseline in baselines.ATTENTION]


def run(benchmark, case: harness.Case, name: str) -> None:
    """Time implementation `name` of `case`; a backward is timed alone, its forward is the round's setup.

    What has no number is skipped with its reason, which bench/conftest.py lists at the end; only a failure of
    this package's own fails.
    """
    label = f"{shape_label(case.shape)} {case.dtype} {'bwd' if case.backward else 'fwd'}"
    benchmark.group = f"{case.op} {label} {DEVICE.type}"
    problem = case.build(DEVICE)
    found = {implementation.name: implementation for implementation in problem.implementations()}
    if name not in found:
        pytest.skip(f"{name} missing: it is the default backend and runs as {OURS}")
    prepared, entry = harness.prepare_and_check(case, problem, found[name])
    if prepared is None:
        report = f"{name} {entry['status']}: {entry['reason']}"
        if entry["status"] != "missing" and name.startswith(OURS):
            pytest.fail(report)
        pytest.skip(report)
    clock = timing.clock_of(DEVICE)
    timed = harness.timed(problem, prepared, case.backward)

    def target(state):
        result = timed.run(state)
        clock.synchronize()
        return result

    def setup():
        state = timed.prepare()
        clock.flush()
        clock.synchronize()
        return (state,), {}

    start = time.perf_counter()
    target(*setup()[0])
    once = time.perf_counter() - start
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(SECONDS / once)))
    benchmark.pedantic(target, setup=setup, rounds=rounds, warmup_rounds=2)
    torch.compiler.reset()

"""The pytest-benchmark suites run, list what has no number, and refuse to time a wrong kernel."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from bench import suite
from bench.attention import WindowAttention
from bench.harness import Case
from bench.problem import OURS, Implementation, Missing, Prepared

ROOT = Path(__file__).parent.parent.parent
CASE = Case("test", "window_attention", {"num_windows": 2, "seqlen": 33, "num_heads": 2, "head_dim": 16})


def test_the_suites_run_once_through():
    rest = "(gated_ops or cross_ops or other_ops) and not eager and not sdpa and not token and not 768"
    chosen = f"float32 and not backward and not compiled and not flex and (demo or ({rest}))"
    options = ["-q", "bench", "-m", "kernels", "-k", chosen, "--benchmark-disable"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout and "no number for" in done.stdout
    assert "xformers missing: xformers.ops cannot be imported" in done.stdout


def offer(monkeypatch, implementation: Implementation) -> None:
    monkeypatch.setattr(WindowAttention, "implementations", lambda self: [implementation])


def halved(problem) -> Prepared:
    leaves, forward = problem.ours(None)
    return Prepared(leaves, lambda: forward() / 2)


def test_a_wrong_kernel_of_ours_fails_and_is_not_timed(monkeypatch):
    offer(monkeypatch, Implementation(OURS, halved))
    benchmark = Mock()
    outcomes = (pytest.fail.Exception, pytest.skip.Exception)
    with pytest.raises(outcomes, match="infimm_kernels wrong: out errs by .* not timed") as caught:
        suite.run(benchmark, CASE, OURS)
    assert caught.type is pytest.fail.Exception
    benchmark.pedantic.assert_not_called()


def test_a_wrong_or_missing_rival_is_skipped_with_the_reason(monkeypatch):
    def missing(problem):
        raise Missing("no wheel")

    benchmark = Mock()
    for prepare, message in ((halved, "rival wrong: out errs by"), (missing, "rival missing: no wheel")):
        offer(monkeypatch, Implementation("rival", prepare))
        with pytest.raises(pytest.skip.Exception, match=message):
            suite.run(benchmark, CASE, "rival")
    benchmark.pedantic.assert_not_called()


@pytest.mark.parametrize("backward", [False, True])
def test_a_right_kernel_is_timed_and_a_backward_without_its_forward(monkeypatch, backward):
    graphs = []

    def prepare(problem) -> Prepared:
        leaves, forward = problem.ours(None)

        def watched() -> torch.Tensor:
            graphs.append(torch.is_grad_enabled())
            return forward()

        return Prepared(leaves, watched)

    offer(monkeypatch, Implementation(OURS, prepare))
    benchmark = Mock()
    suite.run(benchmark, Case(CASE.section, CASE.op, CASE.shape, "float32", backward), OURS)
    ((target,), options) = benchmark.pedantic.call_args
    arguments, _ = options["setup"]()
    graphs.clear()
    target(*arguments)
    assert graphs == ([] if backward else [False])
    assert suite.MIN_ROUNDS <= options["rounds"] <= suite.MAX_ROUNDS

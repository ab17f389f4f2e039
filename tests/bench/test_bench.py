"""The benchmark suites run, and refuse to time a wrong kernel."""

import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from bench import test_window_attention as suite

ROOT = Path(__file__).parent.parent.parent


def test_the_suite_runs_once_through():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "bench",
        "-m",
        "kernels",
        "-k",
        "demo",
        "--benchmark-disable",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def test_a_wrong_kernel_is_not_timed():
    def wrong(qkv: torch.Tensor) -> torch.Tensor:
        return suite.sdpa(qkv) * 1.01

    benchmark = Mock()
    dtype = next(iter(suite.DTYPES))
    with pytest.raises(AssertionError, match="not timed"):
        suite.test_window_attention(benchmark, "demo", dtype, suite.forward, wrong)
    benchmark.assert_not_called()
    suite.test_window_attention(benchmark, "demo", dtype, suite.forward, suite.ours)
    benchmark.assert_called_once()

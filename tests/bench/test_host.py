"""bench.host: the launch path that a GPU would take, on a machine without one."""

import json
import os
import subprocess
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def found() -> dict:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("bench.gpu measures the host time of a GPU")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.host", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_call_launches(found):
    """Four kernels: one forward, three backward."""
    assert found["kernels"] == 4
    assert found["launches"] > 1000
    # no order between them: a busy machine once timed the call with gradients as the shorter one
    assert found["forward_us"] > 0
    assert found["forward_with_grad_us"] > 0
    assert found["backward_us"] > 0


def test_another_number_of_windows_compiles_nothing(found):
    """Triton compiles again for sizes that are 1 or multiples of 16 unless it is told not to."""
    assert found["kernels_after_other_numbers_of_windows"] == found["kernels"]

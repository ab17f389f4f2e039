"""Triton's interpreter needs a repair for bfloat16; without it no bfloat16 test here would mean anything."""

import subprocess
import sys

import pytest
import torch

from infimm_kernels import testing

pytestmark = pytest.mark.usefixtures("interpreter")

PROBE = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, {root!r})
import torch, triton, triton.language as tl
from infimm_kernels import testing

@triton.jit
def kernel(a_ptr, b_ptr, c_ptr, d_ptr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))
    tl.store(d_ptr + at, tl.load(c_ptr + at).to(tl.bfloat16))

if {repair}:
    testing.repair_interpreter_bf16()
    testing.repair_interpreter_bf16()
torch.manual_seed(0)
a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
c, d = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
kernel[(1,)](a, b, c, d)
dot = torch.allclose(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
cast = torch.equal(d, c.bfloat16())
print(dot, cast)
"""


def probe(tmp_path, repair):
    import infimm_kernels

    root = infimm_kernels.__path__[0].rsplit("/", 1)[0]
    script = tmp_path / "probe.py"  # the interpreter reads a kernel's source, so it must be in a file
    script.write_text(PROBE.format(root=root, repair=repair))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_repaired_interpreter_multiplies_and_rounds_as_hardware_does(tmp_path):
    assert probe(tmp_path, repair=True) == ["True", "True"]


def test_the_repair_is_still_needed(tmp_path):
    """When this fails, Triton has fixed both: remove `repair_interpreter_bf16`."""
    assert probe(tmp_path, repair=False) == ["False", "False"]


def test_nan_survives_the_repaired_cast():
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    values = torch.tensor([torch.nan, torch.inf, -0.0, 1.00390625, 3.4e38])
    handle = TensorHandle(values.numpy(), tl.float32)
    cast = InterpreterBuilder().cast_impl(handle, tl.bfloat16)
    result = torch.from_numpy(cast.data.view("int16")).view(torch.bfloat16)
    assert torch.equal(result.isnan(), values.isnan())
    assert torch.equal(result[1:], values[1:].bfloat16())


def test_poisoned_allocations_are_nan():
    for fresh in (torch.empty(3), torch.empty_like(torch.zeros(2)), torch.zeros(1).new_empty((4,))):
        assert fresh.isnan().all()
    assert bool((torch.empty(3, dtype=torch.int32) == 2**31 - 1).all())
    with testing.poisoned_allocations():
        pass
    assert torch.empty(1).isnan().all(), "leaving an inner context must not lift the outer one"


def test_the_error_rule_rejects_what_it_should():
    exact = torch.tensor([1.0, -2.0], dtype=torch.float64)
    eager = (exact + 1e-3).float()
    testing.assert_within_twice_eager("x", (exact + 1.9e-3).float(), eager, exact)
    for wrong in ((exact + 2.1e-3).float(), torch.tensor([torch.nan, -2.0]), torch.tensor([torch.inf, -2.0])):
        with pytest.raises(AssertionError, match="x is off by"):
            testing.assert_within_twice_eager("x", wrong, eager, exact)
    with pytest.raises(AssertionError, match="x has dtype"):
        testing.assert_within_twice_eager("x", exact, eager, exact)

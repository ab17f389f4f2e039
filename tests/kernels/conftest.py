import importlib.util

import pytest
import torch

from infimm_kernels import testing

if importlib.util.find_spec("triton") is not None:
    testing.repair_interpreter_bf16()

# PyTorch notes the functions that `torch.device` acts on at its first use. If that happens inside a test
# here, it notes the poisoned ones, and a later test's "meta" model of 13 B parameters fills real memory.
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def poison():
    """Memory that a kernel did not write is NaN in every test of this folder."""
    with testing.poisoned_allocations():
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def interpreter(monkeypatch):
    """Triton on CPU tensors; skipped where the GPU tests cover the kernels instead."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the GPU tests run the kernels themselves")
    monkeypatch.setenv("TRITON_INTERPRET", "1")

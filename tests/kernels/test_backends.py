"""Which backend serves, which reason is given, what a fresh interpreter imports."""

import subprocess
import sys
import types

import pytest
import torch

from infimm_kernels import add_position_2d, availability, backends, window_attention
from infimm_kernels.attention import choice
from infimm_kernels.backends import Candidate, select

CPU = torch.zeros(1)
# What select looks at; no GPU is needed to ask what would be chosen on one.
CUDA = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)


def runs(name, default=True):
    return Candidate(name, lambda *tensors: None, default)


def refuses(name, reason):
    return Candidate(name, lambda *tensors: reason)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)


def test_cpu_goes_to_the_reference_whatever_could_run():
    assert select("op", [runs("triton")], None, CPU) == "reference"


def test_cuda_goes_to_the_first_that_can_run():
    assert select("op", [refuses("cuda", "no"), runs("triton")], None, CUDA) == "triton"


def test_a_backend_off_by_default_has_to_be_named():
    candidates = [runs("cuda", default=False), runs("triton")]
    assert select("op", candidates, None, CUDA) == "triton"
    assert select("op", candidates, "cuda", CUDA) == "cuda"


def test_nothing_falls_back_to_the_reference_on_a_gpu():
    candidates = [refuses("triton", "float64 is not supported"), runs("cuda", default=False)]
    with pytest.raises(NotImplementedError) as raised:
        select("op", candidates, None, CUDA)
    assert str(raised.value) == (
        "no backend can run op on cuda:0 (triton: float64 is not supported; "
        "cuda: runs only when it is named); "
        "backend='reference' runs it in eager PyTorch"
    )
    assert select("op", candidates, "reference", CUDA) == "reference"


def test_a_named_backend_that_cannot_run_says_why():
    message = "backend must name a backend that can run op, got 'triton': too wide"
    with pytest.raises(ValueError, match=message):
        select("op", [refuses("triton", "too wide")], "triton", CUDA)


def test_environment_variable(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert select("op", [runs("triton")], None, CUDA) == "reference"
    assert select("op", [runs("triton")], "triton", CUDA) == "triton"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(
        ValueError, match="INFIMM_BACKEND must be one of reference, triton, cuda, got 'fastest'"
    ):
        select("op", [], None, CPU)


def test_environment_variable_reaches_the_ops(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "triton")
    with pytest.raises(ValueError, match="INFIMM_BACKEND must name a backend that can run window_attention"):
        window_attention(torch.zeros(1, 2, 3, 1, 16))


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((2, 4, 3, 1, 8), torch.float32, "head_dim must be from 16 to 256, got 8"),
        ((2, 4, 3, 1, 512), torch.float32, "head_dim must be from 16 to 256, got 512"),
        ((2, 4, 3, 1, 16), torch.float64, "float64 is not supported"),
    ],
)
def test_why_not_triton(interpreter, shape, dtype, reason):
    qkv = torch.zeros(shape, dtype=dtype)
    assert choice.why_not_triton(qkv) == reason
    with pytest.raises(ValueError, match=reason):
        window_attention(qkv, backend="triton")
    assert window_attention(qkv, backend="reference").shape == (*shape[:2], *shape[3:])


def test_triton_needs_its_interpreter_on_the_cpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="CPU tensors need Triton's interpreter"):
        window_attention(torch.zeros(1, 2, 3, 1, 16), backend="triton")


def test_cuda_position_on_the_cpu_says_why():
    with pytest.raises(ValueError, match="got 'cuda': "):
        add_position_2d(torch.zeros(1, 4, 8), torch.zeros(1, 2).int(), backend="cuda")


def test_availability_has_a_line_for_every_op_backend_and_direction():
    rows = availability()
    assert len({row[:3] for row in rows}) == len(rows)
    assert {row.op for row in rows} == {
        "varlen_attention",
        "window_attention",
        "add_position_2d",
        "residual_post_norm",
        "vision_keys_values",
        "gated_residual_projection",
        "gated_cross_attention_decode",
        "gated_cross_attention",
        "gated_feed_forward",
    }
    assert {row.direction for row in rows if row.op == "gated_cross_attention_decode"} == {"forward"}
    assert all(row.reason is None for row in rows if row.backend == "reference")
    notes = {row.op: row.note for row in rows if row.backend == "triton" and row.direction == "backward"}
    assert notes["varlen_attention"] == "float32: the reference's formula on the same device"
    if not torch.cuda.is_available():
        assert all(row.reason for row in rows if row.backend != "reference")


COLD = """
import sys
{before}
import infimm_kernels, torch
loaded = [name for name in sys.modules if name in ("triton", "infimm_kernels._C") and sys.modules[name]]
assert not loaded, loaded
infimm_kernels.window_attention(torch.randn(1, 4, 3, 1, 16, requires_grad=True)).sum().backward()
infimm_kernels.add_position_2d(torch.randn(1, 4, 8), torch.zeros(1, 2).int(), granularity="token")
"""


@pytest.mark.parametrize("before", ["", "sys.modules['triton'] = None"], ids=["installed", "blocked"])
def test_import_and_cpu_ops_need_neither_triton_nor_the_extension(before):
    done = subprocess.run([sys.executable, "-c", COLD.format(before=before)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

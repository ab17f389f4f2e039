"""The kernels of residual_post_norm in Triton's interpreter, and on a GPU."""

import pytest
import torch

from infimm_kernels.post_norm import residual_post_norm
from infimm_kernels.testing import max_error
from tests.kernels.cases import exact
from tests.kernels.test_post_norm import (
    DTYPES,
    FLOATS,
    PLACES,
    POSITIONS,
    SIZES,
    check,
    check_special_rows,
    eager,
    every_dtype,
    inputs,
    places,
)

# --- the kernels in the interpreter -------------------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_interpreter(size, dtype, interpreter):
    check(inputs(size[:1], size[1], dtype), backend="triton")


@pytest.mark.sample(5)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("place", PLACES[1:], ids=["window", "token"])
@pytest.mark.parametrize("hidden", [16, 600, 2304])
def test_interpreter_positions(hidden, place, dtype, interpreter):
    check(inputs((4, 7), hidden, dtype), backend="triton", **place)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_interpreter_special_rows(dtype, interpreter):
    check_special_rows(dtype, "triton")


def check_close(ours, tensors, dout=None):
    """A result and its gradients against float64, a few roundings apart."""
    wide = exact(*tensors)
    right = eager(*wide)
    dout = torch.randn_like(ours) if dout is None else dout
    grads = torch.autograd.grad(ours, tensors, dout), torch.autograd.grad(right, wide, dout.double())
    for a, b in zip((ours, *grads[0]), (right, *grads[1]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [(), (0,), (2, 0), (3, 1, 2)], ids=str)
def test_interpreter_shapes(rows, interpreter):
    tensors = inputs(rows, 7, (torch.float32,) * 3)
    check_close(residual_post_norm(*tensors, backend="triton"), tensors)


def test_interpreter_layouts(interpreter):
    tensors = inputs((4, 6), 8, (torch.float32,) * 3)
    x, y, weight, bias = tensors
    spread = torch.stack((weight, weight), 1)[:, 0]
    rows = x.transpose(0, 1).contiguous().transpose(0, 1), y.mT.contiguous().mT
    out = residual_post_norm(*rows, spread, bias, backend="triton")
    check_close(out, tensors, torch.ones(1, 1, 1).expand_as(out))


@pytest.mark.parametrize("wanted", [(1,), (2, 3), (3,), (1, 2, 3)], ids=str)
def test_interpreter_only_the_wanted_gradients(wanted, interpreter):
    tensors = inputs((20,), 40, (torch.float32,) * 3)
    tensors = [t if i in wanted else t.detach() for i, t in enumerate(tensors)]
    needed = [tensors[i] for i in wanted]
    dout = torch.randn(20, 40)
    grads = (
        torch.autograd.grad(residual_post_norm(*tensors, backend=backend), needed, dout)
        for backend in ("triton", None)
    )
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_interpreter_rows_far_from_zero(interpreter):
    """A mean rounded at its own size, 1e6, is off by 0.03; the kernel mends it with what is left over."""
    x, y, weight, bias = (t.detach() for t in inputs((5,), 300, (torch.float32,) * 3))
    y += 1e6
    right = eager(*(t.double() for t in (x, y, weight, bias)))
    assert max_error(residual_post_norm(x, y, weight, bias, backend="triton"), right) < 1e-5


def test_interpreter_sums_of_many_programs(interpreter, monkeypatch):
    from infimm_kernels.post_norm import triton_backward

    monkeypatch.setattr(triton_backward, "_num_sms", lambda device: 20)
    tensors = inputs((280,), 8, (torch.float32,) * 3)
    check_close(residual_post_norm(*tensors, backend="triton"), tensors)


def test_rows_too_wide_for_registers_are_refused_with_the_reason(interpreter):
    tensors = inputs((1,), 8193, (torch.float32,) * 3)
    with pytest.raises(
        ValueError, match="hidden must be at most 8192, as a row is held in registers; it is 8193"
    ):
        residual_post_norm(*tensors, backend="triton")
    assert residual_post_norm(*tensors).isfinite().all()


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("size", [*SIZES, (10250, 1792), (4100, 8192)], ids=str)
def test_gpu(size, dtype):
    check(inputs(size[:1], size[1], dtype, "cuda"))


@pytest.mark.gpu
@every_dtype
@places
@pytest.mark.parametrize("hidden", [16, 1792])
def test_gpu_positions(hidden, place, dtype):
    place = place | ({"positions": POSITIONS.cuda()} if place else {})
    check(inputs((4, 7), hidden, dtype, "cuda"), **place)


@pytest.mark.gpu
def test_gpu_repeats_its_bits_and_waits_for_nothing():
    tensors = inputs((4100,), 1792, (torch.bfloat16,) * 3, "cuda")
    dout = torch.randn(4100, 1792, device="cuda", dtype=torch.bfloat16)

    def run():
        out = residual_post_norm(*tensors)
        return out, *torch.autograd.grad(out, tensors, dout)

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [run() for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for results in again for a, b in zip(results, first, strict=True))


@pytest.mark.gpu
def test_gpu_graph_sees_new_input():
    x, y, weight, bias = (t.detach() for t in inputs((70,), 80, (torch.bfloat16,) * 3, "cuda"))
    residual_post_norm(x, y, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = residual_post_norm(x, y, weight, bias)
    y.copy_(torch.randn_like(y))
    graph.replay()
    assert torch.equal(out, residual_post_norm(x, y, weight, bias))

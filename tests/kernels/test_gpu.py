"""The Triton kernels on a GPU against float64, and what only a GPU can show: streams, graphs, no waiting."""

import pytest
import torch

from infimm_kernels import add_position_2d, gated_residual_projection, varlen_attention, window_attention
from infimm_kernels.testing import assert_within_twice_eager, max_error, packed_lengths
from tests.kernels.cases import (
    AWKWARD_LENGTHS,
    MIXED_DTYPES,
    attention_inputs,
    eager_attention,
    eager_gated,
    eager_position,
    exact,
    gated_inputs,
)

pytestmark = pytest.mark.gpu
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
floats = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def check_attention(lengths_q, lengths_k, num_heads, num_kv_heads, head_dim, dtype, num_prefix_tokens=0):
    """Result and gradients against the error rule."""
    inputs = attention_inputs(lengths_q, lengths_k, num_heads, num_kv_heads, head_dim, dtype, "cuda")
    q, k, v, cu_q, cu_k = inputs
    q64, k64, v64 = exact(q, k, v)
    out, lse = varlen_attention(*inputs, return_lse=True, num_prefix_tokens=num_prefix_tokens)
    eager, eager_lse = eager_attention(*inputs)
    out64, lse64 = eager_attention(q64, k64, v64, cu_q, cu_k)
    assert_within_twice_eager("out", out, eager, out64)
    assert_within_twice_eager("lse", lse, eager_lse.to(lse.dtype), lse64)
    dout = torch.randn_like(out)
    ours, theirs = torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(eager, (q, k, v), dout)
    expected = torch.autograd.grad(out64, (q64, k64, v64), dout.double())
    for name, a, b, c in zip("qkv", ours, theirs, expected, strict=True):
        assert_within_twice_eager(f"d{name}", a, b, c)


@floats
@pytest.mark.parametrize("head_dim", (16, 20, 32, 64, 72, 80, 88, 96, 104, 112, 128, 256))
@pytest.mark.parametrize("lengths", (*AWKWARD_LENGTHS, (1025,)), ids=str)
def test_attention(lengths, head_dim, dtype):
    check_attention(lengths, lengths, 2, 1, head_dim, dtype)


@pytest.mark.parametrize("num_prefix_tokens", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", (64, 80, 112, 128))
def test_attention_with_prefix_tokens(head_dim, dtype, num_prefix_tokens):
    lengths = (1025, 0, 1, 2, 65, 257, 1026, 7)
    check_attention(lengths, lengths, 2, 2, head_dim, dtype, num_prefix_tokens)


@pytest.mark.parametrize("num_prefix_tokens", [0, 1])
def test_attention_over_other_tokens(num_prefix_tokens):
    check_attention(
        (200, 0, 31, 5), (1025, 30, 0, 2050), 12, 3, 64, torch.bfloat16, num_prefix_tokens=num_prefix_tokens
    )


@pytest.mark.parametrize(
    ("seqlen", "num_prefix_tokens"), [(1025, 1), (257, 1), (1029, 5), (1024, 0), (577, 1)]
)
def test_equal_windows(seqlen, num_prefix_tokens):
    """Whole tiles behind the prefix take code without masks, which ragged windows do not."""
    qkv = torch.randn(3, seqlen, 3, 2, 112, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cu_seqlens = packed_lengths((seqlen,) * 3, "cuda")
    q64 = qkv.detach().double().requires_grad_()
    dout = torch.randn(3, seqlen, 2, 112, device="cuda", dtype=torch.bfloat16)
    out = window_attention(qkv, num_prefix_tokens=num_prefix_tokens)
    eager, out64 = (eager_attention(*x.flatten(0, 1).unbind(1), *(cu_seqlens,) * 2)[0] for x in (qkv, q64))
    assert_within_twice_eager("out", out.flatten(0, 1), eager, out64)
    flat = dout.flatten(0, 1)
    (ours,), (theirs,) = torch.autograd.grad(out, qkv, dout), torch.autograd.grad(eager, qkv, flat)
    (expected,) = torch.autograd.grad(out64, q64, flat.double())
    for i, name in enumerate("qkv"):
        assert_within_twice_eager(f"d{name}", ours[:, :, i], theirs[:, :, i], expected[:, :, i])


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def window_gradient(qkv, dout):
    qkv = qkv.detach().requires_grad_()
    return torch.autograd.grad(window_attention(qkv, num_prefix_tokens=1), qkv, dout)[0]


def test_deterministic_backward_repeats_its_bits(deterministic):
    """dq of the default backward is a sum of atomics, in another order every time."""
    qkv = torch.randn(20, 1025, 3, 4, 112, device="cuda", dtype=torch.bfloat16)
    dout = torch.randn(20, 1025, 4, 112, device="cuda", dtype=torch.bfloat16)
    first = window_gradient(qkv, dout)
    assert all(torch.equal(window_gradient(qkv, dout), first) for _ in range(5))


def test_repeated_runs_agree():
    """A race moves an error from run to run; the forward repeats its bits, the backward rounds its sums."""
    qkv = torch.randn(20, 1025, 3, 4, 112, device="cuda", dtype=torch.bfloat16)
    dout = torch.randn(20, 1025, 4, 112, device="cuda", dtype=torch.bfloat16)
    out, grad = window_attention(qkv, num_prefix_tokens=1), window_gradient(qkv, dout)
    for _ in range(5):
        assert torch.equal(window_attention(qkv, num_prefix_tokens=1), out)
        torch.testing.assert_close(window_gradient(qkv, dout), grad, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", (*FLOATS, *MIXED_DTYPES), ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(1, 16, 16), (65, 80, 48), (257, 5120, 768)], ids=str)
def test_gated_residual(size, masked, dtype):
    rows, hidden, inner = size
    inputs = gated_inputs((rows,), hidden, inner, dtype, "cuda")
    mask = torch.rand(rows, device="cuda") > 0.3 if masked else None
    y = gated_residual_projection(*inputs, row_mask=mask)
    assert_within_twice_eager("y", y, eager_gated(*inputs, mask), eager_gated(*exact(*inputs), mask))


@floats
@pytest.mark.parametrize("options", [{}, {"granularity": "token", "num_prefix_tokens": 1}], ids=str)
def test_position(options, dtype):
    x = torch.randn(4, 17, 112, device="cuda").to(dtype)
    positions = torch.tensor([[0, 0], [3, 1], [-1, -1], [40, 70]], device="cuda")
    y, eager = add_position_2d(x, positions, **options), eager_position(x, positions, **options)
    assert_within_twice_eager("y", y, eager, eager_position(x.double(), positions, **options))
    assert torch.equal(y[2], x[2])


def test_float64_is_refused_with_the_reason():
    qkv = torch.randn(1, 4, 3, 1, 16, device="cuda", dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="triton: float64 is not supported"):
        window_attention(qkv)
    expected = window_attention(qkv.cpu())
    assert max_error(window_attention(qkv, backend="reference"), expected) < 1e-12


def calls():
    qkv = torch.randn(3, 65, 3, 2, 112, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = packed_lengths((65,) * 3, "cuda")
    x, o, weight, gate = (t.detach() for t in gated_inputs((70,), 80, 48, torch.bfloat16, "cuda"))
    tokens = torch.randn(3, 16, 112, device="cuda", dtype=torch.bfloat16)
    positions = torch.tensor([[0, 0], [3, 1], [-1, -1]], device="cuda")

    def packed(qkv):
        return window_attention(qkv, cu_seqlens)

    def gated(x):
        return gated_residual_projection(x, o, weight, gate)

    def position(x):
        return add_position_2d(x, positions, granularity="token")

    return {
        "window": (window_attention, qkv),
        "packed window": (packed, qkv.flatten(0, 1)),
        "gated": (gated, x),
        "position": (position, tokens),
    }


NAMES = ("window", "packed window", "gated", "position")


@pytest.mark.parametrize("name", NAMES)
def test_cuda_graph_replays_with_new_input(name):
    """A launch on a remembered stream leaves the graph empty, and it then replays stale numbers."""
    call, x = calls()[name]
    static = x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(static)
    for _ in range(3):
        fresh = torch.randn_like(x)
        static.copy_(fresh)
        graph.replay()
        assert torch.equal(out, call(fresh))


def test_cuda_graph_replays_the_backward(deterministic):
    qkv, dout = calls()["window"][1], torch.randn(3, 65, 2, 112, device="cuda", dtype=torch.bfloat16)
    static = qkv.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(window_attention(static), static, dout)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (grad,) = torch.autograd.grad(window_attention(static), static, dout)
    for _ in range(3):
        fresh = torch.randn_like(qkv)
        with torch.no_grad():
            static.copy_(fresh)
        graph.replay()
        eager = fresh.requires_grad_()
        assert torch.equal(grad, torch.autograd.grad(window_attention(eager), eager, dout)[0])


@pytest.mark.parametrize("name", NAMES)
def test_side_stream(name):
    call, x = calls()[name]
    expected = call(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late = x.clone()
        out = call(late)
    side.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", NAMES)
def test_forward_does_not_wait_for_the_gpu(name):
    call, x = calls()[name]
    call(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["window", "packed window"])
def test_attention_backward_does_not_wait_for_the_gpu(name):
    call, x = calls()[name]
    x.requires_grad_()
    out = call(x)
    torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(out, x, torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    call, x = calls()["window"]
    assert torch.equal(window_attention(x.to("cuda:1")).cpu(), call(x).cpu())

"""csrc's attention for Hopper on a GPU, against the fp64 reference and Triton."""

import warnings

import pytest
import torch

from infimm_kernels import varlen_attention, window_attention
from infimm_kernels.attention import cuda
from infimm_kernels.testing import assert_within_twice_eager, poisoned_allocations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LENGTHS = [1, 2, 63, 128, 129, 257, 1024, 1025, 1026]


@pytest.fixture(autouse=True)
def can_run():
    if torch.cuda.is_available():
        probe = torch.empty(8, 1, 64, dtype=torch.bfloat16, device="cuda")
        reason = cuda.why_not_cuda(probe, probe, probe)
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def no_warning():
    """The self-test's warning would mean that Triton served the test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="infimm_kernels")
        yield


def packed(lengths, head_dim=112, num_heads=3, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (sum(lengths), 3, num_heads, head_dim)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)


def check(call, *tensors):
    """`call(backend, *tensors)` gives (out, lse)."""
    with poisoned_allocations():
        out, lse = call("cuda", *tensors)
    eager, _ = call("reference", *tensors)
    exact, exact_lse = call("reference", *(x.double() for x in tensors))
    assert_within_twice_eager("out", out, eager, exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
@pytest.mark.parametrize("length", LENGTHS)
def test_equal_windows(length, head_dim, dtype):
    qkv = packed([length] * 4, head_dim, dtype=dtype).unflatten(0, (4, length))
    for prefix in (0, 1):
        options = {"num_prefix_tokens": prefix, "return_lse": True}
        check(lambda backend, x, o=options: window_attention(x, backend=backend, **o), qkv)


@pytest.mark.parametrize("prefix", range(9))
def test_ragged_windows(prefix):
    lengths = [*LENGTHS, 0, 700]
    cu_seqlens = cumulative(lengths)
    options = {"num_prefix_tokens": prefix, "return_lse": True}
    check(lambda backend, x: window_attention(x, cu_seqlens, backend=backend, **options), packed(lengths))


@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
def test_text_over_images(head_dim):
    lengths_q, lengths_k = [40, 7, 700, 1, 0], [2050, 0, 10250, 65, 30]
    q = packed(lengths_q, head_dim, 4).unbind(1)[0]
    k, v, _ = packed(lengths_k, head_dim, 2).unbind(1)
    lengths = cumulative(lengths_q), cumulative(lengths_k)
    check(lambda backend, *x: varlen_attention(*x, *lengths, backend=backend, return_lse=True), q, k, v)


def check_gradients(call, *tensors):
    """Gradients by csrc's kernel, within twice eager's error."""
    found = {}
    for backend, dtype in (("cuda", None), ("reference", None), ("exact", torch.float64)):
        leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in tensors]
        out = call("reference" if backend == "exact" else backend, *leaves)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(tensors[0].dtype)
        found[backend] = torch.autograd.grad(out, leaves, dout.to("cuda", out.dtype))
    for i, (result, eager, exact) in enumerate(zip(*found.values(), strict=True)):
        assert_within_twice_eager(f"gradient {i}", result, eager, exact)


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_gradients_of_equal_windows(length, head_dim, dtype):
    qkv = packed([length] * 3, head_dim, dtype=dtype).unflatten(0, (3, length))
    for prefix in (0, 1):
        check_gradients(
            lambda backend, x, p=prefix: window_attention(x, num_prefix_tokens=p, backend=backend), qkv
        )


def test_gradients_of_ragged_windows():
    lengths = [*LENGTHS, 0, 700]
    cu_seqlens, qkv = cumulative(lengths), packed(lengths)
    for prefix in (0, 1, 5):
        options = {"num_prefix_tokens": prefix}
        check_gradients(
            lambda backend, x, o=options: window_attention(x, cu_seqlens, backend=backend, **o), qkv
        )


def test_gradients_of_text_over_images():
    lengths_q, lengths_k = [40, 7, 700, 1, 0], [2050, 0, 10250, 65, 30]
    q = packed(lengths_q, 64, 4).unbind(1)[0]
    k, v, _ = packed(lengths_k, 64, 2).unbind(1)
    lengths = cumulative(lengths_q), cumulative(lengths_k)
    check_gradients(lambda backend, *x: varlen_attention(*x, *lengths, backend=backend), q, k, v)


def test_many_launches_give_the_same_bits():
    """A wait that is too short would show now and then."""
    qkv = packed([1025] * 40, num_heads=16).unflatten(0, (40, 1025))
    first = window_attention(qkv, num_prefix_tokens=1, backend="cuda")
    for _ in range(100):
        assert torch.equal(window_attention(qkv, num_prefix_tokens=1, backend="cuda"), first)


def test_graph_replay_reads_the_new_input():
    qkv = packed([300] * 3).unflatten(0, (3, 300))
    window_attention(qkv, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = window_attention(qkv, backend="cuda")
    qkv.normal_()
    graph.replay()
    assert torch.equal(out, window_attention(qkv, backend="cuda"))


def test_side_stream():
    stream = torch.cuda.Stream()
    qkv = packed([300] * 3).unflatten(0, (3, 300))
    window_attention(qkv, backend="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        qkv.add_(1)
        out = window_attention(qkv, backend="cuda")
    stream.synchronize()
    assert torch.equal(out, window_attention(qkv, backend="cuda"))


def test_compiled():
    qkv = packed([300] * 3).unflatten(0, (3, 300))
    compiled = torch.compile(lambda x: window_attention(x, backend="cuda"), fullgraph=True)
    assert torch.equal(compiled(qkv), window_attention(qkv, backend="cuda"))

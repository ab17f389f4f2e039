"""The Hopper kernel serves once it has given Triton's numbers on the device: stand-ins for both."""

import warnings

import pytest
import torch

from infimm_kernels.attention import cuda, cuda_backward, reference, triton_launch
from infimm_kernels.attention.plan import plan, uniform_plan


def exact(q, k, v, cu_seqlens_q, cu_seqlens_k, seqlen, softmax_scale, num_prefix_tokens):
    if cu_seqlens_q is None:
        segments = uniform_plan(len(q) // seqlen, seqlen, seqlen)
    else:
        segments = plan(cu_seqlens_q, cu_seqlens_k, len(q), len(k))
    return reference.forward(q, k, v, softmax_scale, segments)


def off_by(name, change):
    def launch(*arguments):
        out, lse = exact(*arguments)
        for result in (out if name == "out" else lse,):
            result.view(-1)[-1:].add_(change)
        return out, lse

    return launch


def failing(*arguments):
    raise RuntimeError("window_attention: CUDA error 700")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(cuda, "_verdicts", {})
    monkeypatch.setattr(triton_launch, "forward", exact)


@pytest.fixture
def call():
    q = torch.randn(20, 2, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    return q, q, q, None, None, 10, 0.125, 0


def test_equal_numbers_are_trusted_and_tried_once(monkeypatch, call):
    calls = []
    monkeypatch.setattr(cuda, "launch", lambda *arguments: (calls.append(arguments), exact(*arguments))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            cuda.forward(*call)
    assert [len(arguments[0]) for arguments in calls[-3:]] == [20] * 3 and len(calls) == 3 + 3


@pytest.mark.parametrize(
    ("launch", "sentence"),
    [
        (off_by("out", 0.5), r"ragged windows with a prefix token: out differs from Triton's by 0\.\d+, "),
        (off_by("lse", 1e-3), r"ragged windows with a prefix token: lse differs from Triton's by 0\.001, "),
        (off_by("out", float("nan")), "out is finite in other places than Triton's"),
        (failing, "CUDA error 700"),
    ],
)
def test_a_difference_is_a_warning_and_triton_serves(monkeypatch, call, launch, sentence):
    monkeypatch.setattr(cuda, "launch", launch)
    expected = exact(*call)
    disabled = "the forward of attention on backend 'cuda' is disabled for bfloat16, head_dim 64 on cpu"
    with pytest.warns(UserWarning, match=f"{disabled}.*{sentence}"):
        out, lse = cuda.forward(*call)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert torch.equal(cuda.forward(*call)[0], expected[0])


def test_each_dtype_and_head_dim_is_tried(monkeypatch, call):
    monkeypatch.setattr(cuda, "launch", exact)
    q = call[0]
    for x in (q, q.half(), torch.cat([q, q], -1)):
        cuda.forward(x, x, x, *call[3:])
    assert [key[1:] for direction, key in cuda._verdicts if direction == "forward"] == [
        (torch.bfloat16, 64),
        (torch.float16, 64),
        (torch.bfloat16, 128),
    ]


def test_the_test_is_not_the_callers_randomness(monkeypatch, call):
    monkeypatch.setattr(cuda, "launch", exact)
    state = torch.random.get_rng_state()
    cuda.forward(*call)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("scale", [0.0, -0.1, float("inf"), 1e-40])
def test_scales_that_the_kernel_does_not_take(call, scale):
    with pytest.raises(ValueError, match="softmax_scale must be a positive float32 for backend 'cuda', got "):
        cuda.forward(*call[:6], scale, 0)


def backward(
    q, k, v, out, lse, dout, dlse, cu_q, cu_k, seqlen, scale, prefix, deterministic, *grads, main=None
):
    """In the place of Triton's; `main` is called as the real one would, and spoils what it touches."""
    if cu_q is None:
        segments = uniform_plan(len(q) // seqlen, seqlen, seqlen)
    else:
        segments = plan(cu_q, cu_k, len(q), len(k))
    reference.backward(dout, dlse, q, k, v, scale, segments, *grads)
    if main is not None:
        main(q, k, v, dout, lse, None, None, *grads[1:], cu_q, cu_k, seqlen, scale, prefix)


@pytest.fixture
def backward_call(monkeypatch, call):
    monkeypatch.setattr(triton_launch, "backward", backward)
    out, lse = exact(*call)
    return (*call[:3], out, lse, out, None, *call[3:]), [torch.empty_like(x) for x in call[:3]]


def test_the_backward_is_tried_too(monkeypatch, backward_call):
    launches = []
    monkeypatch.setattr(cuda_backward, "launch_main", lambda *arguments: launches.append(arguments))
    arguments, grads = backward_call
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            cuda_backward.backward(*arguments, False, *grads)
    assert [len(each[0]) for each in launches] == [452, 452, 452, 20, 20]


def test_a_wrong_gradient_is_a_warning_and_triton_serves(monkeypatch, backward_call):
    launches = []

    def launch_main(*arguments):
        launches.append(arguments)
        arguments[8].view(-1)[:1].add_(1.0)  # dv

    monkeypatch.setattr(cuda_backward, "launch_main", launch_main)
    arguments, grads = backward_call
    expected = [torch.empty_like(x) for x in grads]
    backward(*arguments, False, *expected)
    with pytest.warns(UserWarning, match="the backward of attention .* with a prefix token: dv differs from"):
        cuda_backward.backward(*arguments, False, *grads)
    assert all(map(torch.equal, grads, expected)) and len(launches) == 1


def test_a_deterministic_backward_and_other_sizes_are_tritons(monkeypatch, backward_call):
    def launch_main(*arguments):
        raise AssertionError("not to be called")

    monkeypatch.setattr(cuda_backward, "launch_main", launch_main)
    arguments, grads = backward_call
    cuda_backward.backward(*arguments, True, *grads)
    wide = [torch.cat([x, x], -1) if x is not None and x.dim() == 3 else x for x in arguments[:7]]
    cuda_backward.backward(*wide, *arguments[7:], False, *(torch.cat([x, x], -1) for x in grads))
    assert not cuda._verdicts

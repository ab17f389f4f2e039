"""Attention of segments whose ranges of keys overlap, against a dense mask: CPU path and interpreter."""

import pytest
import torch

from infimm_kernels.attention.overlapping import overlapping_attention
from infimm_kernels.testing import assert_within_twice_eager, max_error, packed_lengths
from tests.kernels.cases import exact, masked_attention

# Each sample: tokens before its first image, then (tokens of text, tokens of vision) of each image.
SAMPLES = (
    ((2, (3, 5), (1, 0), (4, 7)), (3,), (0, (2, 4))),
    ((0,), (5, (1, 1))),
    ((1, *((2, 3),) * 8),),
    ((0, (0, 6), (0, 2), (3, 4)), (0, (2, 0))),
)
LONG = ((3, (70, 130), (1, 65), (66, 40)), (20,), (0, (129, 64)))


def segments_of(samples, device="cpu"):
    """cu_seqlens_q, cu_seqlens_k, key_ranges, query_ranges."""
    lengths_q, lengths_k, key_ranges, query_ranges = [], [], [], []
    for before, *images in samples:
        first_k, end_q = sum(lengths_k), sum(lengths_q) + before + sum(text for text, _ in images)
        for text, vision in ((before, 0), *images):
            query_ranges.append((sum(lengths_q), end_q))
            lengths_q.append(text)
            lengths_k.append(vision)
            key_ranges.append((first_k, sum(lengths_k)))
    ranges = (
        torch.tensor(r, dtype=torch.int32, device=device).view(-1, 2) for r in (key_ranges, query_ranges)
    )
    return packed_lengths(lengths_q, device), packed_lengths(lengths_k, device), *ranges


def hidden_mask(samples):
    """[text, vision], True where a text token does not see a vision token, from the rule itself."""
    owners = [
        (s, i) for s, (_, *images) in enumerate(samples) for i, (_, n) in enumerate(images) for _ in range(n)
    ]
    rows = []
    for s, (before, *images) in enumerate(samples):
        for i, text in enumerate((before, *(text for text, _ in images))):
            rows += [[not (owner == s and image < i) for owner, image in owners]] * text
    return torch.tensor(rows, dtype=torch.bool).view(len(rows), len(owners))


def inputs_of(samples, num_heads=2, num_kv_heads=2, head_dim=16, dtype=torch.float64, device="cpu"):
    total_q, total_k = hidden_mask(samples).shape
    shapes = ((total_q, num_heads), (total_k, num_kv_heads), (total_k, num_kv_heads))
    return tuple(
        torch.randn(*shape, head_dim, dtype=torch.float64).to(device, dtype).requires_grad_()
        for shape in shapes
    )


def call(samples, q, k, v, softmax_scale=None, backend=None):
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    return overlapping_attention(q, k, v, *segments_of(samples, q.device), scale, backend)


def eager(samples, q, k, v):
    group = q.shape[1] // k.shape[1]
    return masked_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), hidden_mask(samples).to(q.device)
    )


def check(samples, backend, **shape):
    q, k, v = inputs = inputs_of(samples, **shape)
    out = call(samples, *inputs, backend=backend)
    wide = exact(*inputs)
    plain, expected = eager(samples, *inputs), eager(samples, *wide)
    assert_within_twice_eager("out", out, plain, expected)
    dout = torch.randn_like(out)
    grads = (
        torch.autograd.grad(y, x, dout.to(y.dtype))
        for y, x in ((out, inputs), (plain, inputs), (expected, wide))
    )
    for name, *three in zip("qkv", *grads, strict=True):
        assert_within_twice_eager(f"d{name}", *three)
    blind = hidden_mask(samples).all(1)
    assert not out[blind].any()


@pytest.mark.parametrize("samples", SAMPLES, ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_equals_the_dense_mask(samples, heads):
    inputs = inputs_of(samples, *heads)
    out, expected = call(samples, *inputs), eager(samples, *inputs)
    assert max_error(out, expected) < 1e-12
    dout = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(y, inputs, dout) for y in (out, expected))
    assert max(map(max_error, ours, theirs)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("samples", [SAMPLES[0], LONG], ids=["short", "long"])
def test_twice_eager(samples, dtype):
    check(samples, None, dtype=dtype, head_dim=64)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("samples", [SAMPLES[0], *SAMPLES[2:], LONG], ids=str)
def test_triton(samples, deterministic, interpreter):
    torch.use_deterministic_algorithms(deterministic)
    try:
        check(samples, "triton", dtype=torch.bfloat16, num_heads=2, num_kv_heads=1, head_dim=64)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_triton_in_other_dtypes(dtype, interpreter):
    check(SAMPLES[0], "triton", dtype=dtype, head_dim=64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("samples", [SAMPLES[0], *SAMPLES[2:], LONG], ids=str)
def test_gpu(samples, dtype):
    check(samples, None, dtype=dtype, num_heads=4, num_kv_heads=2, head_dim=64, device="cuda")


@pytest.mark.sample(8)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("side", ["key_ranges", "query_ranges"])
@pytest.mark.parametrize("wrong", [(-5, None), (None, 10**6), (10**6, None), (7, 3)], ids=str)
def test_ranges_are_cut_to_the_tokens_there_are(wrong, side, deterministic, interpreter):
    """A GPU's host cannot check them, so the kernels cut what would reach outside; seen from both sides."""
    q, k, v = (x.detach() for x in inputs_of(SAMPLES[0], dtype=torch.float16))
    cu_q, cu_k, *ranges = segments_of(SAMPLES[0])
    total = len(k if side == "key_ranges" else q)
    which = ["key_ranges", "query_ranges"].index(side)
    wild = ranges[which].clone()
    for place, number in enumerate(wrong):
        if number is not None:
            wild[3, place] = number
    cut = wild.clamp(0, total)
    cut[:, 1] = torch.maximum(cut[:, 0], cut[:, 1])
    forward, backward = (
        getattr(torch.ops.infimm_kernels, f"overlapping_attention{suffix}") for suffix in ("", "_backward")
    )
    dout, results = torch.randn_like(q), []
    torch.use_deterministic_algorithms(deterministic)
    try:
        for changed in (wild, cut):
            ranges[which] = changed
            saved = forward(q, k, v, cu_q, cu_k, *ranges, 0.25, "triton")
            grads = backward(q, k, v, *saved, dout, None, cu_q, cu_k, *ranges, 0.25, "triton")
            results.append([*saved, *grads])
    finally:
        torch.use_deterministic_algorithms(False)
    # Ranges that disagree about who sees whom have no right result, but they have the same one.
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (0, lambda x: x + 1, "cu_seqlens_q must start at 0, got 1"),
        (
            1,
            lambda x: torch.cat((x[:-1], x[-1:] - 1)),
            r"cu_seqlens_k must end at the number of tokens \(16\)",
        ),
        (2, lambda x: x.flip(1), r"segment_key_ranges must be ranges within the 16 keys, got \(5, 0\)"),
        (2, lambda x: x + 1, r"segment_key_ranges must be ranges within the 16 keys, got \(\d+, 17\)"),
        (3, lambda x: x - 1, r"segment_query_ranges must be ranges within the 15 queries, got \(-1, 9\)"),
    ],
)
def test_wrong_numbers_are_refused_on_the_cpu(which, change, message, backend, interpreter):
    segments = list(segments_of(SAMPLES[0]))
    segments[which] = change(segments[which])
    inputs = inputs_of(SAMPLES[0], dtype=torch.float32)
    with pytest.raises(ValueError, match=f"^{message}"):
        overlapping_attention(*inputs, *segments, 1.0, backend)


def test_gradcheck():
    samples, inputs = SAMPLES[0], inputs_of(SAMPLES[0], head_dim=3)
    assert torch.autograd.gradcheck(lambda *t: call(samples, *t), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: call(samples, *t), inputs)


def test_compiles_without_graph_breaks():
    q, k, v = inputs_of(SAMPLES[0], dtype=torch.float32)
    arguments = (q, k, v, *segments_of(SAMPLES[0]), 0.25, None)
    compiled = torch.compile(overlapping_attention, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*arguments), overlapping_attention(*arguments)
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(y.sum(), k)[0] for y in (out, expected)))


def test_transforms_run_the_dense_form():
    samples, inputs = SAMPLES[0], inputs_of(SAMPLES[0])
    out, tangent = torch.func.jvp(lambda *t: call(samples, *t), inputs, inputs)
    expected = torch.func.jvp(lambda *t: eager(samples, *t), inputs, inputs)
    assert max_error(out, expected[0]) < 1e-12
    blind = hidden_mask(samples).all(1)
    assert max_error(tangent[~blind], expected[1][~blind]) < 1e-12
    assert not tangent[blind].any()  # the eager form has NaN there

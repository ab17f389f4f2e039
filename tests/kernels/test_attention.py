"""varlen_attention and window_attention on the CPU path: values, gradients, special segments, layouts."""

import pytest
import torch

from infimm_kernels import varlen_attention, window_attention
from infimm_kernels.attention import reference
from infimm_kernels.attention.plan import plan
from infimm_kernels.testing import assert_within_twice_eager, max_error, packed_lengths
from tests.kernels.cases import (
    AWKWARD_LENGTHS,
    HEAD_DIMS,
    attention_inputs,
    eager_attention,
    exact,
    masked_attention,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def grads(outputs, inputs, douts):
    return torch.autograd.grad(outputs, inputs, douts)


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize(
    "lengths",
    [((3, 0, 7, 1), (5, 4, 0, 2)), ((0, 0), (3, 0)), ((5, 5, 5), (4, 4, 4)), ((7, 2, 9, 3), (6,) * 4)],
)
def test_equals_masked_attention_in_float64(lengths, heads):
    q, k, v, cu_q, cu_k = attention_inputs(*lengths, *heads)
    rows = torch.arange(len(lengths[0])).repeat_interleave(torch.tensor(lengths[0]))
    columns = torch.arange(len(lengths[1])).repeat_interleave(torch.tensor(lengths[1]))
    wide_k, wide_v = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (k, v))
    expected = masked_attention(q, wide_k, wide_v, rows[:, None] != columns[None, :], 0.3)
    out, lse = varlen_attention(q, k, v, cu_q, cu_k, softmax_scale=0.3, return_lse=True)
    _, expected_lse = eager_attention(q, k, v, cu_q, cu_k, 0.3)
    assert max_error(out, expected) < 1e-12
    assert max_error(lse, expected_lse) < 1e-12
    dout, visible = torch.randn_like(out), lse.isfinite()
    dlse = torch.randn_like(lse)
    ours = grads((out, lse[visible]), (q, k, v), (dout, dlse[visible]))
    theirs = grads((expected, expected_lse[visible]), (q, k, v), (dout, dlse[visible]))
    assert max(map(max_error, ours, theirs)) < 1e-12


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("lengths", AWKWARD_LENGTHS, ids=str)
def test_twice_eager(lengths, head_dim, dtype):
    q, k, v, cu_q, cu_k = attention_inputs(lengths, lengths, 2, 1, head_dim, dtype)
    check_twice_eager(q, k, v, cu_q, cu_k)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_twice_eager_at_1025_tokens(dtype):
    check_twice_eager(*attention_inputs((1025,), (1025,), 1, 1, 112, dtype))


def check_twice_eager(q, k, v, cu_q, cu_k):
    q64, k64, v64 = exact(q, k, v)
    out, lse = varlen_attention(q, k, v, cu_q, cu_k, return_lse=True)
    eager, eager_lse = eager_attention(q, k, v, cu_q, cu_k)
    out64, lse64 = eager_attention(q64, k64, v64, cu_q, cu_k)
    assert_within_twice_eager("out", out, eager, out64)
    assert_within_twice_eager("lse", lse, eager_lse.to(lse.dtype), lse64)
    dout = torch.randn_like(out)
    ours, theirs = grads(out, (q, k, v), dout), grads(eager, (q, k, v), dout)
    for name, a, b, c in zip("qkv", ours, theirs, grads(out64, (q64, k64, v64), dout.double()), strict=True):
        assert_within_twice_eager(f"d{name}", a, b, c)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("lengths", [(65, 129, 65), (64, 63, 64, 64, 257)], ids=str)
def test_twice_eager_whatever_the_cpu_multiplies(monkeypatch, native, lengths):
    """A CPU without bfloat16 instructions computes in float32; both ways are tested on every CPU."""
    monkeypatch.setattr(reference, "native_bfloat16", lambda: native)
    check_twice_eager(*attention_inputs(lengths, lengths, 4, 2, 112, torch.bfloat16))


@pytest.mark.parametrize(
    "native, lengths, with_lse, expected",
    [
        (True, (65, 65), False, [torch.bfloat16] * 7),
        (True, (65, 65), True, [torch.bfloat16] * 2 + [torch.float32] * 5),
        (True, (80, 63), False, [torch.float32] * 5),
        (True, (20, 80), False, [torch.float32] * 5),
        (False, (65, 65), False, [torch.float32] * 5),
    ],
)
def test_what_is_multiplied_in_bfloat16(monkeypatch, native, lengths, with_lse, expected):
    """The backward once converted to float32 everywhere: 0.7 times the speed of SDPA at 1025 tokens.

    Few keys and the gradient of lse stay in float32: there bfloat16 broke the error rule for some inputs.
    So do few scores: the forward took half as long again.
    """
    monkeypatch.setattr(reference, "native_bfloat16", lambda: native)
    original, dtypes = torch.bmm, []

    def recorded(a, b, **kwargs):
        dtypes.append(a.dtype)
        return original(a, b, **kwargs)

    monkeypatch.setattr(torch, "bmm", recorded)
    inputs = attention_inputs(*((length,) for length in lengths), 2, 2, 16, torch.bfloat16)
    out, lse = varlen_attention(*inputs, return_lse=True)
    (out.sum() + lse.sum() if with_lse else out.sum()).backward()
    assert dtypes == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(1, 1, 1), (2, 65)], ids=str)
def test_twice_eager_with_gradient_of_lse(lengths, dtype):
    """dlse was once added inside p * (dp - delta): with one key, where dp equals delta, its small sum with
    them lost all digits, and the gradient erred 3000 times as much as eager."""
    q, k, v, cu_q, cu_k = attention_inputs(lengths, lengths, 2, 1, 112, dtype)
    exact_inputs = exact(q, k, v)
    results = varlen_attention(q, k, v, cu_q, cu_k, return_lse=True)
    dout, dlse = (torch.randn_like(x) for x in results)

    def all_grads(outputs, inputs):
        return grads(outputs, inputs, [d.to(x.dtype) for d, x in zip((dout, dlse), outputs, strict=True)])

    theirs = all_grads(eager_attention(q, k, v, cu_q, cu_k), (q, k, v))
    truth = all_grads(eager_attention(*exact_inputs, cu_q, cu_k), exact_inputs)
    for name, a, b, c in zip("qkv", all_grads(results, (q, k, v)), theirs, truth, strict=True):
        assert_within_twice_eager(f"d{name}", a, b, c)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_window_attention_is_varlen_attention_of_its_slices(packed, dtype):
    qkv = torch.randn(3, 17, 3, 2, 24, dtype=dtype, requires_grad=True)
    cu_seqlens = packed_lengths((17,) * 3)
    q, k, v = qkv.flatten(0, 1).unbind(1)
    expected, expected_lse = varlen_attention(q, k, v, cu_seqlens, cu_seqlens, return_lse=True)
    if packed:
        out, lse = window_attention(qkv.flatten(0, 1), cu_seqlens, return_lse=True)
        assert out.shape == (51, 2, 24)
    else:
        out, lse = window_attention(qkv, return_lse=True)
        assert out.shape == (3, 17, 2, 24)
    assert torch.equal(out.reshape(51, 2, 24), expected)
    assert torch.equal(lse, expected_lse)
    dout, dlse = torch.randn_like(expected), torch.randn_like(lse)
    (ours,) = grads((out, lse), qkv, (dout.view_as(out), dlse))
    (theirs,) = grads((expected, expected_lse), qkv, (dout, dlse))
    assert torch.equal(ours, theirs)


def test_equal_windows_are_one_view_and_one_call(monkeypatch):
    """The CPU path of the vision encoder: no copy of the packed projections, one call for all windows."""
    qkv = torch.randn(4, 9, 3, 2, 8)
    calls = []
    original = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def recorded(q, k, v, scale):
        calls.append({x.untyped_storage().data_ptr() for x in (q, k, v)})
        return original(q, k, v, scale=scale)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", recorded)
    window_attention(qkv)
    assert calls == [{qkv.untyped_storage().data_ptr()}]


def test_ragged_queries_over_equal_images_share_calls():
    """A text batch has queries of every length over images of one length: grouped within a factor of two."""
    lengths_q = (5, 33, 0, 40, 64, 8)
    groups = plan(packed_lengths(lengths_q), packed_lengths((325,) * 6), sum(lengths_q), 6 * 325).groups
    assert sorted(group.num_segments for group in groups) == [2, 3]


def test_long_windows_are_read_in_place():
    """Equal windows apart from each other were once gathered into a copy: only short ones gain by that."""
    lengths = (257, 65, 257, 257, 65, 1025, 0, 257)
    cu_seqlens = packed_lengths(lengths)
    made = plan(cu_seqlens, cu_seqlens, sum(lengths), sum(lengths))
    assert [(g.num_segments, g.len_q, g.rows_q is None) for g in made.groups] == [
        (1, 257, True),
        (2, 65, False),
        (2, 257, True),
        (1, 1025, True),
        (1, 257, True),
    ]
    assert made.covers_queries and made.covers_keys and not made.is_one_view
    apart = plan(packed_lengths((300,) * 3), packed_lengths((300, 0, 300)), 900, 600)
    assert [(g.num_segments, g.rows_q is None) for g in apart.groups] == [(1, True)] * 2
    q, k, v = (torch.randn(sum(lengths), 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out, expected = (
        varlen_attention(q, k, v, cu_seqlens, cu_seqlens),
        eager_attention(q, k, v, *2 * [cu_seqlens]),
    )
    assert max_error(out, expected[0]) < 1e-12
    dout = torch.randn_like(out)
    theirs = grads(expected[0], (q, k, v), dout)
    assert max(map(max_error, grads(out, (q, k, v), dout), theirs)) < 1e-12


@pytest.mark.parametrize(
    "shape", [(160, 65, 1), (4, 257, 16), (3, 65, 2), (1, 1025, 5), (1, 2049, 3), (40, 9, 3)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_are_bounded_and_cover_everything_once(shape, dtype):
    num_windows, seqlen, num_heads = shape
    q = torch.zeros(num_windows, num_heads, seqlen, 112, dtype=dtype)
    count = torch.zeros(num_windows, num_heads, dtype=torch.int64)
    for block in reference._blocks(q, q, dtype):
        count[block] += 1
        matrices = count[block].numel()
        scores = matrices * 2 * seqlen * seqlen * dtype.itemsize
        assert matrices == 1 or scores <= 2 * reference.MAX_BLOCK_BYTES["cpu"] * torch.get_num_threads()
    assert bool((count == 1).all())


@pytest.mark.parametrize("function", ["varlen", "window", "packed window"])
def test_gradcheck_with_lse(function):
    if function == "varlen":
        q, k, v, cu_q, cu_k = attention_inputs((3, 2, 4), (2, 0, 5), 2, 1, 3)

        def call(q, k, v):
            out, lse = varlen_attention(q, k, v, cu_q, cu_k, return_lse=True)
            return out, lse[:, [0, 1, 2, 5, 6, 7, 8]]

        inputs = (q, k, v)
    else:
        shape = (2, 4, 3, 1, 3) if function == "window" else (7, 3, 1, 3)
        inputs = (torch.randn(shape, dtype=torch.float64, requires_grad=True),)
        cu_seqlens = packed_lengths((4, 3)) if function == "packed window" else None

        def call(qkv):
            return window_attention(qkv, cu_seqlens, return_lse=True)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_segments_without_keys_are_exactly_zero():
    q, k, v, cu_q, cu_k = attention_inputs((4, 3), (0, 6))
    out, lse = varlen_attention(q, k, v, cu_q, cu_k, return_lse=True)
    assert torch.equal(out[:4], torch.zeros_like(out[:4]))
    assert bool((lse[:, :4] == -torch.inf).all())
    dq, _, _ = grads(out, (q, k, v), torch.randn_like(out))
    assert torch.equal(dq[:4], torch.zeros_like(dq[:4]))


def test_keys_without_queries_get_zero_gradients():
    q, k, v, cu_q, cu_k = attention_inputs((0, 3), (5, 6))
    _, dk, dv = grads(varlen_attention(q, k, v, cu_q, cu_k), (q, k, v), torch.randn(3, 2, 16).double())
    assert torch.equal(dk[:5], torch.zeros_like(dk[:5]))
    assert torch.equal(dv[:5], torch.zeros_like(dv[:5]))


@pytest.mark.parametrize("lengths", [((), ()), ((0,), (0,)), ((0, 0), (3, 0)), ((3,), (0,))], ids=str)
def test_nothing_to_do(lengths):
    """An empty batch: the fused CPU kernel divides by zero there, so it must not be reached."""
    q, k, v, cu_q, cu_k = attention_inputs(*lengths)
    out = varlen_attention(q, k, v, cu_q, cu_k)
    assert torch.equal(out, torch.zeros_like(q))
    assert all(not g.any() for g in grads(out, (q, k, v), torch.ones_like(out)))


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 8), (4, 0, 3, 2, 8)], ids=str)
def test_no_windows(shape):
    qkv = torch.randn(shape, requires_grad=True)
    out = window_attention(qkv)
    assert out.shape == (*shape[:2], 2, 8)
    assert grads(out, qkv, torch.ones_like(out))[0].shape == shape


@pytest.mark.parametrize("num_keys", [1, 5, 15, 16, 40, 63, 64, 65, 513, 1025])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_propagates(where, num_keys):
    """The fused CPU kernel returns 0 for a NaN query over few keys; eager returns NaN, and so must we."""
    tensors = dict(zip("qkv", attention_inputs((4,), (num_keys,), 1, 1, 8, torch.float32)[:3], strict=True))
    with torch.no_grad():
        tensors[where][0, 0, 0] = torch.nan
    cu_q, cu_k = packed_lengths((4,)), packed_lengths((num_keys,))
    out, lse = varlen_attention(**tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True)
    expected, expected_lse = eager_attention(**tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(lse.isnan(), expected_lse.isnan())


@pytest.mark.parametrize("scale", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_reaches_the_gradients(dtype, scale):
    """A gemm with alpha = 0 reads no input: folding the scale into it would hide a NaN."""
    q, k, v, cu_q, cu_k = attention_inputs((4,), (65,), 1, 1, 8, dtype)
    with torch.no_grad():
        q[0, 0, 0] = torch.nan
    out = varlen_attention(q, k, v, cu_q, cu_k, softmax_scale=scale)
    expected, _ = eager_attention(q, k, v, cu_q, cu_k, scale)
    assert torch.equal(out.isnan(), expected.isnan())
    ours, theirs = (grads(x, (q, k, v), torch.ones_like(x)) for x in (out, expected))
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(ours, theirs, strict=True))
    assert any(x.isnan().any() for x in ours)


def test_nan_of_one_segment_stays_there():
    """Padding rows once carried the NaN of a neighbour into the gradients of keys."""
    q, k, v, cu_q, cu_k = attention_inputs((5, 7, 6), (4, 4, 4))
    with torch.no_grad():
        q[0] = torch.nan
    out = varlen_attention(q, k, v, cu_q, cu_k)
    assert not out[5:].isnan().any()
    dq, dk, dv = grads(out, (q, k, v), torch.ones_like(out))
    assert not dq[5:].isnan().any()
    assert not dk[4:].isnan().any()
    assert not dv[4:].isnan().any()


@pytest.mark.parametrize("layout", ["head major", "every other channel", "expanded", "offset"])
def test_layouts(layout):
    q, k, v, cu_q, cu_k = attention_inputs((5, 6), (4, 7))
    expected = varlen_attention(q, k, v, cu_q, cu_k)

    def laid_out(x):
        if layout == "head major":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "every other channel":
            return torch.stack((x, x), -1).flatten(-2)[..., ::2]
        if layout == "offset":
            return torch.cat((x[:1], x))[1:]
        return x[:, :1].expand(-1, 2, -1)

    if layout == "expanded":
        expected = varlen_attention(*(x[:, :1].repeat(1, 2, 1) for x in (q, k, v)), cu_q, cu_k)
    assert torch.equal(varlen_attention(laid_out(q), laid_out(k), laid_out(v), cu_q, cu_k), expected)


@pytest.mark.parametrize("shape", [(1, 2, 16), (11, 1, 1)], ids=["mean over tokens", "sum over channels"])
def test_gradient_expanded_in_one_dimension(shape):
    q, k, v, cu_q, cu_k = attention_inputs((5, 6), (4, 7))
    dout = torch.randn(shape, dtype=torch.float64).expand(11, 2, 16)
    ours = grads(varlen_attention(q, k, v, cu_q, cu_k), (q, k, v), dout)
    theirs = grads(eager_attention(q, k, v, cu_q, cu_k)[0], (q, k, v), dout)
    assert max(map(max_error, ours, theirs)) < 1e-12


def test_expanded_gradient():
    q, k, v, cu_q, cu_k = attention_inputs((5, 6), (4, 7))
    out = varlen_attention(q, k, v, cu_q, cu_k)
    ours = grads(out, (q, k, v), torch.ones(1, 1, 1, dtype=torch.float64).expand_as(out))
    theirs = grads(eager_attention(q, k, v, cu_q, cu_k)[0], (q, k, v), torch.ones_like(out))
    assert max(map(max_error, ours, theirs)) < 1e-12


@pytest.mark.parametrize("num_prefix_tokens", range(9))
def test_num_prefix_tokens_never_changes_the_result(num_prefix_tokens):
    qkv = torch.randn(2, 10, 3, 1, 8)
    assert torch.equal(window_attention(qkv, num_prefix_tokens=num_prefix_tokens), window_attention(qkv))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 2])
def test_softmax_scale(scale):
    q, k, v, cu_q, cu_k = attention_inputs((5, 6), (4, 7))
    ours = varlen_attention(q, k, v, cu_q, cu_k, softmax_scale=scale)
    assert max_error(ours, eager_attention(q, k, v, cu_q, cu_k, scale)[0]) < 1e-12


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("matrices", [1, 4])
def test_backward_in_parts(monkeypatch, matrices):
    """The backward holds a bounded number of scores: several parts, the last one shorter, give the numbers of
    one. A buffer kept for parts of another size is resized by PyTorch with a warning."""
    qkv = torch.randn(3, 9, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(3, 9, 2, 8, dtype=torch.float64)
    (whole,) = grads(window_attention(qkv), qkv, dout)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setitem(reference.MAX_BLOCK_BYTES, "cpu", matrices * 8 * (2 * 9 * 9 + 7 * 9 * 8))
    (parts,) = grads(window_attention(qkv), qkv, dout)
    assert max_error(parts, whole) < 1e-14


def test_a_plan_made_in_inference_mode_serves_training():
    """Plans are kept across calls, and the first call of a batch may be an evaluation."""
    q, k, v, cu_q, cu_k = attention_inputs((3, 9, 4), (5, 6, 5))
    with torch.inference_mode():
        varlen_attention(q, k, v, cu_q, cu_k)
    out = varlen_attention(q, k, v, cu_q, cu_k)
    assert len(grads(out, (q, k, v), torch.ones_like(out))) == 3

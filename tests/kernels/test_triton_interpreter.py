"""The Triton kernels on CPU tensors, in Triton's interpreter: the error rule, special segments, bounds."""

import pytest
import torch

from infimm_kernels import add_position_2d, gated_residual_projection, varlen_attention, window_attention
from infimm_kernels.testing import assert_within_twice_eager, packed_lengths
from tests.kernels.cases import (
    AWKWARD_LENGTHS,
    HEAD_DIMS,
    MIXED_DTYPES,
    attention_inputs,
    eager_attention,
    eager_gated,
    eager_position,
    exact,
    gated_inputs,
)

pytestmark = pytest.mark.usefixtures("interpreter")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
floats = pytest.mark.parametrize("dtype", FLOATS, ids=str)
floats_and_mixed = pytest.mark.parametrize("dtype", (*FLOATS, *MIXED_DTYPES), ids=str)


def check_attention(q, k, v, cu_q, cu_k):
    out, lse = varlen_attention(q, k, v, cu_q, cu_k, return_lse=True, backend="triton")
    eager, eager_lse = eager_attention(q, k, v, cu_q, cu_k)
    out64, lse64 = eager_attention(*exact(q, k, v), cu_q, cu_k)
    assert_within_twice_eager("out", out, eager, out64)
    assert_within_twice_eager("lse", lse, eager_lse.to(lse.dtype), lse64)


@floats
@pytest.mark.parametrize("lengths", AWKWARD_LENGTHS, ids=str)
def test_attention_lengths(lengths, dtype):
    check_attention(*attention_inputs(lengths, lengths, 2, 1, 32, dtype))


@floats
@pytest.mark.parametrize("head_dim", (*HEAD_DIMS, 16, 20, 256))
def test_attention_head_dims(head_dim, dtype):
    check_attention(*attention_inputs((1, 70, 0, 3), (65, 33, 4, 0), 2, 2, head_dim, dtype))


def test_attention_at_1025_tokens():
    check_attention(*attention_inputs((1025,), (1025,), 1, 1, 112, torch.float16))


def test_many_segments():
    """Every segment is found by bisection, whatever the number of segments and however many are empty."""
    generator = torch.Generator().manual_seed(1)
    for num_segments in (1, 2, 3, 4, 5, 8, 9, 17):
        lengths = torch.randint(0, 4, (num_segments,), generator=generator).tolist()
        keys = torch.randint(0, 4, (num_segments,), generator=generator).tolist()
        inputs = attention_inputs(lengths, keys, 1, 1, 16, torch.float32)
        out, lse = varlen_attention(*inputs, return_lse=True, backend="triton")
        expected, expected_lse = eager_attention(*inputs)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, expected_lse)


def test_segments_without_keys_are_exactly_zero():
    q, k, v, cu_q, cu_k = attention_inputs((4, 3), (0, 6), 2, 2, 16, torch.float16)
    out, lse = varlen_attention(q, k, v, cu_q, cu_k, return_lse=True, backend="triton")
    assert torch.equal(out[:4], torch.zeros_like(out[:4]))
    assert bool((lse[:, :4] == -torch.inf).all())


@pytest.mark.parametrize("lengths", [((), ()), ((0, 0), (3, 0)), ((3,), (0,))], ids=str)
def test_nothing_to_do(lengths):
    q, k, v, cu_q, cu_k = attention_inputs(*lengths, 2, 2, 16, torch.float32)
    out = varlen_attention(q, k, v, cu_q, cu_k, backend="triton")
    assert torch.equal(out, torch.zeros_like(q))


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_propagates(where):
    tensors = dict(zip("qkv", attention_inputs((4, 3), (5, 40), 1, 1, 16, torch.float32)[:3], strict=True))
    cu = {"cu_seqlens_q": packed_lengths((4, 3)), "cu_seqlens_k": packed_lengths((5, 40))}
    with torch.no_grad():
        tensors[where][-1, 0, 0] = torch.nan
    ours = varlen_attention(**tensors, **cu, backend="triton")
    assert torch.equal(ours.isnan(), eager_attention(**tensors, **cu)[0].isnan())


@pytest.mark.parametrize("packed", [False, True])
def test_window_attention(packed):
    qkv = torch.randn(3, 17, 3, 2, 48)
    expected = window_attention(qkv, return_lse=True)
    if packed:
        out, lse = window_attention(
            qkv.flatten(0, 1), packed_lengths((17,) * 3), return_lse=True, backend="triton"
        )
    else:
        out, lse = window_attention(qkv, return_lse=True, backend="triton")
    torch.testing.assert_close(out.view_as(expected[0]), expected[0])
    torch.testing.assert_close(lse, expected[1])


def test_attention_layouts():
    q, k, v, cu_q, cu_k = attention_inputs((5, 6), (4, 7), 4, 2, 16, torch.float32)
    expected = varlen_attention(q, k, v, cu_q, cu_k, backend="triton")
    head_major = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    assert torch.equal(varlen_attention(*head_major, cu_q, cu_k, backend="triton"), expected)
    other_channels = (torch.stack((x, x), -1).flatten(-2)[..., ::2] for x in (q, k, v))
    assert torch.equal(varlen_attention(*other_channels, cu_q, cu_k, backend="triton"), expected)


@floats_and_mixed
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(1, 16, 16), (65, 80, 48), (130, 72, 64)], ids=str)
def test_gated_residual(size, masked, dtype):
    rows, hidden, inner = size
    inputs = gated_inputs((rows,), hidden, inner, dtype)
    mask = torch.rand(rows) > 0.3 if masked else None
    y = gated_residual_projection(*inputs, row_mask=mask, backend="triton")
    assert_within_twice_eager("y", y, eager_gated(*inputs, mask), eager_gated(*exact(*inputs), mask))


@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 0.05, 0.29, 0.31, 1.0, 9.0, 60.0])
def test_gated_residual_tanh(magnitude):
    """1 - exp(-2x) cancels near 0, which is where gates are when training starts."""
    gate = torch.linspace(-magnitude, magnitude, 33)
    y = gated_residual_projection(
        torch.zeros(1, 33), torch.ones(1, 16), torch.eye(33, 16) + 1, gate, backend="triton"
    )
    update = (torch.eye(33, 16, dtype=torch.float64) + 1).sum(1)
    torch.testing.assert_close(y[0].double(), gate.double().tanh() * update, rtol=4e-7, atol=0)


@floats_and_mixed
def test_gated_residual_returns_x_bit_for_bit(dtype):
    x, o, weight, gate = (t.detach() for t in gated_inputs((6,), 20, 16, dtype))
    x[:3], gate[:10] = -0.0, 0.0
    mask = torch.tensor([True, False] * 3)
    o[1] = torch.nan
    y = gated_residual_projection(x, o, weight, gate, row_mask=mask, backend="triton")
    assert torch.equal(y[~mask].view(torch.uint8), x[~mask].view(torch.uint8))
    assert torch.equal(y[:, :10].contiguous().view(torch.uint8), x[:, :10].contiguous().view(torch.uint8))


def test_gated_residual_layouts():
    x, o, weight, gate = (t.detach() for t in gated_inputs((3, 5), 20, 16, torch.float32))
    expected = gated_residual_projection(x, o, weight, gate, backend="triton")
    strided = (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        o.mT.contiguous().mT,
        weight.t().contiguous().t(),
    )
    assert torch.equal(gated_residual_projection(*strided, gate, backend="triton"), expected)
    assert gated_residual_projection(x[:0], o[:0], weight, gate, backend="triton").shape == (0, 5, 20)


POSITIONS = torch.tensor([[0, 0], [3, 1], [-1, -1], [40, 70], [2, -4]])


@pytest.mark.sample(4)
@floats
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_prefix_tokens": 1},
        {"granularity": "token", "num_prefix_tokens": 1, "window_shape": (4, 9)},
        {"granularity": "token", "window_shape": (37, 1)},
        {"granularity": "token", "window_shape": (0, 0), "num_prefix_tokens": 3},
    ],
    ids=str,
)
def test_position(options, dtype):
    seqlen = 3 if options.get("window_shape") == (0, 0) else 37
    x = torch.randn(5, seqlen, 40).to(dtype)
    x[2] = -0.0
    for positions in (POSITIONS, POSITIONS.int()):
        y = add_position_2d(x, positions, **options, backend="triton")
        eager = eager_position(x, positions, **options)
        assert_within_twice_eager("y", y, eager, eager_position(x.double(), positions, **options))
        assert torch.equal(y[2].view(torch.uint8), x[2].view(torch.uint8))


def test_position_layouts():
    x = torch.randn(5, 9, 8)
    expected = add_position_2d(x, POSITIONS, backend="triton")
    wide = torch.randn(5, 9, 3, 8)
    wide[:, :, 1] = x
    assert torch.equal(add_position_2d(wide[:, :, 1], POSITIONS, backend="triton"), expected)
    assert torch.equal(
        add_position_2d(x.mT.contiguous().mT, POSITIONS.t().contiguous().t(), backend="triton"), expected
    )
    assert add_position_2d(x[:0], POSITIONS[:0], backend="triton").shape == (0, 9, 8)

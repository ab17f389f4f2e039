"""gated_cross_attention of a few new tokens against cached vision keys, in every backend."""

import math

import pytest
import torch

from infimm_kernels import decode_segments, gated_cross_attention
from infimm_kernels.gated_cross_attention import decode_reference
from infimm_kernels.testing import assert_within_twice_eager, max_error
from tests.kernels.cases import MIXED_DTYPES

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
floats = pytest.mark.parametrize("dtype", FLOATS, ids=str)
# Tokens of the images of each sample; the last image is the one that is seen.
MANY = ((257,), (), (3, 63), (0,), (1,), (5, 0), (2,) * 8, (65,), (65,))
NAMES = ("x", "query", "key", "value", "out_weight", "attn_gate")


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    if request.param == "triton":
        request.getfixturevalue("interpreter")
    return request.param


def step(images, text_len=1, heads=(2, 2), head_dim=16, hidden=40, dtype=torch.float64, device="cpu"):
    """The six tensors of a call and its segments; dtype of all, or of (x, branch, gate)."""
    stream, branch, gate = dtype if isinstance(dtype, tuple) else (dtype,) * 3
    batch, total, inner = len(images), sum(map(sum, images)), heads[0] * head_dim
    shapes = (
        ((batch, text_len, hidden), stream),
        ((batch, text_len, heads[0], head_dim), branch),
        ((total, heads[1], head_dim), branch),
        ((total, heads[1], head_dim), branch),
        ((hidden, inner), branch),
        ((hidden,), gate),
    )
    tensors = [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape, dtype in shapes]
    tensors[4] *= inner**-0.5
    lengths = [n for sample in images for n in sample]
    segments = decode_segments(lengths, list(map(len, images)), text_len=text_len, device=device)
    return tensors, segments


def eager(tensors, ranges, softmax_scale=None):
    """Attention sample by sample, in the dtype of each tensor throughout."""
    x, query, key, value, weight, gate = tensors
    scale = query.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    group = query.shape[2] // key.shape[1]
    out = torch.zeros_like(query)
    for sample, (first, end) in enumerate(ranges):
        k, v = (t[first:end].repeat_interleave(group, 1).transpose(0, 1) for t in (key, value))
        p = (query[sample].transpose(0, 1) @ k.transpose(1, 2) * scale).softmax(-1)
        out[sample] = (p @ v).transpose(0, 1)
    y = x + gate.tanh() * torch.nn.functional.linear(out.flatten(2), weight)
    has_keys = torch.tensor([end > first for first, end in ranges], dtype=torch.bool, device=x.device)
    return torch.where(has_keys.view(-1, 1, 1), y, x)


def check(tensors, segments, backend, ranges=None, **options):
    """The error rule, for the public function or, with `ranges`, for the registered op."""
    if ranges is None:
        ranges = segments.key_ranges.tolist()
        y = gated_cross_attention(*tensors, segments, backend=backend, **options)
    else:
        y = registered(tensors, segments.key_ranges, segments.max_keys, backend)
    scale = options.get("softmax_scale")
    expected = eager([t.double() for t in tensors], ranges, scale)
    assert_within_twice_eager("y", y, eager(tensors, ranges, scale), expected)
    return y


def registered(tensors, key_ranges, max_keys, backend):
    scale = tensors[1].shape[3] ** -0.5
    op = torch.ops.infimm_kernels.gated_cross_attention_decode
    return op(*tensors, key_ranges, max_keys, scale, backend)


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text_len", [1, 3, 8])
@pytest.mark.parametrize("dtype", (*FLOATS, *MIXED_DTYPES[:2]), ids=str)
def test_twice_eager(dtype, text_len, backend):
    tensors, segments = step(MANY, text_len, (2, 1), 16, 40, dtype)
    check(tensors, segments, backend)


@floats
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)], ids=str)
def test_long_images(heads, dtype, backend):
    """Past the number of keys from which the CPU takes the path of lone rows."""
    tensors, segments = step(((1025,), (5, 600), ()), 1, heads, 64, 40, dtype)
    check(tensors, segments, backend)


@floats
@pytest.mark.parametrize("head_dim", [16, 17, 80, 112, 256])
def test_head_dims(head_dim, dtype, backend):
    tensors, segments = step(((70,), (300,)), 2, (2, 1), head_dim, 33, dtype)
    check(tensors, segments, backend)


@floats
@pytest.mark.parametrize("heads", [(16, 1), (40, 2)], ids=str)
def test_more_rows_than_a_tile(heads, dtype, backend):
    tensors, segments = step(((300,), (65,)), 8, heads, 16, 24, dtype)
    check(tensors, segments, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ten_windows(dtype, backend):
    """The size of one image of InfiMM-HD: nine windows and the thumbnail."""
    heads = (12, 12) if backend == "reference" else (2, 1)  # the interpreter is slow
    tensors, segments = step(((10250,),), 1, heads, 64, 64, dtype)
    check(tensors, segments, backend)


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)], ids=str)
def test_float64_on_the_cpu(heads):
    tensors, segments = step((*MANY, (900,)), 1, heads)
    y = gated_cross_attention(*tensors, segments)
    assert max_error(y, eager(tensors, segments.key_ranges.tolist())) < 1e-12


@floats
@pytest.mark.parametrize("scale", [0, -0.7, 1e-3, 3.0, 1e-45, 1e30])
def test_scales(scale, dtype, backend):
    tensors, segments = step(((70,), (600,)), 1, (2, 2), 16, 24, dtype)
    if scale == 1e30:
        # One score far above the others, so that eager is finite too.
        tensors[1].fill_(1.0)
        tensors[2].mul_(0.0)
        tensors[2][5], tensors[2][80] = 1e-30, 1e-30
        tensors[2] = tensors[2].to(dtype)
    check(tensors, segments, backend, softmax_scale=scale)


# --- shares of the keys -------------------------------------------------------------------------------------


@floats
@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize("text_len", [1, 4])
def test_splits(splits, text_len, dtype, interpreter, monkeypatch):
    """More of them than tiles of keys too, so that some have nothing to do and write nothing."""
    from infimm_kernels.gated_cross_attention import triton_decode

    monkeypatch.setattr(triton_decode, "splits_for", lambda *sizes: splits)
    tensors, segments = step(((400,), (1,), (), (129,)), text_len, (2, 1), 32, 40, dtype)
    check(tensors, segments, "triton")


@floats
def test_shares_in_several_tiles(dtype, interpreter, monkeypatch):
    """What the projection adds up one after the other, where all shares of its rows are too many numbers."""
    from infimm_kernels.gated_cross_attention import triton_decode, triton_decode_config

    monkeypatch.setattr(triton_decode, "splits_for", lambda *sizes: 5)
    monkeypatch.setattr(triton_decode_config, "MAX_TILE", 256)
    assert triton_decode_config.projection_config(4, 5, 32, dtype).num_blocks_s == 4
    tensors, segments = step(((700,), (129,)), 2, (2, 1), 32, 40, dtype)
    check(tensors, segments, "triton")


def test_number_of_splits():
    pytest.importorskip("triton")
    from infimm_kernels.gated_cross_attention.triton_decode import projection_config, splits_for

    assert [splits_for(batch, 1, 12, 64, 10250, 132) for batch in (1, 8, 64)] == [22, 3, 1]
    assert splits_for(1, 8, 12, 64, 10250, 132) == 11  # a CTA per SM: all 8 rows read all shares
    assert [splits_for(1, 1, 12, 64, keys, 132) for keys in (-1, 0, 255, 512, 1025)] == [1, 1, 1, 2, 4]
    for rows in (1, 3, 8, 40):
        for head_dim in (16, 64, 112, 256):
            splits = splits_for(rows, 1, 1, head_dim, 1 << 20, 132)
            tile = projection_config(rows, splits, head_dim, torch.bfloat16)
            assert tile.num_blocks_s <= 4
            assert splits <= tile.block_s * tile.num_blocks_s < 2 * splits


@floats
@pytest.mark.parametrize("max_keys", [0, 300, 10**6, -1])
def test_a_wrong_hint_changes_nothing(max_keys, dtype, backend):
    tensors, segments = step(((700,), (), (100,)), 2, (2, 1), 32, 40, dtype)
    check(tensors, segments._replace(max_keys=max_keys), backend)


@floats
def test_ranges_are_cut_to_the_keys(dtype, backend):
    """Nothing outside key and value is read; ranges may overlap, come in any order, and be empty."""
    tensors, segments = step(((30,), (40,), (5,), (5,), (5,), (5,)), 2, (2, 2), 16, 24, dtype)
    ranges = [[-9, 12], [60, 2**31 - 1], [20, 10], [100, 200], [5, 50], [-(2**31), -1]]
    key_ranges = torch.tensor(ranges, dtype=torch.int32)
    cut = [[0, 12], [60, 90], [0, 0], [0, 0], [5, 50], [0, 0]]
    check(tensors, segments._replace(key_ranges=key_ranges), backend, cut)


@floats
def test_shared_images(dtype, backend):
    """Samples that continue one prompt in different ways, on the same keys."""
    tensors, segments = step(((600,), (600,), (600,)), 1, (2, 2), 32, 24, dtype)
    ranges = [[600, 1200]] * 3
    key_ranges = torch.tensor(ranges, dtype=torch.int32)
    check(tensors, segments._replace(key_ranges=key_ranges), backend, ranges)


# --- exact results ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (*FLOATS, MIXED_DTYPES[0]), ids=str)
def test_samples_without_keys_return_x_bit_for_bit(dtype, backend):
    tensors, segments = step(((), (300,), (), (4, 0)), 2, (2, 1), 16, 24, dtype)
    x = tensors[0]
    x[0, 0] = -0.0
    tensors[4][3] = math.nan
    y = gated_cross_attention(*tensors, segments, backend=backend)
    for sample in (0, 2, 3):
        assert torch.equal(bits(y[sample]), bits(x[sample]))
    assert y[1, :, 3].isnan().all()


def test_no_keys_at_all(backend):
    tensors, segments = step(((), ()), 1, (2, 2), 16, 24, torch.float32)
    y = gated_cross_attention(*tensors, segments, backend=backend)
    assert torch.equal(bits(y), bits(tensors[0]))
    assert y.data_ptr() != tensors[0].data_ptr()


@floats
def test_a_zero_gate_returns_x_bit_for_bit(dtype, backend):
    tensors, segments = step(((300,),), 2, (2, 1), 16, 24, dtype)
    tensors[0][0, 0] = -0.0
    y = gated_cross_attention(*tensors[:5], torch.zeros_like(tensors[5]), segments, backend=backend)
    assert torch.equal(bits(y), bits(tensors[0]))


def bits(x):
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value", "out_weight", "attn_gate"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_shows_as_in_eager(value, name, dtype, backend):
    tensors, segments = step(((3,), (600,)), 1, (2, 2), 16, 24, dtype)
    tensors[NAMES.index(name)][-1] = value
    y = gated_cross_attention(*tensors, segments, backend=backend)
    expected = eager([t.double() for t in tensors], segments.key_ranges.tolist())
    assert torch.equal(y.isfinite(), expected.isfinite())


def test_scores_of_minus_infinity_have_no_weight(backend):
    """A whole share of them too: it has no largest score to be measured from."""
    tensors, segments = step(((1200,),), 1, (1, 1), 16, 24, torch.float32)
    tensors[1].fill_(1e38)
    tensors[2][:] = -1.0
    tensors[2][7] = 0.0
    y = gated_cross_attention(*tensors, segments, softmax_scale=1.0, backend=backend)
    x, _, _, value, weight, gate = (t.double() for t in tensors)
    assert max_error(y, x + gate.tanh() * (value[7].flatten() @ weight.t())) < 1e-5


# --- layouts ------------------------------------------------------------------------------------------------


def packed(key, value):
    return torch.stack((key, value), 1).unbind(1)


def head_major(key, value):
    return (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (key, value))


def every_other_channel(key, value):
    return (torch.stack((t, t.flip(0)), -1).flatten(2)[..., ::2] for t in (key, value))


def gapped_heads(key, value):
    return (torch.nn.functional.pad(t, (3, 5))[..., 3:-5] for t in (key, value))


def one_key_for_all_heads(key, value):
    return (t[:, :1].expand_as(t) for t in (key, value))


LAYOUTS = (packed, head_major, every_other_channel, gapped_heads, one_key_for_all_heads)


@floats
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts(layout, dtype, backend):
    tensors, segments = step(((600,), (), (515,)), 1, (2, 2), 16, 24, dtype)
    tensors[2:4] = layout(*tensors[2:4])
    check(tensors, segments, backend)


def test_layouts_of_the_other_tensors(backend):
    tensors, segments = step(((70,), (33,)), 3, (2, 1), 16, 24, torch.float32)
    expected = gated_cross_attention(*tensors, segments, backend=backend)
    x, query, key, value, weight, gate = tensors
    y = gated_cross_attention(
        x.transpose(0, 1).contiguous().transpose(0, 1),
        query.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        key,
        value,
        weight.t().contiguous().t(),
        torch.stack((gate, -gate), 1)[:, 0],
        segments._replace(key_ranges=segments.key_ranges.t().contiguous().t()),
        backend=backend,
    )
    assert max_error(y, expected) < 1e-6


def test_inputs_stay_as_they_are(backend):
    tensors, segments = step(((600,), (33,)), 1, (2, 2), 16, 24, torch.float32)
    before = [t.clone() for t in tensors]
    gated_cross_attention(*tensors, segments, backend=backend)
    assert all(map(torch.equal, tensors, before))


# --- segments -----------------------------------------------------------------------------------------------


def test_key_ranges_by_hand():
    segments = decode_segments([5, 6, 7, 8, 0], [1, 0, 3, 1], text_len=2)
    assert segments.key_ranges.tolist() == [[0, 5], [0, 0], [18, 26], [0, 0]]
    assert segments.key_ranges.dtype == torch.int32
    assert segments.max_keys == 8
    assert decode_segments([], []).key_ranges.shape == (0, 2)
    assert decode_segments([], [0, 0]).max_keys == 0


def test_reference_joins_equal_neighbours():
    """One call for a batch of images of one size, which is the usual one."""
    ranges = [[0, 5], [5, 10], [10, 15], [0, 0], [15, 20], [20, 26], [-3, 4], [99, 200]]
    runs = list(decode_reference._runs(ranges, 102))
    assert runs == [(0, 3, 0, 5), (4, 1, 15, 5), (5, 1, 20, 6), (6, 1, 0, 4), (7, 1, 99, 3)]


def test_an_empty_batch(backend):
    tensors, segments = step((), 1, (2, 2), 16, 24, torch.float32)
    assert gated_cross_attention(*tensors, segments, backend=backend).shape == (0, 1, 24)

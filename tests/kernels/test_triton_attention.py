"""The attention kernels in Triton's interpreter, with the tiles of both architectures."""

import pytest
import torch

from infimm_kernels import gated_cross_attention, media_segments, varlen_attention, window_attention
from infimm_kernels.testing import assert_within_twice_eager, packed_lengths
from tests.kernels.cases import attention_inputs, eager_attention, exact, masked_attention

pytestmark = pytest.mark.usefixtures("interpreter")
ARCHITECTURES = {"sm_80": (8, 0), "sm_90": (9, 0)}
# Of the queries and of the keys of one call each.
LENGTHS = (
    ((0, 1, 2, 63, 0), (0, 1, 2, 63, 0)),
    ((64, 65, 3), (64, 65, 3)),
    ((5, 0, 130, 1), (129, 4, 0, 1)),
    ((257,), (257,)),
)


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request, monkeypatch):
    """The interpreter with the tiles of this architecture."""
    from infimm_kernels.attention import triton_launch

    monkeypatch.setattr(triton_launch, "_capability", lambda x: ARCHITECTURES[request.param])
    return request.param


def check(q, k, v, cu_q, cu_k, with_dlse=True, **options):
    """Result and gradients against the error rule; lse takes part where a row has keys."""
    out, lse = varlen_attention(q, k, v, cu_q, cu_k, return_lse=True, backend="triton", **options)
    scale = options.get("softmax_scale")
    eager, eager_lse = eager_attention(q, k, v, cu_q, cu_k, scale)
    wide = exact(q, k, v)
    expected, expected_lse = eager_attention(*wide, cu_q, cu_k, scale)
    assert_within_twice_eager("out", out, eager, expected)
    assert_within_twice_eager("lse", lse, eager_lse.to(lse.dtype), expected_lse)
    dout, seen = torch.randn_like(out), expected_lse.isfinite()
    dlse = torch.randn_like(lse) * with_dlse
    found = torch.autograd.grad((out, lse), (q, k, v), (dout, torch.where(seen, dlse, 0.0)))

    def gradients(out, lse, inputs):
        grads = (dout.to(out.dtype), dlse[seen].to(lse.dtype))
        return torch.autograd.grad((out, lse[seen]), inputs, grads)

    eager_grads = gradients(eager, eager_lse, (q, k, v))
    for name, *three in zip("qkv", found, eager_grads, gradients(expected, expected_lse, wide), strict=True):
        assert_within_twice_eager(f"d{name}", *three)


@pytest.mark.sample(5)
@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 2, 8])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_ragged_segments(lengths, num_prefix_tokens, architecture):
    check(*attention_inputs(*lengths, 1, 1, 112, torch.bfloat16), num_prefix_tokens=num_prefix_tokens)


def test_float16(architecture):
    check(*attention_inputs(*LENGTHS[2], 1, 1, 112, torch.float16), num_prefix_tokens=1)


@pytest.mark.sample(5)
@pytest.mark.parametrize("head_dim", [16, 20, 64, 72, 80, 88, 96, 104, 128, 160])
def test_head_dims(head_dim, architecture):
    lengths = (66, 1, 0, 40)
    check(*attention_inputs(lengths, lengths, 2, 2, head_dim, torch.bfloat16), num_prefix_tokens=1)


@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 3])
def test_groups_of_query_heads(num_prefix_tokens, architecture):
    inputs = attention_inputs((70, 3), (33, 66), 6, 2, 64, torch.bfloat16)
    check(*inputs, num_prefix_tokens=num_prefix_tokens)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.5])
@pytest.mark.parametrize("num_prefix_tokens", [1, 4])
def test_any_scale(scale, num_prefix_tokens):
    """The maximum is taken before the scale where that is right, which it is not for a negative one."""
    inputs = attention_inputs((70, 5), (70, 5), 1, 1, 32, torch.bfloat16)
    check(*inputs, softmax_scale=scale, num_prefix_tokens=num_prefix_tokens)


@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("num_prefix_tokens", [0, 2])
def test_deterministic_backward(num_prefix_tokens, with_dlse, architecture, deterministic):
    inputs = attention_inputs((5, 0, 130, 1), (129, 4, 0, 1), 2, 1, 112, torch.bfloat16)
    check(*inputs, with_dlse=with_dlse, num_prefix_tokens=num_prefix_tokens)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch):
    """[(kernel, its arguments)] of the launches, which do not take place."""
    from infimm_kernels.attention import triton_launch

    launched = []

    class Recorded:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((self.name, args))

    for name in [name for name in vars(triton_launch) if name.endswith("_kernel")]:
        monkeypatch.setattr(triton_launch, name, Recorded(name.removeprefix("attention_")))
    return launched


def kernels_of_backward(launches, num_prefix_tokens) -> list[str]:
    qkv = torch.randn(1, 9, 3, 1, 16, dtype=torch.float16, requires_grad=True)
    out = window_attention(qkv, num_prefix_tokens=num_prefix_tokens, backend="triton")
    out.backward(torch.ones_like(out))
    assert launches.pop(0)[0] == "forward_kernel"
    return [name for name, _ in launches]


def test_the_fused_kernel_is_the_default(launches):
    names = ["backward_prepare_kernel", "backward_kernel", "backward_finish_kernel"]
    assert kernels_of_backward(launches, 1) == names


@pytest.mark.parametrize(("num_prefix_tokens", "last"), [(0, []), (1, ["backward_finish_kernel"])])
def test_deterministic_algorithms_choose_the_other_kernels(launches, deterministic, num_prefix_tokens, last):
    """dq by atomics differs from run to run on a GPU, whatever PyTorch was told."""
    names = ["backward_prepare_kernel", "backward_kernel", "backward_dq_kernel", *last]
    assert kernels_of_backward(launches, num_prefix_tokens) == names


@pytest.mark.sample(5)
@pytest.mark.parametrize("num_prefix_tokens", range(9))
@pytest.mark.parametrize("seqlen", [1, 4, 9, 33])
def test_prefix_tokens_never_change_the_result(seqlen, num_prefix_tokens):
    qkv = torch.randn(2, seqlen, 3, 2, 16, dtype=torch.float16, requires_grad=True)
    dout = torch.randn(2, seqlen, 2, 16, dtype=torch.float16)
    plain, hinted = (
        window_attention(qkv, num_prefix_tokens=n, backend="triton") for n in (0, num_prefix_tokens)
    )
    torch.testing.assert_close(hinted, plain, rtol=0, atol=4e-3)
    grads = [torch.autograd.grad(out, qkv, dout)[0] for out in (hinted, plain)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-2)


def check_windows(qkv, num_prefix_tokens):
    """Equal windows without cu_seqlens, as the packed gradient has them."""
    num_windows, seqlen = qkv.shape[:2]
    cu_seqlens = packed_lengths((seqlen,) * num_windows)
    out = window_attention(qkv, num_prefix_tokens=num_prefix_tokens, backend="triton")
    wide = exact(qkv)[0]
    eager, expected = (
        eager_attention(*x.flatten(0, 1).unbind(1), *(cu_seqlens,) * 2)[0] for x in (qkv, wide)
    )
    dout = torch.randn_like(out)
    assert_within_twice_eager("out", out.flatten(0, 1), eager, expected)
    (found,) = torch.autograd.grad(out, qkv, dout)
    eager_grad, expected_grad = (
        torch.autograd.grad(result, x, dout.flatten(0, 1).to(result.dtype))[0]
        for result, x in ((eager, qkv), (expected, wide))
    )
    for i, name in enumerate("qkv"):
        three = (x[:, :, i] for x in (found, eager_grad, expected_grad))
        assert_within_twice_eager(f"d{name}", *three)


@pytest.mark.sample(5)
@pytest.mark.parametrize(("seqlen", "num_prefix_tokens"), [(257, 1), (129, 1), (128, 0), (133, 5), (130, 1)])
def test_equal_windows(seqlen, num_prefix_tokens, architecture):
    """Whole tiles behind the prefix take code without masks; 130 tokens do not."""
    qkv = torch.randn(2, seqlen, 3, 1, 112).bfloat16().requires_grad_()
    check_windows(qkv, num_prefix_tokens)


@pytest.mark.sample(11)
@pytest.mark.parametrize("seqlen", [1024, 1025, 1026])
def test_a_window_of_448_pixels(seqlen, architecture):
    qkv = torch.randn(1, seqlen, 3, 1, 112).bfloat16().requires_grad_()
    check_windows(qkv, 1)


def test_packed_projections_are_not_copied(launches):
    qkv = torch.randn(2 * 9, 3, 2, 16, dtype=torch.float16, requires_grad=True)
    out = window_attention(qkv, packed_lengths((9, 9)), backend="triton")
    (dqkv,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    arguments = dict(launches)
    slices = [x.data_ptr() for x in qkv.unbind(1)]
    for name in ("forward_kernel", "backward_prepare_kernel", "backward_kernel"):
        assert [x.data_ptr() for x in arguments[name][:3]] == slices
    written = [x.data_ptr() for x in arguments["backward_finish_kernel"][2:5]]
    assert written == [x.data_ptr() for x in dqkv.unbind(1)]


def test_rows_far_apart_are_copied(launches, monkeypatch):
    """Offsets inside a tile are 32-bit: rows that lie further apart would wrap around."""
    from infimm_kernels.attention import triton_launch

    q, k, v, cu_q, cu_k = attention_inputs((9,), (9,), 1, 1, 16, torch.float16)
    apart = torch.zeros(9, 64, 1, 16, dtype=torch.float16)[:, 0]
    varlen_attention(apart, k, v, cu_q, cu_k, backend="triton")
    monkeypatch.setattr(triton_launch, "MAX_TILE_ROWS", 2**31 // 1024)
    varlen_attention(apart, k, v, cu_q, cu_k, backend="triton")
    (_, near), (_, copied) = launches
    assert near[0].data_ptr() == apart.data_ptr()
    assert copied[0].data_ptr() != apart.data_ptr()
    assert copied[0].stride(0) == 16


def test_nan_of_one_segment_stays_there():
    """Rows past the end of a segment are read as its last one, never as a neighbour's."""
    q, k, v, cu_q, cu_k = attention_inputs((5, 7, 6), (4, 9, 4), 1, 1, 16, torch.float16)
    with torch.no_grad():
        for x in (q, k, v):
            x[0] = torch.nan
            x[-1] = torch.nan
    out = varlen_attention(q, k, v, cu_q, cu_k, num_prefix_tokens=1, backend="triton")
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for x, cu in zip((out, *grads), (cu_q, cu_q, cu_k, cu_k), strict=True):
        assert x[: cu[1]].isnan().any()
        assert not x[cu[1] : cu[2]].isnan().any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_score_that_is_no_number(value, num_prefix_tokens):
    """Over the prefix key alone, whose probability was taken for 1, a NaN in q once gave out = v."""
    q, k, v, cu_q, cu_k = attention_inputs((1, 2), (1, 2), 1, 1, 16, torch.float16)
    with torch.no_grad():
        q[0] = value
    out = varlen_attention(q, k, v, cu_q, cu_k, num_prefix_tokens=num_prefix_tokens, backend="triton")
    assert torch.equal(out.isnan(), eager_attention(q, k, v, cu_q, cu_k)[0].isnan())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("scale", [1e-46, 1e-40, 1e39, -1e300])
def test_scales_beyond_float32(scale):
    """A scale that is 0 in float32 once made NaN of masked scores; one past its range could not be passed."""
    q, k, v, cu_q, cu_k = attention_inputs((70,), (70,), 1, 1, 16, torch.float16)
    out = varlen_attention(q, k, v, cu_q, cu_k, softmax_scale=scale, backend="triton")
    if abs(scale) < 1:
        assert_within_twice_eager(
            "out", out, eager_attention(q, k, v, cu_q, cu_k, scale)[0], v.double().mean(0).expand(70, 1, 16)
        )
    else:
        assert out.isnan().all()


def test_scores_far_from_zero():
    """exp(score) alone would overflow or vanish; so would a probability made of zeros for a missing key."""
    q, k, v, cu_q, cu_k = attention_inputs((70,), (70,), 1, 1, 16, torch.float16)
    with torch.no_grad():
        k[...] = -q.mean(0) * 30 + k
        q[...] = q.mean(0) * 30 + q
    check(q, k, v, cu_q, cu_k, num_prefix_tokens=1)


@pytest.mark.parametrize("values", [(0, 900, -7, 5), (3, 2, 1, 0), (-5, 0, 5, 10**9), (7, 7, 7, 7)], ids=str)
@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 3])
def test_wrong_cu_seqlens_on_a_gpu_stay_in_bounds(values, num_prefix_tokens):
    """A GPU does not check them; the result may then be anything, but no foreign memory is touched."""
    from infimm_kernels.attention import triton_launch

    guard, total = 64, 5

    def guarded(fill):
        memory = torch.full((total + 2 * guard, 1, 16), fill, dtype=torch.float16)
        return memory, memory[guard:-guard]

    memory, (q, k, v, out, dout, *grads) = zip(*(guarded(6e4) for _ in range(8)), strict=True)
    for x in (q, k, v, out, dout):
        x.normal_()
    cu_seqlens = torch.tensor(values, dtype=torch.int32)
    problem = (cu_seqlens, cu_seqlens, 0, 0.25, num_prefix_tokens)
    result, lse = triton_launch.forward(q, k, v, *problem)
    written = result.isfinite().all(-1).all(-1)
    assert bool((result[written].abs() < 1e3).all())
    lse = lse.nan_to_num(0.0)
    triton_launch.backward(q, k, v, out, lse, dout, None, *problem, False, *grads)
    for x in memory:
        assert bool((x[:guard] == 6e4).all())
        assert bool((x[-guard:] == 6e4).all())


def test_float32_goes_back_through_the_reference():
    """From a saved lse its probabilities would err by more than twice eager's error."""
    q, k, v, cu_q, cu_k = attention_inputs((5, 6), (4, 7), 2, 1, 16, torch.float32)
    dout = torch.randn(11, 2, 16)
    ours, theirs = (
        torch.autograd.grad(varlen_attention(q, k, v, cu_q, cu_k, backend=name), (q, k, v), dout)
        for name in ("triton", "reference")
    )
    assert all(map(torch.equal, ours, theirs))


def test_gated_cross_attention_runs_on_these_kernels():
    """Text cut at its images, three query heads to a key head: against the masked matrix."""
    is_image = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    vision_seqlens, heads = (40, 7, 65), (6, 2, 32)
    segments = media_segments(is_image, vision_seqlens, [2, 0, 1])
    image_of_text = torch.tensor([[-1, 0, 0, 0, 1, 1], [-1] * 6, [2] * 6]).flatten()
    image_of_key = torch.arange(3).repeat_interleave(torch.tensor(vision_seqlens))
    hidden = image_of_text[:, None] != image_of_key[None, :]
    num_heads, num_kv_heads, head_dim = heads
    total = sum(vision_seqlens)
    shapes = ((3, 6, 48), (3, 6, num_heads, head_dim), *((total, num_kv_heads, head_dim),) * 2)
    shapes += ((48, num_heads * head_dim), (48,))
    inputs = tuple(torch.randn(shape).bfloat16().requires_grad_() for shape in shapes)
    y = gated_cross_attention(*inputs, segments, backend="triton")

    def eager(x, query, key, value, weight, gate):
        key, value = (t.repeat_interleave(num_heads // num_kv_heads, 1) for t in (key, value))
        out = masked_attention(query.flatten(0, 1), key, value, hidden).reshape(3, 6, -1)
        return x + gate.tanh() * (out @ weight.t())

    wide = exact(*inputs)
    theirs, expected = eager(*inputs), eager(*wide)
    assert_within_twice_eager("y", y, theirs, expected)
    dy = torch.randn_like(y)
    grads = (
        torch.autograd.grad(result, t, dy.to(result.dtype)) for result, t in ((y, inputs), (theirs, inputs))
    )
    for name, a, b, c in zip("xqkvwg", *grads, torch.autograd.grad(expected, wide, dy.double()), strict=True):
        assert_within_twice_eager(f"d{name}", a, b, c)

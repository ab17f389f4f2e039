"""residual_post_norm on the CPU: its results, what it owes to PyTorch, its errors."""

import pytest
import torch
from torch.autograd import forward_ad

from infimm_kernels.post_norm import op, residual_post_norm
from infimm_kernels.testing import assert_within_twice_eager, max_error
from tests.kernels.cases import eager_position, exact

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Of x, of y, of weight and bias.
DTYPES = (
    *((dtype,) * 3 for dtype in FLOATS),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
)
NAMES = ("dx", "dy", "dweight", "dbias")
POSITIONS = torch.tensor([[0, 1], [-1, -1], [2, 0], [40, 70]])
TOKEN = {"positions": POSITIONS, "granularity": "token", "window_shape": (2, 3), "num_prefix_tokens": 1}
PLACES = ({}, {"positions": POSITIONS, "num_prefix_tokens": 1}, TOKEN)
places = pytest.mark.parametrize("place", PLACES, ids=["no position", "window", "token"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# One warp and several, whole pieces and parts of one, more rows than one program takes.
SIZES = ((1, 16), (9, 1792), (35, 300), (3, 2304), (2, 5000))


def inputs(rows=(4, 7), hidden=8, dtype=(torch.float64,) * 3, device="cpu"):
    """x, y, weight, bias that need a gradient."""
    stream, branch, norm = dtype
    shapes = (((*rows, hidden), stream), ((*rows, hidden), branch), ((hidden,), norm), ((hidden,), norm))
    return tuple(torch.randn(shape).to(device, dtype).requires_grad_() for shape, dtype in shapes)


def eager(x, y, weight, bias, eps=1e-6, positions=None, **place):
    """What a user writes; under a position, its tokens one at a time."""
    norm = torch.nn.functional.layer_norm(y, y.shape[-1:], weight.to(y.dtype), bias.to(y.dtype), eps)
    out = x + norm
    return out if positions is None else eager_position(out, positions, **place)


def check(tensors, backend=None, **options):
    """Result and gradients against the error rule."""
    wide = exact(*tensors)
    out, expected, out64 = (
        residual_post_norm(*tensors, backend=backend, **options),
        eager(*tensors, **options),
        eager(*wide, **options),
    )
    assert_within_twice_eager("out", out, expected, out64)
    dout = torch.randn(out.shape).to(out.device, out.dtype)
    grads = (
        torch.autograd.grad(out, tensors, dout),
        torch.autograd.grad(expected, tensors, dout),
        torch.autograd.grad(out64, wide, dout.double()),
    )
    for name, ours, theirs, right in zip(NAMES, *grads, strict=True):
        assert_within_twice_eager(name, ours, theirs, right)


# --- the CPU path -------------------------------------------------------------------------------------------


@places
def test_equals_eager_in_float64(place):
    tensors = inputs()
    out, expected = residual_post_norm(*tensors, **place), eager(*tensors, **place)
    assert max_error(out, expected) < 1e-13
    dout = torch.randn_like(out)
    grads = (torch.autograd.grad(result, tensors, dout) for result in (out, expected))
    assert max(map(max_error, *grads)) < 1e-12


@pytest.mark.parametrize("rows", [(), (5,), (2, 0), (0,), (3, 1, 2)], ids=str)
@pytest.mark.parametrize("hidden", [1, 7])
def test_shapes(rows, hidden):
    tensors = inputs(rows, hidden)
    out = residual_post_norm(*tensors)
    assert out.shape == (*rows, hidden)
    grads = (torch.autograd.grad(result.sum(), tensors) for result in (out, eager(*tensors)))
    assert max(map(max_error, *grads)) < 1e-12


@every_dtype
@places
def test_twice_eager(place, dtype):
    check(inputs((4, 7), 112, dtype), **place)


@every_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_twice_eager_sizes(size, dtype):
    check(inputs(size[:1], size[1], dtype))


def test_sums_over_many_narrow_rows_are_exact():
    """PyTorch adds up the rows of a bfloat16 gradient in bfloat16: dbias was off by 16 in 2050 rows."""
    dtype = (torch.bfloat16, torch.bfloat16, torch.float32)
    tensors = inputs((2050,), 256, dtype)
    dout = torch.randn(2050, 256).bfloat16()
    _, _, dweight, dbias = torch.autograd.grad(residual_post_norm(*tensors), tensors, dout)
    wide = exact(*tensors)
    _, _, dweight64, dbias64 = torch.autograd.grad(eager(*wide), wide, dout.double())
    assert max_error(dweight, dweight64) < 1e-3
    assert max_error(dbias, dbias64) < 1e-3


def test_the_sum_is_rounded_once():
    """x + the rounded LayerNorm rounds twice, which in bfloat16 changes every tenth element."""
    tensors = inputs((64,), 64, (torch.bfloat16,) * 3)
    right = eager(*exact(*tensors)).bfloat16()
    ours, theirs = ((out != right).float().mean() for out in (residual_post_norm(*tensors), eager(*tensors)))
    assert ours < 0.005 < 0.05 < theirs


def special_rows(dtype, offset):
    """A constant row, one far from zero, one with a NaN, one with an infinity, an ordinary one."""
    x, y, weight, bias = (t.detach() for t in inputs((5,), 64, (dtype,) * 3))
    y[0], y[1] = 3.0, y[1] + offset
    y[2, 5], y[3, 6] = torch.nan, torch.inf
    return x, y, weight, bias


def check_special_rows(dtype, backend):
    offset = 1e4 if dtype == torch.float32 else 100.0
    tensors = special_rows(dtype, offset)
    out, expected = residual_post_norm(*tensors, backend=backend), eager(*tensors)
    assert torch.equal(out.isnan(), expected.isnan())
    assert bool(out[2:4].isnan().all()) and not out[[0, 1, 4]].isnan().any()
    right = eager(*(t.double() for t in tensors))
    rows = [0, 1, 4]
    assert_within_twice_eager("out", out[rows], expected[rows], right[rows])
    assert max_error(out[0], tensors[0][0].double() + tensors[3].double()) < 0.05


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_special_rows(dtype):
    check_special_rows(dtype, None)


def test_gradcheck():
    tensors = inputs((3, 2), 4)
    for options in ({}, {"eps": 0.1, "positions": POSITIONS[:3]}):

        def call(*tensors, options=options):
            return residual_post_norm(*tensors, **options)

        assert torch.autograd.gradcheck(call, tensors)
        assert torch.autograd.gradgradcheck(call, tensors)


def test_third_derivative():
    """PyTorch's own double backward of a LayerNorm takes the statistics for constants."""
    x, y, weight, bias = inputs((2,), 3)

    def call(y):
        out = residual_post_norm(x.detach(), y, weight.detach(), bias.detach())
        (dy,) = torch.autograd.grad(out.sin().sum(), y, create_graph=True)
        return dy

    assert torch.autograd.gradgradcheck(call, y)


def test_layouts():
    tensors = inputs((4, 6), 8)
    x, y, weight, bias = tensors
    expected = residual_post_norm(*tensors)
    spread = torch.stack((weight, weight), 1)[:, 0]
    out = residual_post_norm(
        x.transpose(0, 1).contiguous().transpose(0, 1), y.mT.contiguous().mT, spread, bias
    )
    assert torch.equal(out, expected)
    dout = torch.ones(1, 1, 1, dtype=torch.float64).expand_as(out)
    grads = (torch.autograd.grad(result, tensors, dout) for result in (out, eager(*tensors)))
    assert max(map(max_error, *grads)) < 1e-12


# --- what the op owes to PyTorch ----------------------------------------------------------------------------


@places
def test_compiles_without_graph_breaks(place):
    tensors = inputs()

    def call(*tensors):
        return residual_post_norm(*tensors, **place)

    out, expected = torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors), call(*tensors)
    assert max_error(out, expected) < 1e-14
    dout = torch.randn_like(out)
    grads = (torch.autograd.grad(result, tensors, dout) for result in (out, expected))
    assert max(map(max_error, *grads)) < 1e-13


@places
def test_transforms(place):
    """A custom op has no forward-mode formula, and PyTorch would return a zero tangent without a word."""
    tensors = inputs()
    plain = tuple(t.detach() for t in tensors)
    tangents = tuple(map(torch.randn_like, plain))

    def call(*tensors):
        return residual_post_norm(*tensors, **place)

    def loss(*tensors):
        return call(*tensors).sin().sum()

    every = (0, 1, 2, 3)
    expected = torch.autograd.grad(loss(*tensors), tensors)
    assert max(map(max_error, torch.func.grad(loss, every)(*plain), expected)) < 1e-12
    batched = torch.func.vmap(torch.func.grad(loss, every))(*(torch.stack((t, t)) for t in plain))
    assert max(max_error(b[1], e) for b, e in zip(batched, expected, strict=True)) < 1e-12
    step = 1e-6
    ahead, behind = (call(*(x + s * t for x, t in zip(plain, tangents, strict=True))) for s in (step, -step))
    primal, tangent = torch.func.jvp(call, plain, tangents)
    assert max_error(primal, call(*plain)) < 1e-13
    assert max_error(tangent, (ahead - behind) / (2 * step)) < 1e-7
    with forward_ad.dual_level():
        dual = call(*map(forward_ad.make_dual, plain, tangents))
        assert max_error(forward_ad.unpack_dual(dual).tangent, tangent) < 1e-12


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_changes_nothing(compiled):
    """Its layer_norm runs in float32, and so do all sums here."""
    tensors = inputs(hidden=64, dtype=(torch.float32, torch.bfloat16, torch.float32))
    call = (
        torch.compile(residual_post_norm, fullgraph=True, backend="aot_eager")
        if compiled
        else residual_post_norm
    )
    expected = residual_post_norm(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(*tensors)
        dout = torch.randn_like(out)
        grads = torch.autograd.grad(out, tensors, dout)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
    assert all(map(torch.equal, grads, torch.autograd.grad(expected, tensors, dout)))


def saved_tensors(call):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return kept


def test_the_statistics_have_no_gradient():
    arguments = (*inputs(), 1e-6, None, "window", 1, 1, 0, None)
    needed = [t.requires_grad for t in torch.ops.infimm_kernels.residual_post_norm(*arguments)]
    assert needed == [True, False, False]


def test_the_backward_keeps_y_weight_and_two_numbers_per_row():
    x, y, weight, bias = inputs((4, 7), 8)
    kept = saved_tensors(lambda: residual_post_norm(x, y, weight, bias))
    assert sorted(tuple(t.shape) for t in kept) == [(4, 7), (4, 7), (4, 7, 8), (8,)]
    assert y.data_ptr() in [t.data_ptr() for t in kept]
    assert saved_tensors(lambda: residual_post_norm(x, *(t.detach() for t in (y, weight, bias)))) == []
    with torch.no_grad():
        assert saved_tensors(lambda: residual_post_norm(x, y, weight, bias)) == []


def test_only_the_wanted_gradients(monkeypatch):
    """A frozen norm costs no column sums, a frozen branch no dy, and a lone dx no backward at all."""
    asked = []

    def backward(*arguments):
        asked.append(arguments[-2:])
        return original(*arguments)

    original = op.reference.backward
    monkeypatch.setattr(op.reference, "backward", backward)
    tensors = inputs()
    every = torch.autograd.grad(residual_post_norm(*tensors).sin().sum(), tensors)
    for wanted in ([0], [0, 1], [2], [3], [1, 3]):
        some = [t if i in wanted else t.detach() for i, t in enumerate(tensors)]
        found = torch.autograd.grad(residual_post_norm(*some).sin().sum(), [some[i] for i in wanted])
        assert all(torch.equal(grad, every[i]) for i, grad in zip(wanted, found, strict=True))
    assert asked == [(True, True), (True, False), (False, True), (False, True), (True, True)]


def T(*shape, **kwargs):
    return torch.ones(shape, **kwargs)


P = T(2, 2).int()
BAD = [
    ({"x": None}, "x must be a torch.Tensor, got NoneType"),
    ({"x": T()}, "x must have a last dimension of at least one channel, got []"),
    ({"x": T(2, 0)}, "x must have a last dimension of at least one channel, got [2, 0]"),
    ({"x": T(2, 5, 8).long()}, "x must have dtype float16, bfloat16, float32 or float64, got torch.int64"),
    ({"y": T(2, 5, 4)}, "y must have shape the shape of x = [2, 5, 8], got [2, 5, 4]"),
    (
        {"y": T(2, 5, 8).double()},
        "y must have the dtype of x (torch.float32) or a narrower one, got torch.fl",
    ),
    ({"y": T(2, 5, 8, device="meta")}, "y must be on the device of x (cpu), got meta"),
    ({"weight": T(2, 4)}, "weight must have shape [hidden], got [2, 4]"),
    ({"weight": T(7)}, "weight must have shape [hidden] = [8], got [7]"),
    ({"weight": T(8).double()}, "weight must have the dtype of x (torch.float32), of y (torch.float32) or"),
    ({"bias": None}, "bias must be a torch.Tensor, got NoneType"),
    ({"bias": T(8).bfloat16()}, "bias must have the dtype of weight (torch.float32), got torch.bfloat16"),
    ({"bias": T(1)}, "bias must have shape [hidden] = [8], got [1]"),
    ({"eps": -1e-9}, "eps must be a number from 0 to the largest float32, got -1e-09"),
    ({"eps": float("nan")}, "eps must be a number from 0 to the largest float32, got nan"),
    ({"eps": 1e39}, "eps must be a number from 0 to the largest float32, got 1e+39"),
    ({"eps": True}, "eps must be a number from 0 to the largest float32, got True"),
    ({"positions": T(3, 2).int()}, "positions must have shape [num_windows, 2] = [2, 2], got [3, 2]"),
    ({"positions": T(2, 2)}, "positions must have dtype torch.int32 or torch.int64, got torch.float32"),
    ({"positions": P, "granularity": "patch"}, "granularity must be 'window' or 'token', got 'patch'"),
    ({"positions": P, "granularity": "token"}, "window_shape must be given when the number of patches (5)"),
    ({"x": T(5, 8), "y": T(5, 8), "positions": P}, "x must have shape [num_windows, seqlen, hidden] with p"),
    ({"backend": "cudnn"}, "backend must be None or one of reference, triton, cuda, got 'cudnn'"),
    ({"backend": "cuda"}, "backend must name a backend that can run residual_post_norm, got 'cuda'"),
]


def legal_call(**change):
    arguments = {"x": T(2, 5, 8), "y": T(2, 5, 8), "weight": T(8), "bias": T(8)} | change
    return residual_post_norm(**arguments)


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_message(change, message):
    assert legal_call().isfinite().all()
    with pytest.raises(ValueError) as raised:
        legal_call(**change)
    assert str(raised.value).startswith(message)

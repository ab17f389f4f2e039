import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from infimm_kernels.gated_feed_forward import gated_feed_forward
from infimm_kernels.testing import assert_within_twice_eager, max_error
from tests.kernels.cases import MIXED_DTYPES, exact

NAMES = ("x", "norm_weight", "norm_bias", "weight_in", "weight_out", "gate")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def inputs_of(rows=(2, 5), hidden=12, ffn=20, dtype=torch.float64, device="cpu"):
    """`dtype` of all, or those of (x and the norm, the projections, gate)."""
    stream, branch, gate = dtype if isinstance(dtype, tuple) else (dtype,) * 3
    shapes = (
        ((*rows, hidden), stream),
        ((hidden,), stream),
        ((hidden,), stream),
        ((ffn, hidden), branch),
        ((hidden, ffn), branch),
        ((hidden,), gate),
    )
    return tuple(
        torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_() for shape, dtype in shapes
    )


def eager(x, norm_weight, norm_bias, weight_in, weight_out, gate, row_mask=None, eps=1e-5):
    """Written out, but for erf: no function of torch.nn."""
    centred = x - x.mean(-1, keepdim=True)
    norm = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * norm_weight + norm_bias
    h = norm.to(weight_in.dtype) @ weight_in.t()
    update = gate.tanh() * ((h * 0.5 * (1 + (h / math.sqrt(2)).erf())) @ weight_out.t())
    return x + (update if row_mask is None else update * row_mask.unsqueeze(-1))


def eager_of_torch(x, norm_weight, norm_bias, weight_in, weight_out, gate, row_mask):
    norm = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias).to(weight_in.dtype)
    update = gate.tanh() * F.linear(F.gelu(F.linear(norm, weight_in)), weight_out)
    return x + update * row_mask.unsqueeze(-1)


def check_gradients(y, expected, inputs, bound):
    dy = torch.randn_like(y)
    ours, theirs = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)
    assert max(map(max_error, ours, theirs)) < bound


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [(2, 5), (7,), (), (2, 0), (3, 1, 2)], ids=str)
def test_equals_eager_in_float64(rows, masked):
    inputs = inputs_of(rows)
    mask = torch.rand(rows) > 0.4 if masked else None
    y, expected = gated_feed_forward(*inputs, row_mask=mask), eager(*inputs, mask)
    assert y.shape == inputs[0].shape
    assert max_error(y, expected) < 1e-12
    check_gradients(y, expected, inputs, 1e-12)


def test_eps_reaches_the_norm():
    inputs = inputs_of()
    for eps in (1e-6, 1):
        assert max_error(gated_feed_forward(*inputs, eps=eps), eager(*inputs, eps=eps)) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", (*FLOATS, *MIXED_DTYPES), ids=str)
def test_twice_eager(dtype, backend, interpreter):
    inputs, mask = inputs_of((66,), 80, 48, dtype), torch.rand(66) > 0.3
    inputs64 = exact(*inputs)
    results = gated_feed_forward(*inputs, row_mask=mask, backend=backend), eager_of_torch(*inputs, mask)
    y64 = eager(*inputs64, mask)
    assert_within_twice_eager("y", *results, y64)
    dy = torch.randn_like(results[0])
    ours, theirs = (torch.autograd.grad(y, inputs, dy) for y in results)
    expected = torch.autograd.grad(y64, inputs64, dy.double())
    for name, a, b, c in zip(NAMES, ours, theirs, expected, strict=True):
        assert_within_twice_eager(f"d{name}", a, b, c)


@pytest.mark.parametrize("dtype", (*FLOATS, *MIXED_DTYPES), ids=str)
def test_zero_gates_and_masked_rows_return_x_bit_for_bit(dtype):
    x, *rest, gate = (t.detach() for t in inputs_of((3, 4), dtype=dtype))
    x[0], gate[:5] = -0.0, 0.0
    mask = torch.tensor([[True, False, True, False]] * 3)
    y = gated_feed_forward(x, *rest, gate, row_mask=mask)
    same = (y == x) & (y.signbit() == x.signbit())
    assert same[~mask].all()
    assert same[..., :5].all()
    assert not same[mask][:, 5:].all()


@pytest.mark.parametrize("rows", [1, 65])
def test_parts_of_the_norm_in_other_dtypes(rows):
    """Without autocast a norm in float32 beside a bfloat16 branch is legal, and so is one in its dtype."""
    x, norm_weight, norm_bias, *rest = (t.detach() for t in inputs_of((rows,), dtype=MIXED_DTYPES[0]))
    wide = gated_feed_forward(x, norm_weight, norm_bias, *rest)
    narrow = gated_feed_forward(x, norm_weight.bfloat16(), norm_bias.bfloat16(), *rest)
    assert wide.dtype == narrow.dtype == torch.float32
    rounded = (t.bfloat16().float() for t in (norm_weight, norm_bias))
    assert torch.equal(narrow, gated_feed_forward(x, *rounded, *rest))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_keeps_the_residual_stream(compiled):
    inputs = inputs_of(dtype=torch.float32)
    call = gated_feed_forward
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(*inputs)
    assert y.dtype == torch.float32
    leaves = [t.detach().requires_grad_() for t in inputs]
    low = [t.bfloat16() if i in (3, 4) else t for i, t in enumerate(leaves)]
    expected = gated_feed_forward(*low)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    ours, theirs = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, leaves, dy)
    assert all(map(torch.equal, ours, theirs))


def test_autocast_with_a_bfloat16_stream():
    """Parameters in float32, as a trainer keeps them, beside activations in bfloat16."""
    x, *rest = (t.detach() for t in inputs_of(dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = gated_feed_forward(x.bfloat16(), *rest)
    assert y.dtype == torch.bfloat16
    expected = eager(*(t.double() for t in (x.bfloat16(), *rest)))
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("norm", [1, 2], ids=NAMES.__getitem__)
def test_the_norm_has_the_widest_dtype_of_its_parts(norm):
    inputs = [t.detach() for t in inputs_of((70,), dtype=torch.float32)]
    mixed = [t.bfloat16() if i in (0, 3 - norm) else t for i, t in enumerate(inputs)]
    wide = [t.float() if i in (1, 2) else t for i, t in enumerate(mixed)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gated_feed_forward(*mixed), gated_feed_forward(*wide))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_what_is_in_masked_rows_reaches_no_gradient(value, backend, interpreter):
    inputs = inputs_of((6,), dtype=torch.float32)
    mask = torch.arange(6) % 2 == 0
    with torch.no_grad():
        inputs[0][~mask] = value
    y = gated_feed_forward(*inputs, row_mask=mask, backend=backend)
    assert torch.equal(y[~mask].nan_to_num(7.0), inputs[0][~mask].nan_to_num(7.0))
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, inputs, dy)
    assert torch.equal(found[0][~mask], dy[~mask])
    kept = gated_feed_forward(inputs[0][mask], *inputs[1:], backend=backend)
    expected = torch.autograd.grad(kept, inputs, dy[mask])
    for ours, theirs, rows in zip(found, expected, (mask, *[...] * 5), strict=True):
        torch.testing.assert_close(ours[rows], theirs[rows])


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked):
    inputs = inputs_of((2, 2), 3, 4)
    mask = torch.tensor([[True, False], [True, True]]) if masked else None

    def call(*inputs):
        return gated_feed_forward(*inputs, row_mask=mask)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_transforms():
    inputs = tuple(t.detach() for t in inputs_of())
    tangents = tuple(torch.randn_like(t) for t in inputs)
    _, expected = torch.func.jvp(eager, inputs, tangents)
    _, tangent = torch.func.jvp(gated_feed_forward, inputs, tangents)
    assert max_error(tangent, expected) < 1e-11
    every = tuple(range(6))
    gradients = [
        torch.func.grad(lambda *t, f=f: f(*t).sin().sum(), every)(*inputs)
        for f in (gated_feed_forward, eager)
    ]
    assert max(map(max_error, *gradients)) < 1e-11


def test_compiles_with_any_number_of_rows():
    """The mask hides rows but removes none, so one symbolic graph serves every mask and every batch."""
    compilations = []

    def counting(graph, inputs):
        compilations.append(1)
        return graph.forward

    compiled = torch.compile(gated_feed_forward, fullgraph=True, backend=counting)
    rest = [t.detach() for t in inputs_of()[1:]]
    for rows in (7, 3, 2, 9):
        x, mask = torch.randn(rows, 12, dtype=torch.float64), torch.rand(rows) > 0.5
        for t in (x, mask):
            torch._dynamo.mark_dynamic(t, 0)
        assert max_error(compiled(x, *rest, row_mask=mask), eager(x, *rest, mask)) < 1e-12
    assert len(compilations) == 1


def test_frozen_parts():
    """Every subset of inputs that need a gradient gets the gradients that all of them get."""
    leaves = inputs_of()
    dy = torch.randn_like(leaves[0])
    every = torch.autograd.grad(gated_feed_forward(*leaves), leaves, dy)
    for wanted in itertools.product((False, True), repeat=6):
        if any(wanted):
            inputs = [t if keep else t.detach() for t, keep in zip(leaves, wanted, strict=True)]
            found = torch.autograd.grad(
                gated_feed_forward(*inputs), list(itertools.compress(leaves, wanted)), dy
            )
            assert max(map(max_error, found, itertools.compress(every, wanted))) < 1e-12


T, HALF = torch.randn, torch.float16
WRONG = [
    ({"x": None}, "x must be a torch.Tensor, got NoneType"),
    ({"x": torch.tensor(1.0)}, "x must have at least one dimension, got []"),
    ({"x": T(2, 12).long()}, "x must have dtype float16, bfloat16, float32 or float64, got torch.int64"),
    ({"x": T(2, 11)}, "weight_in must have shape [ffn, hidden] = [20, 11], got [20, 12]"),
    ({"x": T(2, 0)}, "x must have at least one channel, got [2, 0]"),
    ({"x": T(2, 12).half()}, "weight_in must have the dtype of x (torch.float16) or a narrower one"),
    ({"norm_weight": T(12).half()}, "norm_weight must have the dtype of x (torch.float32) or of weight_in"),
    ({"norm_weight": T(11)}, "norm_weight must have shape [hidden] = [12], got [11]"),
    ({"norm_weight": T(1, 12)}, "norm_weight must have shape [hidden], got [1, 12]"),
    ({"norm_weight": None}, "norm_weight must be a torch.Tensor, got NoneType"),
    ({"norm_bias": T(12).half()}, "norm_bias must have the dtype of x (torch.float32) or of weight_in"),
    ({"norm_bias": T(12, device="meta")}, "norm_bias must be on the device of x (cpu), got meta"),
    ({"norm_bias": T(13)}, "norm_bias must have shape [hidden] = [12], got [13]"),
    ({"weight_in": T(20)}, "weight_in must have shape [ffn, hidden], got [20]"),
    ({"weight_in": T(0, 12)}, "weight_in must have at least one row and one column, got [0, 12]"),
    ({"weight_in": T(20, 12).double()}, "weight_in must have the dtype of x (torch.float32) or a narrower"),
    ({"weight_in": T(20, 12).half()}, "weight_out must have the dtype of weight_in (torch.float16), got"),
    ({"weight_in": T(21, 12)}, "weight_out must have shape [hidden, ffn] = [12, 21], got [12, 20]"),
    ({"weight_out": T(20, 12)}, "weight_out must have shape [hidden, ffn] = [12, 20], got [20, 12]"),
    ({"weight_out": [1.0]}, "weight_out must be a torch.Tensor, got list"),
    ({"gate": T(12, dtype=HALF)}, "gate must have the dtype of x (torch.float32) or of weight_out"),
    ({"gate": T(5)}, "gate must have shape [hidden] = [12], got [5]"),
    ({"row_mask": torch.ones(2)}, "row_mask must have dtype torch.bool, got torch.float32"),
    ({"row_mask": torch.ones(3, dtype=torch.bool)}, "row_mask must have shape the leading shape of x = [2]"),
    ({"eps": torch.tensor(1e-5)}, "eps must be a positive number, got "),
    ({"eps": 0.0}, "eps must be a positive number, got 0.0"),
    ({"eps": -1e-5}, "eps must be a positive number, got -1e-05"),
    ({"eps": math.nan}, "eps must be a positive number, got nan"),
    ({"eps": math.inf}, "eps must be a positive number, got inf"),
    ({"eps": 10**400}, "eps must be a positive number, got 1000"),
    ({"eps": "1e-5"}, "eps must be a positive number, got 1e-5"),
    ({"eps": None}, "eps must be a positive number, got None"),
    ({"eps": True}, "eps must be a positive number, got True"),
    ({"backend": "eager"}, "backend must be None or one of"),
    ({"backend": "cuda"}, "backend must name a backend that can run gated_residual_projection"),
]


@pytest.mark.parametrize(
    ("change", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else ""
)
def test_wrong_arguments_are_named(change, message):
    legal = dict(zip(NAMES, (t.detach() for t in inputs_of((2,), dtype=torch.float32)), strict=True))
    with pytest.raises(ValueError) as raised:
        gated_feed_forward(**(legal | change))
    assert str(raised.value).startswith(message)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (*FLOATS, *MIXED_DTYPES), ids=str)
@pytest.mark.parametrize("size", [(1, 512, 768), (70, 512, 2048)], ids=str)
def test_twice_eager_on_a_gpu(size, dtype):
    rows, hidden, ffn = size
    inputs = inputs_of((rows,), hidden, ffn, dtype, "cuda")
    with torch.no_grad():
        for weight in inputs[3:5]:
            weight *= 0.05
    mask = torch.rand(rows, device="cuda") > 0.3
    y, expected = gated_feed_forward(*inputs, row_mask=mask), eager_of_torch(*inputs, mask)
    assert_within_twice_eager("y", y, expected, eager(*exact(*inputs), mask))

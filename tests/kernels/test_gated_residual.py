import pytest
import torch

from infimm_kernels import gated_residual_projection
from infimm_kernels.testing import assert_within_twice_eager, max_error
from tests.kernels.cases import MIXED_DTYPES, eager_gated, exact, gated_inputs

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (torch.float64, *FLOATS, *MIXED_DTYPES, (torch.float64, torch.float32, torch.float64))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [(2, 5), (7,), (), (2, 0), (3, 1, 2)], ids=str)
def test_equals_eager_in_float64(rows, masked):
    inputs = gated_inputs(rows)
    mask = torch.rand(rows) > 0.4 if masked else None
    y, expected = gated_residual_projection(*inputs, row_mask=mask), eager_gated(*inputs, mask)
    assert y.shape == inputs[0].shape
    assert max_error(y, expected) < 1e-12
    dy = torch.randn_like(y)
    ours, theirs = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)
    assert max(map(max_error, ours, theirs)) < 1e-12


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked):
    inputs = gated_inputs((2, 3), 4, 3)
    mask = torch.tensor([[True, False, True], [False, True, True]]) if masked else None

    def call(*inputs):
        return gated_residual_projection(*inputs, row_mask=mask)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("size", [(1, 16, 16), (65, 80, 48), (257, 72, 112)], ids=str)
def test_twice_eager(size, dtype):
    rows, hidden, inner = size
    inputs = gated_inputs((rows,), hidden, inner, dtype)
    mask = torch.rand(rows) > 0.3
    inputs64 = exact(*inputs)
    y, eager, y64 = gated_residual_projection(*inputs, row_mask=mask), eager_gated(*inputs, mask), None
    y64 = eager_gated(*inputs64, mask)
    assert_within_twice_eager("y", y, eager, y64)
    dy = torch.randn_like(y)
    ours, theirs = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(eager, inputs, dy)
    for name, a, b, c in zip(
        ("dx", "do", "dweight", "dgate"),
        ours,
        theirs,
        torch.autograd.grad(y64, inputs64, dy.double()),
        strict=True,
    ):
        assert_within_twice_eager(name, a, b, c)


@every_dtype
def test_a_zero_gate_returns_x_bit_for_bit(dtype):
    """x + 0.0 is not enough: it turns the -0.0 of x into 0.0."""
    x, o, weight, gate = (t.detach() for t in gated_inputs((3, 5), dtype=dtype))
    x[0], gate[:6] = -0.0, 0.0
    y = gated_residual_projection(x, o, weight, gate)
    assert torch.equal(bits(y[..., :6]), bits(x[..., :6]))
    assert not torch.equal(y[..., 6:], x[..., 6:])


@every_dtype
def test_masked_rows_return_x_bit_for_bit(dtype):
    """Whatever is in the masked rows of o: NaN too, which must not reach a gradient either."""
    inputs = gated_inputs((3, 5), dtype=dtype)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1] = True
    with torch.no_grad():
        inputs[0][0] = -0.0
        inputs[1][~mask] = torch.nan
    y = gated_residual_projection(*inputs, row_mask=mask)
    assert torch.equal(bits(y[~mask]), bits(inputs[0][~mask]))
    _, do, dweight, dgate = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert torch.equal(do[~mask], torch.zeros_like(do[~mask]))
    assert not dweight.isnan().any()
    assert not dgate.isnan().any()


@pytest.mark.parametrize("stream", [torch.float16, torch.float32], ids=str)
def test_float16_products_do_not_overflow(stream):
    """o @ weight^T leaves the range of float16 here, and the gate brings it back."""
    inputs = gated_inputs((3,), 4, 16, (stream, torch.float16, stream))
    with torch.no_grad():
        for tensor, value in zip(inputs, (1.0, 100.0, 100.0, 0.01), strict=True):
            tensor.fill_(value)
    y, inputs64 = gated_residual_projection(*inputs), exact(*inputs)
    y64 = eager_gated(*inputs64)
    torch.testing.assert_close(y, y64.to(stream))
    dy = torch.full_like(y, 0.01)
    ours, expected = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(y64, inputs64, dy.double())
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype))


def test_an_enabled_autocast_does_not_reach_the_products():
    """In float16, the autocast's dtype, the product in the forward would be inf before the gate."""
    x, o, weight, gate = (t.detach() for t in gated_inputs((3,), 4, 16, torch.float32))
    o.fill_(100.0), weight.fill_(100.0), gate.fill_(0.01)
    with torch.autocast("cpu", dtype=torch.float16):
        y = gated_residual_projection(x, o, weight, gate)
    torch.testing.assert_close(y, x + gate.tanh() * 160_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_enabled_autocast_changes_nothing_inside_the_backward(dtype):
    dy, *rest = (t.detach() for t in gated_inputs((30,), dtype=dtype))
    backward = torch.ops.infimm_kernels.gated_residual_projection_backward
    expected = backward(dy, *rest, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = backward(dy, *rest, None)
    assert all(map(torch.equal, found, expected))


def test_nan_in_masked_rows_reaches_no_gradient_of_a_transform():
    inputs = [t.detach() for t in gated_inputs((6,))]
    mask = torch.arange(6) % 2 == 0
    inputs[1][~mask] = torch.nan

    def loss(*inputs):
        return gated_residual_projection(*inputs, row_mask=mask).sin().sum()

    found = torch.func.grad(loss, (0, 1, 2, 3))(*inputs)
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert all(t.isfinite().all() for t in expected)
    assert max(map(max_error, found, expected)) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(5, 0)}, "x must have at least one channel, got [5, 0]"),
        ({"o": torch.randn(5, 0)}, "o must have at least one channel, got [5, 0]"),
        ({"weight": torch.randn(0, 8)}, "weight must have at least one row and one column, got [0, 8]"),
        ({"weight": torch.randn(12, 0)}, "weight must have at least one row and one column, got [12, 0]"),
    ],
    ids=["x", "o", "no rows", "no columns"],
)
def test_an_empty_argument_is_named(change, message):
    inputs = (t.detach() for t in gated_inputs((5,), dtype=torch.float32))
    legal = dict(zip(("x", "o", "weight", "gate"), inputs, strict=True))
    with pytest.raises(ValueError) as raised:
        gated_residual_projection(**(legal | change))
    assert str(raised.value) == message


def bits(x):
    return x.detach().contiguous().view(torch.uint8)


def test_nan_passes_a_zero_gate_as_in_eager():
    x, o, weight, _ = gated_inputs((4,))
    with torch.no_grad():
        o[1] = torch.nan
    gate = torch.zeros_like(weight[:, 0])
    y = gated_residual_projection(x, o, weight, gate)
    assert torch.equal(y.isnan(), eager_gated(x, o, weight, gate).isnan())


def test_a_zero_gate_still_learns():
    """Training starts there: the gate's gradient is the whole signal, in every way of differentiating."""
    x, o, weight, _ = gated_inputs((4,))
    gate = torch.zeros(12, dtype=torch.float64, requires_grad=True)

    def loss(gate):
        return gated_residual_projection(x.detach(), o.detach(), weight.detach(), gate).sin().sum()

    (expected,) = torch.autograd.grad(loss(gate), gate)
    assert expected.abs().min() > 0
    assert max_error(torch.func.grad(loss)(gate.detach()), expected) < 1e-12
    _, tangent = torch.func.jvp(loss, (gate.detach(),), (torch.ones(12, dtype=torch.float64),))
    assert max_error(tangent, expected.sum()) < 1e-12


def test_layouts_and_expanded_gradient():
    x, o, weight, gate = gated_inputs((4, 6))
    expected = gated_residual_projection(x, o, weight, gate)
    y = gated_residual_projection(
        x.transpose(0, 1).contiguous().transpose(0, 1),
        o.mT.contiguous().mT,
        weight.t().contiguous().t(),
        gate,
    )
    assert max_error(y, expected) < 1e-14
    dy = torch.ones(1, 1, 1, dtype=torch.float64).expand_as(y)
    ours = torch.autograd.grad(y, (x, o, weight, gate), dy)
    theirs = torch.autograd.grad(eager_gated(x, o, weight, gate), (x, o, weight, gate), dy)
    assert max(map(max_error, ours, theirs)) < 1e-12


def test_frozen_projection_costs_no_backward(monkeypatch):
    """With o, weight and gate frozen, dx = dy needs no kernel."""
    from infimm_kernels.gated_residual import op

    monkeypatch.setattr(op.reference, "backward", None)
    x, o, weight, gate = gated_inputs((4,))
    y = gated_residual_projection(x, o.detach(), weight.detach(), gate.detach())
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.ones_like(x))

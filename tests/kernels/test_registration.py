"""What a registered op owes to PyTorch: compile, transforms, autocast, tracing tensors, copies."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from infimm_kernels import add_position_2d, gated_residual_projection, varlen_attention, window_attention
from infimm_kernels.testing import max_error, packed_lengths
from tests.kernels.cases import attention_inputs, gated_inputs
from tests.kernels.public_calls import POSITIONS, cross, gated, packed_window, position, varlen, window

PUBLIC = (varlen, window, packed_window, position, gated, cross)
every_op = pytest.mark.parametrize("make", PUBLIC, ids=lambda make: make.__name__)


@every_op
def test_compiles_without_graph_breaks(make):
    case = make()
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(*case.inputs), case.call(*case.inputs)
    assert max_error(ours, expected) < 1e-14
    dout = torch.randn_like(expected)
    ours = torch.autograd.grad(ours, case.inputs, dout)
    theirs = torch.autograd.grad(expected, case.inputs, dout)
    assert max(map(max_error, ours, theirs)) < 1e-13


def test_a_new_number_of_windows_compiles_once():
    """A dynamic number of windows is one symbolic graph, not a compilation per batch."""
    compilations = []

    def counting(graph, inputs):
        compilations.append(1)
        return graph.forward

    def encode(qkv, positions):
        out = window_attention(qkv, num_prefix_tokens=1).flatten(2)
        return add_position_2d(out, positions, granularity="token", num_prefix_tokens=1)

    compiled = torch.compile(encode, fullgraph=True, backend=counting)
    for num_windows in (7, 3, 2, 9):
        qkv = torch.randn(num_windows, 5, 3, 2, 8)
        positions = torch.zeros(num_windows, 2, dtype=torch.int64)
        for x in (qkv, positions):
            torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(qkv, positions), encode(qkv, positions))
    assert len(compilations) == 1


@every_op
def test_forward_mode_is_not_silently_zero(make):
    """A custom op has no forward-mode formula, and PyTorch would return a zero tangent without a word."""
    case = make()
    inputs = tuple(x.detach() for x in case.inputs)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    step = 1e-6
    ahead, behind = (
        case.call(*(x + s * t for x, t in zip(inputs, tangents, strict=True))) for s in (step, -step)
    )
    expected = (ahead - behind) / (2 * step)
    primal, tangent = torch.func.jvp(case.call, inputs, tangents)
    assert max_error(primal, case.call(*inputs)) < 1e-12
    assert max_error(tangent, expected) < 1e-7
    with forward_ad.dual_level():
        dual = case.call(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)))
        assert max_error(forward_ad.unpack_dual(dual).tangent, expected) < 1e-7


@pytest.mark.sample(3)
@every_op
def test_compiled_forward_mode_is_not_silently_zero(make):
    case = make()
    inputs = tuple(x.detach() for x in case.inputs)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    _, expected = torch.func.jvp(case.call, inputs, tangents)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*inputs):
        return torch.func.jvp(case.call, inputs, tangents)[1]

    assert max_error(compiled(*inputs), expected) < 1e-12


@every_op
def test_functional_gradients(make):
    case = make()

    def loss(*inputs):
        return case.call(*inputs).sin().sum()

    expected = torch.autograd.grad(loss(*case.inputs), case.inputs)
    inputs = tuple(x.detach() for x in case.inputs)
    every = tuple(range(len(inputs)))
    assert max(map(max_error, torch.func.grad(loss, every)(*inputs), expected)) < 1e-12
    batched = torch.func.vmap(torch.func.grad(loss, every))(*(torch.stack((x, x)) for x in inputs))
    assert max(max_error(b[1], e) for b, e in zip(batched, expected, strict=True)) < 1e-12


def assert_float32_gradients_equal(out, inputs, expected, low):
    """The gradients of `inputs` are those of their rounded copies `low`, in float32."""
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, low, dout)
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize("make", [varlen, window], ids=lambda make: make.__name__)
def test_autocast(make):
    case = make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.call(*case.inputs)
    low = tuple(x.detach().bfloat16().requires_grad_() for x in case.inputs)
    expected = case.call(*low)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert_float32_gradients_equal(out, case.inputs, expected, low)


residual_ops = pytest.mark.parametrize("make", [gated, cross], ids=lambda make: make.__name__)


@residual_ops
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_keeps_the_residual_stream(make, compiled):
    """x and the gate were once cast too, and training in autocast then lost the float32 stream."""
    case = make(torch.float32)
    call = torch.compile(case.call, fullgraph=True, backend="aot_eager") if compiled else case.call
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(*case.inputs)
    x, *branch, gate = (t.detach() for t in case.inputs)
    low = tuple(t.requires_grad_() for t in (x, *(t.bfloat16() for t in branch), gate))
    expected = case.call(*low)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
    assert_float32_gradients_equal(out, case.inputs, expected, low)


@residual_ops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_a_zero_gate_returns_x_bit_for_bit(make, dtype):
    case = make(torch.float32)
    x, *branch, gate = (t.detach() for t in case.inputs)
    x[:, 0] = -0.0
    with torch.autocast("cpu", dtype=dtype):
        y = case.call(x, *branch, torch.zeros_like(gate))
    assert y.dtype == torch.float32
    assert torch.equal(y.view(torch.int32), x.view(torch.int32))


def test_transforms_under_autocast_keep_the_residual_stream():
    case = gated(torch.float32)
    inputs = tuple(x.detach() for x in case.inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = case.call(*inputs)
        primal, tangent = torch.func.jvp(case.call, inputs, (torch.ones_like(inputs[0]), *inputs[1:]))
    assert primal.dtype == tangent.dtype == torch.float32
    assert torch.equal(primal, expected)


@every_op
def test_autocast_leaves_float64_and_the_reference_alone(make):
    case = make()
    expected = case.call(*case.inputs)
    dout = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, case.inputs, dout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.call(*case.inputs)
        assert torch.equal(out, expected)
        assert all(map(torch.equal, torch.autograd.grad(out, case.inputs, dout), grads))


def test_autocast_mixes_dtypes_as_eager_does():
    """Inside autocast bfloat16 activations meet float32 parameters; that is legal."""
    x, o, weight, gate = gated_inputs((4,), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for stream in (x, x.bfloat16()):
            y = gated_residual_projection(stream, o.bfloat16(), weight, gate)
            assert y.dtype == stream.dtype
            assert torch.equal(gated_residual_projection(stream, o, weight, gate), y)


def test_position_ignores_autocast():
    x = torch.randn(3, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(add_position_2d(x, POSITIONS), add_position_2d(x, POSITIONS))
        assert add_position_2d(x, POSITIONS).dtype == torch.float32


@pytest.mark.parametrize("make", [window, gated], ids=lambda make: make.__name__)
def test_meta_and_fake_tensors(make):
    case = make()
    expected = case.call(*case.inputs)

    def call(inputs):
        if make is window:
            return window_attention(*inputs)
        return gated_residual_projection(*inputs)

    meta = call([x.detach().to("meta") for x in case.inputs])
    assert (meta.shape, meta.dtype, meta.stride()) == (expected.shape, expected.dtype, expected.stride())
    plain = [x.detach() for x in case.inputs]
    with FakeTensorMode() as mode:
        fake = call([mode.from_tensor(x) for x in plain])
    assert (fake.shape, fake.dtype, fake.stride()) == (expected.shape, expected.dtype, expected.stride())


@every_op
def test_inference_mode_and_no_grad(make):
    case = make()
    expected = case.call(*case.inputs)
    with torch.inference_mode():
        assert torch.equal(case.call(*case.inputs), expected)
    with torch.no_grad():
        out = case.call(*case.inputs)
    assert torch.equal(out, expected)
    assert not out.requires_grad


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Linear(16, 48)

    def forward(self, x):
        qkv = self.projection(x).unflatten(-1, (3, 2, 8))
        return window_attention(qkv).flatten(2)


def test_deepcopy_and_checkpointing():
    layer, x = Layer(), torch.randn(2, 5, 16)
    layer(x).sum().backward()
    twin = copy.deepcopy(layer)
    twin.zero_grad()
    torch.utils.checkpoint.checkpoint(twin, x, use_reentrant=False).sum().backward()
    for ours, theirs in zip(twin.parameters(), layer.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_only_the_wanted_gradients():
    q, k, v, cu_q, cu_k = attention_inputs((3, 2), (2, 4))
    out = varlen_attention(q.detach(), k, v.detach(), cu_q, cu_k)
    (dk,) = torch.autograd.grad(out.sum(), k, create_graph=True)
    out = varlen_attention(q, k, v, cu_q, cu_k)
    assert max_error(dk, torch.autograd.grad(out.sum(), k)[0]) < 1e-12


def test_a_transform_leaves_nothing_behind():
    """Index tensors made inside a transform and kept would be dead wrappers in the next ordinary call."""
    q, k, v, cu_q, cu_k = attention_inputs((3, 9, 4, 0, 10), (5, 6, 5, 7, 6))

    def loss(q):
        return varlen_attention(q, k.detach(), v.detach(), cu_q, cu_k).sin().sum()

    transformed = torch.func.grad(loss)(q.detach())
    assert max_error(transformed, torch.autograd.grad(loss(q), q)[0]) < 1e-12
    with pytest.raises(ValueError, match="cu_seqlens_q must end at the number of tokens"):
        torch.func.grad(lambda q: varlen_attention(q, k, v, cu_q, cu_k).sum())(q.detach()[:-1])


def test_gradients_that_keep_their_graph_of_one_tensor_in_several_places():
    """Each of q, k and v was once given the gradient of all three, where all were the same tensor."""
    x, cu_seqlens = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True), packed_lengths((3, 2))
    out = varlen_attention(x, x, x, cu_seqlens, cu_seqlens)
    plain, graphed = (
        torch.autograd.grad(out.sin().sum(), x, retain_graph=True, create_graph=create)[0]
        for create in (False, True)
    )
    assert max_error(graphed, plain) < 1e-13


def test_gradient_that_keeps_its_graph_of_a_result_without_one():
    """lse does not depend on v: asking for its gradient with a graph once raised."""
    q, k, v, cu_q, cu_k = attention_inputs((3, 2), (4, 5))
    _, lse = varlen_attention(q.detach(), k.detach(), v, cu_q, cu_k, return_lse=True)
    grads = torch.autograd.grad(lse.sum(), v, create_graph=True, allow_unused=True)
    assert grads[0] is None or not grads[0].any()

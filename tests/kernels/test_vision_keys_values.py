"""vision_keys_values against eager PyTorch in float64, what it owes to PyTorch, and its errors."""

import contextlib
import importlib
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad

from infimm_kernels.testing import assert_within_twice_eager, max_error
from infimm_kernels.vision_keys_values import vision_keys_values
from tests.kernels.cases import eager_position, exact

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
floats = pytest.mark.parametrize("dtype", FLOATS, ids=str)
POSITIONS = torch.tensor([[0, 0], [3, 1], [-1, -1], [40, 70], [2, -4]])
# Of windows of 37 tokens.
PLACES = {
    "none": {},
    "window": {"positions": POSITIONS, "num_prefix_tokens": 1},
    "token": {"positions": POSITIONS.int(), "granularity": "token", "num_prefix_tokens": 1},
    "wide": {
        "positions": POSITIONS,
        "granularity": "token",
        "window_shape": (5, 7),
        "num_prefix_tokens": 2,
    },
    "column": {"positions": POSITIONS, "granularity": "token", "window_shape": (37, 1)},
}
places = pytest.mark.parametrize("place", list(PLACES))


def make_inputs(
    num_windows=5, seqlen=37, hidden=24, inner=12, num_layers=2, dtype=torch.float64, device="cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """features and weight that need a gradient."""
    features = torch.randn(num_windows, seqlen, hidden, dtype=torch.float64)
    weight = torch.randn(num_layers, 2, inner, hidden, dtype=torch.float64) * hidden**-0.5
    return tuple(x.to(device, dtype).requires_grad_() for x in (features, weight))


def eager(features, weight, positions=None, **options):
    """[num_layers, 2, total, inner]: one linear per key and value, after the position."""
    y = features
    if positions is not None:  # on zeros, for autograd would follow every token
        y = features + eager_position(torch.zeros_like(features, requires_grad=False), positions, **options)
    y = y.flatten(0, 1)
    return torch.stack([torch.stack([torch.nn.functional.linear(y, w) for w in pair]) for pair in weight])


def stacked(pairs):
    """The result of vision_keys_values in the form of `eager`."""
    return torch.stack([torch.stack(pair) for pair in pairs]).flatten(-2)


def check(inputs, place, num_heads=2, backend=None):
    """Result and gradients against the error rule."""
    dtype, wide = inputs[0].dtype, exact(*inputs)
    kv = stacked(vision_keys_values(*inputs, num_heads=num_heads, **place, backend=backend))
    kv_eager, kv64 = eager(*inputs, **place), eager(*wide, **place)
    assert_within_twice_eager("kv", kv, kv_eager, kv64)
    dkv = torch.randn(kv.shape, device=kv.device).to(dtype)
    ours, theirs = torch.autograd.grad(kv, inputs, dkv), torch.autograd.grad(kv_eager, inputs, dkv)
    expected = torch.autograd.grad(kv64, wide, dkv.double())
    for name, *three in zip(("dfeatures", "dweight"), ours, theirs, expected, strict=True):
        assert_within_twice_eager(name, *three)


@contextlib.contextmanager
def tiles_of(capability: tuple[int, int]):
    """The Triton kernels with the tiles of a GPU of this compute capability."""
    with contextlib.ExitStack() as stack:
        for name in ("triton_forward", "triton_backward"):
            module = importlib.import_module(f"infimm_kernels.vision_keys_values.{name}")
            stack.enter_context(mock.patch.object(module, "capability_of", lambda x: capability))
        yield


@places
@pytest.mark.parametrize("num_layers", [1, 3])
def test_equals_eager_in_float64(num_layers, place):
    inputs = make_inputs(num_layers=num_layers)
    kv = stacked(vision_keys_values(*inputs, num_heads=3, **PLACES[place]))
    expected = eager(*inputs, **PLACES[place])
    assert max_error(kv, expected) < 1e-12
    dkv = torch.randn_like(kv)
    ours, theirs = torch.autograd.grad(kv, inputs, dkv), torch.autograd.grad(expected, inputs, dkv)
    assert max(map(max_error, ours, theirs)) < 1e-11


@places
@floats
def test_twice_eager(dtype, place):
    check(make_inputs(hidden=112, inner=48, dtype=dtype), PLACES[place])


@floats
def test_the_gradients_of_many_layers_are_rounded_once(dtype):
    """One rounded addition per layer would cost an error that grows with their number."""
    features, weight = make_inputs(1, 64, 32, 32, num_layers=40, dtype=dtype)
    dkv = torch.randn(80, 64, 32).to(dtype)
    parts = [x for pair in vision_keys_values(features, weight, num_heads=1) for x in pair]
    (ours,) = torch.autograd.grad(parts, features, list(dkv.unsqueeze(2)))
    expected = torch.einsum("cti,cih->th", dkv.double(), weight.detach().double().flatten(0, 1))
    rounding = torch.finfo(dtype).eps * float(expected.abs().max())
    assert max_error(ours[0], expected) < (20 if dtype == torch.float32 else 1) * rounding


def test_gradcheck():
    place = {"positions": POSITIONS[:2], "granularity": "token", "num_prefix_tokens": 1}
    inputs = make_inputs(2, 5, 4, 2)

    def call(*inputs):
        return [x for pair in vision_keys_values(*inputs, num_heads=1, **place) for x in pair]

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_keys_and_values_lie_in_one_tensor_without_a_copy():
    features, weight = make_inputs(num_layers=3)
    pairs = vision_keys_values(features, weight, num_heads=3)
    assert [len(pair) for pair in pairs] == [2, 2, 2]
    flat = [x for pair in pairs for x in pair]
    assert all(x.shape == (5 * 37, 3, 4) and x.is_contiguous() for x in flat)
    assert len({x.untyped_storage().data_ptr() for x in flat}) == 1
    assert [x.storage_offset() for x in flat] == [i * 5 * 37 * 12 for i in range(6)]


def test_a_part_that_is_not_used_has_no_gradient():
    features, weight = make_inputs()
    (key, _), (_, value) = vision_keys_values(features, weight, num_heads=2)
    dfeatures, dweight = torch.autograd.grad(key.sum() + 2 * value.sum(), (features, weight))
    assert not dweight[0, 1].any() and not dweight[1, 0].any()
    y = features.detach().flatten(0, 1).sum(0).expand(12, -1)
    assert max_error(dweight[0, 0], y) < 1e-12 and max_error(dweight[1, 1], 2 * y) < 1e-12
    row = (weight[0, 0] + 2 * weight[1, 1]).detach().sum(0)
    assert max_error(dfeatures, row.expand_as(dfeatures)) < 1e-12


@pytest.mark.parametrize(("frozen", "unused"), [(0, "backward_features"), (1, "backward_weight")])
def test_what_is_frozen_costs_no_backward(frozen, unused, monkeypatch):
    """The first stage of training has a frozen vision encoder: no product for the features' gradient."""
    from infimm_kernels.vision_keys_values import op

    inputs = make_inputs()
    place = PLACES["token"]
    dkv = torch.randn(2, 2, 5 * 37, 12, dtype=torch.float64)
    expected = torch.autograd.grad(eager(*inputs, **place), inputs, dkv)[1 - frozen]
    monkeypatch.setattr(op.reference, unused, None)
    wanted = inputs[1 - frozen]
    given = [x if i != frozen else x.detach() for i, x in enumerate(inputs)]
    kv = stacked(vision_keys_values(*given, num_heads=2, **place))
    (grad,) = torch.autograd.grad(kv, wanted, dkv, retain_graph=True)
    assert max_error(grad, expected) < 1e-11
    (grad,) = torch.autograd.grad(kv, wanted, dkv, create_graph=True)
    assert max_error(grad, expected) < 1e-11


def test_nothing_is_kept_for_the_backward_but_the_inputs():
    features, weight = make_inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        vision_keys_values(features, weight, num_heads=2, **PLACES["window"])
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in (features, weight, POSITIONS)}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("place", ["none", "token"])
def test_layouts_and_expanded_gradient(place, backend, request):
    if backend == "triton":
        request.getfixturevalue("interpreter")
    place = PLACES[place] | {"num_heads": 2, "backend": backend}
    features, weight = make_inputs(dtype=torch.float32)
    expected = stacked(vision_keys_values(features, weight, **place))
    other_layouts = (
        torch.cat((features, features), 1)[:, :37],  # a part of longer windows
        features.mT.contiguous().mT,
        features.transpose(0, 1).contiguous().transpose(0, 1),
    )
    for x in other_layouts:
        torch.testing.assert_close(stacked(vision_keys_values(x, weight, **place)), expected)
    for w in (weight.mT.contiguous().mT, weight.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.testing.assert_close(stacked(vision_keys_values(features, w, **place)), expected)
    dkv = torch.ones(1, 1, 1, 1).expand_as(expected)
    grads = torch.autograd.grad(expected, (features, weight), dkv, retain_graph=True)
    odd = (other_layouts[0].detach().requires_grad_(), weight.mT.contiguous().mT.detach().requires_grad_())
    kv = stacked(vision_keys_values(*odd, **place))
    ours = torch.autograd.grad(kv, odd, dkv.clone().transpose(0, 1).contiguous().transpose(0, 1))
    for a, b in zip(ours, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(0, 9), (3, 0), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("granularity", [None, "window", "token"])
def test_nothing_or_little_to_do(shape, granularity, backend, request):
    """No windows, no tokens, prefix tokens alone; in bfloat16, for in float32 eager may be exact by luck."""
    if backend == "triton":
        request.getfixturevalue("interpreter")
    place = {}
    if granularity is not None:
        prefix = int(shape[1] == 1)
        place = {"positions": POSITIONS[: shape[0]], "granularity": granularity, "num_prefix_tokens": prefix}
    check(make_inputs(*shape, dtype=torch.bfloat16), place, backend=backend)


@places
def test_windows_are_placed_some_at_a_time(place):
    """The CPU path adds the positions of a few windows at a time, so that they are still in a cache."""
    inputs = [x.detach() for x in make_inputs()]
    reference = importlib.import_module("infimm_kernels.vision_keys_values.reference")
    results = []
    for windows in (1, 2, 5):
        with mock.patch.object(reference, "CHUNK_BYTES", windows * inputs[0][0].nbytes):
            results.append(stacked(vision_keys_values(*inputs, num_heads=2, **PLACES[place])))
    assert max(max_error(r, eager(*inputs, **PLACES[place])) for r in results) < 1e-12


# --- what a registered op owes to PyTorch -------------------------------------------------------------------


def flat_call(*inputs):
    """All keys and values as one tensor, as a function of the floating inputs alone."""
    return stacked(vision_keys_values(*inputs, num_heads=2, **PLACES["token"]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    inputs = make_inputs()
    compiled = torch.compile(flat_call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    ours, expected = compiled(*inputs), flat_call(*inputs)
    assert torch.equal(ours, expected)
    dkv = torch.randn_like(expected)
    ours, theirs = torch.autograd.grad(ours, inputs, dkv), torch.autograd.grad(expected, inputs, dkv)
    assert all(map(torch.equal, ours, theirs))


def test_forward_mode_is_not_silently_zero():
    inputs = tuple(x.detach() for x in make_inputs())
    tangents = tuple(torch.randn_like(x) for x in inputs)
    step = 1e-6
    ahead, behind = (
        flat_call(*(x + s * t for x, t in zip(inputs, tangents, strict=True))) for s in (step, -step)
    )
    expected = (ahead - behind) / (2 * step)
    primal, tangent = torch.func.jvp(flat_call, inputs, tangents)
    assert max_error(primal, flat_call(*inputs)) < 1e-12
    assert max_error(tangent, expected) < 1e-7
    with forward_ad.dual_level():
        dual = flat_call(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)))
        assert max_error(forward_ad.unpack_dual(dual).tangent, expected) < 1e-7


def test_functional_gradients():
    inputs = make_inputs()

    def loss(*inputs):
        return flat_call(*inputs).sin().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    plain = tuple(x.detach() for x in inputs)
    assert max(map(max_error, torch.func.grad(loss, (0, 1))(*plain), expected)) < 1e-11
    batched = torch.func.vmap(torch.func.grad(loss, (0, 1)))(*(torch.stack((x, x)) for x in plain))
    assert max(max_error(b[1], e) for b, e in zip(batched, expected, strict=True)) < 1e-11


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_computes_in_its_dtype(compiled):
    inputs = make_inputs(dtype=torch.float32)
    call = torch.compile(flat_call, fullgraph=True, backend="aot_eager") if compiled else flat_call
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kv = call(*inputs)
    low = tuple(x.detach().bfloat16().requires_grad_() for x in inputs)
    expected = flat_call(*low)
    assert kv.dtype == torch.bfloat16 and torch.equal(kv, expected)
    dkv = torch.randn_like(kv)
    ours, theirs = torch.autograd.grad(kv, inputs, dkv), torch.autograd.grad(expected, low, dkv)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


def test_autocast_mixes_dtypes_and_leaves_float64_alone():
    """Inside autocast a bfloat16 encoder's features meet float32 weights; that is legal."""
    features, weight = make_inputs(dtype=torch.float32)
    inputs64 = make_inputs()
    expected = flat_call(*inputs64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(flat_call(features.bfloat16(), weight), flat_call(features, weight))
        assert torch.equal(flat_call(*inputs64), expected)


@pytest.mark.parametrize("op", ["vision_keys_values", "backward_features", "backward_weight"])
def test_an_enabled_autocast_changes_nothing_inside_the_ops(op):
    features, weight = (x.detach() for x in make_inputs(dtype=torch.float16))
    dkv = torch.randn(2, 2, 5 * 37, 12).half()
    place = (POSITIONS, "window", 1, 1, 1, None)
    ops = torch.ops.infimm_kernels

    def call():
        if op == "vision_keys_values":
            return ops.vision_keys_values(features, weight, *place)
        if op == "backward_features":
            return ops.vision_keys_values_backward_features(dkv, weight, None)
        return ops.vision_keys_values_backward_weight(dkv, features, *place)

    expected = call()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # of fewer digits than float16
        assert torch.equal(call(), expected)


def test_meta_tensors():
    inputs = [x.detach() for x in make_inputs()]
    place = PLACES["token"]
    meta = place | {"positions": place["positions"].to("meta")}
    expected = vision_keys_values(*inputs, num_heads=2, **place)
    results = vision_keys_values(*(x.to("meta") for x in inputs), num_heads=2, **meta)
    for pair, expected_pair in zip(results, expected, strict=True):
        for x, y in zip(pair, expected_pair, strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


T = torch.randn
ZEROS = torch.zeros(2, 2).long()
BAD = [
    ({"features": None}, "features must be a torch.Tensor, got NoneType"),
    ({"features": T(9, 8)}, "features must have shape [num_windows, seqlen, hidden], got [9, 8]"),
    (
        {"features": T(2, 9, 8).int()},
        "features must have dtype float16, bfloat16, float32 or float64, got torch.int32",
    ),
    ({"features": T(2, 9, 8).to_sparse()}, "features must be a dense tensor, got torch.sparse_coo"),
    ({"features": T(2, 9, 4)}, "features must have the hidden size of weight (8), got [2, 9, 4]"),
    ({"weight": [1.0]}, "weight must be a torch.Tensor, got list"),
    ({"weight": T(2, 6, 8)}, "weight must have shape [num_layers, 2, inner, hidden], got [2, 6, 8]"),
    (
        {"weight": T(3, 2, 6, 8).double()},
        "weight must have the dtype of features (torch.float32), got torch.float64",
    ),
    ({"weight": T(3, 2, 6, 8, device="meta")}, "weight must be on the device of features (cpu), got meta"),
    (
        {"weight": T(3, 3, 6, 8)},
        "weight must have 2 as its second dimension, keys and values, got [3, 3, 6, 8]",
    ),
    (
        {"weight": T(0, 2, 6, 8)},
        "weight must have at least one layer, one row and one column, got [0, 2, 6, 8]",
    ),
    ({"weight": T(3, 2, 0, 8)}, "weight must have at least one layer, one row and one column"),
    (
        {"weight": T(3, 2, 6, 0), "features": T(2, 9, 0)},
        "weight must have at least one layer, one row and one column",
    ),
    ({"num_heads": 4}, "num_heads must be a positive integer that divides inner (6), got 4"),
    ({"num_heads": 0}, "num_heads must be a positive integer that divides inner (6), got 0"),
    ({"num_heads": -2}, "num_heads must be a positive integer that divides inner (6), got -2"),
    ({"num_heads": True}, "num_heads must be a positive integer that divides inner (6), got True"),
    ({"num_heads": 2.0}, "num_heads must be a positive integer that divides inner (6), got 2.0"),
    (
        {"features": T(2, 9, 6), "weight": T(3, 2, 6, 6), "positions": ZEROS},
        "features must have a hidden size that is a positive multiple of 4, got [2, 9, 6]",
    ),
    ({"positions": [[0, 0]] * 2}, "positions must be a torch.Tensor, got list"),
    ({"positions": ZEROS.float()}, "positions must have dtype torch.int32 or torch.int64, got torch.float32"),
    ({"positions": ZEROS.to("meta")}, "positions must be on the device of features (cpu), got meta"),
    ({"positions": ZEROS[:1]}, "positions must have shape [num_windows, 2] = [2, 2], got [1, 2]"),
    ({"granularity": "patch"}, "granularity must be 'window' or 'token', got 'patch'"),
    ({"granularity": "patch", "positions": ZEROS}, "granularity must be 'window' or 'token', got 'patch'"),
    ({"num_prefix_tokens": 9}, "num_prefix_tokens must be an integer from 0 to 8, got 9"),
    ({"num_prefix_tokens": 1.0, "positions": ZEROS}, "num_prefix_tokens must be an integer from 0 to 8"),
    (
        {"num_prefix_tokens": 1, "positions": ZEROS, "granularity": "token"},
        "window_shape must be given when the number of patches (8) is not a square, got None",
    ),
    (
        {"window_shape": (2, 4), "positions": ZEROS, "granularity": "token"},
        "window_shape must hold the 9 patches of a window, got (2, 4)",
    ),
    ({"backend": "cudnn"}, "backend must be None or one of reference, triton, cuda, got 'cudnn'"),
    (
        {"backend": "cuda"},
        "backend must name a backend that can run vision_keys_values, got 'cuda': vision_keys_values has no",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[f"{i}-{m[:45]}" for i, (_, m) in enumerate(BAD)])
def test_message(change, message):
    legal = {"features": T(2, 9, 8), "weight": T(3, 2, 6, 8), "num_heads": 3}
    assert stacked(vision_keys_values(**legal)).isfinite().all()
    with pytest.raises(ValueError) as raised:
        vision_keys_values(**(legal | change))
    assert str(raised.value).startswith(message)


def test_float64_in_triton_is_refused_with_the_reason(interpreter):
    with pytest.raises(ValueError, match="can run vision_keys_values.*float64 is not supported"):
        vision_keys_values(*make_inputs(), num_heads=2, backend="triton")

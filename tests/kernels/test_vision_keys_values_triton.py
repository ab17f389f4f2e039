"""The Triton kernels of vision_keys_values: in the interpreter, and on a GPU what only a GPU can show."""

import pytest
import torch

from infimm_kernels.testing import assert_within_twice_eager, max_error
from infimm_kernels.vision_keys_values import vision_keys_values
from tests.kernels.test_vision_keys_values import (
    PLACES,
    POSITIONS,
    check,
    floats,
    make_inputs,
    places,
    stacked,
    tiles_of,
)

CAPABILITIES = ((8, 0), (9, 0))
# num_windows, seqlen, hidden, inner, num_layers: several tiles each way; with tails, and without in the tiles
# of 128 and of 256 columns.
SIZES = ((5, 37, 76, 150, 2), (5, 37, 128, 128, 1), (5, 37, 256, 256, 1))


@pytest.fixture(params=CAPABILITIES, ids=str)
def every_tile(request, interpreter):
    with tiles_of(request.param):
        yield


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("place", "dtype"),
    [
        ("none", torch.bfloat16),
        ("window", torch.bfloat16),
        ("token", torch.bfloat16),
        ("wide", torch.float16),
        ("token", torch.float32),
    ],
    ids=str,
)
def test_with_tails(place, dtype, every_tile):
    check(make_inputs(*SIZES[0], dtype=dtype), PLACES[place], backend="triton")


@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_without_tails(size, every_tile):
    check(make_inputs(*size, dtype=torch.bfloat16), PLACES["window"], backend="triton")


@pytest.mark.parametrize("shape", [(1, 1, 0), (2, 2, 1), (8, 16, 0)], ids=str)
def test_windows_shorter_and_longer_than_a_tile(shape, interpreter):
    """A tile of rows spans many windows, or a part of one."""
    height, width, prefix = shape
    inputs = make_inputs(5, prefix + height * width, 32, 16, 1, torch.float32)
    place = {"positions": POSITIONS, "window_shape": (height, width), "num_prefix_tokens": prefix}
    for granularity in ("window", "token"):
        keywords = place | {"granularity": granularity, "num_heads": 2}
        kv, expected = (
            stacked(vision_keys_values(*inputs, **keywords, backend=b)) for b in ("triton", "reference")
        )
        torch.testing.assert_close(kv, expected, rtol=1e-5, atol=1e-4)


def test_float32_has_a_sum_per_layer(interpreter):
    """One running sum over the channels of all layers had three times the error of eager PyTorch."""
    check(make_inputs(1, 40, 32, 512, 8, torch.float32), {}, backend="triton")


@pytest.mark.long
def test_float32_has_a_sum_per_some_rows(interpreter):
    """One running sum over so many rows had 2.3 times the error of eager PyTorch."""
    check(make_inputs(10, 1025, 32, 32, 1, torch.float32), {}, backend="triton")


@floats
def test_rows_after_the_last_are_not_read(dtype, interpreter):
    """Tiles that fit the channels still have a tail of rows; here NaN lies behind it."""
    dkv, features = (torch.full((n, 64, 128), torch.nan, dtype=dtype) for n in (2, 1))
    dkv[:, :37], features[:, :37] = (torch.randn(n, 37, 128).to(dtype) for n in (2, 1))
    dkv, features = dkv[:, :37].view(1, 2, 37, 128), features[:, :37]
    weight_gradient = torch.ops.infimm_kernels.vision_keys_values_backward_weight
    ours, expected = (
        weight_gradient(dkv, features, None, "window", 1, 1, 0, backend)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(ours, expected, atol=1e-4 if dtype == torch.float32 else 0.05, rtol=0.02)


@pytest.mark.parametrize(
    ("wanted", "kernels"),
    [((0,), ["features"]), ((1,), ["weight"]), ((0, 1), ["features", "weight"])],
    ids=str,
)
def test_a_gradient_launches_its_kernel(wanted, kernels, interpreter, monkeypatch):
    from infimm_kernels.vision_keys_values import triton_backward

    launched = []

    class Watched:
        def __init__(self, name):
            self.name = name
            self.kernel = getattr(triton_backward, f"vision_keys_values_backward_{name}_kernel")

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("features", "weight"):
        monkeypatch.setattr(triton_backward, f"vision_keys_values_backward_{name}_kernel", Watched(name))
    inputs = [x if i in wanted else x.detach() for i, x in enumerate(make_inputs(dtype=torch.float32))]
    kv = stacked(vision_keys_values(*inputs, num_heads=2, backend="triton"))
    torch.autograd.grad(kv.sum(), [inputs[i] for i in wanted])
    assert launched == kernels


@pytest.mark.parametrize("granularity", ["window", "token"])
def test_an_inf_in_weight_where_there_is_no_position(granularity, interpreter):
    """The encoding there is zero, and zero times inf would be NaN."""
    features, weight = (x.detach() for x in make_inputs(4, 10, 8, 6, 2, torch.float32))
    weight[0, 1, 3, 2], weight[1, 0, 2, 7] = torch.inf, -torch.inf
    place = {"positions": torch.tensor([[0, 1], [-1, 2], [1, 1], [3, -1]]), "granularity": granularity}
    kv, expected = (
        stacked(vision_keys_values(features, weight, num_heads=2, num_prefix_tokens=1, **place, backend=b))
        for b in ("triton", "reference")
    )
    kv, expected = (x.unflatten(2, (4, 10))[:, :, [1, 3]] for x in (kv, expected))
    assert expected.isinf().any() and not expected.isnan().any()
    torch.testing.assert_close(kv, expected, rtol=1e-5, atol=1e-4)


def test_a_nan_stays_in_its_row(interpreter):
    features, weight = make_inputs(2, 70, 40, 24, 1, torch.float32)
    with torch.no_grad():
        features[1, 3] = torch.nan
    place = {"positions": POSITIONS[:2], "num_heads": 2, "backend": "triton"}
    kv = stacked(vision_keys_values(features, weight, **place))
    expected = torch.zeros(140, dtype=torch.bool)
    expected[73] = True
    assert torch.equal(kv.isnan().any(-1), expected.expand(1, 2, -1))


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@floats
@places
@pytest.mark.parametrize("size", [*SIZES, (5, 37, 1792, 768, 2), (5, 37, 1152, 640, 3)], ids=str)
def test_on_a_gpu(size, place, dtype):
    place = dict(PLACES[place])
    if "positions" in place:
        place["positions"] = place["positions"].cuda()
    check(make_inputs(*size, dtype=dtype, device="cuda"), place)


@pytest.mark.gpu
def test_more_elements_than_int32_counts():
    """30 layers of 768 channels pass 2^31 elements at 46,604 tokens."""
    features, weight = make_inputs(46, 1025, 64, 768, 30, torch.bfloat16, "cuda")
    kv = torch.ops.infimm_kernels.vision_keys_values(
        features.detach(), weight.detach(), None, "window", 1, 1, 0, None
    )
    assert kv.numel() > 2**31
    y = features.detach().flatten(0, 1)
    for layer, part in ((0, 0), (29, 0), (29, 1)):
        expected = y.double() @ weight.detach()[layer, part].double().t()
        assert_within_twice_eager("kv", kv[layer, part], y @ weight.detach()[layer, part].t(), expected)
    dfeatures = torch.ops.infimm_kernels.vision_keys_values_backward_features(kv, weight.detach(), None)
    expected = torch.zeros_like(dfeatures, dtype=torch.float64)
    for dkv, w in zip(kv.flatten(0, 1), weight.detach().flatten(0, 1), strict=True):
        expected += dkv.double() @ w.double()
    assert max_error(dfeatures, expected) < 2**-8 * float(expected.abs().max())
    dweight = torch.ops.infimm_kernels.vision_keys_values_backward_weight(
        kv, features.detach(), None, "window", 1, 1, 0, None
    )
    expected = kv[29, 1].double().t() @ y.double()
    assert_within_twice_eager("dweight", dweight[29, 1], kv[29, 1].t() @ y, expected)


def gpu_call(granularity="token"):
    """A call as a function of features, and features for it."""
    features, weight = make_inputs(5, 257, 128, 96, 2, torch.bfloat16, "cuda")
    place = {"positions": POSITIONS.cuda(), "granularity": granularity, "num_prefix_tokens": 1}

    def call(features):
        return stacked(vision_keys_values(features, weight, num_heads=2, **place))

    return call, features.detach(), weight


@pytest.mark.gpu
def test_a_backward_repeats_its_bits():
    call, features, weight = gpu_call()
    features.requires_grad_()
    kv = call(features)
    dkv = torch.randn_like(kv)
    first = torch.autograd.grad(kv, (features, weight), dkv, retain_graph=True)
    for _ in range(5):
        again = torch.autograd.grad(kv, (features, weight), dkv, retain_graph=True)
        assert all(map(torch.equal, again, first))


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["window", "token"])
def test_a_cuda_graph_replays_with_new_input(granularity):
    call, features, weight = gpu_call(granularity)
    static = features.clone().requires_grad_()
    dkv = torch.randn_like(call(static))

    def step(x):
        kv = call(x)
        return kv, *torch.autograd.grad(kv, (x, weight), dkv)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(static)
    for _ in range(3):
        fresh = torch.randn_like(features)
        with torch.no_grad():
            static.copy_(fresh)
        graph.replay()
        assert all(map(torch.equal, replayed, step(fresh.requires_grad_())))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    call, features, weight = gpu_call()
    features.requires_grad_()
    dkv = torch.randn_like(call(features))
    torch.autograd.grad(call(features), (features, weight), dkv)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(call(features), (features, weight), dkv)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_side_stream():
    call, features, _ = gpu_call()
    expected = call(features)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late = features.clone()
        kv = call(late)
    side.synchronize()
    assert torch.equal(kv, expected)


@pytest.mark.gpu
def test_float64_on_a_gpu_is_refused_with_the_reason():
    inputs = make_inputs(device="cuda")
    with pytest.raises(NotImplementedError, match="triton: float64 is not supported"):
        vision_keys_values(*inputs, num_heads=2)
    kv = stacked(vision_keys_values(*inputs, num_heads=2, backend="reference"))
    assert max_error(kv, stacked(vision_keys_values(*(x.cpu() for x in inputs), num_heads=2))) < 1e-12

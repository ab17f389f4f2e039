"""The Triton backward of gated_residual_projection, its tiles for few rows and its use of the library."""

import itertools

import pytest
import torch

from bench.static import compile as aot
from infimm_kernels import gated_residual_projection
from infimm_kernels.testing import assert_within_twice_eager, max_error
from tests.kernels.cases import MIXED_DTYPES, eager_gated, exact, gated_inputs

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
NAMES = ("dx", "do", "dweight", "dgate")
every_dtype = pytest.mark.parametrize("dtype", (*FLOATS, *MIXED_DTYPES), ids=str)
masked_or_not = pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
BACKWARD = torch.ops.infimm_kernels.gated_residual_projection_backward.default


def check_error_rule(inputs, mask, dy, backend):
    """Forward and backward against eager PyTorch; `dy` None is drawn."""
    inputs64 = exact(*inputs)
    y, eager = gated_residual_projection(*inputs, row_mask=mask, backend=backend), eager_gated(*inputs, mask)
    y64 = eager_gated(*inputs64, mask)
    assert_within_twice_eager("y", y, eager, y64)
    dy = torch.randn_like(y) if dy is None else dy
    ours, theirs = (torch.autograd.grad(result, inputs, dy) for result in (y, eager))
    expected = torch.autograd.grad(y64, inputs64, dy.double())
    for name, a, b, c in zip(NAMES, ours, theirs, expected, strict=True):
        assert_within_twice_eager(name, a, b, c)


def random_mask(rows, device="cpu"):
    return torch.rand(rows, device=device) > 0.3


@pytest.fixture(params=[(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
def capability(request, monkeypatch):
    """The tiles of this architecture, whatever the tests run on."""
    for module in ("triton_forward", "triton_backward"):
        monkeypatch.setattr(f"infimm_kernels.gated_residual.{module}.capability_of", lambda x: request.param)
    return request.param


@pytest.fixture(params=[1024, 32], ids=["ours", "library"])
def ours_or_library(request, monkeypatch):
    """Who multiplies where inner is from 33 to 1024: the kernels, or the library as for a larger one."""
    for module in ("triton_forward", "triton_backward"):
        monkeypatch.setattr(f"infimm_kernels.gated_residual.{module}.LARGE_INNER", request.param)
    return "library" if request.param == 32 else "ours"


@every_dtype
@masked_or_not
@pytest.mark.parametrize("size", [(1, 16, 16), (65, 80, 48), (140, 150, 260), (70, 256, 128)], ids=str)
def test_twice_eager(size, masked, dtype, interpreter):
    rows, hidden, inner = size
    inputs = gated_inputs((rows,), hidden, inner, dtype)
    check_error_rule(inputs, random_mask(rows) if masked else None, None, "triton")


@every_dtype
def test_tiles_of_both_architectures(dtype, capability, interpreter):
    check_error_rule(gated_inputs((133,), 200, 140, dtype), random_mask(133), None, "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, MIXED_DTYPES[0], torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 63, 64, 65])
def test_few_rows(rows, dtype, interpreter):
    for masked, inner in ((False, 200), (True, 200), (False, 256), (True, 256)):
        inputs = gated_inputs((rows,), 40, inner, dtype)
        mask = random_mask(rows) if masked else None
        y = gated_residual_projection(*inputs, row_mask=mask, backend="triton")
        assert_within_twice_eager("y", y, eager_gated(*inputs, mask), eager_gated(*exact(*inputs), mask))


def test_few_rows_share_their_tiles(interpreter):
    """One tile for up to 16 rows and one for up to 64: generation must not compile per batch."""
    from infimm_kernels.gated_residual.triton_forward import tile_for

    for dtype in FLOATS:
        tiles = [tile_for(rows, dtype, (9, 0)) for rows in range(1, 66)]
        assert [len(list(group)) for _, group in itertools.groupby(tiles)] == [16, 48, 1]
    assert 5120 // tiles[0].block_n >= 132  # multiprocessors of an H100


def specialised_on_rows(module: str) -> list[tuple[str, bool]]:
    """Of each kernel with num_rows: its name, and whether it is compiled again for some numbers of rows."""
    kernels = {config.kernel.__name__: config.kernel for config in aot.shipped(module)}
    return [
        (name, not parameter.do_not_specialize)
        for name, kernel in kernels.items()
        for parameter in kernel.params
        if parameter.name == "num_rows"
    ]


def test_the_number_of_rows_is_no_part_of_a_compiled_kernel():
    """Outside the interpreter, whose kernels know nothing of it."""
    pytest.importorskip("triton")
    modules = [module for module in aot.modules() if ".gated_residual." in module]
    found = aot.in_processes(specialised_on_rows, [(module,) for module in modules], 1)
    assert sorted(kernel for each in found for kernel in each) == [
        ("gated_residual_backward_input_kernel", False),
        ("gated_residual_backward_weight_kernel", False),
        ("gated_residual_epilogue_kernel", False),
        ("gated_residual_kernel", False),
        ("gated_residual_scale_kernel", False),
    ]


@pytest.mark.long
def test_float32_has_a_sum_per_some_rows(interpreter):
    """One running sum over so many rows had 2.7 times eager's error for weight, 6 times for gate."""
    check_error_rule(gated_inputs((32_768,), 8, 8, torch.float32), None, None, "triton")


@every_dtype
@pytest.mark.parametrize("inner", [24, 128], ids=["with tails", "without"])
def test_an_inf_in_dy_stays_one(dtype, inner, interpreter):
    dy, *rest = (t.detach().abs() + 0.1 for t in gated_inputs((5,), 128, inner, dtype))
    dy[2, 3] = torch.inf
    ours, expected = (BACKWARD(dy, *rest, None, (False, True, True), b)[1:] for b in ("triton", "reference"))
    for a, b in zip(ours, expected, strict=True):
        assert b.isinf().any() and not b.isnan().any()
        assert torch.equal(a.isinf(), b.isinf()) and not a.isnan().any()


@pytest.fixture
def products(monkeypatch):
    """The library's products of the call under test: their names, in order."""
    called = []

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*args):
            called.append(name)
            return original(*args)

        monkeypatch.setattr(owner, name, watched)

    watch(torch.nn.functional, "linear")
    watch(torch.Tensor, "__matmul__")
    return called


@pytest.mark.sample(5)
@pytest.mark.parametrize("dtype", [*FLOATS, *MIXED_DTYPES], ids=str)
@masked_or_not
def test_large_inner_is_left_to_the_library(dtype, masked, products, interpreter):
    """Forward and do; the weight's gradient stays ours, and so does the forward where rows are few."""
    for rows, inner in ((65, 1040), (64, 1040), (65, 1024)):
        inputs = gated_inputs((rows,), 8, inner, dtype)
        mask = random_mask(rows) if masked else None
        products.clear()
        y = gated_residual_projection(*inputs, row_mask=mask, backend="triton")
        forward = ["linear"] if rows > 64 and inner > 1024 and inputs[1].dtype != torch.float16 else []
        assert products == forward
        torch.autograd.grad(y.sum(), inputs)
        assert products == forward + (["__matmul__"] if inner > 1024 else [])
        check_error_rule(inputs, mask, None, "triton")


def test_returns_x_bit_for_bit(ours_or_library, interpreter):
    x, o, weight, gate = (t.detach() for t in gated_inputs((70,), 20, 40, torch.bfloat16))
    x[:3], gate[:10] = -0.0, 0.0
    mask = torch.arange(70) % 2 == 0
    o[~mask] = torch.nan
    y = gated_residual_projection(x, o, weight, gate, row_mask=mask, backend="triton")
    assert torch.equal(y[~mask].view(torch.uint8), x[~mask].view(torch.uint8))
    assert torch.equal(y[:, :10].contiguous().view(torch.uint8), x[:, :10].contiguous().view(torch.uint8))
    assert not torch.equal(y[mask][:, 10:], x[mask][:, 10:])


def test_float16_products_do_not_overflow(interpreter):
    """With a large inner size the library's float16 product would be inf before the gate brings it back."""
    inputs = gated_inputs((66,), 4, 1040, torch.float16)
    with torch.no_grad():
        for tensor, value in zip(inputs, (1.0, 10.0, 10.0, 0.001), strict=True):
            tensor.fill_(value)
    y = gated_residual_projection(*inputs, backend="triton")
    torch.testing.assert_close(y, eager_gated(*exact(*inputs)).half())


@pytest.mark.parametrize("dtype", [torch.bfloat16, *MIXED_DTYPES[::2], torch.float32], ids=str)
def test_nan_in_masked_rows_reaches_no_gradient(dtype, ours_or_library, interpreter):
    inputs = gated_inputs((70,), 24, 40, dtype)
    mask = torch.arange(70) % 3 != 0
    with torch.no_grad():
        inputs[1][~mask] = torch.nan
    y = gated_residual_projection(*inputs, row_mask=mask, backend="triton")
    dy = torch.randn_like(y)
    dy[~mask] = torch.nan
    _, do, dweight, dgate = torch.autograd.grad(y, inputs, dy)
    assert torch.equal(do[~mask], torch.zeros_like(do[~mask]))
    kept = tuple(t[mask] for t in (*inputs[:2], dy))
    rest = (t.detach() for t in (kept[1], *inputs[2:]))
    expected = BACKWARD(kept[2], *rest, None, backend="triton")
    for ours, theirs in zip((do[mask], dweight, dgate), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, MIXED_DTYPES[0]], ids=str)
def test_layouts_and_expanded_gradient(dtype, ours_or_library, interpreter):
    """Bit for bit where the kernels multiply. On a processor without AVX-512 the library multiplies another
    layout in another order, and a bfloat16 gradient was rounded the other way."""
    inner = 40

    def same(found, expected):
        if ours_or_library == "ours":
            return torch.equal(found, expected)
        return torch.allclose(found, expected, rtol=2**-7, atol=1e-5)

    x, o, weight, gate = (t.detach() for t in gated_inputs((4, 19), 24, inner, dtype))
    mask = random_mask((4, 19))
    mask = mask.t().contiguous().t()
    wide = torch.full((4, 19, inner + 3), torch.nan).to(o.dtype)
    wide[..., 3:] = o
    strided = {
        "o": (o.mT.contiguous().mT, wide[..., 3:], o.transpose(0, 1).contiguous().transpose(0, 1)),
        "weight": (weight.t().contiguous().t(), weight.repeat_interleave(2, 0)[::2]),
        "gate": (gate.repeat_interleave(2)[::2],),
    }
    gradients = (
        torch.randn_like(x),
        torch.ones((), dtype=x.dtype).expand(x.shape),
        torch.randn(24, dtype=torch.float32).to(x.dtype).expand(x.shape),
        torch.randn(4, 19, 1).to(x.dtype).expand(x.shape),
    )
    for dy in gradients:
        plain = BACKWARD(dy.contiguous(), o, weight, gate, mask, backend="triton")
        for name, others in strided.items():
            for other in others:
                arguments = {"o": o, "weight": weight, "gate": gate} | {name: other}
                found = BACKWARD(dy, **arguments, row_mask=mask, backend="triton")
                assert all(map(same, found, plain)), name


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, MIXED_DTYPES[0], torch.float32], ids=str)
def test_only_the_wanted_gradients(dtype, backend, interpreter, monkeypatch):
    """Frozen weights and gates cost no work, and the other gradients have the same bits."""
    x, *rest = (t.detach() for t in gated_inputs((70,), 40, 24, dtype))
    dy, mask = torch.randn_like(x), random_mask(70)
    every = BACKWARD(dy, *rest, mask, backend=backend)
    for needs in itertools.product((False, True), repeat=3):
        found = BACKWARD(dy, *rest, mask, needs, backend)
        for ours, expected, needed in zip(found, every, needs, strict=True):
            assert torch.equal(ours, expected) if needed else ours.shape == (0,)
    leaves = [t.clone().requires_grad_() for t in rest]
    for i, leaf in enumerate(leaves):
        inputs = [leaf if j == i else t for j, t in enumerate(rest)]
        y = gated_residual_projection(x, *inputs, row_mask=mask, backend=backend)
        assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], every[i])


@pytest.mark.parametrize(
    ("needs", "kernels"),
    [
        ((True, False, False), ["input"]),
        ((False, True, False), ["weight"]),
        ((False, False, True), ["weight", "gate"]),
        ((True, True, True), ["input", "weight", "gate"]),
    ],
    ids=str,
)
def test_kernels_of_unwanted_gradients_are_not_launched(needs, kernels, interpreter, monkeypatch):
    from infimm_kernels.gated_residual import triton_backward

    launched = []

    class Watched:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(triton_backward, f"gated_residual_backward_{name}_kernel")

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("input", "weight", "gate"):
        monkeypatch.setattr(triton_backward, f"gated_residual_backward_{name}_kernel", Watched(name))
    dy, o, weight, gate = (t.detach() for t in gated_inputs((5,), 20, 16, torch.float32))
    BACKWARD(dy, o, weight, gate, None, needs, "triton")
    assert launched == kernels


def test_no_rows(ours_or_library, interpreter):
    dy, o, weight, gate = (t.detach() for t in gated_inputs((2, 0), 20, 40, torch.bfloat16))
    do, dweight, dgate = BACKWARD(dy, o, weight, gate, None, backend="triton")
    assert do.shape == o.shape
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dgate, torch.zeros_like(gate))


@pytest.mark.parametrize("size", [1e-6, 1e6])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_gradients_outside_the_range_of_float16(backend, size, interpreter):
    """With a float32 stream and a float16 branch eager computes dgate in float32, whatever the size of dy."""
    inputs = gated_inputs((40,), 20, 16, MIXED_DTYPES[2])
    inputs64 = exact(*inputs)
    dy = torch.randn(40, 20) * size
    ours = torch.autograd.grad(gated_residual_projection(*inputs, backend=backend), inputs[3], dy)
    eager = torch.autograd.grad(eager_gated(*inputs), inputs[3], dy)
    expected = torch.autograd.grad(eager_gated(*inputs64), inputs64[3], dy.double())
    assert_within_twice_eager("dgate", ours[0], eager[0], expected[0])


@pytest.mark.parametrize("backend", ["triton", "reference"])
@every_dtype
@pytest.mark.parametrize("value", [0.0, 1e-6, -1e-3, 0.05, -1.0, 4.0, -9.0, 60.0, float("inf")])
def test_gradient_of_any_gate(value, dtype, backend, interpreter):
    """Zero, where training starts; tiny; and so large that its tanh is 1."""
    inputs = gated_inputs((130,), 72, 64, dtype)  # with few channels eager may be exact by luck
    with torch.no_grad():
        inputs[3].fill_(value)
    check_error_rule(inputs, None, None, backend)


def test_large_gates_keep_their_digits(interpreter):
    """1 - tanh^2 is 0 in float32 from a gate of 9 on; the slope is not."""
    inputs = gated_inputs((40,), 20, 16, torch.float32)
    with torch.no_grad():
        inputs[3].copy_(torch.linspace(-30, 30, 20))
    inputs64 = exact(*inputs)
    y, y64 = gated_residual_projection(*inputs, backend="triton"), eager_gated(*inputs64)
    (ours,) = torch.autograd.grad(y.sum(), inputs[3])
    t = inputs64[3].detach().abs()
    slope = 4 * (-2 * t).exp() / (1 + (-2 * t).exp()) ** 2
    expected = slope * (inputs64[1] @ inputs64[2].t()).sum(0)
    assert y64.shape == y.shape
    torch.testing.assert_close(ours.double(), expected.detach(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, MIXED_DTYPES[0], torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_only_inputs_are_saved(dtype, backend, interpreter):
    """Neither x nor the product of o and weight outlives the forward."""
    x, o, weight, gate = inputs = gated_inputs((70,), 24, 40, dtype)
    mask, saved = random_mask(70), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = gated_residual_projection(*inputs, row_mask=mask, backend=backend)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (o, weight, gate, mask)}
    assert sum(t.nbytes for t in saved) == sum(t.nbytes for t in (o, weight, gate, mask))
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, MIXED_DTYPES[0]], ids=str)
def test_runs_repeat_their_bits(dtype, interpreter):
    dy, *rest = (t.detach() for t in gated_inputs((200,), 150, 140, dtype))
    first = BACKWARD(dy, *rest, None, backend="triton")
    torch.use_deterministic_algorithms(True)
    try:
        again = BACKWARD(dy, *rest, None, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("needs", [(True, False, True), (False, True, False)], ids=str)
def test_opcheck_of_a_part(needs):
    dy, *rest = (t.detach() for t in gated_inputs((2, 4)))
    results = torch.library.opcheck(BACKWARD, (dy, *rest, None, needs, "reference"))
    assert set(results.values()) == {"SUCCESS"}


def test_frozen_weight_compiles():
    x, o, weight, gate = gated_inputs((2, 4))
    weight = weight.detach()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, o, gate):
        return gated_residual_projection(x, o, weight, gate)

    y = gated_residual_projection(x, o, weight, gate)
    dy = torch.randn_like(y)
    ours, expected = (torch.autograd.grad(r, (x, o, gate), dy) for r in (compiled(x, o, gate), y))
    assert max(map(max_error, ours, expected)) < 1e-13


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@every_dtype
@masked_or_not
@pytest.mark.parametrize(
    "size", [(1, 5120, 768), (16, 5120, 5120), (65, 80, 48), (257, 5120, 768), (300, 520, 5120)], ids=str
)
def test_twice_eager_on_a_gpu(size, masked, dtype):
    rows, hidden, inner = size
    inputs = gated_inputs((rows,), hidden, inner, dtype, "cuda")
    check_error_rule(inputs, random_mask(rows, "cuda") if masked else None, None, None)


@pytest.mark.gpu
@pytest.mark.parametrize("inner", [48, 1040])
def test_backward_in_a_cuda_graph(inner):
    dy, *rest = (t.detach() for t in gated_inputs((70,), 80, inner, torch.bfloat16, "cuda"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        BACKWARD(dy, *rest, None)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = BACKWARD(dy, *rest, None)
    dy.copy_(torch.randn_like(dy))
    graph.replay()
    for ours, expected in zip(grads, BACKWARD(dy, *rest, None), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.gpu
def test_offsets_beyond_32_bits_on_a_gpu():
    """Rows of dy and o that lie more than 2**31 elements apart."""
    rows, hidden, inner = 4, 16, 16
    far = 2**30
    dy = torch.empty_strided((rows, hidden), (far, 1), dtype=torch.bfloat16, device="cuda")
    dy.copy_(torch.randn(rows, hidden))
    _, o, weight, gate = (t.detach() for t in gated_inputs((rows,), hidden, inner, torch.bfloat16, "cuda"))
    ours, expected = BACKWARD(dy, o, weight, gate, None), BACKWARD(dy.contiguous(), o, weight, gate, None)
    assert all(map(torch.equal, ours, expected))

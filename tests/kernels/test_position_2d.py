import math

import pytest
import torch

from bench.static import compile as aot
from bench.static.sass import parse
from infimm_kernels import add_position_2d
from infimm_kernels.testing import assert_within_twice_eager, max_error
from tests.kernels.cases import eager_position

CASES = (
    {},
    {"num_prefix_tokens": 1},
    {"granularity": "token", "num_prefix_tokens": 1},
    {"granularity": "token", "window_shape": (2, 5)},
    {"granularity": "token", "window_shape": (8, 1), "num_prefix_tokens": 2},
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
POSITIONS = torch.tensor([[0, 0], [3, 1], [-1, -1], [0, 7], [2, -4]])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_equals_the_equation_in_float64(options, index_dtype):
    x = torch.randn(5, 10, 12, dtype=torch.float64)
    y = add_position_2d(x, POSITIONS.to(index_dtype), **options)
    assert max_error(y, eager_position(x, POSITIONS, **options)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", CASES[1:3], ids=str)
def test_twice_eager(options, dtype):
    x = torch.randn(5, 10, 112).to(dtype)
    y, eager = add_position_2d(x, POSITIONS, **options), eager_position(x, POSITIONS, **options)
    assert_within_twice_eager("y", y, eager, eager_position(x.double(), POSITIONS, **options))


def test_first_half_is_the_column():
    """Order of (row, column) and of the halves, by hand: window at row 1, column 2, hidden 4."""
    y = add_position_2d(torch.zeros(1, 1, 4, dtype=torch.float64), torch.tensor([[1, 2]]))
    expected = torch.tensor([math.sin(2), math.cos(2), math.sin(1), math.cos(1)], dtype=torch.float64)
    assert max_error(y[0, 0], expected) < 1e-15


@pytest.mark.parametrize("granularity", ["window", "token"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_window_without_position_is_copied_bit_for_bit(granularity, dtype):
    x = torch.randn(5, 9, 8).to(dtype)
    x[:, ::2] = -0.0
    y = add_position_2d(x, POSITIONS, granularity=granularity)
    for window in (2, 4):
        assert torch.equal(y[window].view(torch.uint8), x[window].view(torch.uint8))


def test_tokens_of_neighbouring_windows_continue():
    """Patch coordinates run through the whole image: the seam between windows is one step wide."""
    x = torch.zeros(2, 9, 16, dtype=torch.float64)
    y = add_position_2d(x, torch.tensor([[0, 0], [0, 1]]), granularity="token")
    wide = add_position_2d(
        x.view(1, 18, 16), torch.zeros(1, 2).long(), granularity="token", window_shape=(3, 6)
    )
    expected = wide.view(3, 2, 3, 16).transpose(0, 1).reshape(2, 9, 16)
    assert max_error(y, expected) < 1e-14


def test_prefix_tokens():
    x = torch.randn(5, 10, 8)
    by_token = add_position_2d(x, POSITIONS, granularity="token", num_prefix_tokens=1)
    assert torch.equal(by_token[:, 0], x[:, 0])
    by_window = add_position_2d(x, POSITIONS, num_prefix_tokens=1)
    assert not torch.equal(by_window[1, 0], x[1, 0])


def test_gradient_is_the_identity():
    x = torch.randn(5, 10, 8, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(1, 1, 8, dtype=torch.float64).expand(5, 10, 8)
    assert torch.equal(torch.autograd.grad(add_position_2d(x, POSITIONS), x, dy)[0], dy)
    small = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: add_position_2d(x, POSITIONS[:2], granularity="token"), small)


@pytest.mark.parametrize("shape", [(0, 9, 8), (5, 0, 8), (5, 1, 8)], ids=str)
@pytest.mark.parametrize("granularity", ["window", "token"])
def test_nothing_to_do(shape, granularity):
    x = torch.randn(shape)
    positions = POSITIONS[: shape[0]]
    prefix = 1 if shape[1] == 1 else 0
    y = add_position_2d(x, positions, granularity=granularity, num_prefix_tokens=prefix)
    assert y.shape == shape
    if granularity == "token":
        assert torch.equal(y, x)


def test_layouts():
    x = torch.randn(5, 10, 8, dtype=torch.float64)
    expected = add_position_2d(x, POSITIONS)
    assert torch.equal(add_position_2d(x.mT.contiguous().mT, POSITIONS), expected)
    assert torch.equal(add_position_2d(x, POSITIONS.t().contiguous().t()), expected)


@pytest.mark.parametrize("window_shape", [(64, 64), (3, 100), (70, 1)], ids=str)
def test_windows_of_any_grid(window_shape):
    positions = torch.tensor([[1, 2], [0, 0]])
    options = {"granularity": "token", "window_shape": window_shape, "num_prefix_tokens": 1}
    x = torch.randn(2, 1 + window_shape[0] * window_shape[1], 8, dtype=torch.float64)
    assert max_error(add_position_2d(x, positions, **options), eager_position(x, positions, **options)) < 1e-9


# --- out ----------------------------------------------------------------------------------------------------


def bits(x):
    return x.contiguous().view(torch.uint8)


def check_out(x, backend=None, **options):
    """Into other memory, with gaps or without, and into x: the bits of the call that makes a tensor."""
    expected = add_position_2d(x, POSITIONS.to(x.device), backend=backend, **options)
    places = {"apart": torch.empty_like(x), "x": x.clone()}
    places["wide"] = x.new_full((*x.shape[:2], 3, x.shape[2]), 7.0)[:, :, 1]
    places["channel major"] = torch.empty_like(x).mT.contiguous().mT
    for name, out in places.items():
        source = out if name == "x" else x
        result = add_position_2d(source, POSITIONS.to(x.device), out=out, backend=backend, **options)
        assert result is out
        assert torch.equal(bits(out), bits(expected)), name
    assert bool((places["wide"]._base[:, :, ::2] == 7.0).all()), "written outside of out"


@pytest.mark.parametrize("dtype", (torch.float64, *FLOATS), ids=str)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_out(options, dtype):
    check_out(torch.randn(5, 10, 12).to(dtype), **options)


@pytest.mark.sample(7)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", CASES[1:4], ids=str)
def test_out_in_the_interpreter(options, dtype, interpreter):
    x = torch.randn(5, 10, 12).to(dtype)
    x[:, ::3] = -0.0
    check_out(x, backend="triton", **options)


def test_in_place_on_a_part_of_a_tensor():
    packed = torch.randn(5, 10, 2, 8)
    x, other = packed[:, :, 0], packed[:, :, 1].clone()
    expected = add_position_2d(x, POSITIONS)
    add_position_2d(x, POSITIONS, out=packed[:, :, 0])
    assert torch.equal(packed[:, :, 0], expected)
    assert torch.equal(packed[:, :, 1], other)


def test_out_takes_no_part_in_gradients():
    x, out = torch.randn(5, 9, 8, requires_grad=True), torch.empty(5, 9, 8)
    for source, target in ((x, out), (x.detach(), x)):
        with pytest.raises(
            ValueError, match="^out must be None where x or out requires a gradient, got a tensor"
        ):
            add_position_2d(source, POSITIONS, out=target)
    with pytest.raises(ValueError, match="^out must be None under forward-mode AD and torch.func"):
        torch.func.vmap(lambda x: add_position_2d(x, POSITIONS, out=out))(x.detach()[None])
    with torch.no_grad():
        assert not add_position_2d(x, POSITIONS, out=out).requires_grad
    with torch.inference_mode():
        assert torch.equal(add_position_2d(x, POSITIONS, out=torch.empty(5, 9, 8)), out)


BASE = torch.randn(900)
X = BASE[:360].view(5, 9, 8)
BAD_OUT = [
    ("x", "out must be a torch.Tensor, got str"),
    (torch.empty(5, 9, 4), "out must have shape the shape of x = [5, 9, 8], got [5, 9, 4]"),
    (torch.empty(5, 9, 8).half(), "out must have the dtype of x (torch.float32), got torch.float16"),
    (X.to("meta"), "out must be on the device of x (cpu), got meta"),
    (
        BASE[8:368].view(5, 9, 8),
        "out must be x itself or lie before or behind it in memory, got memory between its ends",
    ),
    (
        BASE[359:719].view(5, 9, 8),
        "out must be x itself or lie before or behind it in memory, got memory between its ends",
    ),
    (X.mT.reshape(5, 9, 8).as_strided(X.shape, (72, 1, 9)), None),
    (BASE[:360].as_strided(X.shape, (72, 1, 9)), "out must be x itself or lie before or behind it"),
    (
        BASE[360:].as_strided(X.shape, (72, 0, 1)),
        "out must have elements that do not overlap in memory, got str",
    ),
    (
        BASE[360:].as_strided(X.shape, (8, 8, 1)),
        "out must have elements that do not overlap in memory, got str",
    ),
]


@pytest.mark.parametrize(("out", "message"), BAD_OUT, ids=[str(message)[:50] for _, message in BAD_OUT])
def test_out_message(out, message):
    before = BASE.clone()
    if message is None:
        assert torch.equal(add_position_2d(X, POSITIONS, out=out), add_position_2d(X, POSITIONS))
        return
    with pytest.raises(ValueError) as raised:
        add_position_2d(X, POSITIONS, out=out)
    assert str(raised.value).startswith(message)
    assert torch.equal(BASE, before)


def test_out_over_the_positions():
    x, memory = torch.randn(5, 9, 8), torch.zeros(720, dtype=torch.float32)
    positions = memory[350:370].view(torch.int64).view(5, 2)
    with pytest.raises(ValueError, match="out must be memory apart from positions"):
        add_position_2d(x, positions, out=memory[:360].view(5, 9, 8))
    assert not memory.any()


def test_out_in_cuda_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="got 'cuda': it cannot write into out"):
        add_position_2d(X, POSITIONS, out=torch.empty(5, 9, 8), backend="cuda")


def test_out_opcheck():
    arguments = (X.clone(), POSITIONS, "token", 3, 3, 0, None, torch.empty(5, 9, 8))
    called = torch.ops.infimm_kernels.add_position_2d_out.default
    assert set(torch.library.opcheck(called, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("in_place", [True, False])
def test_out_compiles(in_place):
    expected = add_position_2d(X, POSITIONS)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def double(x, out):
        return 2 * add_position_2d(x, POSITIONS, out=out)

    x = X.clone()
    out = x if in_place else torch.zeros(5, 9, 8)
    assert torch.equal(double(x, out), 2 * expected)
    assert torch.equal(out, expected)
    assert torch.equal(x, expected if in_place else X)


# --- the kernel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, CASES[2]], ids=str)
def test_distant_positions_in_the_interpreter(options, interpreter):
    """The kernel takes whole turns off an angle itself."""
    positions = torch.tensor([[10**6, 3], [999, 12345], [2**15, 2**20], [0, 77777], [5, 5]])
    for dtype in FLOATS:
        x = torch.randn(5, 10, 16).to(dtype)
        y = add_position_2d(x, positions, **options, backend="triton")
        # float32 eager rounds the exponent, which moves such angles; the reference does not.
        expected = add_position_2d(x.double(), positions.float().long(), **options)
        angle_rounding = 2e-7 * 2**20 * 3
        assert max_error(y[:, :, [0, 1, 8, 9]], expected[:, :, [0, 1, 8, 9]]) < torch.finfo(dtype).eps * 8
        assert max_error(y, expected) < angle_rounding


@pytest.mark.parametrize("window_shape", [(64, 3), (2, 70), (33, 34)], ids=str)
def test_windows_of_any_grid_in_the_interpreter(window_shape, interpreter):
    """Lines of several blocks of tokens, and channels of several blocks."""
    positions = torch.tensor([[1, 2], [-1, 0]])
    options = {"granularity": "token", "window_shape": window_shape, "num_prefix_tokens": 3}
    x = torch.randn(2, 3 + window_shape[0] * window_shape[1], 20)
    y = add_position_2d(x, positions, **options, backend="triton")
    torch.testing.assert_close(y, add_position_2d(x, positions, **options))


def instructions_per_element(module, name):
    """Of the shipped configuration: the accesses of its PTX to two-byte numbers, instructions per element."""
    (config,) = (c for c in aot.shipped(module) if c.name == name and c.capability == (9, 0))
    code = aot.compile_config(config)
    (listing,) = aot.disassemble(code.cubin, code.cuobjdump).values()
    count = sum(i.opcode != "NOP" for i in parse(listing.sass))
    tile = config.constexprs["BLOCK_T"] * config.constexprs["BLOCK_C"]
    wide = code.ptx.count("ld.global.v4.b32"), code.ptx.count("st.global.v4.b32")
    return wide, count * 32 * config.num_warps / tile


def test_instructions_leave_the_memory_busy():
    """16-byte accesses alone, and time for the rest beside them.

    A bfloat16 element is read and written, 4 bytes: at 4.8 TB/s 132 SMs, which issue 4 warp instructions a
    cycle at 1.7 GHz, have 24 instructions of a thread for it.
    """
    pytest.importorskip("triton")
    module = "infimm_kernels.position_2d.triton_forward"
    names = [f"add_position per_token={per_token} block_t=32 bf16" for per_token in (False, True)]
    for wide, instructions in aot.in_processes(instructions_per_element, [(module, name) for name in names]):
        assert wide == (8, 8)
        assert instructions < 14


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_gpu_out(options, dtype):
    x = torch.randn(5, 10, 12, device="cuda").to(dtype)
    check_out(x, **options)
    cpu = add_position_2d(x.cpu(), POSITIONS, **options)
    torch.testing.assert_close(add_position_2d(x, POSITIONS.cuda(), **options).cpu(), cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("window_shape", [(32, 32), (64, 64), (16, 16), (3, 100)], ids=str)
def test_gpu_grids_and_distant_positions(window_shape):
    positions = torch.tensor([[1, 2], [0, 0], [-1, 4], [10**6, 10**8], [2**40, 2**55]])
    options = {"granularity": "token", "window_shape": window_shape, "num_prefix_tokens": 1}
    x = torch.randn(5, 1 + window_shape[0] * window_shape[1], 1792)
    y = add_position_2d(x.cuda(), positions.cuda(), **options).cpu()
    torch.testing.assert_close(y, add_position_2d(x, positions, **options))


@pytest.mark.gpu
def test_gpu_more_than_2_31_elements():
    x = torch.zeros(1200, 1025, 1792, device="cuda", dtype=torch.bfloat16)
    positions = torch.tensor([[1, 2]], device="cuda").expand(1200, 2)
    for options in ({}, {"granularity": "token", "num_prefix_tokens": 1}):
        x.zero_()
        add_position_2d(x, positions, out=x, **options)
        expected = add_position_2d(torch.zeros(1, 1025, 1792).bfloat16(), positions[:1].cpu(), **options)
        torch.testing.assert_close(x[-1].cpu(), expected[0])
        assert torch.equal(x[0], x[-1])

"""The CUDA kernel of add_position_2d, run on the CPU, against the fp64 formula; and seeded bugs."""

import shutil

import pytest
import torch

from tests.emulate import add_position_2d as emulator
from tests.emulate import seeded_bugs

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the emulation")

FILES = ["add_position_2d*", "common/*"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (num_windows, seqlen, hidden, window_shape or None, num_prefix_tokens)
SHAPES = [
    (1, 1, 4, None, 0),
    (3, 5, 20, None, 1),
    (2, 9, 12, None, 0),
    (2, 63, 112, None, 1),
    (10, 257, 8, None, 1),
    (4, 7, 28, None, 0),
    (2, 1025, 1792, None, 1),
    (0, 257, 112, None, 0),
    (3, 0, 112, None, 0),
    (2, 6, 4, (2, 3), 0),
    (3, 17, 20, (4, 4), 1),
    (2, 46, 40, (5, 9), 1),
    (2, 257, 112, (16, 16), 1),
    (1, 1032, 64, (32, 32), 8),
    (2, 2, 16, (1, 1), 1),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulator.build(tmp_path_factory.mktemp("emulate"))


def example(num_windows, seqlen, hidden, dtype, *, positions_dtype=torch.int64, largest=64, seed=0):
    """x, and positions: the largest, (1, 2), two windows without one, then random ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_windows, seqlen, hidden, generator=generator).to(dtype)
    positions = torch.randint(0, largest, (num_windows, 2), generator=generator)
    positions[:1] = largest - 1
    positions[1:2] = torch.tensor([1, 2])
    positions[2:3] = torch.tensor([-1, 3])
    positions[3:4] = torch.tensor([3, -1])
    return x, positions.to(positions_dtype)


def check(library, x, positions, window_shape=None, num_prefix_tokens=0, **options):
    """Error to the fp64 formula at most twice that of the eager float32 formula rounded to the dtype of x."""
    out = emulator.run(library, x, positions, window_shape, num_prefix_tokens, **options)
    assert out.shape == x.shape and out.dtype == x.dtype
    if not x.numel():
        return
    exact = emulator.formula(x, positions, window_shape, num_prefix_tokens)
    eager = emulator.formula(x, positions, window_shape, num_prefix_tokens, torch.float32).to(x.dtype)
    error = (out.double() - exact).abs().max()
    assert error <= 2 * (eager.double() - exact).abs().max(), f"error {error}"
    untouched = ((positions < 0).any(1)[:, None, None]).expand(x.shape).clone()
    if window_shape is not None:
        untouched[:, :num_prefix_tokens] = True
    assert torch.equal(out[untouched], x[untouched])


def check_everything(library):
    """Every kind of case once: what a seeded bug is held against."""
    for num_windows, seqlen, hidden, window_shape, prefix in SHAPES:
        for dtype in DTYPES if num_windows * seqlen * hidden < 100_000 else ():
            check(library, *example(num_windows, seqlen, hidden, dtype), window_shape, prefix)
    check_strides(library, torch.float16)
    check_small_grid(library)
    check(library, *example(4, 26, 40, torch.float32, positions_dtype=torch.int32), (5, 5), 1)
    check_frequencies(library)


def check_strides(library, dtype):
    wide, positions = example(3, 70, 128, dtype)
    for x in (wide[:, 3:68, :112], wide[:, :65, 5:117], wide[::2, :65, 4:116], wide.flip(0)[:, :65, 1:25]):
        check(library, x, positions[: len(x)])
    check(library, wide, positions, out_offset=1)
    odd_pitch, _ = example(3, 70, 116, dtype)
    check(library, odd_pitch[:, :, :112], positions)
    check(library, wide.transpose(0, 1)[:3, :3], positions)
    check(library, wide[:1, :65].expand(3, 65, 128), positions, (8, 8), 1)
    check(library, wide, positions.repeat_interleave(2, 1)[:, ::2])


def check_small_grid(library):
    for grid_limit in (1, 3):
        check(library, *example(5, 130, 516, torch.float32), grid_limit=grid_limit)


def check_frequencies(library):
    """At position (1, 1) the sine of a high channel is nearly its frequency, down to 1e-4."""
    x, positions = torch.zeros(1, 1, 1792), torch.ones(1, 2, dtype=torch.int64)
    exact = emulator.formula(x, positions)
    out = emulator.run(library, x, positions)
    assert ((out - exact) / exact).abs().max() <= 2**-22


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_meets_the_formula(library, shape, dtype):
    num_windows, seqlen, hidden, window_shape, prefix = shape
    x, positions = example(num_windows, seqlen, hidden, dtype)
    check(library, x, positions, window_shape, prefix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_alignment(library, dtype):
    """An access wider than the alignment of a pointer or stride would fault on a GPU; the shim reports it."""
    check_strides(library, dtype)


def test_fewer_blocks_than_work(library):
    check_small_grid(library)


def test_int32_positions(library):
    for num_windows in (1, 4):
        x, positions = example(num_windows, 26, 40, torch.float32, positions_dtype=torch.int32)
        check(library, x, positions, (5, 5), 1)


def test_frequencies(library):
    check_frequencies(library)


@pytest.mark.parametrize("hidden", [4, 20, 112, 448])
def test_large_positions_stay_accurate(library, hidden):
    """64 x 64 windows of 64 x 64 patches: angles up to 4095."""
    check(library, *example(2, 4096, hidden, torch.float32), (64, 64), 0)


def test_copies_are_bit_exact(library):
    """A window without position keeps NaN payloads, infinities and negative zeros."""
    x = torch.tensor([0x7FC1, 0xFF80, 0x8000, 0x0001], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x.expand(2, 3, 4).contiguous()
    out = emulator.run(library, x, torch.tensor([[-1, 0], [0, -5]]))
    assert torch.equal(out.view(torch.int16), x.view(torch.int16))


def test_half_conversions_of_the_shim(library):
    """Row 0, column 0 adds sin 0 = 0 and cos 0 = 1, so every half is converted to float32 and back."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype).view(1, -1, 4)
        out = emulator.run(library, x, torch.zeros(1, 2, dtype=torch.int64))
        expected = (x.float() + torch.tensor([0.0, 1.0, 0.0, 1.0])).to(dtype)
        assert torch.equal(out.nan_to_num(nan=-3.0), expected.nan_to_num(nan=-3.0))


def test_refuses_what_it_cannot_count(library):
    x = torch.zeros(1, 2, 6)
    with pytest.raises(RuntimeError, match="CUDA error 1$"):
        emulator.run(library, x, torch.zeros(1, 2, dtype=torch.int64))


MUTATIONS = [
    ("frequency of the wrong pair in the second half", "pair - half_pairs, plan", "pair, plan"),
    ("sin and cos exchanged", "&values[2 * i], &values[2 * i + 1]", "&values[2 * i + 1], &values[2 * i]"),
    ("x and y exchanged", "is_column ? new_x : new_y", "is_column ? new_y : new_x"),
    ("encoding kept when only y changes", "(is_column ? x : y)) continue", "x) continue"),
    ("no position: only the row is looked at", "if (row < 0 || column < 0)", "if (row < 0)"),
    ("prefix tokens counted as patches", "step - p.num_prefix_tokens)", "step)"),
    ("patch divided by the wrong side", "patch % height : patch / width", "patch % width : patch / width"),
    ("window offset in rows times the width", "row * height + i", "row * width + i"),
    ("chunk over both halves taken for columns", "is_column = i < columns", "is_column = columns > 0"),
    ("last token of a run dropped", "n + 1 < end", "n + 1 < end - 1"),
    (
        "stride of out used for x",
        "next_step.token * p.x_stride_token",
        "next_step.token * p.out_stride_token",
    ),
    (
        "stride of x used for out",
        "out + step.token * p.out_stride_token",
        "out + step.token * p.x_stride_token",
    ),
    ("position of the neighbouring axis", "axis * p.positions_stride_axis", "axis"),
    ("int32 positions read as int64", "p.positions_are_int64 ?", "true ?"),
    ("float exponent without correction", "fmaf(power, rest, power)", "power"),
    ("blocks beyond the grid never done", "item += gridDim.x", "item += num_items"),
    ("alignment not asked for", "p.hidden % kWide == 0 && aligned<T>(p, 16)", "p.hidden % kWide == 0"),
    ("alignment of out forgotten", " | reinterpret_cast<uintptr_t>(p.out)", ""),
    ("alignment of the strides forgotten", "p.x_stride_window | p.x_stride_token | ", ""),
    ("last chunk group dropped", "ceil_div(chunks, lanes)", "chunks / lanes"),
    (
        "all token slabs but the first dropped",
        "token_slabs = ceil_div(p.seqlen, ",
        "token_slabs = 1 + 0 * ceil_div(p.seqlen, ",
    ),
    (
        "wide chunk written as a narrow one",
        "i < kWords; ++i) reinterpret_cast",
        "i < 1; ++i) reinterpret_cast",
    ),
]


def build_mutant(folder, old, new):
    return emulator.build(folder, seeded_bugs.copy_with_bug(folder, FILES, old, new))


SOME = MUTATIONS[::4]


# Some of them: each is compiled. `make emulate` tries all.
@pytest.mark.parametrize(("old", "new"), [edit for _, *edit in SOME], ids=[name for name, *_ in SOME])
def test_seeded_bug_is_caught(tmp_path, old, new):
    mutant = build_mutant(tmp_path, old, new)
    assert seeded_bugs.is_caught(lambda: check_everything(mutant))

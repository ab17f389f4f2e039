"""The CUDA kernel of decode attention, run on the CPU, against the fp64 formula; and seeded bugs."""

import contextlib
import itertools
import random
import shutil
import subprocess
import types

import pytest
import torch

from infimm_kernels import extension
from infimm_kernels.gated_cross_attention import cuda
from infimm_kernels.testing import assert_within_twice_eager, max_error
from tests.emulate import decode_attention as emulator
from tests.emulate import seeded_bugs
from tests.emulate.decode_attention_mutations import MUTATIONS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the emulation")

SOME = MUTATIONS[::18]
FILES = ["decode_attention*", "common/*"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulator.build(tmp_path_factory.mktemp("emulate"))


def example(
    ranges=((0, 257),),
    *,
    dtype=torch.bfloat16,
    x_dtype=None,
    gate_dtype=None,
    text_len=1,
    num_heads=2,
    num_kv_heads=None,
    head_dim=64,
    hidden=40,
    total=None,
    spread=1.0,
    seed=0,
):
    """The tensors of a call: contiguous, and as many keys as the ranges need."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, of=dtype):
        return torch.randn(*shape, generator=generator).to(of)

    batch, num_kv_heads = len(ranges), num_kv_heads or num_heads
    total = max((end for _, end in ranges), default=0) if total is None else total
    inner = num_heads * head_dim
    return dict(
        x=random(batch, text_len, hidden, of=x_dtype or dtype),
        query=random(batch, text_len, num_heads, head_dim) * spread,
        key=random(total, num_kv_heads, head_dim),
        value=random(total, num_kv_heads, head_dim),
        out_weight=random(hidden, inner) / inner**0.5,
        attn_gate=random(hidden, of=gate_dtype or x_dtype or dtype),
        key_ranges=torch.tensor(ranges, dtype=torch.int32).view(batch, 2),
    )


def launch(library, tensors, *, softmax_scale=None, **machine):
    """`launch_decode` on CPU tensors, with the emulated launcher as its extension."""
    emulated = emulator.EmulatedExtension(library, **machine)
    scale = tensors["query"].shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    with in_place_of_the_extension(emulated):
        return cuda.launch_decode(**tensors, max_keys=0, softmax_scale=scale)


@contextlib.contextmanager
def in_place_of_the_extension(emulated):
    streams = (types.SimpleNamespace(cuda_stream=number) for number in itertools.count(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "_attempt", lambda: (emulated, None))
        patch.setattr(cuda, "_num_sms", lambda device: emulated.num_sms)
        patch.setattr(torch.cuda, "current_stream", lambda device: next(streams))
        yield


def check(library, tensors, *, softmax_scale=None, check_error=assert_within_twice_eager, **machine):
    """Error to the fp64 formula at most twice eager's; samples without keys are x bit for bit."""
    out = launch(library, tensors, softmax_scale=softmax_scale, **machine)
    scale = tensors["query"].shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    exact = emulator.formula(**tensors, softmax_scale=scale, dtype=torch.float64)
    eager = emulator.formula(**tensors, softmax_scale=scale)
    x, total = tensors["x"], len(tensors["key"])
    assert out.shape == x.shape and out.is_contiguous() and out.data_ptr() != x.data_ptr()
    check_error("out", out, eager, exact)
    ranges = tensors["key_ranges"].clamp(0, total)
    keyless = ranges[:, 1] <= ranges[:, 0]
    assert torch.equal(out[keyless], x[keyless])


def check_everything(library):
    """Every kind of case once, for bfloat16 and up to 64 channels: what a seeded bug is held against."""
    for seed in (0, 1, 3):
        check(library, example([(0, 257), (300, 300), (257, 700)], seed=seed), num_sms=4, seed=seed)
    check(library, example([(0, 257), (10, 75)], text_len=8, hidden=13), num_sms=2, blocks_per_sm=2, seed=5)
    check(library, example([(3, 130)], num_heads=4, num_kv_heads=2, text_len=8, head_dim=40), seed=7)
    check(library, example([(-5, 70), (60, 900)], total=130, text_len=2, spread=60.0), seed=9)
    check_shares(library)
    check_odd_strides(library)
    check_several_chunks(library)
    check_gate_and_residual(library)


def check_shares(library):
    """A share that begins between two samples, off its exact fraction; more blocks than keys; a crowd."""
    check(library, example([(0, 100), (100, 201)], num_heads=1), num_sms=2, seed=1)
    check(library, example([(0, 2)], num_heads=1), num_sms=5, seed=1)
    check(library, example([(i, i + i % 4) for i in range(40)], num_heads=1, head_dim=8), num_sms=2, seed=1)


def check_odd_strides(library, dtype=torch.bfloat16):
    """Keys and values from one packed tensor, then everything off the 16-byte grid."""
    tensors = example([(0, 65), (65, 130)], dtype=dtype)
    packed = torch.stack([tensors["key"], tensors["value"]], 1)  # [total, 2, num_heads, head_dim]
    tensors |= dict(key=packed[:, 0], value=packed[:, 1])
    check(library, tensors, seed=1)
    for name in ("x", "query", "key", "value", "out_weight"):
        for before in (0, 1):
            wide = torch.nn.functional.pad(tensors[name], (before, 2), value=float("nan"))
            check(library, tensors | {name: wide[..., before:-2]}, seed=1)
    for name in ("key", "value"):
        wide = torch.nn.functional.pad(tensors[name].flatten(1), (0, 2), value=float("nan"))
        check(library, tensors | {name: wide[:, :-2].unflatten(1, (2, 64))}, seed=1)
    wide = torch.nn.functional.pad(tensors["query"], (0, 0, 1, 0, 1, 1), value=float("nan"))
    check(library, tensors | dict(query=wide[:, 1:-1, 1:]), seed=1)
    check(library, tensors | dict(key_ranges=tensors["key_ranges"].T.contiguous().T), seed=1)


def check_several_chunks(library):
    """More rows than one pass of the projection has, more channels than a chunk, more columns than warps."""
    ranges = [(20 * i, 20 * i + 15 + i) for i in range(5)]
    check(library, example(ranges, text_len=2, num_heads=20, head_dim=56, hidden=140), num_sms=2, seed=3)


def check_gate_and_residual(library):
    """A wide residual; a gate of zero leaves x alone, the sign of its zeros included, and any gate does so
    without keys.
    """
    tensors = example([(0, 40), (9, 9)], x_dtype=torch.float32, gate_dtype=torch.bfloat16, text_len=2)
    check(library, tensors)
    lost = launch(library, tensors | dict(attn_gate=torch.full_like(tensors["attn_gate"], float("nan"))))
    assert lost[0].isnan().all() and torch.equal(lost[1], tensors["x"][1])
    tensors["x"][:, :, ::2] = -0.0
    tensors["attn_gate"].zero_()
    out = launch(library, tensors)
    assert torch.equal(out.view(torch.int32), tensors["x"].view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 256])
def test_head_dims(library, dtype, head_dim):
    check(library, example([(0, 63), (63, 64)], dtype=dtype, head_dim=head_dim), seed=1)
    check(library, example([(0, 70)], dtype=dtype, head_dim=head_dim, text_len=3), num_sms=2, seed=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text_len", [1, 8])
def test_ranges(library, dtype, text_len):
    """Samples of 0, 1, 63, 257 and 1025 keys: shares of the blocks begin and end everywhere."""
    ranges = [(0, 0), (0, 1), (1, 64), (64, 64), (64, 321), (321, 1346)]
    check(library, example(ranges, dtype=dtype, text_len=text_len), num_sms=5, seed=1)


@pytest.mark.parametrize("num_heads, num_kv_heads", [(4, 1), (4, 2), (12, 1), (3, 3)])
@pytest.mark.parametrize("text_len", [1, 3])
def test_groups_of_query_heads(library, num_heads, num_kv_heads, text_len):
    shape = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, text_len=text_len, head_dim=16)
    check(library, example([(0, 130), (130, 200)], **shape), num_sms=3, seed=3)


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_the_blocks(library, seed):
    """The schedule may not matter, to the last bit: no sum depends on who comes first."""
    tensors = example([(0, 257), (257, 600), (0, 0)], text_len=2, seed=seed)
    check(library, tensors, num_sms=3, blocks_per_sm=2, seed=seed)
    one, other = (launch(library, tensors, num_sms=6, seed=s) for s in (seed, seed + 1))
    assert torch.equal(one, other)


@pytest.mark.parametrize("num_sms", [1, 2, 7, 16])
def test_any_number_of_blocks(library, num_sms):
    check(library, example([(0, 1025)], num_heads=1), num_sms=num_sms, seed=num_sms)


def test_fewer_blocks_than_asked_for(library, monkeypatch):
    """Where one block fits on an SM, the workspace is still made for two."""
    monkeypatch.setattr(cuda, "BLOCKS_PER_SM", 5)
    check(library, example([(0, 500), (500, 777)]), num_sms=2, blocks_per_sm=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_strides(library, dtype):
    check_odd_strides(library, dtype)


def test_shares(library):
    check_shares(library)


def test_several_chunks(library):
    check_several_chunks(library)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate_dtype", ["branch", torch.float32], ids=str)
def test_a_wide_residual(library, dtype, gate_dtype):
    gate_dtype = dtype if gate_dtype == "branch" else gate_dtype
    check(library, example(dtype=dtype, x_dtype=torch.float32, gate_dtype=gate_dtype))


def test_gate_and_residual(library):
    check_gate_and_residual(library)


def test_ranges_past_the_keys_are_cut(library):
    ranges = [(-7, 40), (40, 4000), (90, 20), (2**31 - 1, 2**31 - 1), (-(2**31), 2**31 - 1), (-9, -3)]
    check(library, example(ranges, total=100), seed=1)


def test_no_keys_at_all(library):
    check(library, example([(0, 0), (0, 5)], total=0, text_len=2))


@pytest.mark.parametrize("empty", ["batch", "text_len", "hidden"])
def test_nothing_to_do(library, empty):
    tensors = example([] if empty == "batch" else [(0, 5)], **{} if empty == "batch" else {empty: 0})
    assert launch(library, tensors).shape == tensors["x"].shape


@pytest.mark.parametrize("softmax_scale", [0.0, -0.3, 30.0])
def test_scales(library, softmax_scale):
    check(library, example([(0, 140)], dtype=torch.float32), softmax_scale=softmax_scale)


def test_a_scale_past_float32_stays_finite(library):
    tensors = example([(0, 140)], dtype=torch.float32)
    tensors["query"].zero_()  # an lost scale would make NaN of its scores
    assert torch.equal(*(launch(library, tensors, softmax_scale=scale) for scale in (1e300, 1.0)))


@pytest.mark.parametrize("score", ["nan", "inf", "-inf", "all -inf"])
def test_scores_that_are_no_numbers(library, score):
    """As softmax has it: NaN and +inf reach the whole row, -inf is no key, only -inf is NaN."""
    tensors = example([(0, 100), (100, 170)], dtype=torch.float32)
    tensors["query"].abs_()
    lost = tensors["key"][:100, 0] if score == "all -inf" else tensors["key"][30, 0]
    lost.fill_(float(score.removeprefix("all ")))
    out = launch(library, tensors)
    expected = emulator.formula(**tensors, softmax_scale=0.125, dtype=torch.float64)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out[0].isnan().all() == (score != "-inf") and not out[1].isnan().any()
    if score == "-inf":
        check(library, tensors)


@pytest.mark.long
def test_the_sanitizers_find_nothing(tmp_path):
    """Buffers without slack: a read or store outside one, shared memory included, ends the program."""
    program = emulator.build_program(tmp_path)
    for arguments in (
        "2 2 1 24 2 2 64 70 1",
        "2 1 8 9 4 2 232 33 2",
        "2 5 2 40 20 20 56 3 0",
    ):
        done = subprocess.run([program, *arguments.split()], capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr[-4000:]}"


def assert_within_three_times_eager(name, result, eager, exact):
    """In some of thousands of tiny problems eager is exact by luck."""
    rounding = torch.finfo(result.dtype).eps / 2 * exact.abs().max().item() if exact.numel() else 0.0
    assert max_error(result, exact) <= 3 * max(max_error(eager, exact), rounding), name


def random_call(seed):
    """Anything that a caller may ask for, small; and a machine."""
    choice = random.Random(seed).choice
    dtype = choice(DTYPES)
    x_dtype = choice([dtype, torch.float32])
    num_kv_heads, total = choice([1, 2, 3]), choice([0, 1, 40, 200, 400])
    ranges = [
        (choice(range(-3, total + 3)), choice(range(-3, total + 3))) for _ in range(choice(range(1, 6)))
    ]
    tensors = example(
        ranges,
        dtype=dtype,
        x_dtype=x_dtype,
        gate_dtype=choice([dtype, x_dtype]),
        text_len=choice(range(1, 9)),
        num_heads=num_kv_heads * choice([1, 1, 2, 4]),
        num_kv_heads=num_kv_heads,
        head_dim=8 * choice(range(1, 33)),
        hidden=choice([16, 17, 130]),
        total=total,
        spread=choice([0.1, 1.0, 3.0 if dtype == torch.float32 else 20.0]),
        seed=seed,
    )
    for name in ("key", "value", "out_weight", "x", "query"):
        before, after = choice([(0, 0), (0, 0), (8, 0), (1, 0), (0, 3)])
        wide = torch.nn.functional.pad(tensors[name], (before, after), value=float("nan"))
        tensors[name] = wide[..., before : wide.shape[-1] - after]
    return tensors, dict(num_sms=choice(range(1, 6)), blocks_per_sm=choice([1, 2]), seed=seed)


@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 3000), marks=pytest.mark.long)], ids=["short", "long"]
)
def test_random_calls(library, seeds):
    for seed in seeds:
        tensors, machine = random_call(seed)
        try:
            check(library, tensors, check_error=assert_within_three_times_eager, **machine)
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"random_call({seed}): {error}") from error


def test_other_last_strides_are_copied(library):
    tensors = example(text_len=3)
    for name in ("x", "query", "key", "value", "out_weight"):
        check(library, tensors | {name: tensors[name].mT.contiguous().mT})
    check(library, tensors | dict(attn_gate=tensors["attn_gate"].repeat_interleave(2)[::2]))


def test_the_stream_is_asked_for_at_every_launch(library):
    """A stream kept from an earlier launch would record an empty CUDA graph."""
    emulated = emulator.EmulatedExtension(library)
    with in_place_of_the_extension(emulated):
        for _ in range(3):
            cuda.launch_decode(**example([(0, 9)]), max_keys=9, softmax_scale=1.0)
    assert emulated.streams == [100, 101, 102]


def test_refuses_what_it_cannot_serve(library):
    for shape in (dict(text_len=9), dict(head_dim=20), dict(head_dim=264), dict(num_heads=3, num_kv_heads=2)):
        with pytest.raises(RuntimeError, match="CUDA error 1$"):
            launch(library, example(**shape))


def test_a_deadlock_is_an_error(library, tmp_path):
    """The shim tells it from a long run: a barrier that half of the blocks skip."""
    mutant = build_mutant(tmp_path, "  grid.sync();", "  if (blockIdx.x % 2 == 0) grid.sync();")
    with pytest.raises(RuntimeError, match="CUDA error 702$"):
        launch(mutant, example())


def test_nothing_is_caught_where_nothing_is_wrong(tmp_path):
    check_everything(build_mutant(tmp_path, "constexpr float kLog2E", "constexpr  float kLog2E"))


def build_mutant(folder, old, new):
    emulator.copy_for_bfloat16(folder / "csrc", [8])
    return emulator.build(folder, seeded_bugs.copy_with_bug(folder, FILES, old, new))


# Some of them: each is compiled. `make emulate` tries all.
@pytest.mark.parametrize(("old", "new"), [edit for _, *edit in SOME], ids=[name for name, *_ in SOME])
def test_seeded_bug_is_caught(tmp_path, old, new):
    mutant = build_mutant(tmp_path, old, new)
    assert seeded_bugs.is_caught(lambda: check_everything(mutant))

"""csrc/window_attention_backward.* on a CPU: the same device code, the worst order of everything."""

import itertools
import random
import shutil
import subprocess

import pytest
import torch

from bench import hopper
from bench.static import work
from infimm_kernels.attention import cuda_backward
from tests.emulate import seeded_bugs
from tests.emulate import window_attention as forward
from tests.emulate import window_attention_backward as emulator
from tests.emulate.test_window_attention_emulated import example, in_place_of_the_extension
from tests.emulate.window_attention import formula as forward_formula
from tests.emulate.window_attention_backward_mutations import MUTATIONS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the emulation")
SOME = MUTATIONS[::36]
FILES = ["window_attention_backward*", "window_attention_segments*", "common/*"]
LONG = [pytest.param(length, marks=pytest.mark.long) for length in (1024, 1026)]
SEEDS = range(6)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulator.KERNEL.build(tmp_path_factory.mktemp("emulate"))


def bounds(lengths):
    return [0, *itertools.accumulate(lengths)]


def launch(library, q, k, v, dout, lengths_q, lengths_k, *, prefix=0, scale=None, uniform=False, seed=0):
    """(dq, dk, dv) without the prefix keys' part, from exact lse and delta."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    cu_q, cu_k = bounds(lengths_q), bounds(lengths_k)
    out, lse = forward_formula(q, k, v, cu_q, cu_k, scale, torch.float64)
    delta = (out * dout.double()).sum(-1).T.float().contiguous()
    dq_sum = torch.zeros(q.shape, dtype=torch.float32)
    # Into slices of one tensor with room around each head, which must stay as it is.
    around = torch.full((2, len(k) + 2, k.shape[1], k.shape[2] + 8), 77.0, dtype=k.dtype)
    dk, dv = around[:, 1:-1, :, 4:-4]
    tensors = [torch.tensor(x, dtype=torch.int32) for x in (cu_q, cu_k)]
    segments = (None, None, lengths_q[0]) if uniform else (*tensors, 0)
    with in_place_of_the_extension(emulator.EmulatedExtension(library, seed)):
        arguments = (q, k, v, dout, lse.float().contiguous(), delta, dq_sum, dk, dv)
        cuda_backward.launch_main(*arguments, *segments, scale, prefix)
    assert (around[..., :4] == 77).all() and (around[..., -4:] == 77).all(), "a store beside a head"
    assert (around[:, [0, -1]] == 77).all(), "a store beside the tokens"
    return dq_sum * scale, dk, dv


def prefix_rows(cu_k, prefix):
    rows = torch.zeros(cu_k[-1], dtype=torch.bool)
    for begin, end in itertools.pairwise(cu_k):
        rows[begin : min(end, begin + prefix)] = True
    return rows


def check(library, problem, *, prefix=0, scale=None, uniform=False, factor=2.0, seed=0):
    """Errors to the fp64 formula at most `factor` times eager's; prefix keys are left alone."""
    q, k, v, lengths_q, lengths_k = problem
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    found = launch(
        library, q, k, v, dout, lengths_q, lengths_k, prefix=prefix, scale=scale, uniform=uniform, seed=seed
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    cu_q, cu_k = bounds(lengths_q), bounds(lengths_k)
    exact = list(emulator.formula(q, k, v, dout, cu_q, cu_k, scale, torch.float64))
    eager = emulator.formula(q, k, v, dout, cu_q, cu_k, scale)
    left_alone = prefix_rows(cu_k, prefix)
    # dP - delta is 0 for a segment's only key, but for the float32 sums of both.
    largest = [x.double().norm(dim=-1).max().item() if x.numel() else 0.0 for x in (q, k, v, dout)]
    cancelled = 2**-22 * largest[2] * largest[3] * max(largest[:2]) * scale
    exact[0] = exact[0] - prefix_share(q, k, v, dout, cu_q, cu_k, scale, prefix)
    for name, result, expected, other in zip(("dq", "dk", "dv"), found, exact, eager, strict=True):
        if name == "dq":
            other = other.double() + (
                expected - emulator.formula(q, k, v, dout, cu_q, cu_k, scale, torch.float64)[0]
            )
        else:
            assert (result[left_alone] == 77).all(), f"{name} of a prefix key was written"
            result, expected, other = (x[~left_alone] for x in (result, expected, other))
        if expected.numel() == 0 or q.numel() == 0:
            continue  # without any query the caller has zeroed dk and dv and launches nothing
        assert not result.isnan().any(), name
        rounding = torch.finfo(q.dtype).eps / 2 * expected.abs().max().item()
        limit = factor * max((other - expected).abs().max().item(), rounding / 2) + cancelled
        assert (result - expected).abs().max().item() <= limit, name


def prefix_share(q, k, v, dout, cu_q, cu_k, scale, prefix):
    """What the prefix keys add to dq, in float64: `prepare`'s part."""
    share = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    out, lse = forward_formula(q, k, v, cu_q, cu_k, scale, torch.float64)
    delta = (out * dout.double()).sum(-1)
    for i, (begin, end) in enumerate(itertools.pairwise(cu_k)):
        keys, rows = slice(begin, min(end, begin + prefix)), slice(cu_q[i], cu_q[i + 1])
        key, value = (x[keys].double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        p = (q[rows].double().transpose(0, 1) @ key.mT * scale - lse[:, rows, None]).exp()
        ds = p * (dout[rows].double().transpose(0, 1) @ value.mT - delta[rows].T[..., None])
        share[rows] = (ds @ key).transpose(0, 1) * scale
    return share


def check_everything(library):
    """Every kind of case, for bfloat16 and 112 channels: what a seeded bug is held against."""
    for seed in (0, 1, 2, 3, 5):
        check(library, example([129, 1, 300, 2, 0, 63], heads=2, seed=seed), prefix=1, seed=seed)
        problem = example([40, 7, 129, 1, 128], [300, 0, 128, 65, 256], heads=4, kv_heads=2, seed=seed)
        check(library, problem, seed=seed)
    check(library, example([257] * 3, heads=2), prefix=1, uniform=True, seed=5)
    check(library, example([200] * 2), prefix=1, uniform=True)
    check(library, example([5, 140, 3, 200], [200, 4, 133, 8]), prefix=5, seed=1)
    check(library, example([3, 140] * 20, [9, 60] * 20), seed=2)
    check_strides_apart(library)
    test_segments_do_not_touch_each_other(library, "inf")
    test_cu_seqlens_that_nobody_checked_stay_inside(library)
    with pytest.raises(RuntimeError, match="CUDA error 1 "):
        launch_unaligned(library)


def check_strides_apart(library):
    """Keys and values at other strides than each other."""
    q, k, v, *lengths = example([140, 60], [50, 150])
    check(library, (q, k, torch.nn.functional.pad(v, (0, 16))[..., :112], *lengths), seed=4)


def launch_unaligned(library):
    """What the launch would copy, given to the kernel as it is."""
    q, k, v, *lengths = example([70, 80])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_backward, "for_copies", lambda x: x)
        launch(library, q, torch.nn.functional.pad(k, (3, 0))[..., 3:], v, q, *lengths)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 128, 129, 257, 1025, *LONG])
def test_equal_windows(library, length):
    for prefix in (0, 1):
        check(library, example([length] * 2), prefix=prefix, uniform=True, seed=length)


@pytest.mark.sample(5)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 112])
def test_mixtures(library, head_dim, dtype, seed):
    lengths = [129, 1, 2, 0, 300, 63]
    check(library, example(lengths, head_dim=head_dim, dtype=dtype, heads=2), prefix=1, seed=seed)


@pytest.mark.parametrize("prefix", range(9))
def test_prefix_tokens(library, prefix):
    """More of them than a segment has keys."""
    check(library, example([5, 140, 3, 200], [200, 4, 133, 8]), prefix=prefix, seed=prefix)


@pytest.mark.sample(4)
@pytest.mark.parametrize("seed", SEEDS)
def test_text_over_images(library, seed):
    """Gated cross-attention: heads of 64, groups of them on one key head, texts without images and images
    without text, whose gradients are zeros."""
    problem = example([40, 7, 129, 0], [300, 0, 128, 65], heads=4, kv_heads=2, head_dim=64)
    check(library, problem, seed=seed)
    q, k, v, *lengths = problem
    _, dk, dv = launch(library, q, k, v, q, *lengths)
    assert not dk[-65:].any() and not dv[-65:].any()


@pytest.mark.parametrize("what", ["no queries", "no keys", "no segments"])
def test_nothing_to_do(library, what):
    """The caller has zeroed the results."""
    lengths = {"no queries": ([0, 0], [5, 7]), "no keys": ([5, 140], [0, 0]), "no segments": ([], [])}[what]
    q, k, v, *_ = example(*lengths)
    dq, dk, dv = launch(library, q, k, v, q, *lengths)
    assert not dq.any() and (dk == 77).all() and (dv == 77).all()


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_segments_do_not_touch_each_other(library, bad):
    """A weight of 0 for a neighbour's infinite value would be NaN."""
    q, k, v, *lengths = example([100, 60, 130])
    dout = q.flip(0).clone()
    clean = launch(library, q, k, v, dout, *lengths, prefix=1)
    for x in (q, k, v, dout):
        x[100:160] = float(bad)
    found = launch(library, q, k, v, dout, *lengths, prefix=1)
    for name, result, expected in zip(("dq", "dk", "dv"), found, clean, strict=True):
        assert torch.equal(
            torch.cat([result[:100], result[160:]]), torch.cat([expected[:100], expected[160:]])
        ), name


@pytest.mark.parametrize("scale", [1e-30, 0.5, 4.0])
def test_scales(library, scale):
    check(library, example([140]), scale=scale, prefix=1)


def test_the_stream_is_asked_for_at_every_launch(library):
    """A stream kept from an earlier launch would record an empty CUDA graph."""
    emulated = emulator.EmulatedExtension(library)
    q, k, v, *_ = example([9])
    zeros, rows = torch.zeros(q.shape), torch.zeros(1, 9)
    with in_place_of_the_extension(emulated):
        for _ in range(3):
            cuda_backward.launch_main(q, k, v, q, rows, rows, zeros, k, v, None, None, 9, 0.1, 0)
    assert emulated.streams == [100, 101, 102]


def test_cu_seqlens_that_nobody_checked_stay_inside(library):
    """On a GPU the values are not read; wrong ones give wrong numbers, not accesses elsewhere."""
    q, k, v, *_ = example([200])
    rows = torch.zeros(1, 200)
    for values in ([0, 500], [-7, 100, 90, 200], [0, 2**31 - 1], [50, 60], [5, 5, 5, 5]):
        around = torch.full((2, 220, 1, 112), 77.0, dtype=q.dtype)
        dk, dv = around[:, 10:-10]
        cu_seqlens = torch.tensor(values, dtype=torch.int32)
        with in_place_of_the_extension(emulator.EmulatedExtension(library)):
            arguments = (q, k, v, q, rows, rows, torch.zeros(q.shape), dk, dv, cu_seqlens, cu_seqlens)
            cuda_backward.launch_main(*arguments, 0, 0.1, 1)
        assert (around[:, :10] == 77).all() and (around[:, -10:] == 77).all()


def test_refuses_what_it_cannot_serve(library):
    for problem in (example([9], head_dim=128), example([9], [9], heads=3, kv_heads=2)):
        q, k, v, *lengths = problem
        with pytest.raises((RuntimeError, AssertionError)):
            emulated = emulator.EmulatedExtension(library)
            with in_place_of_the_extension(emulated):
                rows, zeros = torch.zeros(q.shape[1], 9), torch.zeros(q.shape)
                cuda_backward.launch_main(q, k, v, q, rows, rows, zeros, k, v, None, None, 9, 0.1, 0)
    for wrong in (dict(scale=-1.0), dict(prefix=9)):
        q, k, v, *lengths = example([9])
        with pytest.raises(RuntimeError, match="CUDA error 1 "):
            launch(library, q, k, v, q, *lengths, **wrong)


def test_no_query_at_all(library):
    """The long run's problem 42, which the check itself could not take."""
    check(library, example([0], [191], head_dim=64))


def test_a_segment_of_one_key(library):
    """Its dq and dk are 0 and eager's exactly so: the long run's problem 31 allowed no rounding at all."""
    for lengths in ([1], [1, 1, 1]):
        check(library, example([260] * len(lengths), lengths))


def random_problem(seed):
    choice = random.Random(seed).choice
    segments = choice(range(1, 5))
    sizes = [0, 1, 2, 5, 63, 64, 65, 127, 128, 129, 130, 191, 260]
    lengths = [[choice(sizes) for _ in range(segments)] for _ in range(2)]
    kv_heads = choice([1, 1, 2])
    problem = example(
        *lengths,
        heads=kv_heads * choice([1, 1, 3]),
        kv_heads=kv_heads,
        seed=seed,
        head_dim=choice([64, 112]),
        dtype=choice([torch.bfloat16, torch.float16]),
    )
    return problem, dict(prefix=choice([0, 0, 1, 1, 5]), seed=seed)


@pytest.mark.parametrize(
    "seeds", [range(20), pytest.param(range(20, 300), marks=pytest.mark.long)], ids=["short", "long"]
)
def test_random_problems(library, seeds):
    for seed in seeds:
        problem, options = random_problem(seed)
        try:
            check(library, problem, factor=3.0, **options)  # in a few of hundreds eager is exact by luck
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"random_problem({seed}): {error}") from error


@pytest.mark.long
def test_the_sanitizers_find_nothing(tmp_path):
    """Buffers without slack: a read or store outside one, shared memory included, ends the program."""
    program = emulator.KERNEL.build_program(tmp_path)
    for arguments in ("112 2 2 1 0 130 130 1 1 65 65", "64 4 2 0 1 9 140 130 3", "112 1 1 3 4 2 129 200 2"):
        done = subprocess.run([program, *arguments.split()], capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr[-4000:]}"


@pytest.mark.long
def test_what_make_gpu_asks_on_hopper(library, tmp_path):
    """bench.hopper on both kernels, as compute-sanitizer is to see them; and that it tells a wrong result."""
    emulated = forward.EmulatedExtension(forward.KERNEL.build(tmp_path))
    emulated.window_attention_backward = emulator.EmulatedExtension(library).window_attention_backward
    problem = (112, torch.bfloat16, 2, 1, 0)
    assert problem in set(hopper.problems())
    with in_place_of_the_extension(emulated):
        assert hopper.wrong(*problem, device="cpu") is None
        emulated.window_attention_backward = lambda **arguments: None
        assert "dq errs by" in hopper.wrong(*problem, device="cpu")


def test_the_ledger_knows_the_shared_memory(library):
    for head_dim in (64, 112):
        expected = library.emulate_window_backward_shared_bytes(head_dim)
        assert work.window_backward_shared_bytes(head_dim) == expected


def build_mutant(folder, old, new):
    emulator.KERNEL.copy(folder / "csrc", (112,))
    return emulator.KERNEL.build(folder, seeded_bugs.copy_with_bug(folder, FILES, old, new))


def test_nothing_is_caught_where_nothing_is_wrong(tmp_path):
    old = "constexpr float kBackwardLog2E"
    check_everything(build_mutant(tmp_path, old, old.replace(" k", "  k")))


# Some of them: each is compiled. `make emulate` tries all.
@pytest.mark.parametrize(("old", "new"), [edit for _, *edit in SOME], ids=[name for name, *_ in SOME])
def test_seeded_bug_is_caught(tmp_path, old, new):
    mutant = build_mutant(tmp_path, old, new)
    assert seeded_bugs.is_caught(lambda: check_everything(mutant))

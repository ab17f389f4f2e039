"""csrc/window_attention.* on a CPU: the same device code, the worst order of copies, products and warps."""

import contextlib
import itertools
import random
import shutil
import subprocess
import types

import pytest
import torch

from bench.static import work
from infimm_kernels import extension
from infimm_kernels.attention import cuda
from tests.emulate import seeded_bugs
from tests.emulate import window_attention as emulator
from tests.emulate.window_attention_mutations import MUTATIONS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the emulation")
SOME = MUTATIONS[::36]
FILES = ["window_attention.*", "window_attention_[!b]*", "common/*"]
LONG = [pytest.param(length, marks=pytest.mark.long) for length in (1024, 1026)]
SEEDS = range(6)  # each kind of patience, with fixed priorities and without


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulator.KERNEL.build(tmp_path_factory.mktemp("emulate"))


@contextlib.contextmanager
def in_place_of_the_extension(emulated):
    streams = (types.SimpleNamespace(cuda_stream=number) for number in itertools.count(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "_attempt", lambda: (emulated, None))
        patch.setattr(torch.cuda, "current_stream", lambda device: next(streams))
        yield


def example(lengths_q, lengths_k=None, *, heads=1, kv_heads=None, head_dim=112, dtype=torch.bfloat16, seed=0):
    """q, k, v of ragged segments; lengths_k None: packed qkv, as window_attention slices it."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(total, *shape):
        return torch.randn(total, *shape, head_dim, generator=generator).to(dtype)

    if lengths_k is None:
        q, k, v = tokens(sum(lengths_q), 3, heads).unbind(1)
        return q, k, v, lengths_q, lengths_q
    kv_heads = kv_heads or heads
    return (
        tokens(sum(lengths_q), heads),
        *(tokens(sum(lengths_k), kv_heads) for _ in range(2)),
        lengths_q,
        lengths_k,
    )


def launch(library, q, k, v, lengths_q, lengths_k, *, prefix=0, scale=None, uniform=False, **machine):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in (lengths_q, lengths_k))
    segments = (None, None, lengths_q[0]) if uniform else (cu_q, cu_k, 0)
    with in_place_of_the_extension(emulator.EmulatedExtension(library, **machine)):
        return cuda.launch(q, k, v, *segments, scale, prefix)


def check(library, problem, *, prefix=0, scale=None, uniform=False, factor=2.0, **machine):
    """Errors to the fp64 formula at most `factor` times eager's; exact zeros where a segment has no keys."""
    q, k, v, lengths_q, lengths_k = problem
    out, lse = launch(library, *problem, prefix=prefix, scale=scale, uniform=uniform, **machine)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    cu_q, cu_k = ([0, *itertools.accumulate(x)] for x in (lengths_q, lengths_k))
    exact, exact_lse = emulator.formula(q, k, v, cu_q, cu_k, scale, torch.float64)
    eager, _ = emulator.formula(q, k, v, cu_q, cu_k, scale)
    assert out.shape == exact.shape and lse.shape == exact_lse.shape
    if out.numel() == 0:
        return
    assert not out.isnan().any() and not lse.isnan().any(), "a number that nobody wrote, or wrong"
    rounding = torch.finfo(q.dtype).eps / 2 * exact.abs().max().item()
    limit = factor * max((eager - exact).abs().max().item(), rounding / 2)
    assert (out - exact).abs().max().item() <= limit
    keyless = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, keyless)
    assert torch.equal(out[keyless.T], torch.zeros_like(out[keyless.T]))
    if not keyless.all():
        error = (lse - exact_lse)[~keyless].abs().max().item()
        assert error <= 2e-6 * max(1.0, exact_lse[~keyless].abs().max().item())


def check_everything(library):
    """Every kind of case, for bfloat16 and 112 channels: what a seeded bug is held against."""
    for seed in (0, 1, 2, 3, 5):
        check(library, example([129, 1, 300, 2, 0, 63], heads=2, seed=seed), prefix=1, seed=seed, num_sms=3)
        problem = example([40, 7, 129, 1, 128], [300, 0, 128, 65, 256], heads=4, kv_heads=2, seed=seed)
        check(library, problem, prefix=seed % 2, seed=seed, num_sms=2)
    check(library, example([700], seed=1), seed=3, num_sms=1)
    check(library, example([257] * 3, heads=2), prefix=1, uniform=True, seed=5, num_sms=5)
    check(library, example([5, 140, 3, 200], [200, 4, 133, 8]), prefix=5, seed=1)
    check(library, example([3, 140] * 20, [9, 60] * 20), seed=2)
    check(library, example([130, 130]), prefix=1, uniform=True)
    for seed in range(6):  # nothing but prefix tokens: the producer waits for work to be read alone
        check(library, example([4] * 30), prefix=5, seed=seed, num_sms=1)
    check_values_apart(library)
    test_segments_do_not_touch_each_other(library, "inf")
    test_scores_that_are_no_numbers(library, "-inf", 1)
    test_cu_seqlens_that_nobody_checked_stay_inside(library)
    with pytest.raises(RuntimeError, match="CUDA error 1 "):
        launch_unaligned(library)


def check_values_apart(library):
    """Keys and values at other strides than each other."""
    q, k, v, *lengths = example([140, 60], [50, 150], kv_heads=1)
    check(library, (q, k, torch.nn.functional.pad(v, (0, 16))[..., :112], *lengths), seed=4)


def launch_unaligned(library):
    """What launch would copy, given to the kernel as it is."""
    q, k, v, *lengths = example([70, 80])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "for_copies", lambda x: x)
        launch(library, torch.nn.functional.pad(q, (3, 0))[..., 3:], k, v, *lengths)


@pytest.mark.parametrize("length", [1, 2, 63, 128, 129, 257, 1025, *LONG])
def test_equal_windows(library, length):
    for prefix in (0, 1):
        check(library, example([length] * 2), prefix=prefix, uniform=True, num_sms=3, seed=length)


@pytest.mark.sample(5)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 112, 128])
def test_mixtures(library, head_dim, dtype, seed):
    lengths = [129, 1, 2, 0, 300, 63]
    check(library, example(lengths, head_dim=head_dim, dtype=dtype, heads=2), prefix=1, seed=seed)


@pytest.mark.parametrize("prefix", range(9))
def test_prefix_tokens(library, prefix):
    """More of them than a segment has, in queries and in keys."""
    problem = example([5, 140, 3, 200], [200, 4, 133, 8])
    check(library, problem, prefix=prefix, seed=prefix)


@pytest.mark.sample(4)
@pytest.mark.parametrize("seed", SEEDS)
def test_text_over_images(library, seed):
    """Gated cross-attention: heads of 64, groups of them on one key head, texts without images."""
    problem = example([40, 7, 129, 1], [300, 0, 128, 65], heads=4, kv_heads=2, head_dim=64)
    check(library, problem, seed=seed, num_sms=5)


@pytest.mark.parametrize("what", ["no queries", "no keys", "no segments"])
def test_nothing_to_do(library, what):
    lengths = {"no queries": ([0, 0], [5, 7]), "no keys": ([5, 140], [0, 0]), "no segments": ([], [])}[what]
    out, lse = launch(library, *example(*lengths))
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_segments_do_not_touch_each_other(library, bad):
    """A weight of 0 for a neighbour's infinite value would be NaN."""
    q, k, v, *lengths = example([100, 60, 130])
    for x in (q, k, v):
        x[100:160] = float(bad)
    out, lse = launch(library, q, k, v, *lengths, prefix=1)
    alone = [
        launch(library, *(x[rows] for x in (q, k, v)), [n], [n], prefix=1)
        for n, rows in ((100, slice(100)), (130, slice(160, None)))
    ]
    assert torch.equal(torch.cat([out[:100], out[160:]]), torch.cat([one for one, _ in alone]))
    assert torch.equal(torch.cat([lse[:, :100], lse[:, 160:]], 1), torch.cat([one for _, one in alone], 1))
    assert out[100:160].isnan().all()


@pytest.mark.parametrize("score", ["nan", "inf", "-inf", "all -inf"])
@pytest.mark.parametrize("prefix", [0, 1])
def test_scores_that_are_no_numbers(library, score, prefix):
    """As softmax has it: NaN and +inf reach the whole row, -inf is no key, only -inf is NaN."""
    q, k, v, *lengths = example([200])
    q.abs_()
    (k if score == "all -inf" else k[0] if prefix else k[150]).fill_(float(score.removeprefix("all ")))
    out, lse = launch(library, q, k, v, *lengths, prefix=prefix)
    exact, exact_lse = emulator.formula(q, k, v, [0, 200], [0, 200], 112**-0.5, torch.float64)
    assert torch.equal(out.isnan(), exact.isnan()) and torch.equal(lse.isfinite(), exact_lse.isfinite())
    assert out.isnan().all() == (score != "-inf")
    if score == "-inf":
        torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 0.5, 30.0])
def test_scales(library, scale):
    check(library, example([140]), scale=scale, prefix=1)


def test_tensors_that_the_copy_engine_cannot_read_are_copied(library):
    q, k, v, *lengths = example([70, 80])
    check(library, (torch.nn.functional.pad(q, (3, 0))[..., 3:], k, v, *lengths))
    check(library, (q, k.mT.contiguous().mT, v, *lengths))
    check(library, (q, k, v[:1].expand(150, -1, -1), *lengths))


def test_the_stream_is_asked_for_at_every_launch(library):
    """A stream kept from an earlier launch would record an empty CUDA graph."""
    emulated = emulator.EmulatedExtension(library)
    q, k, v, *_ = example([9])
    with in_place_of_the_extension(emulated):
        for _ in range(3):
            cuda.launch(q, k, v, None, None, 9, 0.1, 0)
    assert emulated.streams == [100, 101, 102]


def test_cu_seqlens_that_nobody_checked_stay_inside(library):
    """On a GPU the values are not read; wrong ones give wrong numbers, not accesses elsewhere."""
    q, k, v, *_ = example([200])
    for values in ([0, 500], [-7, 100, 90, 200], [0, 2**31 - 1], [50, 60], [5, 5, 5, 5]):
        cu_seqlens = torch.tensor(values, dtype=torch.int32)
        with in_place_of_the_extension(emulator.EmulatedExtension(library)):
            cuda.launch(q, k, v, cu_seqlens, cu_seqlens, 0, 0.1, 1)


def test_refuses_what_it_cannot_serve(library):
    for problem in (example([9], head_dim=96), example([9], [9], heads=3, kv_heads=2)):
        with pytest.raises(RuntimeError, match="CUDA error 1 "):
            launch(library, *problem)
    for wrong in (dict(scale=-1.0), dict(prefix=9)):
        with pytest.raises(RuntimeError, match="CUDA error 1 "):
            launch(library, *example([9]), **wrong)


def test_no_query_at_all(library):
    """The long run's problem 42, which the check itself could not take."""
    check(library, example([0], [191], head_dim=64))


def random_problem(seed):
    choice = random.Random(seed).choice
    segments = choice(range(1, 6))
    lengths = [
        [choice([0, 1, 2, 5, 63, 64, 65, 127, 128, 129, 130, 191, 260]) for _ in range(segments)]
        for _ in range(2)
    ]
    kv_heads = choice([1, 1, 2])
    problem = example(
        *lengths,
        heads=kv_heads * choice([1, 1, 3]),
        kv_heads=kv_heads,
        seed=seed,
        head_dim=choice([64, 112, 128]),
        dtype=choice([torch.bfloat16, torch.float16]),
    )
    return problem, dict(prefix=choice([0, 0, 1, 1, 5]), num_sms=choice(range(1, 5)), seed=seed)


@pytest.mark.parametrize(
    "seeds", [range(30), pytest.param(range(30, 600), marks=pytest.mark.long)], ids=["short", "long"]
)
def test_random_problems(library, seeds):
    for seed in seeds:
        problem, machine = random_problem(seed)
        try:
            check(library, problem, factor=3.0, **machine)  # in a few of hundreds eager is exact by luck
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"random_problem({seed}): {error}") from error


@pytest.mark.long
def test_the_sanitizers_find_nothing(tmp_path):
    """Buffers without slack: a read or store outside one, shared memory included, ends the program."""
    program = emulator.KERNEL.build_program(tmp_path)
    for arguments in ("112 2 2 1 0 130 130 1 1 65 65", "64 4 2 0 1 9 140 130 3", "112 1 1 3 4 2 129 260 2"):
        done = subprocess.run([program, *arguments.split()], capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr[-4000:]}"


def build_mutant(folder, old, new):
    emulator.KERNEL.copy(folder / "csrc", (112,))
    return emulator.KERNEL.build(folder, seeded_bugs.copy_with_bug(folder, FILES, old, new))


def test_nothing_is_caught_where_nothing_is_wrong(tmp_path):
    check_everything(build_mutant(tmp_path, "constexpr float kLn2", "constexpr  float kLn2"))


def test_a_deadlock_is_an_error(tmp_path):
    """The shim tells it from a long run."""
    mutant = build_mutant(tmp_path, "init(kConsumerWarps);", "init(kConsumerWarps + 1);")
    with pytest.raises(RuntimeError, match="CUDA error 702 "):
        launch(mutant, *example([300, 300]))


# Some of them: each is compiled. `make emulate` tries all.
@pytest.mark.parametrize(("old", "new"), [edit for _, *edit in SOME], ids=[name for name, *_ in SOME])
def test_seeded_bug_is_caught(tmp_path, old, new):
    mutant = build_mutant(tmp_path, old, new)
    assert seeded_bugs.is_caught(lambda: check_everything(mutant))


@pytest.mark.parametrize("head_dim", [64, 112, 128])
def test_the_self_test_passes(library, head_dim):
    def exact(q, k, v, cu_q, cu_k, seqlen, scale, prefix):
        cu_q, cu_k = ([0, seqlen, 2 * seqlen] if cu is None else cu.tolist() for cu in (cu_q, cu_k))
        out, lse = emulator.formula(q, k, v, cu_q, cu_k, scale, torch.float64)
        return out.to(q.dtype), lse

    with in_place_of_the_extension(emulator.EmulatedExtension(library)):
        assert cuda.self_test(torch.device("cpu"), torch.bfloat16, head_dim, exact) is None


def test_the_ledger_knows_the_shared_memory(library):
    for head_dim, prefix in itertools.product((64, 112, 128), (False, True)):
        expected = library.emulate_window_shared_bytes(head_dim, prefix)
        assert work.window_shared_bytes(head_dim, prefix) == expected

"""Every implementation of a case is timed, missing, wrong or failed; none is left out in silence."""

from dataclasses import replace

import pytest
import torch

from bench import harness
from bench.attention import VarlenAttention, WindowAttention
from bench.harness import Case, run_case
from bench.problem import OURS, Implementation, Missing, Prepared

CPU = torch.device("cpu")
WINDOWS = {"num_windows": 4, "seqlen": 33, "num_heads": 2, "head_dim": 16, "num_prefix_tokens": 1}
RAGGED = {"lengths": [13, 49, 25, 31], "num_heads": 2, "head_dim": 16}
CROSS = {"lengths_q": [23, 15], "lengths_k": [49, 37], "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


def case(backward: bool = False, shape: dict = WINDOWS, op: str = "window_attention", **changes) -> Case:
    return Case("test", op, shape, "float32", backward, **changes)


def run(found: Case, implementations: list[Implementation] | None = None, **options) -> dict[str, dict]:
    entries = list(run_case(found, CPU, seconds=0.0, implementations=implementations, **options))
    assert len({entry["implementation"] for entry in entries}) == len(entries)
    return {entry["implementation"]: entry for entry in entries}


def ours(problem) -> Prepared:
    return problem.ours(None)


def changed(change) -> Implementation:
    """Our attention with `change` applied to its result."""

    def prepare(problem) -> Prepared:
        leaves, forward = problem.ours(None)
        return Prepared(leaves, lambda: change(forward()))

    return Implementation("changed", prepare)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("op", "shape"),
    [("window_attention", WINDOWS), ("window_attention", RAGGED), ("varlen_attention", CROSS)],
    ids=["windows", "ragged", "cross"],
)
def test_every_implementation_is_named_and_what_runs_on_a_cpu_is_timed(op, shape, backward):
    found = replace(case(backward, shape, op), dtype="bfloat16")
    entries = run(found)
    assert set(entries) == {i.name for i in found.build(CPU).implementations()}
    assert {"flash_attn_2", "flash_attn_3", "flash_attn_4", "xformers"} <= entries.keys()
    timed = {name for name, entry in entries.items() if entry["status"] == "ok"}
    assert {OURS, "sdpa", "sdpa_flash", "sdpa_math", "eager"} <= timed
    for name in timed:
        assert entries[name]["median_us"] > 0 and entries[name]["repeats"] == 5
        assert entries[name]["error"] < 0.1 and entries[name]["tflops"] > 0
    for entry in entries.values():
        assert entry["pass"] == ("bwd" if backward else "fwd") and entry["shape"] == shape
        assert (entry["status"] == "ok") == (entry["median_us"] is not None) == (entry["reason"] is None)


def test_an_interpreted_kernel_is_not_timed(monkeypatch):
    """Tests set TRITON_INTERPRET for themselves, and a suite started from one timed Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    entry = run(case())[f"{OURS}:triton"]
    assert (entry["status"], entry["reason"]) == (
        "missing",
        "an interpreter's time says nothing about a kernel",
    )


def test_what_cannot_be_had_is_missing_with_the_reason():
    def prepare(problem):
        raise Missing("no such wheel")

    entry = run(case(), [Implementation("rival", prepare)])["rival"]
    assert (entry["status"], entry["reason"]) == ("missing", "no such wheel")
    entries = run(case())
    assert "No module named" in entries["xformers"]["reason"]
    assert entries["sdpa_cudnn"]["reason"] == "needs a CUDA device"
    assert entries["flex_attention"]["reason"] == harness.NO_COMPILER


@pytest.mark.parametrize(
    "change",
    [
        lambda out: out * 1.001,
        lambda out: torch.where(torch.arange(len(out)).view(-1, 1, 1, 1) == len(out) - 1, out * 2, out),
        lambda out: out * float("nan"),
    ],
    ids=["slightly", "last window", "nan"],
)
def test_a_wrong_kernel_is_not_timed(change):
    entries = run(case(), [changed(change), Implementation("right", ours)])
    wrong = entries["changed"]
    assert wrong["status"] == "wrong" and wrong["median_us"] is None and wrong["tflops"] is None
    assert "out errs by" in wrong["reason"] and "not timed" in wrong["reason"]
    assert wrong["error"] > 2 * wrong["eager_error"]
    assert entries["right"]["status"] == "ok"


def test_a_wrong_gradient_is_found_and_named():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    assert run(case(), [changed(Doubled.apply)])["changed"]["status"] == "ok"
    entry = run(case(backward=True), [changed(Doubled.apply)])["changed"]
    assert entry["status"] == "wrong" and entry["reason"].split()[0] in ("dq", "dk", "dv")


def test_a_result_left_over_from_earlier_inputs_is_wrong():
    """Inputs are drawn anew for each check, so that memory with an earlier answer cannot pass."""

    def prepare(problem) -> Prepared:
        leaves, forward = problem.ours(None)
        first = forward().detach()
        return Prepared(leaves, lambda: first)

    entries = run(case(), [Implementation("right", ours), Implementation("stale", prepare)])
    assert {name: entry["status"] for name, entry in entries.items()} == {"right": "ok", "stale": "wrong"}


def test_a_wrong_dtype_is_wrong():
    assert run(case(), [changed(lambda out: out.double())])["changed"]["status"] == "wrong"


def test_one_that_raises_is_recorded_and_the_others_go_on():
    def prepare(problem):
        raise RuntimeError("no kernel\nsecond line")

    entries = run(case(), [Implementation("broken", prepare), Implementation("right", ours)])
    assert entries["broken"]["status"] == "failed"
    assert entries["broken"]["reason"] == "RuntimeError: no kernel second line"
    assert entries["right"]["status"] == "ok"


def test_warnings_explain_a_failure():
    """PyTorch says in warnings why no backend of SDPA can run and in the exception only that none can."""

    def prepare(problem):
        import warnings

        warnings.warn("head_dim is odd", stacklevel=1)
        raise RuntimeError("No available kernel.")

    reason = run(case(), [Implementation("broken", prepare)])["broken"]["reason"]
    assert reason == "RuntimeError: No available kernel. (head_dim is odd)"


def test_one_that_raises_while_it_is_timed_is_failed():
    calls = iter(range(1000))

    def prepare(problem) -> Prepared:
        leaves, forward = problem.ours(None)

        def fails_later():
            if next(calls) > 3:
                raise RuntimeError("late")
            return forward()

        return Prepared(leaves, fails_later)

    entries = run(case(), [Implementation("late", prepare), Implementation("right", ours)])
    assert entries["late"]["status"] == "failed" and entries["late"]["median_us"] is None
    assert entries["right"]["status"] == "ok"


def test_deterministic_mode_is_on_and_demands_equal_bits():
    seen = []

    def prepare(problem) -> Prepared:
        leaves, forward = problem.ours(None)
        noise = iter(range(1000))

        def drifting():
            seen.append(torch.are_deterministic_algorithms_enabled())
            return forward() * (1 + next(noise) * 1e-7)

        return Prepared(leaves, drifting)

    found = case(backward=True, deterministic=True)
    entries = run(found, [Implementation("drifting", prepare), Implementation("right", ours)])
    assert all(seen) and not torch.are_deterministic_algorithms_enabled()
    assert entries["drifting"]["status"] == "wrong" and "two runs differ" in entries["drifting"]["reason"]
    assert entries["right"]["status"] == "ok" and entries["right"]["deterministic"]


def test_settled_ones_are_left_alone_and_each_start_is_told():
    begun = []
    entries = run(
        case(), [Implementation(n, ours) for n in "abc"], settled={"b"}, begin=lambda name: begun.append(name)
    )
    assert list(entries) == ["a", "c"] and begun == ["a", "c", harness.TIMING]


def test_host_time_and_memory_are_metrics_of_their_own():
    entries = run(case(metric="host", only=(OURS, "sdpa")))
    assert list(entries) == [OURS, "sdpa"]
    assert entries[OURS]["metric"] == "host" and entries[OURS]["median_us"] > 0
    assert entries[OURS]["tflops"] is None
    entry = run(case(True, metric="memory", only=(OURS,)))[OURS]
    assert entry["pass"] == "fwd+bwd" and entry["status"] == "missing"


def test_useful_work():
    problem = WindowAttention(CPU, torch.float32, **WINDOWS)
    assert problem.flops(False) == 4 * 33**2 * 16 * 2 * 4
    assert problem.flops(True) == 10 * 33**2 * 16 * 2 * 4
    assert VarlenAttention(CPU, torch.float32, **CROSS).flops(False) == 4 * (23 * 49 + 15 * 37) * 4 * 16


def test_inputs_are_random_and_reproducible():
    first, second = (WindowAttention(CPU, torch.float32, **WINDOWS) for _ in range(2))
    assert torch.equal(first.inputs[0], second.inputs[0])
    before = first.inputs[0].clone()
    first.draw()
    assert not torch.equal(first.inputs[0], before) and first.inputs[0].std() > 0.5


WINDOWS_OF_FIVE = {"num_windows": 11, "seqlen": 5, "hidden": 8}
HEADS = {"num_heads": 2, "head_dim": 8}
OTHER_OPS = {
    "add_position_2d": {**WINDOWS_OF_FIVE, "num_prefix_tokens": 1},
    "residual_post_norm": WINDOWS_OF_FIVE,
    "gated_residual_projection": {"rows": 50, "hidden": 64, "inner": 48},
    "gated_feed_forward": {"rows": 50, "hidden": 64, "inner": 48},
    "vision_keys_values": {**WINDOWS_OF_FIVE, **HEADS, "num_layers": 3, "num_prefix_tokens": 1},
    "gated_cross_attention": {**WINDOWS_OF_FIVE, **HEADS, "text_len": 33},
    "gated_cross_attention_decode": {
        **WINDOWS_OF_FIVE,
        "hidden": 64,  # the sums of fewer channels have errors that differ by luck
        "num_heads": 2,
        "head_dim": 16,
        "batch": 3,
        "vision_hidden": 8,
    },
    "matrix_product": {"size": 8},
    "copy": {"numel": 64},
}
BESIDE = {
    "gated_cross_attention": {"sdpa_masked"},
    "gated_cross_attention_decode": {"sdpa_cached", "recompute"},
}
GRANULARITIES = [{"granularity": "window"}, {"granularity": "token"}]
CHANGES = {
    "add_position_2d": [{**g, "in_place": in_place} for g in GRANULARITIES for in_place in (False, True)],
    "vision_keys_values": GRANULARITIES,
    "gated_cross_attention_decode": [{"text_len": 1}, {"text_len": 4}],
}


@pytest.mark.parametrize("op", OTHER_OPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_other_ops_run(op, dtype):
    one_way = ("add_position_2d", "gated_cross_attention_decode", "matrix_product", "copy")
    for backward in (False,) if op in one_way else (False, True):
        for change in CHANGES.get(op, [{}]):
            entries = run(replace(case(backward, OTHER_OPS[op] | change, op), dtype=dtype))
            if dtype == "float32":  # of few numbers, SDPA's errors there may be twice eager's by luck
                for name in BESIDE.get(op, ()):
                    entries[name] |= {"status": entries[name]["status"].replace("wrong", "ok")}
            ok = {name for name, entry in entries.items() if entry["status"] == "ok"}
            wanted = {"torch"} if "torch" in entries else {OURS, "eager"} | BESIDE.get(op, set())
            assert ok >= wanted, entries
            assert {entry["status"] for entry in entries.values()} <= {"ok", "missing"}, entries


def test_a_wrong_result_of_the_other_ops_is_found():
    """Keys and values of several layers are one result of many tensors: one of them wrong is enough."""
    for op, shape in OTHER_OPS.items():
        problem = case(False, shape | CHANGES.get(op, [{}])[0], op).build(CPU)

        def prepare(problem) -> Prepared:
            right = problem.implementations()[0].prepare(problem)

            def forward():
                out = right.forward()
                return (*out[:-1], out[-1] * 1.01) if isinstance(out, tuple) else out * 1.01

            return Prepared(right.leaves, forward)

        checked = harness.prepare_and_check(
            case(False, shape, op), problem, Implementation("changed", prepare)
        )
        assert checked[0] is None and checked[1]["status"] == "wrong", (op, checked[1])


def test_work_of_the_other_ops():
    def problem(op, **changes):
        return harness.PROBLEMS[op](CPU, torch.float32, **OTHER_OPS[op] | changes)

    gated = problem("gated_residual_projection")
    assert gated.flops(False) == 2 * 50 * 64 * 48 and gated.flops(True) == 4 * 50 * 64 * 48
    assert gated.bytes(False) == 4 * (2 * 50 * 64 + 50 * 48 + 64 * 48)
    assert gated.bytes(True) == 4 * (50 * 64 + 2 * 50 * 48 + 2 * 64 * 48)
    assert problem("gated_feed_forward").flops(True) == 8 * 50 * 64 * 48
    keys_values = problem("vision_keys_values")
    assert keys_values.flops(False) == 2 * 55 * 8 * (3 * 2 * 16)
    assert keys_values.bytes(False) == 4 * (55 * 8 + 3 * 2 * 16 * 8 + 55 * 3 * 2 * 16)
    text = problem("gated_cross_attention")  # two of its 33 tokens stand before the image
    assert text.flops(False) == 31 * (4 * 55 * 16 + 2 * 8 * 16)
    assert text.flops(True) == 31 * (10 * 55 * 16 + 4 * 8 * 16)
    token = problem("gated_cross_attention_decode")
    assert token.flops(False) == 3 * (4 * 55 * 32 + 2 * 64 * 32)
    assert token.bytes(False) == 4 * (2 * 3 * 64 + 3 * 32 + 2 * 3 * 55 * 32 + 64 * 32 + 64)
    assert problem("residual_post_norm").bytes(True) == 3 * 4 * 55 * 8

"""One case: check every implementation, time the right ones in turns, and tell every one's fate."""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import timing
from bench.attention import VarlenAttention, WindowAttention
from bench.cross_ops import GatedCrossAttention, GatedCrossAttentionDecode, VisionKeysValues
from bench.gated_ops import GatedFeedForward, GatedResidualProjection
from bench.other_ops import AddPosition2d, Copy, MatrixProduct, ResidualPostNorm
from bench.problem import Implementation, Missing, Prepared, Problem

PROBLEMS = {
    problem.op: problem
    for problem in (
        WindowAttention,
        VarlenAttention,
        VisionKeysValues,
        GatedCrossAttention,
        GatedCrossAttentionDecode,
        GatedResidualProjection,
        GatedFeedForward,
        AddPosition2d,
        ResidualPostNorm,
        MatrixProduct,
        Copy,
    )
}
METRICS = ("time", "host", "memory")
NO_COMPILER = "what torch.compile makes is measured in other cases only, for its compile time"
TIMING = "(timing)"
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"

Entry = dict[str, Any]


class DeviceLost(RuntimeError):
    """The CUDA context is gone; only a new process can go on."""


@dataclass(frozen=True)
class Case:
    """One op, shape, dtype, direction and quantity to measure.

    shape: the arguments of the op's problem, as they go into the results. metric: "time" of the device,
    "host" (from the Python call to its return), "memory" (the peak of forward and backward above the inputs).
    only: the implementations that make sense, () for all. compiled: whether to wait for torch.compile.
    """

    section: str
    op: str
    shape: dict[str, Any] = field(hash=False)
    dtype: str = "bfloat16"
    backward: bool = False
    metric: str = "time"
    deterministic: bool = False
    compiled: bool = False
    only: tuple[str, ...] = ()

    def build(self, device: torch.device) -> Problem:
        return PROBLEMS[self.op](device, getattr(torch, self.dtype), **self.shape)

    def entry(self, implementation: str, status: str, reason: str | None = None, **measured: Any) -> Entry:
        """A line of the results; what was not measured is None."""
        empty = dict.fromkeys(
            ("median_us", "iqr", "repeats", "tflops", "gbps", "peak_bytes", "error", "eager_error")
        )
        return {
            "section": self.section,
            "op": self.op,
            "pass": "fwd+bwd" if self.metric == "memory" else "bwd" if self.backward else "fwd",
            "metric": self.metric,
            "shape": self.shape,
            "dtype": self.dtype,
            "deterministic": self.deterministic,
            "implementation": implementation,
            "status": status,
            "reason": reason,
            **empty,
            **measured,
        }


def run_case(
    case: Case,
    device: torch.device,
    *,
    seconds: float,
    settled: Collection[str] = (),
    implementations: list[Implementation] | None = None,
    begin: Callable[[str], None] = lambda name: None,
) -> Iterator[Entry]:
    """Yield one entry for every implementation but the `settled` ones.

    A result that breaks the error rule is "wrong" and is not timed; what cannot be had is "missing", what
    raises is "failed". `begin` hears each implementation's name before it is touched, so that a watcher can
    blame a crash on it, and TIMING before the samples. `seconds` bounds the time spent on the samples.

    Raises DeviceLost, after the entry of the implementation that raised, when the GPU can no longer be used.
    """
    problem = case.build(device)
    if implementations is None:
        implementations = problem.implementations()
    ready: dict[str, tuple[Prepared, Entry]] = {}
    with determinism(case.deterministic):
        for implementation in implementations:
            name = implementation.name
            if name in settled or (case.only and name not in case.only):
                continue
            begin(name)
            prepared, entry = prepare_and_check(case, problem, implementation)
            if prepared is None:
                yield entry
                _raise_if_lost(device)
            else:
                ready[name] = prepared, entry
        begin(TIMING)
        if case.metric == "time":
            yield from _time(case, problem, ready, seconds)
        else:
            for name, (prepared, entry) in ready.items():
                measure = _host_time if case.metric == "host" else _peak_memory
                yield _guarded(case, name, entry, functools.partial(measure, case, problem, prepared))
                _raise_if_lost(device)
    if case.compiled:
        torch.compiler.reset()  # its limit of variants of one function is met in silence


def prepare_and_check(
    case: Case, problem: Problem, implementation: Implementation
) -> tuple[Prepared | None, Entry]:
    """Bind an implementation and check it: (Prepared, its entry), or (None, the entry that says why not)."""
    name = implementation.name
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            if implementation.compiles and not case.compiled:
                raise Missing(NO_COMPILER)
            prepared = implementation.prepare(problem)
            checked = problem.check(prepared, case.backward)
            repeatable = not case.deterministic or _repeats(problem, prepared, case.backward)
        except Missing as missing:
            return None, case.entry(name, "missing", str(missing))
        except Exception as error:
            _free(problem.device)
            notes = "; ".join(dict.fromkeys(str(warning.message).split("\n")[0] for warning in warned))
            return None, case.entry(name, "failed", reason_of(error) + (f" ({notes})" if notes else ""))
    errors = {"error": checked.error, "eager_error": checked.eager_error}
    if not checked.passed:
        reason = f"{checked.name} errs by {checked.error:.3g}, eager by {checked.eager_error:.3g}: not timed"
        return None, case.entry(name, "wrong", reason, **errors)
    if not repeatable:
        return None, case.entry(name, "wrong", "two runs differ in deterministic mode: not timed", **errors)
    return prepared, case.entry(name, "ok", **errors)


def _repeats(problem: Problem, prepared: Prepared, backward: bool) -> bool:
    first, second = (problem.results(prepared, backward) for _ in range(2))
    return all(torch.equal(first[name], second[name]) for name in first)


def timed(problem: Problem, prepared: Prepared, backward: bool) -> timing.Timed:
    """The forward without a graph, or the backward alone, whose forward runs outside the clock."""
    if backward:
        return timing.Timed(prepared.forward, lambda out: problem.backward(prepared, out))
    return timing.Timed(lambda: None, lambda _: _without_graph(prepared))


def _without_graph(prepared: Prepared) -> torch.Tensor:
    with torch.no_grad():
        return prepared.forward()


def _time(
    case: Case, problem: Problem, ready: dict[str, tuple[Prepared, Entry]], seconds: float
) -> Iterator[Entry]:
    clock = timing.clock_of(problem.device)
    calls = {name: timed(problem, prepared, case.backward) for name, (prepared, _) in ready.items()}
    samples, raised = timing.interleave(clock, calls, seconds)
    for name, (_, entry) in ready.items():
        if name in raised:
            yield {**entry, "status": "failed", "reason": reason_of(raised[name])}
            continue
        summary = timing.summarize(samples[name])
        rates = {}
        for rate, amount, unit in (("tflops", problem.flops, 1e6), ("gbps", problem.bytes, 1e3)):
            if (count := amount(case.backward)) is not None:
                rates[rate] = count / summary.median_us / unit
        yield {**entry, **summary._asdict(), **rates}
    _raise_if_lost(problem.device)


def _host_time(case: Case, problem: Problem, prepared: Prepared) -> Entry:
    clock = timing.clock_of(problem.device)
    samples = timing.host_times(clock, lambda: _without_graph(prepared))
    return timing.summarize(samples)._asdict()


def _peak_memory(case: Case, problem: Problem, prepared: Prepared) -> Entry:
    if problem.device.type != "cuda":
        raise Missing("peak memory is read from the CUDA allocator")
    _free(problem.device)
    torch.cuda.reset_peak_memory_stats(problem.device)
    before = torch.cuda.memory_allocated(problem.device)
    problem.gradients(prepared)
    torch.cuda.synchronize(problem.device)
    return {"peak_bytes": torch.cuda.max_memory_allocated(problem.device) - before, "repeats": 1}


def _guarded(case: Case, name: str, entry: Entry, measure: Callable[[], Entry]) -> Entry:
    try:
        return {**entry, **measure()}
    except Missing as missing:
        return case.entry(name, "missing", str(missing))
    except Exception as error:
        return {**entry, "status": "failed", "reason": reason_of(error)}


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """PyTorch's deterministic mode, without its filling of every new tensor, which would be timed too.

    cuBLAS takes part only with a fixed workspace; the one named here has the size of Hopper's default.
    """
    if not wanted:
        yield
        return
    filled = torch.utils.deterministic.fill_uninitialized_memory
    workspace = os.environ.get(CUBLAS_WORKSPACE)
    os.environ[CUBLAS_WORKSPACE] = workspace or ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
        if workspace is None:
            del os.environ[CUBLAS_WORKSPACE]


def reason_of(error: Exception) -> str:
    """One line for the results."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    root: BaseException = error
    while (earlier := root.__cause__ or root.__context__) is not None:
        root = earlier
    parts = [_first_lines(error)] + ([_first_lines(root)] if root is not error else [])
    return ", from ".join(parts)


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:400]


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # a lost device is noticed right after
            torch.cuda.empty_cache()


def _raise_if_lost(device: torch.device) -> None:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise DeviceLost(reason_of(error)) from error

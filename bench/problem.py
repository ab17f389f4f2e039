"""A problem: tensors of one op and shape, what is right for them, and the implementations that solve it."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from infimm_kernels import backends

OURS = "infimm_kernels"  # the default backend; "infimm_kernels:NAME" is one that has to be named


class Missing(Exception):
    """An implementation that cannot be had here; the text says why."""


class Prepared(NamedTuple):
    """An implementation with its inputs bound: `forward()` reads `leaves`, which take the gradients."""

    leaves: tuple[Tensor, ...]
    forward: Callable[[], Tensor]


class Implementation(NamedTuple):
    """`prepare(problem)` binds it or raises Missing; `compiles` says that it comes out of torch.compile."""

    name: str
    prepare: Callable[["Problem"], Prepared]
    compiles: bool = False


def own(
    problem: "Problem",
    candidates: Sequence[backends.Candidate],
    tensors: Sequence[Tensor],
    bind: Callable[["Problem", str | None], Prepared],
) -> list[Implementation]:
    """This package's implementations: the backend chosen for `tensors`, then every other one by its name.

    bind: (problem, backend) -> Prepared. Where nothing can run on a GPU, the call itself will say why.
    """

    def prepare_named(problem: "Problem", candidate: backends.Candidate) -> Prepared:
        reason = candidate.why_not(*tensors)
        if reason is None and problem.device.type == "cpu":
            reason = "an interpreter's time says nothing about a kernel"
        if reason is not None:
            raise Missing(reason)
        return bind(problem, candidate.name)

    chosen = "reference"
    if problem.device.type == "cuda":
        with contextlib.suppress(NotImplementedError):
            chosen = backends.select(problem.op, candidates, None, *tensors)
    named = [
        Implementation(f"{OURS}:{c.name}", functools.partial(prepare_named, candidate=c))
        for c in candidates
        if c.name != chosen
    ]
    return [Implementation(OURS, functools.partial(bind, backend=None)), *named]


class Checked(NamedTuple):
    """The worst result of a check, by error over allowance."""

    name: str
    error: float
    eager_error: float
    passed: bool


class Problem:
    """Base of the problems of every op.

    Inputs are drawn in place, so that what an implementation bound stays bound, and memory left over from an
    earlier result cannot pass for the present one. Results are compared where `expected` computes them.
    """

    op: str
    inputs: tuple[Tensor, ...]
    dout: Tensor

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device)
        self._draws = 0

    def draw(self) -> None:
        """New random inputs, never zeros: others at every call, the same sequence in every process."""
        self._draws += 1
        self._generator.manual_seed(self._draws)
        for x in (*self.inputs, self.dout):
            x.normal_(generator=self._generator)

    def implementations(self) -> list[Implementation]:
        """This package's first, then what stands beside it."""
        raise NotImplementedError

    def expected(self, backward: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """By name of the result, (same-dtype eager, float64) for the present draw."""
        raise NotImplementedError

    def results(self, prepared: Prepared, backward: bool) -> dict[str, Tensor]:
        """What the implementation gives, by the names of `expected`."""
        raise NotImplementedError

    def flops(self, backward: bool) -> int | None:
        """Useful floating-point operations; None where the op only moves bytes."""
        return None

    def bytes(self, backward: bool) -> int | None:
        """Bytes of each input read once and each output written once; None where that is no bound."""
        return None

    def backward(self, prepared: Prepared, out: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the leaves, from the graph behind `out`."""
        return torch.autograd.grad(out, prepared.leaves, self.dout.view(out.shape))

    def gradients(self, prepared: Prepared) -> tuple[Tensor, ...]:
        """Forward and backward once."""
        return self.backward(prepared, prepared.forward())

    def check(self, prepared: Prepared, backward: bool) -> Checked:
        """The one error rule on fresh inputs: at most twice the error of same-dtype eager PyTorch.

        One rounding of the largest exact value to the dtype is always allowed: eager may be exact by luck.
        """
        self.draw()
        expected, results = self.expected(backward), self.results(prepared, backward)
        found = []
        for name, (eager, exact) in expected.items():
            rounding = torch.finfo(self.dtype).eps / 2 * float(exact.abs().max())
            error, eager_error = _max_error(results[name], exact), _max_error(eager, exact)
            allowed = 2 * max(eager_error, rounding)
            passed = results[name].dtype == eager.dtype and error <= allowed
            found.append((passed, -error / allowed, Checked(name, error, eager_error, passed)))
        return min(found, key=lambda item: item[:2])[2]


def _max_error(result: Tensor, exact: Tensor) -> float:
    """The largest absolute difference, found on the device of both; NaN is infinitely off."""
    difference = (result.detach().double() - exact.detach()).abs()
    return float(difference.nan_to_num(nan=torch.inf).max())

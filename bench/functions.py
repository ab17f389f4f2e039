"""The base of the problems whose implementations are functions of the inputs, and what they share."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.problem import Implementation, Prepared, Problem, own
from infimm_kernels import backends


def places(num_windows: int, device: torch.device) -> Tensor:
    """Rows and columns of images of 3 x 3 windows, each followed by its thumbnail, which has no place."""
    windows = torch.arange(num_windows, device=device)
    found = torch.stack((windows // 3 % 3, windows % 3), 1)
    return found.masked_fill((windows % 10 == 9).unsqueeze(1), -1)


class Function(Problem):
    """A problem whose implementations are functions of the inputs, checked whole against `eager`."""

    gradient_names: tuple[str, ...] = ()

    def eager(self, *inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def bind(self, function: Callable[..., Tensor]) -> Prepared:
        leaves = tuple(x.detach().requires_grad_() for x in self.inputs)
        return Prepared(leaves, lambda: function(*leaves))

    def function(self, name: str, function: Callable[..., Tensor], compiles: bool = False) -> Implementation:
        """An implementation; one that compiles is compiled anew for each problem."""

        def prepare(problem: "Function") -> Prepared:
            return problem.bind(torch.compile(function, dynamic=False) if compiles else function)

        return Implementation(name, prepare, compiles)

    def own_and_eager(
        self,
        candidates: Sequence[backends.Candidate],
        tensors: Sequence[Tensor],
        function: Callable[..., Tensor],
        eager: Callable[..., Tensor] | None = None,
    ) -> list[Implementation]:
        """`function(*inputs, backend=)` of this package, eager PyTorch and what torch.compile makes of it.

        eager: what stands as such beside ours; `self.eager` where it is None.
        """
        eager = eager or self.eager

        def bind(problem: "Function", backend: str | None) -> Prepared:
            return problem.bind(functools.partial(function, backend=backend))

        return [
            *own(self, candidates, tensors, bind),
            self.function("eager", eager),
            self.function("compiled_eager", eager, compiles=True),
        ]

    def expected(self, backward: bool) -> dict[str, tuple[Tensor, Tensor]]:
        eager, exact = (
            self._evaluate(self._prepared_eager(t), backward) for t in (self.dtype, torch.float64)
        )
        return {name: (eager[name], exact[name]) for name in exact}

    def results(self, prepared: Prepared, backward: bool) -> dict[str, Tensor]:
        return self._evaluate(prepared, backward)

    def _prepared_eager(self, dtype: torch.dtype) -> Prepared:
        leaves = tuple(x.detach().to(dtype).requires_grad_() for x in self.inputs)
        return Prepared(leaves, lambda: self.eager(*leaves))

    def _evaluate(self, prepared: Prepared, backward: bool) -> dict[str, Tensor]:
        if not backward:
            with torch.no_grad():
                return {"out": prepared.forward()}
        out = prepared.forward()
        grads = torch.autograd.grad(out, prepared.leaves, self.dout.to(out.dtype))
        return dict(zip(self.gradient_names, grads, strict=True))

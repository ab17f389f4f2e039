"""The problems of the ops beside attention, and of the two ceilings of a machine: matrix product and copy."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.problem import Implementation, Prepared, Problem, own
from infimm_kernels import add_position_2d, gated_residual_projection
from infimm_kernels.gated_residual import op as gated_op
from infimm_kernels.position_2d import op as position_op
from infimm_kernels.position_2d import reference as position_reference


class _Function(Problem):
    """A problem whose implementations are functions of the inputs, checked whole against `eager`."""

    gradient_names: tuple[str, ...] = ()

    def eager(self, *inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def bind(self, function: Callable[..., Tensor]) -> Prepared:
        leaves = tuple(x.detach().requires_grad_() for x in self.inputs)
        return Prepared(leaves, lambda: function(*leaves))

    def function(self, name: str, function: Callable[..., Tensor], compiles: bool = False) -> Implementation:
        """An implementation; one that compiles is compiled anew for each problem."""

        def prepare(problem: "_Function") -> Prepared:
            return problem.bind(torch.compile(function, dynamic=False) if compiles else function)

        return Implementation(name, prepare, compiles)

    def own_and_eager(self, candidates, tensors: tuple[Tensor, ...], function: Callable[..., Tensor]):
        """`function(*inputs, backend=)` of this package, eager PyTorch and what torch.compile makes of it."""

        def bind(problem: "_Function", backend: str | None) -> Prepared:
            return problem.bind(functools.partial(function, backend=backend))

        return [
            *own(self, candidates, tensors, bind),
            self.function("eager", self.eager),
            self.function("compiled_eager", self.eager, compiles=True),
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


class AddPosition2d(_Function):
    """add_position_2d on a square image's windows; every thumbnail's place is negative."""

    op = "add_position_2d"

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        num_windows,
        seqlen,
        hidden,
        granularity,
        num_prefix_tokens,
    ):
        super().__init__(device, dtype)
        self.granularity, self.num_prefix_tokens = granularity, num_prefix_tokens
        self.side = round((seqlen - num_prefix_tokens) ** 0.5)
        windows = torch.arange(num_windows, device=device)
        places = torch.stack((windows // 3 % 3, windows % 3), 1)
        self.positions = places.masked_fill((windows % 10 == 9).unsqueeze(1), -1)
        self.inputs = (torch.empty(num_windows, seqlen, hidden, dtype=dtype, device=device),)
        self.dout = torch.empty_like(self.inputs[0])
        self.draw()

    def eager(self, x: Tensor) -> Tensor:
        shape = (1, 1) if self.granularity == "window" else (self.side, self.side)
        return position_reference.forward(x, self.positions, self.granularity, shape, self.num_prefix_tokens)

    def implementations(self) -> list[Implementation]:
        def ours(x: Tensor, backend: str | None) -> Tensor:
            options = {"granularity": self.granularity, "num_prefix_tokens": self.num_prefix_tokens}
            return add_position_2d(x, self.positions, **options, backend=backend)

        return self.own_and_eager(position_op.CANDIDATES, (*self.inputs, self.positions), ours)

    def bytes(self, backward: bool) -> int:
        return 2 * self.inputs[0].nbytes


class GatedResidualProjection(_Function):
    """gated_residual_projection on `rows` tokens."""

    op = "gated_residual_projection"
    gradient_names = ("dx", "do", "dweight", "dgate")

    def __init__(self, device: torch.device, dtype: torch.dtype, *, rows: int, hidden: int, inner: int):
        super().__init__(device, dtype)
        make = functools.partial(torch.empty, dtype=dtype, device=device)
        self.inputs = make(rows, hidden), make(rows, inner), make(hidden, inner), make(hidden)
        self.dout = make(rows, hidden)
        self.draw()

    def eager(self, x: Tensor, o: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        return x + gate.tanh() * (o @ weight.t())

    def implementations(self) -> list[Implementation]:
        return self.own_and_eager(gated_op.CANDIDATES, self.inputs, gated_residual_projection)

    def flops(self, backward: bool) -> int:
        rows, hidden = self.inputs[0].shape
        return (4 if backward else 2) * rows * hidden * self.inputs[1].shape[1]


class MatrixProduct(_Function):
    """A square product through torch: the arithmetic ceiling of the same run. Checked on three rows."""

    op = "matrix_product"

    def __init__(self, device: torch.device, dtype: torch.dtype, *, size: int):
        super().__init__(device, dtype)
        self.inputs = tuple(torch.empty(size, size, dtype=dtype, device=device) for _ in range(2))
        self.dout = torch.empty(0, dtype=dtype, device=device)
        self.draw()

    def implementations(self) -> list[Implementation]:
        return [self.function("torch", torch.matmul)]

    def expected(self, backward: bool) -> dict[str, tuple[Tensor, Tensor]]:
        a, b = (x.detach() for x in self.inputs)
        rows = self._rows(a)
        return {"out": (rows @ b, rows.double() @ b.double())}

    def results(self, prepared: Prepared, backward: bool) -> dict[str, Tensor]:
        return {"out": self._rows(super().results(prepared, backward)["out"])}

    def flops(self, backward: bool) -> int:
        return 2 * len(self.inputs[0]) ** 3

    @staticmethod
    def _rows(x: Tensor) -> Tensor:
        return x[[0, len(x) // 2, len(x) - 1]]


class Copy(_Function):
    """A copy within device memory: the ceiling of bandwidth of the same run."""

    op = "copy"

    def __init__(self, device: torch.device, dtype: torch.dtype, *, numel: int):
        super().__init__(device, dtype)
        self.inputs = (torch.empty(numel, dtype=dtype, device=device),)
        self.dout = torch.empty(0, dtype=dtype, device=device)
        self.draw()

    def eager(self, x: Tensor) -> Tensor:
        return x.clone()

    def implementations(self) -> list[Implementation]:
        target = torch.empty_like(self.inputs[0])
        return [self.function("torch", lambda x: target.copy_(x))]

    def bytes(self, backward: bool) -> int:
        return 2 * self.inputs[0].nbytes

"""The problems of the memory-bound ops, and of the two ceilings of a machine: matrix product and copy."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.functions import Function, places
from bench.problem import Implementation, Prepared
from infimm_kernels import add_position_2d
from infimm_kernels.position_2d import op as position_op
from infimm_kernels.position_2d import reference as position_reference
from infimm_kernels.post_norm import op as post_norm_op
from infimm_kernels.post_norm import residual_post_norm


class AddPosition2d(Function):
    """add_position_2d on a square image's windows; every thumbnail's place is negative.

    In place the features change from call to call, by the same encoding each time: the traffic is the same.
    """

    op = "add_position_2d"

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        num_windows: int,
        seqlen: int,
        hidden: int,
        granularity: str,
        num_prefix_tokens: int,
        in_place: bool = False,
    ):
        super().__init__(device, dtype)
        self.granularity, self.num_prefix_tokens, self.in_place = granularity, num_prefix_tokens, in_place
        self.side = round((seqlen - num_prefix_tokens) ** 0.5)
        self.positions = places(num_windows, device)
        self.inputs = (torch.empty(num_windows, seqlen, hidden, dtype=dtype, device=device),)
        self.dout = torch.empty_like(self.inputs[0])
        self.draw()

    def bind(self, function: Callable[..., Tensor]) -> Prepared:
        if not self.in_place:
            return super().bind(function)
        (x,) = (x.detach() for x in self.inputs)  # what is written over takes no gradient
        return Prepared((x,), lambda: function(x))

    def eager(self, x: Tensor) -> Tensor:
        shape = (1, 1) if self.granularity == "window" else (self.side, self.side)
        return position_reference.forward(x, self.positions, self.granularity, shape, self.num_prefix_tokens)

    def implementations(self) -> list[Implementation]:
        def ours(x: Tensor, backend: str | None) -> Tensor:
            options = {"granularity": self.granularity, "num_prefix_tokens": self.num_prefix_tokens}
            out = x if self.in_place else None
            return add_position_2d(x, self.positions, **options, out=out, backend=backend)

        def in_place(x: Tensor) -> Tensor:
            return x.copy_(self.eager(x))

        eager = in_place if self.in_place else self.eager
        return self.own_and_eager(position_op.CANDIDATES, (*self.inputs, self.positions), ours, eager)

    def bytes(self, backward: bool) -> int:
        return 2 * self.inputs[0].nbytes


class ResidualPostNorm(Function):
    """residual_post_norm as every block of the ViT has it twice: x + LayerNorm(y)."""

    op = "residual_post_norm"
    gradient_names = ("dx", "dy", "dweight", "dbias")
    EPS = 1e-6

    def __init__(
        self, device: torch.device, dtype: torch.dtype, *, num_windows: int, seqlen: int, hidden: int
    ):
        super().__init__(device, dtype)
        make = functools.partial(torch.empty, dtype=dtype, device=device)
        stream = num_windows, seqlen, hidden
        self.inputs = make(stream), make(stream), make(hidden), make(hidden)
        self.dout = make(stream)
        self.draw()

    def eager(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x + F.layer_norm(y, y.shape[-1:], weight, bias, self.EPS)

    def implementations(self) -> list[Implementation]:
        ours = functools.partial(residual_post_norm, eps=self.EPS)
        return self.own_and_eager(post_norm_op.CANDIDATES, self.inputs, ours)

    def bytes(self, backward: bool) -> int:
        """Forward x and y read and the result written; backward y and dy for it. That of x is dout itself."""
        return 3 * self.inputs[0].nbytes


class MatrixProduct(Function):
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


class Copy(Function):
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

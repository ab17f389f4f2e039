"""The problems of the two gated branches of a block: a projection, and a whole feed-forward."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.functions import Function
from bench.problem import Implementation
from infimm_kernels import gated_residual_projection
from infimm_kernels.gated_feed_forward import gated_feed_forward
from infimm_kernels.gated_residual import op as gated_op


class GatedResidualProjection(Function):
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

    def bytes(self, backward: bool) -> int:
        """With few rows the weight is nearly all of it. Backward dy is read and the gradients are written."""
        x, o, weight, _ = self.inputs
        return x.nbytes + (
            2 * (o.nbytes + weight.nbytes) if backward else x.nbytes + o.nbytes + weight.nbytes
        )


class GatedFeedForward(Function):
    """gated_feed_forward on `rows` tokens; weights of the variance that keeps the hidden units near 1."""

    op = "gated_feed_forward"
    gradient_names = ("dx", "dnorm_weight", "dnorm_bias", "dweight_in", "dweight_out", "dgate")
    EPS = 1e-5

    def __init__(self, device: torch.device, dtype: torch.dtype, *, rows: int, hidden: int, inner: int):
        super().__init__(device, dtype)
        make = functools.partial(torch.empty, dtype=dtype, device=device)
        vectors = make(hidden), make(hidden)
        self.inputs = make(rows, hidden), *vectors, make(inner, hidden), make(hidden, inner), make(hidden)
        self.dout = make(rows, hidden)
        self.draw()

    def draw(self) -> None:
        super().draw()
        for weight in self.inputs[3:5]:
            weight.mul_(weight.shape[1] ** -0.5)

    def eager(
        self, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight_in: Tensor, weight_out: Tensor, gate
    ) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, self.EPS)
        return x + gate.tanh() * F.linear(F.gelu(F.linear(normed, weight_in)), weight_out)

    def implementations(self) -> list[Implementation]:
        ours = functools.partial(gated_feed_forward, eps=self.EPS)
        return self.own_and_eager(gated_op.CANDIDATES, self.inputs, ours)

    def flops(self, backward: bool) -> int:
        return (8 if backward else 4) * len(self.inputs[0]) * self.inputs[3].numel()

    def bytes(self, backward: bool) -> int:
        x, *_, weight_in, weight_out, _ = self.inputs
        weights = weight_in.nbytes + weight_out.nbytes
        return 3 * x.nbytes + 2 * weights if backward else 2 * x.nbytes + weights

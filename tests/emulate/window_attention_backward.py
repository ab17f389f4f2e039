"""csrc/window_attention_backward.cu, compiled by g++ behind cuda_shim, as the extension; and the formula."""

import ctypes

import torch
from torch import Tensor

from tests.emulate import hopper
from tests.emulate.window_attention import formula as forward_formula

KERNEL = hopper.Kernel("window_attention_backward", (64, 112))
POINTERS = ("q", "k", "v", "dout", "lse", "delta", "dq_sum", "dk", "dv", "cu_seqlens_q", "cu_seqlens_k")


class EmulatedExtension:
    """Takes what `_C.window_attention_backward` takes; dk and dv may be slices with guards of the test."""

    DTYPES = hopper.DTYPES

    def __init__(self, compiled: ctypes.CDLL, seed: int = 0):
        self.compiled, self.seed = compiled, seed
        self.streams = []

    def window_attention_backward(
        self, *, softmax_scale: float, device: int | None, stream: int, **arguments
    ) -> None:
        assert device is None, "tensors of this test are on the CPU"
        self.streams.append(stream)
        size = arguments["total_q"] * arguments["num_heads"] * arguments["head_dim"] * 4
        guarded = hopper.Guarded({"dq_sum": size}, {"dq_sum": arguments["dq_sum"]})
        error = self.compiled.emulate_window_attention_backward(
            hopper.pointers(arguments | guarded.addresses, POINTERS),
            hopper.integers(arguments, POINTERS),
            ctypes.c_float(softmax_scale),
            ctypes.c_uint64(self.seed),
        )
        hopper.raise_on(error, self.compiled)
        guarded.copy_back(arguments)


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    cu_seqlens_q: list[int],
    cu_seqlens_k: list[int],
    softmax_scale: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) through autograd, in `dtype`; None computes as eager PyTorch does."""
    leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in (q, k, v)]
    out, _ = forward_formula(*leaves, cu_seqlens_q, cu_seqlens_k, softmax_scale)
    return torch.autograd.grad(out, leaves, dout.to(out.dtype))

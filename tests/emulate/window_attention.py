"""csrc/window_attention.cu, compiled by g++ behind cuda_shim, as the extension; and the formula."""

import ctypes

import torch
from torch import Tensor

from tests.emulate import hopper

KERNEL = hopper.Kernel("window_attention", (64, 112, 128))
POINTERS = ("q", "k", "v", "out", "lse", "cu_seqlens_q", "cu_seqlens_k")


class EmulatedExtension:
    """Takes what `_C.window_attention` takes, as integers, and runs the launcher compiled for the CPU.

    num_sms blocks share the work; `seed` picks the order of everything.
    """

    DTYPES = hopper.DTYPES

    def __init__(self, compiled: ctypes.CDLL, num_sms: int = 2, seed: int = 0):
        self.compiled, self.num_sms, self.seed = compiled, num_sms, seed
        self.streams = []

    def window_attention(self, *, softmax_scale: float, device: int | None, stream: int, **arguments) -> None:
        assert device is None, "tensors of this test are on the CPU"
        self.streams.append(stream)
        rows = arguments["total_q"] * arguments["num_heads"]
        guarded = hopper.Guarded({"out": rows * arguments["head_dim"] * 2, "lse": rows * 4})
        error = self.compiled.emulate_window_attention(
            hopper.pointers(arguments | guarded.addresses, POINTERS),
            hopper.integers(arguments, POINTERS),
            ctypes.c_float(softmax_scale),
            ctypes.c_uint(self.num_sms),
            ctypes.c_uint64(self.seed),
        )
        hopper.raise_on(error, self.compiled)
        guarded.copy_back(arguments)


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: list[int],
    cu_seqlens_k: list[int],
    softmax_scale: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in `dtype`; None computes as eager PyTorch does, lse in float32."""
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for i in range(len(cu_seqlens_q) - 1):
        queries = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]].transpose(0, 1)
        keys = slice(cu_seqlens_k[i], cu_seqlens_k[i + 1])
        key, value = (x[keys].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scores = queries @ key.mT * softmax_scale
        weights = scores.softmax(-1) if keys.stop > keys.start else scores
        outs.append((weights @ value).transpose(0, 1))
        lses.append(scores.to(dtype or torch.float32).logsumexp(-1))
    if not outs:
        return torch.zeros_like(q), torch.full((q.shape[1], len(q)), -torch.inf, dtype=dtype)
    return torch.cat(outs), torch.cat(lses, 1)

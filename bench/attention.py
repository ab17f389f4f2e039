"""The problems of attention inside segments: packed windows, and queries over other keys."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from bench import baselines
from bench.problem import Implementation, Prepared, Problem, own
from infimm_kernels import backends, varlen_attention, window_attention
from infimm_kernels.attention import choice
from infimm_kernels.testing import packed_lengths


class Attention(Problem):
    """Segments of `lengths_q` queries over `lengths_k` keys, checked on the first, middle and last segment.

    Baselines take q, k and v as three leaves, so they are not charged for joining their gradients into one.
    """

    candidates: tuple[backends.Candidate, ...]

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        lengths_q: Sequence[int],
        lengths_k: Sequence[int],
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
    ):
        super().__init__(device, dtype)
        self.lengths_q, self.lengths_k = tuple(lengths_q), tuple(lengths_k)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.uniform = len(set(self.lengths_q)) == 1 and len(set(self.lengths_k)) == 1
        self.cu_seqlens_q, self.cu_seqlens_k = (
            packed_lengths(lengths, device) for lengths in (self.lengths_q, self.lengths_k)
        )
        self.dout = torch.empty(sum(lengths_q), num_heads, head_dim, dtype=dtype, device=device)

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [total_q, num_heads, head_dim] and k, v [total_k, num_kv_heads, head_dim], views or inputs."""
        raise NotImplementedError

    def ours(self, backend: str | None) -> Prepared:
        """This package's op on the inputs."""
        raise NotImplementedError

    def flops(self, backward: bool) -> int:
        pairs = sum(a * b for a, b in zip(self.lengths_q, self.lengths_k, strict=True))
        return (10 if backward else 4) * pairs * self.num_heads * self.head_dim

    def implementations(self) -> list[Implementation]:
        return own(self, self.candidates, self.inputs, type(self).ours) + baselines.ATTENTION

    def expected(self, backward: bool) -> dict[str, tuple[Tensor, Tensor]]:
        eager, exact = (self._by_segment(dtype, backward) for dtype in (self.dtype, torch.float64))
        return {name: (eager[name], exact[name]) for name in exact}

    def results(self, prepared: Prepared, backward: bool) -> dict[str, Tensor]:
        if not backward:
            with torch.no_grad():
                out = prepared.forward()
            return {"out": self._checked(out.reshape(-1, self.num_heads, self.head_dim), self.lengths_q)}
        grads = self.gradients(prepared)
        if len(grads) == 1:
            grads = grads[0].reshape(-1, 3, self.num_heads, self.head_dim).unbind(1)
        heads = self.num_heads, self.num_kv_heads, self.num_kv_heads
        lengths = self.lengths_q, self.lengths_k, self.lengths_k
        return {
            name: self._checked(grad.reshape(-1, h, self.head_dim), segments)
            for name, grad, h, segments in zip(("dq", "dk", "dv"), grads, heads, lengths, strict=True)
        }

    def _segments(self) -> list[int]:
        return sorted({0, len(self.lengths_q) // 2, len(self.lengths_q) - 1})

    def _checked(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """The rows of x [total, heads, head_dim] that belong to the checked segments."""
        starts = [0, *itertools.accumulate(lengths)]
        return torch.cat([x[starts[s] : starts[s + 1]] for s in self._segments()])

    def _by_segment(self, dtype: torch.dtype, backward: bool) -> dict[str, Tensor]:
        starts_q, starts_k = ([0, *itertools.accumulate(x)] for x in (self.lengths_q, self.lengths_k))
        q, k, v = (x.detach() for x in self.qkv())
        found: dict[str, list[Tensor]] = {}
        for s in self._segments():
            rows, keys = slice(starts_q[s], starts_q[s + 1]), slice(starts_k[s], starts_k[s + 1])
            leaves = [x.to(dtype).requires_grad_() for x in (q[rows], k[keys], v[keys])]
            out = baselines.eager(*(x.transpose(0, 1)[None] for x in leaves))[0].transpose(0, 1)
            results = {"out": out.detach()}
            if backward:
                grads = torch.autograd.grad(out, leaves, self.dout[rows].to(dtype))
                results = dict(zip(("dq", "dk", "dv"), grads, strict=True))
            for name, x in results.items():
                found.setdefault(name, []).append(x)
        return {name: torch.cat(parts) for name, parts in found.items()}


class WindowAttention(Attention):
    """window_attention on `num_windows` of `seqlen` tokens, or on windows of `lengths`."""

    op = "window_attention"
    candidates = choice.WINDOW_CANDIDATES

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        num_windows: int = 0,
        seqlen: int = 0,
        lengths: Sequence[int] = (),
        num_heads: int,
        head_dim: int,
        num_prefix_tokens: int = 0,
    ):
        lengths = lengths or [seqlen] * num_windows
        super().__init__(device, dtype, lengths, lengths, num_heads, num_heads, head_dim)
        self.num_prefix_tokens = num_prefix_tokens
        self.inputs = (torch.empty(sum(lengths), 3, num_heads, head_dim, dtype=dtype, device=device),)
        self.draw()

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.inputs[0].unbind(1)

    def ours(self, backend: str | None) -> Prepared:
        options = {"num_prefix_tokens": self.num_prefix_tokens, "backend": backend}
        leaf = self.inputs[0].detach()
        if self.uniform:
            leaf = leaf.unflatten(0, (len(self.lengths_q), -1)).requires_grad_()
            return Prepared((leaf,), lambda: window_attention(leaf, **options))
        leaf.requires_grad_()
        options["max_seqlen"] = max(self.lengths_q)
        return Prepared((leaf,), lambda: window_attention(leaf, self.cu_seqlens_q, **options))


class VarlenAttention(Attention):
    """varlen_attention of segments of `lengths_q` queries over `lengths_k` keys."""

    op = "varlen_attention"
    candidates = choice.VARLEN_CANDIDATES

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        lengths_q: Sequence[int],
        lengths_k: Sequence[int],
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
    ):
        super().__init__(device, dtype, lengths_q, lengths_k, num_heads, num_kv_heads, head_dim)
        shapes = [(sum(lengths_q), num_heads, head_dim)] + [(sum(lengths_k), num_kv_heads, head_dim)] * 2
        self.inputs = tuple(torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
        self.draw()

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.inputs

    def ours(self, backend: str | None) -> Prepared:
        leaves = tuple(x.detach().requires_grad_() for x in self.inputs)
        maxima = {"max_seqlen_q": max(self.lengths_q), "max_seqlen_k": max(self.lengths_k)}
        cu_seqlens = self.cu_seqlens_q, self.cu_seqlens_k
        return Prepared(leaves, lambda: varlen_attention(*leaves, *cu_seqlens, **maxima, backend=backend))

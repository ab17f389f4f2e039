"""What a user of attention would write without this package, each through its best interface.

Segments of equal length go to a dense call on [num_segments, seqlen] views; ragged ones to the library's own
form for them. A library that cannot be imported, or a shape that it cannot express, is `Missing` with the
reason; a call that fails is left to raise.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.problem import Implementation, Missing, Prepared

if TYPE_CHECKING:
    from bench.attention import Attention


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [batch, heads, len_q, head_dim] over k, v [batch, kv_heads, len_k, head_dim], in plain ops."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    return scores.softmax(3) @ v


def _leaves(problem: "Attention") -> tuple[Tensor, ...]:
    """q, k, v that take gradients: [num_segments, seqlen, heads, head_dim] or [total, heads, head_dim]."""
    tensors = [x.detach() for x in problem.qkv()]
    if problem.uniform:
        tensors = [x.unflatten(0, (len(problem.lengths_q), -1)) for x in tensors]
    return tuple(x.requires_grad_() for x in tensors)


def _import(module: str, *attributes: str) -> ModuleType:
    """The module, with `attributes` in it; Missing with the reason when it cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = importlib.import_module(module)
        for attribute in attributes:
            getattr(found, attribute)
    except Exception as error:  # a broken binary raises anything: ImportError, OSError, RuntimeError
        raise Missing(f"{module} cannot be imported: {type(error).__name__}: {error}") from error
    return found


def _need_cuda(problem: "Attention") -> None:
    if problem.device.type != "cuda":
        raise Missing("needs a CUDA device")


def _dense_heads_first(
    problem: "Attention", attention: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Prepared:
    """`attention` takes and gives [batch, heads, seqlen, head_dim]; ragged segments go one by one."""
    leaves = _leaves(problem)
    if problem.uniform:
        return Prepared(leaves, lambda: attention(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2))

    def one_by_one() -> Tensor:
        parts = zip(
            leaves[0].split(problem.lengths_q),
            leaves[1].split(problem.lengths_k),
            leaves[2].split(problem.lengths_k),
            strict=True,
        )
        outs = [attention(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1) for part in parts]
        return torch.cat(outs)

    return Prepared(leaves, one_by_one)


def _eager(problem: "Attention") -> Prepared:
    return _dense_heads_first(problem, eager)


def _compiled_eager(problem: "Attention") -> Prepared:
    if not problem.uniform:
        raise Missing("one graph for each length would have to be compiled")
    return _dense_heads_first(problem, torch.compile(eager, dynamic=False, fullgraph=True))


def _sdpa(problem: "Attention", backend: SDPBackend | None) -> Prepared:
    if backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        _need_cuda(problem)
    gqa = problem.num_heads != problem.num_kv_heads

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)

    return _dense_heads_first(problem, attention)


def _torch_varlen(problem: "Attention") -> Prepared:
    if problem.uniform:
        raise Missing("the dense call of sdpa_flash runs the same kernel")
    varlen_attn = _import("torch.nn.attention.varlen", "varlen_attn").varlen_attn
    _need_cuda(problem)
    leaves = _leaves(problem)
    arguments = (problem.cu_seqlens_q, problem.cu_seqlens_k, max(problem.lengths_q), max(problem.lengths_k))
    options = {"enable_gqa": True} if problem.num_heads != problem.num_kv_heads else {}
    return Prepared(leaves, lambda: varlen_attn(*leaves, *arguments, **options))


def _flash_attn(problem: "Attention", module: str) -> Prepared:
    """FlashAttention 2, 3 and 4: one interface, [batch, seqlen, heads, head_dim] or packed."""
    found = _import(module, "flash_attn_func", "flash_attn_varlen_func")
    _need_cuda(problem)
    leaves = _leaves(problem)
    options = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
    if problem.uniform:
        return Prepared(leaves, lambda: _first(found.flash_attn_func(*leaves, **options)))
    options |= {"cu_seqlens_q": problem.cu_seqlens_q, "cu_seqlens_k": problem.cu_seqlens_k}
    options |= {"max_seqlen_q": max(problem.lengths_q), "max_seqlen_k": max(problem.lengths_k)}
    return Prepared(leaves, lambda: _first(found.flash_attn_varlen_func(*leaves, **options)))


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _xformers(problem: "Attention") -> Prepared:
    ops = _import("xformers.ops", "memory_efficient_attention")
    _need_cuda(problem)
    leaves, bias, groups = _leaves(problem), None, problem.num_heads // problem.num_kv_heads
    if not problem.uniform:
        masks = _import("xformers.ops.fmha.attn_bias", "BlockDiagonalMask")
        bias = masks.BlockDiagonalMask.from_seqlens(list(problem.lengths_q), list(problem.lengths_k))

    def attend() -> Tensor:
        q, k, v = leaves if problem.uniform else (x[None] for x in leaves)  # [batch, seqlen, heads, head_dim]
        if groups > 1:  # [batch, seqlen, kv_heads, groups, head_dim]
            q = q.unflatten(2, (-1, groups))
            k, v = (x.unsqueeze(3).expand(-1, -1, -1, groups, -1) for x in (k, v))
        return ops.memory_efficient_attention(q, k, v, attn_bias=bias)

    return Prepared(leaves, attend)


def _flex(problem: "Attention") -> Prepared:
    flex = _import("torch.nn.attention.flex_attention", "flex_attention", "create_block_mask")
    attention = torch.compile(flex.flex_attention, dynamic=False, fullgraph=True)
    leaves, mask = _leaves(problem), None
    gqa = problem.num_heads != problem.num_kv_heads
    if not problem.uniform:
        segment_q, segment_k = (
            torch.repeat_interleave(torch.tensor(lengths, device=problem.device))
            for lengths in (problem.lengths_q, problem.lengths_k)
        )

        def same_segment(b, h, row, column):
            return segment_q[row] == segment_k[column]

        totals = sum(problem.lengths_q), sum(problem.lengths_k)
        mask = flex.create_block_mask(same_segment, None, None, *totals, device=problem.device)

    def attend() -> Tensor:
        # On the CPU it refuses what requires a gradient even where none is recorded.
        tensors = leaves if torch.is_grad_enabled() else (x.detach() for x in leaves)
        q, k, v = (x.transpose(-3, -2) for x in tensors)
        if problem.uniform:
            return attention(q, k, v, enable_gqa=gqa).transpose(1, 2)
        return attention(q[None], k[None], v[None], block_mask=mask, enable_gqa=gqa)[0].transpose(0, 1)

    return Prepared(leaves, attend)


ATTENTION = [
    Implementation("sdpa_flash", functools.partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION)),
    Implementation("sdpa_cudnn", functools.partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION)),
    Implementation("sdpa_efficient", functools.partial(_sdpa, backend=SDPBackend.EFFICIENT_ATTENTION)),
    Implementation("sdpa_math", functools.partial(_sdpa, backend=SDPBackend.MATH)),
    Implementation("sdpa", functools.partial(_sdpa, backend=None)),
    Implementation("torch_varlen", _torch_varlen),
    Implementation("flash_attn_2", functools.partial(_flash_attn, module="flash_attn")),
    Implementation("flash_attn_3", functools.partial(_flash_attn, module="flash_attn_interface")),
    Implementation("flash_attn_4", functools.partial(_flash_attn, module="flash_attn.cute")),
    Implementation("xformers", _xformers),
    Implementation("flex_attention", _flex, compiles=True),
    Implementation("compiled_eager", _compiled_eager, compiles=True),
    Implementation("eager", _eager),
]

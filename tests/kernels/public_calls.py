"""Calls of the public ops as functions of their floating inputs alone, to test what each owes to PyTorch."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from infimm_kernels import (
    add_position_2d,
    gated_cross_attention,
    gated_residual_projection,
    media_segments,
    varlen_attention,
    window_attention,
)
from infimm_kernels.testing import packed_lengths
from tests.kernels.cases import attention_inputs, gated_inputs

POSITIONS = torch.tensor([[0, 1], [-1, -1], [2, 0]])
ROW_MASK = torch.tensor([[True, False, True, True], [False, True, True, False]])
LOCATIONS = torch.tensor([[False, True, False, False, True], [False] * 5])


class Case(NamedTuple):
    """A public call as a function of its floating inputs alone."""

    call: Callable
    inputs: tuple[torch.Tensor, ...]


def varlen(dtype=torch.float64) -> Case:
    q, k, v, cu_q, cu_k = attention_inputs((3, 2, 4), (2, 0, 5), 2, 1, 8, dtype)
    return Case(lambda q, k, v: varlen_attention(q, k, v, cu_q, cu_k), (q, k, v))


def window(dtype=torch.float64) -> Case:
    qkv = torch.randn(3, 5, 3, 2, 8, dtype=dtype, requires_grad=True)
    return Case(window_attention, (qkv,))


def packed_window(dtype=torch.float64) -> Case:
    qkv, cu_seqlens = torch.randn(9, 3, 2, 8, dtype=dtype, requires_grad=True), packed_lengths((4, 0, 5))
    return Case(lambda qkv: window_attention(qkv, cu_seqlens), (qkv,))


def position(dtype=torch.float64) -> Case:
    x = torch.randn(3, 5, 8, dtype=dtype, requires_grad=True)
    return Case(lambda x: add_position_2d(x, POSITIONS, granularity="token", num_prefix_tokens=1), (x,))


def gated(dtype=torch.float64) -> Case:
    return Case(
        lambda *t: gated_residual_projection(*t, row_mask=ROW_MASK), gated_inputs((2, 4), dtype=dtype)
    )


def cross(dtype=torch.float64) -> Case:
    segments = media_segments(LOCATIONS, [3, 2], [2, 0])
    shapes = ((2, 5, 6), (2, 5, 2, 4), (5, 2, 4), (5, 2, 4), (6, 8), (6,))
    inputs = tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return Case(lambda *t: gated_cross_attention(*t, segments), inputs)

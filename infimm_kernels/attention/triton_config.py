"""Tile sizes of the attention kernels, and the constants that a launch derives from its problem."""

import functools
from typing import NamedTuple

import torch
import triton

FLOAT32 = torch.finfo(torch.float32)
MAX_PEELED_HEAD_DIM = 128  # wider heads have no registers left for prefix tokens


class ForwardConfig(NamedTuple):
    pieces: tuple[int, ...]
    block_m: int
    block_n: int
    prefix_block_n: int  # tile of keys in the program that has the prefix queries too
    num_warps: int
    num_stages: int
    drop_tail: bool  # whether code for a last part of a tile is left out where no window has one
    one_loop: bool


class BackwardConfig(NamedTuple):
    pieces: tuple[int, ...]
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class BackwardConfigs(NamedTuple):
    """Tiles of the kernel that adds up dq with atomics, and of the two of the deterministic mode."""

    fused: BackwardConfig
    dkdv: BackwardConfig
    dq: BackwardConfig


@functools.lru_cache(maxsize=256)
def forward_config(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> ForwardConfig:
    """The tiles for a GPU of this compute capability, chosen by the ledger; their speed is not measured."""
    if dtype == torch.float32:
        # Exact float32 products run outside the tensor cores; larger tiles spill by the kilobyte.
        widths = pieces(head_dim, exact=False)
        tiles = {16: (64, 32, 4), 32: (64, 32, 4), 64: (64, 32, 8), 128: (16, 32, 4)}
        block_m, block_n, num_warps = tiles.get(widths[0], (16, 16, 4))
        return ForwardConfig(widths, block_m, block_n, block_n, num_warps, 1, True, True)
    if head_dim > MAX_PEELED_HEAD_DIM:
        return ForwardConfig(pieces(head_dim, exact=False), 64, 32, 32, 4, 1, True, True)
    if capability[0] in (9, 10):  # the GPUs with more than 200 KB of shared memory
        # Without the tail ptxas makes the wgmma instructions of the main loop wait for each other (C7515).
        return ForwardConfig(pieces(head_dim, exact=False), 128, 128, 64, 8, 2, False, False)
    return ForwardConfig(pieces(head_dim, exact=True), 128, 64, 32, 8, 2, True, False)


@functools.lru_cache(maxsize=256)
def backward_config(head_dim: int, capability: tuple[int, int]) -> BackwardConfigs:
    """As `forward_config`; float32 has no backward here."""
    if head_dim > MAX_PEELED_HEAD_DIM:
        widths = pieces(head_dim, exact=False)
        return BackwardConfigs(*(BackwardConfig(widths, 32, 32, 4, 1),) * 3)
    large = capability[0] in (9, 10)
    widths = pieces(head_dim, exact=not large)
    dq = BackwardConfig(widths, 128, 64, 8, 2)
    if head_dim <= 64:
        return BackwardConfigs(*(BackwardConfig(widths, 64, 128, 8, 2),) * 2, dq)
    if large:
        # A tile of 64 rows asks for more tensor memory than sm_100 has, and Triton makes a trap of it.
        fused, dkdv = (64 if capability[0] == 9 else 32, 128, 8, 1), (64, 128, 8, 2)
    else:
        fused, dkdv = (32, 64, 4, 2), (32, 128, 8, 2)
    return BackwardConfigs(BackwardConfig(widths, *fused), BackwardConfig(widths, *dkdv), dq)


def pieces(head_dim: int, exact: bool) -> tuple[int, ...]:
    """Widths of the pieces, powers of two from 16 on: one that covers head_dim or, where `exact`, up to three
    that round it up to a multiple of 16."""
    left = -(-head_dim // 16) * 16
    widths = []
    while left:
        widths.append(1 << (left.bit_length() - 1))
        left -= widths[-1]
    return tuple(widths) if exact and len(widths) <= 3 else (max(16, triton.next_power_of_2(head_dim)),)


def fused_scale(dtype: torch.dtype, softmax_scale: float) -> bool:
    """FUSED_SCALE of the kernels: for masked scores of -inf the scale must be neither 0 nor near infinity."""
    return FLOAT32.tiny <= softmax_scale < FLOAT32.max / 2 and dtype != torch.float32


def float32_scale(softmax_scale: float) -> float:
    """The scale as a normal float32, which a kernel takes: past it scores are infinite, or all alike."""
    return min(max(softmax_scale, FLOAT32.min), FLOAT32.max) if abs(softmax_scale) >= FLOAT32.tiny else 0.0


def peeled_tokens(num_prefix_tokens: int, head_dim: int, dtype: torch.dtype) -> int:
    """NUM_PREFIX of the kernels: the hint, where they make use of it."""
    return num_prefix_tokens if dtype != torch.float32 and head_dim <= MAX_PEELED_HEAD_DIM else 0


def whole_tiles(seqlen: int, num_prefix_tokens: int, block: int) -> bool:
    """EVEN_Q, EVEN_K: whether equal segments are whole tiles behind their prefix, at least one."""
    rest = seqlen - num_prefix_tokens
    return rest > 0 and rest % block == 0

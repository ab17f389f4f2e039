"""Tile sizes of the decode kernels, and the number of programs that share the keys of a head."""

from typing import NamedTuple

import torch
import triton

MAX_PROJECTION_ROWS = 16  # the shortest side of an MMA
MIN_KEYS_PER_SPLIT = 256
MAX_SPLITS = 64
# In the projection: rows of shares beyond which reading them costs more than idle processors do; numbers of a
# tile of them, 32 registers of a thread; tiles that its code is written out for.
FEW_SHARES, MAX_TILE, MAX_TILES = 64, 4096, 4
CTAS_PER_SM = 2


class AttentionConfig(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class ProjectionConfig(NamedTuple):
    rows: int
    block_s: int
    num_blocks_s: int
    block_n: int
    num_warps: int
    num_stages: int


def attention_config(num_rows: int, head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """For that many rows per key head; 4 to 16 KB of keys in a tile. Their speed is not measured."""
    width, rows = padded(head_dim), max(16, triton.next_power_of_2(num_rows))
    if dtype == torch.float32:
        block_n = 64 if width <= 32 else 32 if width <= 128 else 16
        return AttentionConfig(16, block_n, 4, 3)
    block_n = 128 if width <= 32 else 64 if width <= 128 else 32
    return AttentionConfig(min(rows, 64 if width <= 64 else 32), block_n, 4, 4 if width <= 64 else 3)


def projection_config(num_rows: int, num_splits: int, head_dim: int, dtype: torch.dtype) -> ProjectionConfig:
    rows = _rows_of_projection(num_rows)
    splits = triton.next_power_of_2(num_splits)
    block_s = min(splits, max(1, MAX_TILE // (rows * padded(head_dim))))
    num_blocks_s = splits // block_s
    block_n = 64 if rows >= 8 and dtype != torch.float32 else 32
    num_warps = 8 if padded(head_dim) > 128 else 4
    return ProjectionConfig(rows, block_s, num_blocks_s, block_n, num_warps, max(1, 4 - num_blocks_s))


def _rows_of_projection(num_rows: int) -> int:
    return min(MAX_PROJECTION_ROWS, triton.next_power_of_2(num_rows))


def padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def splits_for(
    batch: int, text_len: int, num_kv_heads: int, head_dim: int, max_keys: int, num_sms: int
) -> int:
    """How many programs share the keys of a head: for CTAS_PER_SM, or for one where shares have many rows.

    Each program of the projection reads the shares of its rows, so more of them cost it time.
    """
    programs, rows = batch * num_kv_heads, _rows_of_projection(batch * text_len)
    wanted = (2 * CTAS_PER_SM * num_sms + programs) // (2 * programs)  # rounded
    if wanted * rows > FEW_SHARES:
        wanted = max(FEW_SHARES // rows, min(wanted, triton.cdiv(num_sms, programs)))
    most = min(MAX_SPLITS, MAX_TILES * MAX_TILE // (rows * padded(head_dim)))
    return max(1, min(wanted, max_keys // MIN_KEYS_PER_SPLIT, most))

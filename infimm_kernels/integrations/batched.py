"""Attention of equal sequences given as separate q, k and v, as other libraries hold them."""

import torch
from torch import Tensor

from infimm_kernels.attention import varlen_attention


def batched_attention(
    q: Tensor, k: Tensor, v: Tensor, *, num_prefix_tokens: int = 0, softmax_scale: float | None = None
) -> Tensor:
    """`varlen_attention` of a batch in which every sequence has the same length; nothing is masked.

    Args:
        q: [batch, seqlen_q, num_heads, head_dim].
        k, v: [batch, seqlen_k, num_kv_heads, head_dim]. Like q, read in place where batch and seqlen can be
            seen as one dimension, as in a projection split into heads, and copied otherwise.
        num_prefix_tokens, softmax_scale: as in `varlen_attention`.

    Returns:
        [batch, seqlen_q, num_heads, head_dim] in the dtype of q.

    Raises what `varlen_attention` raises.
    """
    batch, seqlen_q = q.shape[:2]
    seqlen_k = k.shape[1]
    out = varlen_attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        _equal_segments(batch, seqlen_q, q.device),
        _equal_segments(batch, seqlen_k, q.device),
        max_seqlen_q=seqlen_q,
        max_seqlen_k=seqlen_k,
        num_prefix_tokens=num_prefix_tokens,
        softmax_scale=softmax_scale,
    )
    return out.unflatten(0, (batch, seqlen_q))


def _equal_segments(batch: int, seqlen: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen  # [batch + 1]

"""gated_cross_attention: attention to the preceding image, projection, gate, residual; built of two ops."""

import torch
from torch import Tensor

from infimm_kernels import autodiff, backends, checks
from infimm_kernels.attention import varlen_attention
from infimm_kernels.attention.overlapping import overlapping_attention
from infimm_kernels.gated_cross_attention import decode
from infimm_kernels.gated_cross_attention.segments import MediaSegments
from infimm_kernels.gated_residual import gated_residual_projection
from infimm_kernels.gated_residual.op import check_branch, check_gate


def gated_cross_attention(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out_weight: Tensor,
    attn_gate: Tensor,
    segments: MediaSegments,
    *,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The attention half of a gated cross-attention block, after the projections of queries, keys and values:

        x + tanh(attn_gate) * (attention(query, key, value; segments) @ out_weight^T)

    (Alayrac et al. 2022, Flamingo, figure 4, with an element-wise gate). Rows before any image of their
    sample, and samples without an image, return x exactly.

    Args:
        x: [batch, text_len, hidden], the residual stream; float16, bfloat16, float32 or float64.
        query: [batch, text_len, num_heads, head_dim]; the dtype of x, or one whose every value x can hold.
        key, value: [total_vision, num_kv_heads, head_dim], the vision tokens of all images, packed in order;
            dtype of query.
        out_weight: [hidden, num_heads * head_dim], the layout of torch.nn.Linear; dtype of query.
        attn_gate: [hidden], before the tanh; dtype of x or of out_weight.
        segments: from `media_segments` or `decode_segments`, on the device of x.
        softmax_scale: head_dim**-0.5 when None.
        backend: for each of the ops, "cuda" for the attention alone; see `infimm_kernels.backends`.

    Returns:
        a new tensor of the shape and dtype of x.

    Up to 8 new tokens a sample with the segments of `decode_segments`, where no gradient is recorded, run as
    one op that splits the keys of a sample among the processors: two kernels in Triton, one in CUDA C++.

    Under autocast query, key, value and out_weight are cast to its dtype; x and attn_gate stay.

    Raises:
        ValueError: an argument breaks a rule above, or the named backend cannot run.
        NotImplementedError: no GPU backend can serve the call.
    """
    checks.tensor("x", x, 3, "[batch, text_len, hidden]")
    checks.tensor("query", query, 4, "[batch, text_len, num_heads, head_dim]")
    for name, tensor in (("key", key), ("value", value)):
        checks.tensor(name, tensor, 3, "[total_vision, num_kv_heads, head_dim]")
    checks.tensor("out_weight", out_weight, 2, "[hidden, num_heads * head_dim]")
    checks.tensor("attn_gate", attn_gate, 1, "[hidden]")
    checks.floating("x", x)
    check_gate("attn_gate", attn_gate, x, "out_weight", out_weight)
    query, key, value = autodiff.to_autocast_dtype(query, key, value)
    check_branch("query", query, x)
    # The projection casts the weight itself; here only its dtype matters, so no row is cast.
    cast_weight = autodiff.to_autocast_dtype(out_weight[:0])[0]
    for name, tensor in (("key", key), ("value", value), ("out_weight", cast_weight)):
        checks.same_kind(name, tensor, "query", query)
    checks.shape("query", query, (*x.shape[:2], *query.shape[2:]), "[batch, text_len, num_heads, head_dim]")
    num_heads, head_dim = query.shape[2:]
    if num_heads < 1 or head_dim < 1:
        checks.fail("query", "have at least one head and one channel", list(query.shape))
    if key.shape[2] != head_dim or key.shape[1] < 1 or num_heads % key.shape[1]:
        rule = f"have the head_dim of query ({head_dim}) and a divisor of its {num_heads} heads"
        checks.fail("key", rule, list(key.shape))
    checks.shape("value", value, key.shape, "the shape of key")
    checks.shape(
        "out_weight", out_weight, (x.shape[2], num_heads * head_dim), "[hidden, num_heads * head_dim]"
    )
    checks.shape("attn_gate", attn_gate, (x.shape[2],), "[hidden]")
    if not isinstance(segments, MediaSegments):
        checks.fail("segments", "be MediaSegments", type(segments).__name__)
    checks.tensor("segments.text_mask", segments.text_mask, 2, "[batch, text_len]")
    checks.shape("segments.text_mask", segments.text_mask, x.shape[:2], "[batch, text_len]")
    if segments.key_ranges is not None and decode.serves(x, query, key, value, out_weight, attn_gate):
        _check_count(segments, key)
        (out_weight,) = autodiff.to_autocast_dtype(out_weight)
        return decode.gated_cross_attention_decode(
            x,
            query,
            key,
            value,
            out_weight,
            attn_gate,
            segments.key_ranges,
            segments.max_keys,
            softmax_scale,
            backend,
        )
    cu_seqlens = segments.cu_seqlens_q, segments.cu_seqlens_k
    if segments.segment_key_ranges is None:
        out = varlen_attention(
            query.flatten(0, 1), key, value, *cu_seqlens, softmax_scale=softmax_scale, backend=backend
        )
    else:
        _check_count(segments, key)
        ranges = _checked_ranges(segments, x)
        scale = checks.softmax_scale(softmax_scale, head_dim)
        backends.check(backend)
        q, k, v = map(checks.unit_last_stride, (query.flatten(0, 1), key, value))
        out = overlapping_attention(q, k, v, *cu_seqlens, *ranges, scale, backend)
    out = out.reshape(
        *x.shape[:2], query.shape[2] * query.shape[3]
    )  # [batch, text_len, num_heads * head_dim]
    projection = None if backend == "cuda" else backend  # which has no such backend
    return gated_residual_projection(
        x, out, out_weight, attn_gate, row_mask=segments.text_mask, backend=projection
    )


def _check_count(segments: MediaSegments, key: Tensor) -> None:
    """The ranges of keys are cut to the keys there are, so a forgotten image would go unnoticed."""
    cu_seqlens_k = segments.cu_seqlens_k
    checks.cu_seqlens("segments.cu_seqlens_k", cu_seqlens_k, "key", key)
    if checks.is_readable(cu_seqlens_k) and cu_seqlens_k[-1] != key.shape[0]:
        rule = f"have the vision tokens that segments count ({int(cu_seqlens_k[-1])})"
        checks.fail("key", rule, key.shape[0])


def _checked_ranges(segments: MediaSegments, x: Tensor) -> tuple[Tensor, Tensor]:
    checks.cu_seqlens("segments.cu_seqlens_q", segments.cu_seqlens_q, "x", x)
    shape = (segments.cu_seqlens_q.shape[0] - 1, 2)
    checks.shape("segments.cu_seqlens_k", segments.cu_seqlens_k, (shape[0] + 1,), "[num_segments + 1]")
    ranges = []
    for name in ("segment_key_ranges", "segment_query_ranges"):
        value = getattr(segments, name)
        checks.tensor(f"segments.{name}", value, 2, "[num_segments, 2]")
        if value.dtype != torch.int32:
            checks.fail(f"segments.{name}", "have dtype torch.int32", value.dtype)
        checks.same_device(f"segments.{name}", value, "x", x)
        checks.shape(f"segments.{name}", value, shape, "[num_segments, 2]")
        ranges.append(value.contiguous())
    return tuple(ranges)

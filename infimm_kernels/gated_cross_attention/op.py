"""gated_cross_attention: attention to the preceding image, projection, gate, residual; built of two ops."""

from torch import Tensor

from infimm_kernels import autodiff, checks
from infimm_kernels.attention import varlen_attention
from infimm_kernels.gated_cross_attention.segments import MediaSegments
from infimm_kernels.gated_residual import gated_residual_projection


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
        query: [batch, text_len, num_heads, head_dim].
        key, value: [total_vision, num_kv_heads, head_dim], the vision tokens of all images, packed in order.
        out_weight: [hidden, num_heads * head_dim], the layout of torch.nn.Linear.
        attn_gate: [hidden], before the tanh.
        segments: from `media_segments` or `decode_segments`, on the device of x.
        softmax_scale: head_dim**-0.5 when None.
        backend: for both ops; see `infimm_kernels.backends`.

    Returns:
        a new tensor of the shape and dtype of x (of the autocast dtype under autocast).

    Raises:
        ValueError: an argument breaks a rule above, or the named backend cannot run.
        NotImplementedError: no GPU backend can serve the call.
    """
    checks.tensor("x", x, 3, "[batch, text_len, hidden]")
    checks.tensor("query", query, 4, "[batch, text_len, num_heads, head_dim]")
    x, query = autodiff.to_autocast_dtype(x, query)
    checks.same_kind("query", query, "x", x)
    checks.shape("query", query, (*x.shape[:2], *query.shape[2:]), "[batch, text_len, num_heads, head_dim]")
    if not isinstance(segments, MediaSegments):
        checks.fail("segments", "be MediaSegments", type(segments).__name__)
    checks.shape("segments.text_mask", segments.text_mask, x.shape[:2], "[batch, text_len]")
    out = varlen_attention(
        query.flatten(0, 1),
        key,
        value,
        segments.cu_seqlens_q,
        segments.cu_seqlens_k,
        softmax_scale=softmax_scale,
        backend=backend,
    )
    out = out.reshape(
        *x.shape[:2], query.shape[2] * query.shape[3]
    )  # [batch, text_len, num_heads * head_dim]
    return gated_residual_projection(
        x, out, out_weight, attn_gate, row_mask=segments.text_mask, backend=backend
    )

"""overlapping_attention: segments of packed queries whose ranges of keys overlap, and its registered op.

Flamingo's rule "a text token sees all images before it" is of this kind: the ranges of one sample begin at
the same key and end at one image after the other. Seen from the keys it is of the same kind again: the
queries that see an image go from its `<image>` token to the end of the sample. So neither direction needs a
mask or a copy of keys, and the gradients of a key and a value are written by one program.
"""

import torch
from torch import Tensor

from infimm_kernels import autodiff, backends, checks
from infimm_kernels.attention import overlapping_reference as reference
from infimm_kernels.attention.choice import OVERLAPPING_CANDIDATES, backward_backend


def overlapping_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    key_ranges: Tensor,
    query_ranges: Tensor,
    softmax_scale: float,
    backend: str | None = None,
) -> Tensor:
    """`varlen_attention` where segment s sees the keys ``key_ranges[s, 0] : key_ranges[s, 1]``.

    A part of `gated_cross_attention`, which checks its arguments and casts for autocast.

    Args:
        q, k, v: as in `varlen_attention`, with a unit last stride.
        cu_seqlens_q, cu_seqlens_k: as there; of the keys for the gradient, whose segment s is seen by the
            queries ``query_ranges[s, 0] : query_ranges[s, 1]``.
        key_ranges, query_ranges: contiguous int32 [num_segments, 2] on the device of q: the same pairs of a
            query and a key, from both sides. Numbers on the CPU are checked; on a GPU a range is cut to the
            tokens there are.

    Returns:
        out [total_q, num_heads, head_dim] in the dtype of q.
    """
    segments = (cu_seqlens_q, cu_seqlens_k, key_ranges, query_ranges)
    if all(map(checks.is_readable, segments)):
        reference.check_values(*segments, q.shape[0], k.shape[0])
    return _call(q, k, v, *segments, softmax_scale, backend)[0]


_library = torch.library.Library("infimm_kernels", "FRAGMENT")
_library.define(
    "overlapping_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " Tensor key_ranges, Tensor query_ranges, float softmax_scale, str? backend) -> (Tensor out, Tensor lse)"
)
_library.define(
    "overlapping_attention_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dout,"
    " Tensor? dlse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor key_ranges, Tensor query_ranges,"
    " float softmax_scale, str? backend) -> (Tensor dq, Tensor dk, Tensor dv)"
)


# --- kernel choice ------------------------------------------------------------------------------------------


@autodiff.without_autocast
def _kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, key_ranges, query_ranges, softmax_scale, backend):
    if backends.select("overlapping_attention", OVERLAPPING_CANDIDATES, backend, q, k, v) == "triton":
        from infimm_kernels.attention import triton_launch

        return triton_launch.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, 0, softmax_scale, 0, key_ranges)
    return reference.forward(q, k, v, cu_seqlens_q, key_ranges, softmax_scale)


@autodiff.without_autocast
def _backward_kernel(
    q,
    k,
    v,
    out,
    lse,
    dout,
    dlse,
    cu_seqlens_q,
    cu_seqlens_k,
    key_ranges,
    query_ranges,
    softmax_scale,
    backend,
):
    if backward_backend("overlapping_attention", OVERLAPPING_CANDIDATES, backend, q, k, v) != "triton":
        return reference.backward(dout, dlse, q, k, v, cu_seqlens_q, key_ranges, softmax_scale)
    from infimm_kernels.attention import triton_launch

    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    deterministic = torch.are_deterministic_algorithms_enabled()
    forward_and_grads = (q, k, v, out, lse, dout, dlse)
    lengths = (cu_seqlens_q, cu_seqlens_k, 0)
    triton_launch.backward(
        *forward_and_grads, *lengths, softmax_scale, 0, deterministic, *grads, key_ranges, query_ranges
    )
    return grads


for _device in ("CPU", "CUDA"):
    _library.impl("overlapping_attention", _kernel, _device)
    _library.impl("overlapping_attention_backward", _backward_kernel, _device)


# --- fake ---------------------------------------------------------------------------------------------------


@torch.library.register_fake("infimm_kernels::overlapping_attention", lib=_library)
def _fake(q, k, v, cu_seqlens_q, cu_seqlens_k, key_ranges, query_ranges, softmax_scale, backend):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=autodiff.compute_dtype(q.dtype))


@torch.library.register_fake("infimm_kernels::overlapping_attention_backward", lib=_library)
def _backward_fake(
    q,
    k,
    v,
    out,
    lse,
    dout,
    dlse,
    cu_seqlens_q,
    cu_seqlens_k,
    key_ranges,
    query_ranges,
    softmax_scale,
    backend,
):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# --- autograd -----------------------------------------------------------------------------------------------


def _reference(q, k, v, cu_seqlens_q, cu_seqlens_k, key_ranges, query_ranges, softmax_scale, backend=None):
    return reference.dense(q, k, v, cu_seqlens_q, key_ranges, softmax_scale)


@autodiff.transforms_go_to(_reference)
def _call(*args):
    return torch.ops.infimm_kernels.overlapping_attention.default(*args)


def _setup_context(ctx, inputs, output):
    q, k, v, *segments, ctx.softmax_scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, *segments)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dlse):
    q, k, v, out, lse, *segments = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 9
    if torch.is_grad_enabled():

        def attention(q, k, v):
            return _reference(q, k, v, *segments, ctx.softmax_scale)

        return *autodiff.differentiable_backward(attention, (q, k, v), (dout, dlse)), *(None,) * 6
    grads = torch.ops.infimm_kernels.overlapping_attention_backward.default(
        q, k, v, out, lse, dout, dlse, *segments, ctx.softmax_scale, ctx.backend
    )
    return *grads, *(None,) * 6


torch.library.register_autograd(
    "infimm_kernels::overlapping_attention", _autograd, setup_context=_setup_context, lib=_library
)

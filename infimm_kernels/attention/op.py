"""varlen_attention and window_attention: the public functions and their registered ops."""

import torch
from torch import Tensor

from infimm_kernels import autodiff, backends, checks
from infimm_kernels.attention import reference
from infimm_kernels.attention.choice import VARLEN_CANDIDATES, WINDOW_CANDIDATES, backward_backend
from infimm_kernels.attention.plan import VARLEN_NAMES, WINDOW_NAMES, check_values, plan, uniform_plan


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    num_prefix_tokens: int = 0,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention inside segments of packed tokens; no mask within a segment.

    Segment s pairs the queries ``cu_seqlens_q[s] : cu_seqlens_q[s + 1]`` with the keys
    ``cu_seqlens_k[s] : cu_seqlens_k[s + 1]``, and for each head

        out = softmax(softmax_scale * q k^T) v,        lse = logsumexp(softmax_scale * q k^T)

    (Vaswani et al. 2017; packed as in FlashAttention's varlen interface). A segment without keys gives out =
    0 exactly, lse = -inf and zero gradients. Each key head serves num_heads / num_kv_heads consecutive query
    heads.

    Args:
        q: [total_q, num_heads, head_dim], float16, bfloat16, float32 or float64.
        k, v: [total_k, num_kv_heads, head_dim], dtype and device of q; num_heads % num_kv_heads == 0.
            Any strides; a tensor whose last stride is not 1 is copied first.
        cu_seqlens_q, cu_seqlens_k: int32 [num_segments + 1] on the device of q: cumulative lengths from 0 to
            total_q and to total_k. Their values are checked on the CPU only, since reading them would stop a
            GPU.
        max_seqlen_q, max_seqlen_k: length of the longest segment, in tokens; a hint, never needed, checked on
            the CPU.
        num_prefix_tokens: 0 to 8; how many leading tokens of each segment, of queries and of keys, are
            special (CLS). A hint, for speed where the tokens behind them fill whole tiles (1 + 1024): the
            result is the same for every value.
        softmax_scale: head_dim**-0.5 when None.
        return_lse: also return the logsumexp, float32 (float64 for float64) [num_heads, total_q]. It is
            differentiable.
        backend: "reference", "triton" or "cuda" (opt-in: compute capability 9.0, float16 and bfloat16,
            head_dim 64, 112 and 128, a positive softmax_scale; at 128 and deterministic the backward is
            Triton's); None chooses. See `infimm_kernels.backends`.

    Returns:
        out [total_q, num_heads, head_dim] in the dtype of q, or (out, lse).

    The Triton backward adds up dq with atomics, so its last bits differ from run to run; under
    ``torch.use_deterministic_algorithms`` another kernel computes it, slower and always the same. float32
    goes back through the reference's formula, which on a GPU reads cu_seqlens and so waits for the device.
    Under autocast q, k and v are cast to its dtype. Forward-mode AD and torch.func transforms run a plain
    PyTorch version whose memory grows with total_q * total_k; the backward of the backward does too.

    Raises:
        ValueError: an argument breaks a rule above, or the named backend cannot run.
        NotImplementedError: no GPU backend can serve the call.
    """
    checks.tensor("q", q, 3, "[total_q, num_heads, head_dim]")
    checks.tensor("k", k, 3, "[total_k, num_kv_heads, head_dim]")
    checks.tensor("v", v, 3, "[total_k, num_kv_heads, head_dim]")
    q, k, v = autodiff.to_autocast_dtype(q, k, v)
    checks.floating("q", q)
    checks.same_kind("k", k, "q", q)
    checks.same_kind("v", v, "q", q)
    num_heads, head_dim = q.shape[1:]
    if num_heads < 1 or head_dim < 1:
        checks.fail("q", "have at least one head and one channel", list(q.shape))
    if k.shape[2] != head_dim:
        checks.fail("k", f"have the head_dim of q ({head_dim})", list(k.shape))
    if k.shape[1] < 1 or num_heads % k.shape[1]:
        checks.fail("k", f"have a number of heads that divides the {num_heads} heads of q", list(k.shape))
    if v.shape != k.shape:
        checks.fail("v", f"have the shape of k {list(k.shape)}", list(v.shape))
    checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, "q", q)
    checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, "q", q)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        checks.fail(
            "cu_seqlens_k",
            f"have the shape of cu_seqlens_q {list(cu_seqlens_q.shape)}",
            list(cu_seqlens_k.shape),
        )
    checks.max_seqlen("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    checks.max_seqlen("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    checks.prefix_tokens(num_prefix_tokens)
    checks.flag("return_lse", return_lse)
    softmax_scale = checks.softmax_scale(softmax_scale, head_dim)
    backends.check(backend)
    q, k, v = checks.unit_last_stride(q), checks.unit_last_stride(k), checks.unit_last_stride(v)
    out, lse = _call_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, num_prefix_tokens, backend)
    return (out, lse) if return_lse else out


def window_attention(
    qkv: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    num_prefix_tokens: int = 0,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Self-attention inside windows, from packed projections; the gradient is one packed tensor too.

    The equation is that of `varlen_attention` with q, k and v the three slices of qkv.

    Args:
        qkv: [num_windows, seqlen, 3, num_heads, head_dim], or [total, 3, num_heads, head_dim] with
            `cu_seqlens`; float16, bfloat16, float32 or float64. Any strides; copied first when the last one
            is not 1.
        cu_seqlens: int32 [num_windows + 1] on the device of qkv, cumulative lengths from 0 to total; checked
            as in `varlen_attention`. Must be None for the first form.
        max_seqlen, num_prefix_tokens, softmax_scale, backend: as in `varlen_attention`.
        return_lse: also return the logsumexp, float32 (float64 for float64) [num_heads, total], where the
            first form has total = num_windows * seqlen.

    Returns:
        out, the shape of qkv without its 3-axis and in its dtype, or (out, lse).

    Autocast, transforms and errors are those of `varlen_attention`.
    """
    checks.tensor("qkv", qkv)
    checks.floating("qkv", qkv)
    if cu_seqlens is None:
        checks.tensor("qkv", qkv, 5, "[num_windows, seqlen, 3, num_heads, head_dim] without cu_seqlens")
    else:
        checks.tensor("qkv", qkv, 4, "[total, 3, num_heads, head_dim] with cu_seqlens")
        checks.cu_seqlens("cu_seqlens", cu_seqlens, "qkv", qkv)
    if qkv.shape[-3] != 3:
        checks.fail("qkv", "have 3 as its third dimension from the end", list(qkv.shape))
    if qkv.shape[-2] < 1 or qkv.shape[-1] < 1:
        checks.fail("qkv", "have at least one head and one channel", list(qkv.shape))
    checks.max_seqlen("max_seqlen", max_seqlen, qkv.shape[1] if cu_seqlens is None else cu_seqlens)
    checks.prefix_tokens(num_prefix_tokens)
    checks.flag("return_lse", return_lse)
    softmax_scale = checks.softmax_scale(softmax_scale, qkv.shape[-1])
    backends.check(backend)
    qkv = checks.unit_last_stride(autodiff.to_autocast_dtype(qkv)[0])
    out, lse = _call_window(qkv, cu_seqlens, softmax_scale, num_prefix_tokens, backend)
    return (out, lse) if return_lse else out


_library = torch.library.Library("infimm_kernels", "FRAGMENT")
_library.define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " float softmax_scale, int num_prefix_tokens, str? backend) -> (Tensor out, Tensor lse)"
)
_library.define(
    "varlen_attention_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dout,"
    " Tensor? dlse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float softmax_scale, int num_prefix_tokens,"
    " str? backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)
_library.define(
    "window_attention(Tensor qkv, Tensor? cu_seqlens, float softmax_scale, int num_prefix_tokens,"
    " str? backend) -> (Tensor out, Tensor lse)"
)
_library.define(
    "window_attention_backward(Tensor qkv, Tensor out, Tensor lse, Tensor? dout, Tensor? dlse,"
    " Tensor? cu_seqlens, float softmax_scale, int num_prefix_tokens, str? backend) -> Tensor dqkv"
)


# --- kernel choice ------------------------------------------------------------------------------------------


def _launcher(backend: str):
    """The forward of "triton" or "cuda", imported on first use."""
    if backend == "cuda":
        from infimm_kernels.attention import cuda as launcher
    else:
        from infimm_kernels.attention import triton_launch as launcher
    return launcher.forward


@autodiff.without_autocast
def _varlen_kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, num_prefix_tokens, backend):
    selected = backends.select("varlen_attention", VARLEN_CANDIDATES, backend, q, k, v)
    if selected != "reference":
        _check_readable(cu_seqlens_q, cu_seqlens_k, q, k)
        forward = _launcher(selected)
        return forward(q, k, v, cu_seqlens_q, cu_seqlens_k, 0, softmax_scale, num_prefix_tokens)
    return reference.forward(q, k, v, softmax_scale, plan(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0]))


@autodiff.without_autocast
def _window_kernel(qkv, cu_seqlens, softmax_scale, num_prefix_tokens, backend):
    q, k, v = _packed(qkv)
    selected = backends.select("window_attention", WINDOW_CANDIDATES, backend, qkv)
    if selected != "reference":
        if cu_seqlens is not None:
            _check_readable(cu_seqlens, cu_seqlens, q, k, WINDOW_NAMES)
        forward = _launcher(selected)
        out, lse = forward(q, k, v, cu_seqlens, cu_seqlens, _seqlen(qkv), softmax_scale, num_prefix_tokens)
    else:
        out, lse = reference.forward(q, k, v, softmax_scale, _window_plan(qkv, cu_seqlens))
    return out.view(*qkv.shape[:-3], *qkv.shape[-2:]), lse


@autodiff.without_autocast
def _varlen_backward_kernel(
    q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k, softmax_scale, num_prefix_tokens, backend
):
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    selected = backward_backend("varlen_attention", VARLEN_CANDIDATES, backend, q, k, v)
    if selected != "reference":
        forward_and_grads = (q, k, v, out, lse, dout, dlse)
        lengths = (cu_seqlens_q, cu_seqlens_k, 0)
        _launch_backward(selected, *forward_and_grads, *lengths, softmax_scale, num_prefix_tokens, dq, dk, dv)
    else:
        segments = plan(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])
        reference.backward(dout, dlse, q, k, v, softmax_scale, segments, dq, dk, dv)
    return dq, dk, dv


@autodiff.without_autocast
def _window_backward_kernel(qkv, out, lse, dout, dlse, cu_seqlens, softmax_scale, num_prefix_tokens, backend):
    q, k, v = _packed(qkv)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dq, dk, dv = _packed(dqkv)
    dout = None if dout is None else dout.reshape(q.shape)
    selected = backward_backend("window_attention", WINDOW_CANDIDATES, backend, qkv)
    if selected != "reference":
        forward_and_grads = (q, k, v, out.reshape(q.shape), lse, dout, dlse)
        lengths = (cu_seqlens, cu_seqlens, _seqlen(qkv))
        _launch_backward(selected, *forward_and_grads, *lengths, softmax_scale, num_prefix_tokens, dq, dk, dv)
    else:
        reference.backward(dout, dlse, q, k, v, softmax_scale, _window_plan(qkv, cu_seqlens), dq, dk, dv)
    return dqkv


def _launch_backward(backend: str, *arguments) -> None:
    """arguments: of `triton_launch.backward`, without `deterministic`."""
    if backend == "cuda":
        from infimm_kernels.attention import cuda_backward as launcher
    else:
        from infimm_kernels.attention import triton_launch as launcher
    *before, dq, dk, dv = arguments
    launcher.backward(*before, torch.are_deterministic_algorithms_enabled(), dq, dk, dv)


def _seqlen(qkv: Tensor) -> int:
    """The length of equal windows; 0 for packed ones."""
    return qkv.shape[1] if qkv.dim() == 5 else 0


def _packed(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three slices as [total, num_heads, head_dim], views where the strides of qkv allow."""
    return (qkv.flatten(0, 1) if qkv.dim() == 5 else qkv).unbind(1)


def _window_plan(qkv: Tensor, cu_seqlens: Tensor | None):
    if cu_seqlens is None:
        return uniform_plan(*qkv.shape[:2], qkv.shape[1])
    return plan(cu_seqlens, cu_seqlens, qkv.shape[0], qkv.shape[0], WINDOW_NAMES)


def _check_readable(cu_seqlens_q, cu_seqlens_k, q, k, names=VARLEN_NAMES) -> None:
    """The checks that come with a plan, for the paths that need none."""
    if checks.is_readable(cu_seqlens_q) and checks.is_readable(cu_seqlens_k):
        check_values(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), q.shape[0], k.shape[0], names)


for _device in ("CPU", "CUDA"):
    _library.impl("varlen_attention", _varlen_kernel, _device)
    _library.impl("window_attention", _window_kernel, _device)
    _library.impl("varlen_attention_backward", _varlen_backward_kernel, _device)
    _library.impl("window_attention_backward", _window_backward_kernel, _device)


# --- fake ---------------------------------------------------------------------------------------------------


@torch.library.register_fake("infimm_kernels::varlen_attention", lib=_library)
def _varlen_fake(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, num_prefix_tokens, backend):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=autodiff.compute_dtype(q.dtype))


@torch.library.register_fake("infimm_kernels::window_attention", lib=_library)
def _window_fake(qkv, cu_seqlens, softmax_scale, num_prefix_tokens, backend):
    total = qkv.shape[0] * qkv.shape[1] if qkv.dim() == 5 else qkv.shape[0]
    out = qkv.new_empty((*qkv.shape[:-3], *qkv.shape[-2:]))
    return out, qkv.new_empty((qkv.shape[-2], total), dtype=autodiff.compute_dtype(qkv.dtype))


@torch.library.register_fake("infimm_kernels::varlen_attention_backward", lib=_library)
def _varlen_backward_fake(
    q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k, softmax_scale, num_prefix_tokens, backend
):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("infimm_kernels::window_attention_backward", lib=_library)
def _window_backward_fake(qkv, out, lse, dout, dlse, cu_seqlens, softmax_scale, num_prefix_tokens, backend):
    return qkv.new_empty(qkv.shape)


# --- autograd -----------------------------------------------------------------------------------------------


def _varlen_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, num_prefix_tokens=0, backend=None):
    _check_readable(cu_seqlens_q, cu_seqlens_k, q, k)
    return reference.dense(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)


def _window_reference(qkv, cu_seqlens, softmax_scale, num_prefix_tokens=0, backend=None):
    if cu_seqlens is None:
        return reference.dense_windows(qkv, softmax_scale)
    _check_readable(cu_seqlens, cu_seqlens, qkv, qkv, WINDOW_NAMES)
    return reference.dense(*qkv.unbind(1), cu_seqlens, cu_seqlens, softmax_scale)


@autodiff.transforms_go_to(_varlen_reference)
def _call_varlen(*args):
    return torch.ops.infimm_kernels.varlen_attention.default(*args)


@autodiff.transforms_go_to(_window_reference)
def _call_window(*args):
    return torch.ops.infimm_kernels.window_attention.default(*args)


def _varlen_setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.set_materialize_grads(False)


def _varlen_autograd(ctx, dout, dlse):
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 8
    if torch.is_grad_enabled():

        def attention(q, k, v):
            return _varlen_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.options)

        return *autodiff.differentiable_backward(attention, (q, k, v), (dout, dlse)), *(None,) * 5
    grads = torch.ops.infimm_kernels.varlen_attention_backward.default(
        q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k, *ctx.options
    )
    return *grads, *(None,) * 5


def _window_setup_context(ctx, inputs, output):
    qkv, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _window_autograd(ctx, dout, dlse):
    qkv, out, lse, cu_seqlens = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 5
    if torch.is_grad_enabled():

        def attention(qkv):
            return _window_reference(qkv, cu_seqlens, *ctx.options)

        return *autodiff.differentiable_backward(attention, (qkv,), (dout, dlse)), *(None,) * 4
    dqkv = torch.ops.infimm_kernels.window_attention_backward.default(
        qkv, out, lse, dout, dlse, cu_seqlens, *ctx.options
    )
    return dqkv, *(None,) * 4


torch.library.register_autograd(
    "infimm_kernels::varlen_attention", _varlen_autograd, setup_context=_varlen_setup_context, lib=_library
)
torch.library.register_autograd(
    "infimm_kernels::window_attention", _window_autograd, setup_context=_window_setup_context, lib=_library
)

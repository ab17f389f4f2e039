"""residual_post_norm: the public function and its registered op."""

import torch
from torch import Tensor

from infimm_kernels import autodiff, backends, checks
from infimm_kernels.gated_residual.op import check_branch
from infimm_kernels.position_2d.op import check_positions
from infimm_kernels.post_norm import reference

MAX_TRITON_HIDDEN = 8192
MAX_EPS = torch.finfo(torch.float32).max


def residual_post_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    positions: Tensor | None = None,
    granularity: str = "window",
    window_shape: tuple[int, int] | None = None,
    num_prefix_tokens: int = 0,
    backend: str | None = None,
) -> Tensor:
    """A residual stream plus the LayerNorm of a branch, and a position: ``x + LayerNorm(y) [+ PE]``.

        LayerNorm(y) = weight * (y - mean(y)) / sqrt(var(y) + eps) + bias

    over the last dimension, var the biased variance (Ba et al. 2016). A block with its norm behind attention
    or MLP, on the branch alone, is the residual post-norm of Swin Transformer V2 (Liu et al. 2022) and of
    EVA2-CLIP-E. PE is the encoding that `infimm_kernels.add_position_2d` adds.

    Args:
        x: [..., hidden], float16, bfloat16, float32 or float64.
        y: the shape and the device of x; the dtype of x, or one whose every value x can hold: a float32
            residual stream takes a bfloat16 branch.
        weight: [hidden], on the device of x; dtype of x, of y or float32.
        bias: [hidden], dtype and device of weight.
        eps: added to the variance; from 0 to the largest float32.
        positions: int32 or int64 [num_windows, 2] as in `add_position_2d`; x and y are then
            [num_windows, seqlen, hidden] with hidden % 4 == 0. None adds no position, and the next three
            arguments are ignored.
        granularity: "window" or "token", as in `add_position_2d`.
        window_shape: (h, w), in patches, for "token"; None takes the square of that many patches.
        num_prefix_tokens: 0 to 8 tokens (CLS) in front of the patches of each window.
        backend: "reference" or "triton"; None chooses. See `infimm_kernels.backends`.

    Returns:
        a new tensor of the shape and dtype of x. Sums are in float32 at least, the result is rounded once,
        and each gradient has the dtype of its tensor; that of x is the gradient of the result. The backward
        keeps y, weight and two numbers per row.

    Autocast leaves the op alone: no product in it could be narrower. Forward-mode AD, torch.func transforms
    and the backward of the backward run a plain PyTorch version.

    Raises:
        ValueError: an argument breaks a rule above, or the named backend cannot run.
        NotImplementedError: no GPU backend can serve the call.
    """
    checks.tensor("x", x)
    if x.dim() < 1 or x.shape[-1] < 1:
        checks.fail("x", "have a last dimension of at least one channel", list(x.shape))
    checks.floating("x", x)
    checks.tensor("y", y)
    check_branch("y", y, x)
    checks.shape("y", y, x.shape, "the shape of x")
    checks.tensor("weight", weight, 1, "[hidden]")
    if weight.dtype not in (x.dtype, y.dtype, torch.float32):
        rule = f"have the dtype of x ({x.dtype}), of y ({y.dtype}) or torch.float32"
        checks.fail("weight", rule, weight.dtype)
    checks.same_device("weight", weight, "x", x)
    checks.shape("weight", weight, x.shape[-1:], "[hidden]")
    checks.tensor("bias", bias, 1, "[hidden]")
    checks.same_kind("bias", bias, "weight", weight)
    checks.shape("bias", bias, x.shape[-1:], "[hidden]")
    if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not 0 <= eps <= MAX_EPS:
        checks.fail("eps", "be a number from 0 to the largest float32", eps)
    height, width = 1, 1
    if positions is None:
        granularity, num_prefix_tokens = "window", 0
    else:
        if x.dim() != 3:
            checks.fail("x", "have shape [num_windows, seqlen, hidden] with positions", list(x.shape))
        height, width = check_positions("x", x, positions, granularity, window_shape, num_prefix_tokens)
    backends.check(backend)
    place = (positions, granularity, height, width, num_prefix_tokens)
    return _call(x, y, weight, bias, float(eps), *place, backend)


_library = torch.library.Library("infimm_kernels", "FRAGMENT")
_library.define(
    "residual_post_norm(Tensor x, Tensor y, Tensor weight, Tensor bias, float eps, Tensor? positions,"
    " str granularity, SymInt window_height, SymInt window_width, int num_prefix_tokens, str? backend)"
    " -> (Tensor out, Tensor mean, Tensor rstd)"
)
# A gradient that is not needed is a tensor without elements.
_library.define(
    "residual_post_norm_backward(Tensor dout, Tensor y, Tensor weight, Tensor mean, Tensor rstd,"
    " bool need_dy, bool need_sums, str? backend) -> (Tensor dy, Tensor dweight, Tensor dbias)"
)


# --- kernel choice ------------------------------------------------------------------------------------------


def why_not_triton(*tensors: Tensor) -> str | None:
    """Why Triton cannot run on these x, y, weight and bias; None when it can."""
    hidden = tensors[0].shape[-1]
    if hidden > MAX_TRITON_HIDDEN:
        return f"hidden must be at most {MAX_TRITON_HIDDEN}, as a row is held in registers; it is {hidden}"
    return backends.why_not_triton(*tensors)


CANDIDATES = (backends.Candidate("triton", why_not_triton),)


@autodiff.without_autocast
def _kernel(x, y, weight, bias, eps, positions, granularity, height, width, num_prefix_tokens, backend):
    arguments = (x, y, weight, bias, eps, positions, granularity, (height, width), num_prefix_tokens)
    if backends.select("residual_post_norm", CANDIDATES, backend, x, y, weight, bias) == "triton":
        from infimm_kernels.post_norm.triton_forward import launch_residual_post_norm

        return launch_residual_post_norm(*arguments)
    return tuple(t.contiguous() for t in reference.forward(*arguments))


@autodiff.without_autocast
def _backward_kernel(dout, y, weight, mean, rstd, need_dy, need_sums, backend):
    arguments = (dout, y, weight, mean, rstd, need_dy, need_sums)
    if backends.select("residual_post_norm", CANDIDATES, backend, dout, y, weight) == "triton":
        from infimm_kernels.post_norm.triton_backward import launch_residual_post_norm_backward

        grads = launch_residual_post_norm_backward(*arguments)
    else:
        grads = reference.backward(*arguments)
    return tuple(
        t.new_empty(0) if grad is None else grad.contiguous()
        for t, grad in zip((y, weight, weight), grads, strict=True)
    )


for _device in ("CPU", "CUDA"):
    _library.impl("residual_post_norm", _kernel, _device)
    _library.impl("residual_post_norm_backward", _backward_kernel, _device)


# --- fake ---------------------------------------------------------------------------------------------------


@torch.library.register_fake("infimm_kernels::residual_post_norm", lib=_library)
def _fake(x, y, weight, bias, eps, positions, granularity, height, width, num_prefix_tokens, backend):
    dtype = autodiff.compute_dtype(x.dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=dtype) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@torch.library.register_fake("infimm_kernels::residual_post_norm_backward", lib=_library)
def _backward_fake(dout, y, weight, mean, rstd, need_dy, need_sums, backend):
    sums = weight.shape if need_sums else 0
    return y.new_empty(y.shape if need_dy else 0), weight.new_empty(sums), weight.new_empty(sums)


# --- autograd -----------------------------------------------------------------------------------------------


def _reference(x, y, weight, bias, eps, positions, granularity, height, width, num_prefix_tokens, backend):
    place = (positions, granularity, (height, width), num_prefix_tokens)
    return reference.differentiable(x, y, weight, bias, eps, *place)


@autodiff.transforms_go_to(_reference)
def _call(*args):
    out, _, _ = torch.ops.infimm_kernels.residual_post_norm.default(*args)
    return out


def _setup_context(ctx, inputs, output):
    _, y, weight, _, ctx.eps, *_, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    needs = ctx.needs_input_grad
    if any(needs[1:4]):
        ctx.save_for_backward(y, weight, mean, rstd)


def _autograd(ctx, dout, dmean, drstd):
    need_dy, need_sums = ctx.needs_input_grad[1], any(ctx.needs_input_grad[2:4])
    grads = (None, None, None)
    if need_dy or need_sums:
        y, weight, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = reference.differentiable_backward(dout, y, weight, ctx.eps)
        else:
            found = torch.ops.infimm_kernels.residual_post_norm_backward.default(
                dout, y, weight, mean, rstd, need_dy, need_sums, ctx.backend
            )
            grads = (found[0] if need_dy else None, *(found[1:] if need_sums else (None, None)))
    return dout, *grads, *(None,) * 7


torch.library.register_autograd(
    "infimm_kernels::residual_post_norm", _autograd, setup_context=_setup_context, lib=_library
)

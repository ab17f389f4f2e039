"""gated_residual_projection: the public function and its registered op."""

import torch
from torch import Tensor

from infimm_kernels import autodiff, backends, checks
from infimm_kernels.gated_residual import reference


def gated_residual_projection(
    x: Tensor,
    o: Tensor,
    weight: Tensor,
    gate: Tensor,
    *,
    row_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A residual stream plus a gated projection: ``x + tanh(gate) * (o @ weight^T) * row_mask``.

    The gate is element-wise over the hidden channels (tanh gating: Alayrac et al. 2022, Flamingo). Outside
    transforms the result is x bit for bit where the gate is zero and in rows whose mask is False (a NaN or
    inf in o or weight still shows through a zero gate, as in eager PyTorch; it does not show in a masked
    row).

    Args:
        x: [..., hidden], float16, bfloat16, float32 or float64.
        o: [..., inner], the leading shape and the device of x; the dtype of x, or one whose every value x
            can hold: a float32 residual stream takes a bfloat16 branch.
        weight: [hidden, inner], the layout of torch.nn.Linear; dtype and device of o.
        gate: [hidden], before the tanh; dtype of x or of weight, device of x.
        row_mask: bool, the leading shape of x, on the device of x; None for all True.
        backend: "reference" or "triton"; None chooses. See `infimm_kernels.backends`.

    Returns:
        a new tensor of the shape and dtype of x. Sums are in float32 at least, and each gradient has the
        dtype of its tensor.

    Under autocast o and weight are cast to its dtype; x and gate stay, so the residual stream keeps its
    precision as in ``x + linear(o)``, and the dtype of weight that gate may have is the one before the cast.
    Forward-mode AD, torch.func transforms and the backward of the backward run a plain PyTorch version.

    Saved for the backward are o, weight, gate and row_mask alone; gradients that nothing needs are not
    computed. In Triton, where inner is above 1024 and there are more than 64 rows, o @ weight^T (not in
    float16) is a product of PyTorch's library, under its settings (TF32, reduced-precision sums), with one
    element-wise kernel behind it; so is the gradient of o, whatever the number of rows. Which is faster was
    not measured yet. What our kernels compute has the same bits in every run; for the library's products its
    own rules hold.

    Raises:
        ValueError: an argument breaks a rule above, or the named backend cannot run.
        NotImplementedError: no GPU backend can serve the call.
    """
    for name, value in (("x", x), ("o", o)):
        checks.tensor(name, value)
        if value.dim() < 1:
            checks.fail(name, "have at least one dimension", list(value.shape))
    checks.tensor("weight", weight, 2, "[hidden, inner]")
    checks.tensor("gate", gate, 1, "[hidden]")
    checks.floating("x", x)
    check_gate("gate", gate, x, "weight", weight)
    o, weight = autodiff.to_autocast_dtype(o, weight)
    check_branch("o", o, x)
    checks.same_kind("weight", weight, "o", o)
    hidden, inner = x.shape[-1], o.shape[-1]
    if weight.numel() == 0:
        checks.fail("weight", "have at least one row and one column", list(weight.shape))
    for name, value in (("x", x), ("o", o)):
        if value.shape[-1] < 1:
            checks.fail(name, "have at least one channel", list(value.shape))
    checks.shape("o", o, (*x.shape[:-1], inner), "[..., inner] with the leading shape of x")
    checks.shape("weight", weight, (hidden, inner), "[hidden, inner]")
    checks.shape("gate", gate, (hidden,), "[hidden]")
    if row_mask is not None:
        check_row_mask(row_mask, x)
    backends.check(backend)
    return _call(x, o, weight, gate, row_mask, backend)


def check_branch(argument: str, value: Tensor, x: Tensor) -> None:
    """`value` must be on the device of x, and of a dtype that adding to x does not widen."""
    checks.floating(argument, value)
    if torch.promote_types(x.dtype, value.dtype) != x.dtype:
        checks.fail(argument, f"have the dtype of x ({x.dtype}) or a narrower one", value.dtype)
    checks.same_device(argument, value, "x", x)


def check_gate(argument: str, gate: Tensor, x: Tensor, weight_name: str, weight: Tensor) -> None:
    """`gate` must have the dtype of x or that of `weight` before autocast."""
    if gate.dtype not in (x.dtype, weight.dtype):
        rule = f"have the dtype of x ({x.dtype}) or of {weight_name} ({weight.dtype})"
        checks.fail(argument, rule, gate.dtype)
    checks.same_device(argument, gate, "x", x)


def check_row_mask(row_mask: Tensor, x: Tensor) -> None:
    checks.tensor("row_mask", row_mask)
    if row_mask.dtype != torch.bool:
        checks.fail("row_mask", "have dtype torch.bool", row_mask.dtype)
    checks.same_device("row_mask", row_mask, "x", x)
    checks.shape("row_mask", row_mask, x.shape[:-1], "the leading shape of x")


_library = torch.library.Library("infimm_kernels", "FRAGMENT")
_library.define(
    "gated_residual_projection(Tensor x, Tensor o, Tensor weight, Tensor gate, Tensor? row_mask,"
    " str? backend) -> Tensor"
)
# needs: which of the three gradients to compute; the others come back empty.
_library.define(
    "gated_residual_projection_backward(Tensor dy, Tensor o, Tensor weight, Tensor gate, Tensor? row_mask,"
    " bool[3] needs=[True, True, True], str? backend=None) -> (Tensor do, Tensor dweight, Tensor dgate)"
)


# --- kernel choice ------------------------------------------------------------------------------------------


EVERY_GRADIENT = (True, True, True)
CANDIDATES = (backends.Candidate("triton", backends.why_not_triton),)


@autodiff.without_autocast
def _kernel(x, o, weight, gate, row_mask, backend):
    if backends.select("gated_residual_projection", CANDIDATES, backend, x, o, weight, gate) == "triton":
        from infimm_kernels.gated_residual.triton_forward import launch_gated_residual_projection

        return launch_gated_residual_projection(x, o, weight, gate, row_mask)
    return reference.forward(x, o, weight, gate, row_mask).contiguous()


@autodiff.without_autocast
def _backward_kernel(dy, o, weight, gate, row_mask, needs=EVERY_GRADIENT, backend=None):
    if backends.select("gated_residual_projection", CANDIDATES, backend, dy, o, weight, gate) == "triton":
        from infimm_kernels.gated_residual.triton_backward import launch_gated_residual_backward

        grads = launch_gated_residual_backward(dy, o, weight, gate, row_mask, needs)
    else:
        grads = reference.backward(dy, o, weight, gate, row_mask, needs)
    return tuple(
        x.new_empty(0) if grad is None else grad.contiguous()
        for x, grad in zip((o, weight, gate), grads, strict=True)
    )


for _device in ("CPU", "CUDA"):
    _library.impl("gated_residual_projection", _kernel, _device)
    _library.impl("gated_residual_projection_backward", _backward_kernel, _device)


# --- fake ---------------------------------------------------------------------------------------------------


@torch.library.register_fake("infimm_kernels::gated_residual_projection", lib=_library)
def _fake(x, o, weight, gate, row_mask, backend):
    return x.new_empty(x.shape)


@torch.library.register_fake("infimm_kernels::gated_residual_projection_backward", lib=_library)
def _backward_fake(dy, o, weight, gate, row_mask, needs=EVERY_GRADIENT, backend=None):
    inputs = zip((o, weight, gate), needs, strict=True)
    return tuple(x.new_empty(x.shape if needed else 0) for x, needed in inputs)


# --- autograd -----------------------------------------------------------------------------------------------


def _reference(x, o, weight, gate, row_mask, backend):
    return reference.differentiable(x, o, weight, gate, row_mask)


@autodiff.transforms_go_to(_reference)
def _call(*args):
    return torch.ops.infimm_kernels.gated_residual_projection.default(*args)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:5])
    ctx.backend = inputs[5]


def _autograd(ctx, dy):
    o, weight, gate, row_mask = ctx.saved_tensors
    needs = ctx.needs_input_grad[1:4]
    if not any(needs):
        return dy, None, None, None, None, None
    if torch.is_grad_enabled():
        grads = reference.backward(dy, o, weight, gate, row_mask, needs)
    else:
        grads = torch.ops.infimm_kernels.gated_residual_projection_backward.default(
            dy, o, weight, gate, row_mask, needs, ctx.backend
        )
        grads = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dy, *grads, None, None


torch.library.register_autograd(
    "infimm_kernels::gated_residual_projection", _autograd, setup_context=_setup_context, lib=_library
)

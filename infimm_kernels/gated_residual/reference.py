"""x + tanh(gate) * (o @ weight^T), stated in eager PyTorch.

With t = tanh(gate), dy the gradient of the result and dm = dy with its masked rows set to zero:

    S = dm^T o                     [hidden, inner]
    dx = dy
    do = (dm * t) weight
    dweight = t[:, None] * S
    dgate = (1 - t^2) * rowsum(weight * S)

so the backward needs the inputs alone: o @ weight^T is not saved. The compute dtype is
``torch.promote_types(dtype, torch.float32)``.
"""

import torch
from torch import Tensor

from infimm_kernels.autodiff import compute_dtype


def forward(x: Tensor, o: Tensor, weight: Tensor, gate: Tensor, row_mask: Tensor | None) -> Tensor:
    """x [..., hidden], o [..., inner], weight [hidden, inner], gate [hidden], row_mask [...] -> like x."""
    update = _update(x, o, weight, gate)
    # x + (-0.0) is x bit for bit; x + 0.0 would turn a -0.0 of x into 0.0.
    unchanged = update == 0 if row_mask is None else (update == 0) | ~row_mask.unsqueeze(-1)
    return (x.to(update.dtype) + update.masked_fill_(unchanged, -0.0)).to(x.dtype)


def differentiable(x: Tensor, o: Tensor, weight: Tensor, gate: Tensor, row_mask: Tensor | None) -> Tensor:
    """`forward` for transforms: where a gate is zero its derivative is not, so no zero may be filled over."""
    update = _update(x, o, weight, gate)
    if row_mask is not None:
        update = update.masked_fill(~row_mask.unsqueeze(-1), -0.0)
    return (x.to(update.dtype) + update).to(x.dtype)


def _update(x: Tensor, o: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    dtype = compute_dtype(x.dtype)
    return torch.nn.functional.linear(o.to(dtype), weight.to(dtype)) * gate.to(dtype).tanh()


def backward(
    dy: Tensor, o: Tensor, weight: Tensor, gate: Tensor, row_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of o, weight and gate; that of x is dy itself."""
    dtype = compute_dtype(dy.dtype)
    t, w = gate.to(dtype).tanh(), weight.to(dtype)
    dm = dy.to(dtype)
    if row_mask is not None:
        dm = dm.masked_fill(~row_mask.unsqueeze(-1), 0.0)
        o = o.masked_fill(~row_mask.unsqueeze(-1), 0.0)  # or a NaN in a masked row would reach S
    s = dm.reshape(-1, dm.shape[-1]).t() @ o.to(dtype).reshape(-1, o.shape[-1])
    do = (dm * t) @ w
    dgate = (1 - t * t) * (w * s).sum(1)
    return do.to(o.dtype), (t.unsqueeze(1) * s).to(weight.dtype), dgate.to(gate.dtype)

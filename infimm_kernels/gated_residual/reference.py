"""x + tanh(gate) * (o @ weight^T), stated in eager PyTorch.

With m = o @ weight^T, t = tanh(gate), dy the gradient of the result and dm = dy with its masked rows set to
zero:

    S = dm^T o                     [hidden, inner]
    dx = dy
    do = (dm * t) weight
    dweight = t[:, None] * S  =  (dm * t)^T o
    dgate = (1 - t^2) * rowsum(weight * S)  =  (1 - t^2) * columnsum(dm * m)

so the backward needs the inputs alone: m is not saved. The compute dtype is the widest of the inputs' and
float32. o and weight in bfloat16 are multiplied as they are, like torch.nn.functional.linear does under
autocast; a rounded S would double the error of dgate, so there the second forms hold, with m made again.
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


def backward(
    dy: Tensor, o: Tensor, weight: Tensor, gate: Tensor, row_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of o, weight and gate, each in its dtype; that of x is dy itself."""
    dtype = compute_dtype(torch.promote_types(dy.dtype, gate.dtype))
    product_dtype = _product_dtype(o, dtype)
    dm = dy.to(dtype)
    if row_mask is not None:
        dm = dm.masked_fill(~row_mask.unsqueeze(-1), 0.0)
        o = o.masked_fill(~row_mask.unsqueeze(-1), 0.0)  # or a NaN in a masked row would reach S
    t = gate.to(dtype).tanh()
    wp, dmt = weight.to(product_dtype), (dm * t).to(product_dtype)
    do = dmt @ wp
    op, dm, dmt = (y.flatten(0, -2) if y.dim() > 1 else y[None] for y in (o.to(product_dtype), dm, dmt))
    if product_dtype == dtype:
        s = dm.t() @ op
        dweight, sums = t.unsqueeze(1) * s, (wp * s).sum(1)
    else:
        dweight, sums = dmt.t() @ op, (dm * torch.nn.functional.linear(op, wp)).sum(0)
    return do.to(o.dtype), dweight.to(weight.dtype), ((1 - t * t) * sums).to(gate.dtype)


def _update(x: Tensor, o: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    dtype = compute_dtype(torch.promote_types(x.dtype, gate.dtype))
    product_dtype = _product_dtype(o, dtype)
    m = torch.nn.functional.linear(o.to(product_dtype), weight.to(product_dtype))
    return m.to(dtype) * gate.to(dtype).tanh()


def _product_dtype(o: Tensor, dtype: torch.dtype) -> torch.dtype:
    """bfloat16 has the range of float32 and fast CPU matmuls; float16 could overflow and is slow there."""
    return o.dtype if o.dtype == torch.bfloat16 else dtype

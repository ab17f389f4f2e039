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

from infimm_kernels import few_rows
from infimm_kernels.autodiff import compute_dtype


def forward(x: Tensor, o: Tensor, weight: Tensor, gate: Tensor, row_mask: Tensor | None) -> Tensor:
    """x [..., hidden], o [..., inner], weight [hidden, inner], gate [hidden], row_mask [...] -> like x."""
    update = _update(x, o, weight, gate)
    # x + (-0.0) is x bit for bit; x + 0.0 would turn a -0.0 of x into 0.0.
    unchanged = update == 0 if row_mask is None else (update == 0) | ~row_mask.unsqueeze(-1)
    return (x.to(update.dtype) + update.masked_fill_(unchanged, -0.0)).to(x.dtype)


def differentiable(x: Tensor, o: Tensor, weight: Tensor, gate: Tensor, row_mask: Tensor | None) -> Tensor:
    """`forward` for transforms: where a gate is zero its derivative is not, so no zero may be filled over."""
    if row_mask is None:
        update = _update(x, o, weight, gate)
    else:
        masked = ~row_mask.unsqueeze(-1)
        # o too, or a NaN in a masked row would meet a zero in the gradient of weight.
        update = _update(x, o.masked_fill(masked, 0.0), weight, gate).masked_fill(masked, -0.0)
    return (x.to(update.dtype) + update).to(x.dtype)


def backward(
    dy: Tensor,
    o: Tensor,
    weight: Tensor,
    gate: Tensor,
    row_mask: Tensor | None,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of o, weight and gate, each in its dtype, or None; that of x is dy itself."""
    needs_do, needs_dweight, needs_dgate = needs
    dtype = compute_dtype(torch.promote_types(dy.dtype, gate.dtype))
    product_dtype = _product_dtype(o, dtype)
    dm = dy.to(dtype)
    if row_mask is not None:
        dm = dm.masked_fill(~row_mask.unsqueeze(-1), 0.0)
    t = gate.to(dtype).tanh()
    wp = weight.to(product_dtype)
    do = dweight = dgate = dmt = None
    if needs_do or (needs_dweight and product_dtype != dtype):
        dmt = (dm * t).to(product_dtype)
    if needs_do:
        do = (dmt @ wp).to(o.dtype)
    if needs_dweight or needs_dgate:
        if row_mask is not None:
            o = o.masked_fill(~row_mask.unsqueeze(-1), 0.0)  # or a NaN in a masked row would reach S
        op, dm = _rows(o.to(product_dtype)), _rows(dm)
        if product_dtype == dtype:
            s = dm.t() @ op
            dweight = (t.unsqueeze(1) * s).to(weight.dtype) if needs_dweight else None
            sums = (wp * s).sum(1) if needs_dgate else None
        else:
            dweight = (_rows(dmt).t() @ op).to(weight.dtype) if needs_dweight else None
            sums = (dm * torch.nn.functional.linear(op, wp)).sum(0) if needs_dgate else None
        if needs_dgate:
            dgate = ((1 - t * t) * sums).to(gate.dtype)
    return do, dweight, dgate


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def _update(x: Tensor, o: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    dtype = compute_dtype(torch.promote_types(x.dtype, gate.dtype))
    product_dtype = _product_dtype(o, dtype)
    m = few_rows.linear(o.to(product_dtype), weight.to(product_dtype))
    return m.to(dtype) * gate.to(dtype).tanh()


def _product_dtype(o: Tensor, dtype: torch.dtype) -> torch.dtype:
    """bfloat16 has the range of float32 and fast CPU matmuls; float16 could overflow and is slow there."""
    return o.dtype if o.dtype == torch.bfloat16 else dtype

"""gated_feed_forward: LayerNorm and GELU of PyTorch around two projections, the second one gated."""

import torch
import torch.nn.functional as F
from torch import Tensor

from infimm_kernels import autodiff, backends, checks, few_rows
from infimm_kernels.gated_residual import gated_residual_projection
from infimm_kernels.gated_residual.op import check_branch, check_gate, check_row_mask


def gated_feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    gate: Tensor,
    *,
    row_mask: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """The feed-forward half of a gated cross-attention block:

        x + tanh(gate) * (gelu(LayerNorm(x) @ weight_in^T) @ weight_out^T) * row_mask

    (Alayrac et al. 2022, Flamingo, figure 4, with an element-wise gate; the GELU is the exact one, by erf).
    Outside transforms the result is x bit for bit where the gate is zero and in rows whose mask is False (a
    NaN or inf in the branch still shows through a zero gate, as in eager PyTorch). What is in a masked row of
    x, NaN and inf too, reaches no other row and no gradient.

    Args:
        x: [..., hidden], the residual stream; float16, bfloat16, float32 or float64.
        norm_weight, norm_bias: [hidden], of the LayerNorm over hidden; dtype of x or of weight_in.
        weight_in: [ffn, hidden], the layout of torch.nn.Linear; the dtype of x, or one whose every value x
            can hold: a float32 residual stream takes a bfloat16 branch.
        weight_out: [hidden, ffn]; dtype of weight_in.
        gate: [hidden], before the tanh; dtype of x or of weight_out.
        row_mask: bool, the leading shape of x; None for all True. Every row is computed whatever the mask, a
            masked one as zeros, so that shapes do not depend on it.
        eps: of the LayerNorm, positive.
        backend: of `gated_residual_projection`, which does the second projection and all after it.

    All tensors are on the device of x.

    Returns:
        a new tensor of the shape and dtype of x.

    The norm is computed in the widest of the dtypes of x, norm_weight and norm_bias, and cast to that of
    weight_in. Under autocast weight_in and weight_out are cast to its dtype; x and gate stay, and the dtypes
    of weight_in and weight_out that other arguments may have are those before the cast.

    Raises:
        ValueError: an argument breaks a rule above, or the named backend cannot run.
        NotImplementedError: no GPU backend can serve the call.
    """
    checks.tensor("x", x)
    if x.dim() < 1:
        checks.fail("x", "have at least one dimension", list(x.shape))
    for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias), ("gate", gate)):
        checks.tensor(name, value, 1, "[hidden]")
    checks.tensor("weight_in", weight_in, 2, "[ffn, hidden]")
    checks.tensor("weight_out", weight_out, 2, "[hidden, ffn]")
    checks.floating("x", x)
    check_gate("norm_weight", norm_weight, x, "weight_in", weight_in)
    check_gate("norm_bias", norm_bias, x, "weight_in", weight_in)
    check_gate("gate", gate, x, "weight_out", weight_out)
    # The projections cast the weights themselves; here only their dtype matters, so no row is cast.
    cast_in, cast_out = autodiff.to_autocast_dtype(weight_in[:0], weight_out[:0])
    check_branch("weight_in", cast_in, x)
    checks.same_kind("weight_out", cast_out, "weight_in", cast_in)
    hidden, ffn = x.shape[-1], weight_in.shape[0]
    if weight_in.numel() == 0:
        checks.fail("weight_in", "have at least one row and one column", list(weight_in.shape))
    if hidden < 1:
        checks.fail("x", "have at least one channel", list(x.shape))
    checks.shape("weight_in", weight_in, (ffn, hidden), "[ffn, hidden]")
    checks.shape("weight_out", weight_out, (hidden, ffn), "[hidden, ffn]")
    for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias), ("gate", gate)):
        checks.shape(name, value, (hidden,), "[hidden]")
    if row_mask is not None:
        check_row_mask(row_mask, x)
    if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not 0 < eps <= checks.LARGEST_FLOAT:
        checks.fail("eps", "be a positive number", eps)
    backends.check(backend)
    dtype = torch.promote_types(torch.promote_types(x.dtype, norm_weight.dtype), norm_bias.dtype)
    # A NaN in a masked row would meet a zero in the gradients of all that comes before the gate.
    kept = x if row_mask is None else x.masked_fill(~row_mask.unsqueeze(-1), 0.0)
    norm = F.layer_norm(kept.to(dtype), (hidden,), norm_weight.to(dtype), norm_bias.to(dtype), eps)
    branch = F.gelu(few_rows.linear(norm.to(cast_in.dtype), weight_in))
    return gated_residual_projection(x, branch, weight_out, gate, row_mask=row_mask, backend=backend)

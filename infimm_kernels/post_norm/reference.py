"""x + LayerNorm(y) [+ PE], stated in eager PyTorch.

Over the channels of a row, with dout the gradient of the result:

    mean = average(y)
    rstd = 1 / sqrt(average((y - mean)^2) + eps)
    n = (y - mean) * rstd
    out = x + weight * n + bias [+ PE]

    g = weight * dout
    dx = dout
    dy = rstd * (g - average(g) - n * average(g * n))
    dweight = sum over rows of dout * n
    dbias = sum over rows of dout

so the backward needs y, weight, and the two statistics of each row. The compute dtype is that of x,
float32 at least.
"""

import torch
from torch import Tensor

from infimm_kernels.autodiff import compute_dtype
from infimm_kernels.position_2d import reference as position_2d

# Narrow dtypes are widened this many elements at a time, which stay in a cache.
CHUNK = 2**18


def forward(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    positions: Tensor | None,
    granularity: str,
    window_shape: tuple[int, int],
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, y [..., hidden], weight, bias [hidden] -> like x, then mean and rstd [...] in the compute dtype."""
    dtype = compute_dtype(x.dtype)
    hidden = x.shape[-1]
    weight, bias = weight.to(dtype), bias.to(dtype)
    if x.dtype == y.dtype == dtype:
        out, mean, rstd = torch.native_layer_norm(y, (hidden,), weight, bias, eps)
        out.add_(x)
        if positions is not None:
            position_2d.add_into(out, out, positions, granularity, window_shape, num_prefix_tokens)
        return out, mean.squeeze(-1), rstd.squeeze(-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=dtype, device=x.device) for _ in range(2))
    outs, means, rstds = out, mean, rstd
    if positions is None:  # any rows are a part; with positions, whole windows
        outs, x, y = (t.reshape(-1, hidden) for t in (out, x, y))
        means, rstds = mean.view(-1), rstd.view(-1)
    size = max(1, CHUNK // max(1, x[:1].numel()))
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        normed, *statistics = torch.native_layer_norm(y[part].to(dtype), (hidden,), weight, bias, eps)
        normed.add_(x[part])
        if positions is not None:
            place = (positions[part], granularity, window_shape, num_prefix_tokens)
            position_2d.add_into(normed, normed, *place)
        outs[part] = normed
        means[part], rstds[part] = (t.squeeze(-1) for t in statistics)
    return out, mean, rstd


def differentiable(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    positions: Tensor | None,
    granularity: str,
    window_shape: tuple[int, int],
    num_prefix_tokens: int,
) -> Tensor:
    """`forward` for transforms, without the statistics: every derivative of it is right, in any order."""
    dtype = compute_dtype(x.dtype)
    normed, _ = _normalised(y.to(dtype), eps)
    out = x.to(dtype) + normed * weight.to(dtype) + bias.to(dtype)
    if positions is not None:
        out = position_2d.forward(out, positions, granularity, window_shape, num_prefix_tokens)
    return out.to(x.dtype)


def backward(
    dout: Tensor, y: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, need_dy: bool, need_sums: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of y, weight and bias, None where not needed; that of x is dout itself."""
    dtype, hidden = mean.dtype, y.shape[-1]
    wanted = [need_dy, need_sums, need_sums]
    wide, mean, rstd = weight.to(dtype), mean.reshape(-1, 1), rstd.reshape(-1, 1)
    dout, rows = dout.reshape(-1, hidden), y.reshape(-1, hidden)
    # Never the mixed form of the function below, which takes a narrow dout as it is: it adds up the rows in
    # the narrow dtype.
    narrow = not dout.dtype == y.dtype == dtype
    size = max(1, CHUNK // hidden if narrow else len(rows))
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device) if narrow and need_dy else None
    sums = [torch.zeros(hidden, dtype=dtype, device=y.device) for _ in range(2)]
    for start in range(0, max(1, len(rows)), size):
        part = slice(start, start + size)
        grads = torch.ops.aten.native_layer_norm_backward(
            dout[part].to(dtype), rows[part].to(dtype), [hidden], mean[part], rstd[part], wide, wide, wanted
        )
        if narrow and need_dy:
            dy.view(-1, hidden)[part] = grads[0]
        elif need_dy:
            dy = grads[0].view(y.shape)
        if need_sums:
            sums = [total.add_(grad) for total, grad in zip(sums, grads[1:], strict=True)]
    return dy, *(t.to(weight.dtype) if need_sums else None for t in sums)


def differentiable_backward(
    dout: Tensor, y: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` for a gradient that keeps its graph: the statistics are functions of y here."""
    dtype = compute_dtype(dout.dtype)
    normed, rstd = _normalised(y.to(dtype), eps)
    wide = dout.to(dtype)
    g = wide * weight.to(dtype)
    dy = rstd * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
    dweight = (wide * normed).reshape(-1, y.shape[-1]).sum(0)
    dbias = wide.reshape(-1, y.shape[-1]).sum(0)
    return dy.to(y.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)


def _normalised(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    centred = y - y.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd

"""The keys and values of all layers, stated in eager PyTorch.

With y = features + PE, or the features alone, the result kv [num_layers, 2, total, inner] and its gradient
dkv:

    kv[l, j] = y weight[l, j]^T                  j = 0 for keys, 1 for values
    dfeatures = sum over l, j of dkv[l, j] weight[l, j]
    dweight[l, j] = dkv[l, j]^T y

so the backward needs the inputs alone, and each gradient only the half of them that it reads. On a CPU, which
has no epilogue to fold the position into, adding it to the features is the cheapest way.

The products are in float32 at least, but for bfloat16: it has the range of float32 and is fast on CPUs, and
each result is one product, so its sums are rounded once.
"""

import functools

import torch
from torch import Tensor

from infimm_kernels.autodiff import compute_dtype
from infimm_kernels.position_2d import reference as position_2d

# Windows are placed this many bytes at a time, which stay in a cache for the products of all layers.
CHUNK_BYTES = 1 << 23


def forward(features: Tensor, weight: Tensor, positions: Tensor | None, *place: object) -> Tensor:
    """features [num_windows, seqlen, hidden], weight [num_layers, 2, inner, hidden].

    place: granularity, window_shape, num_prefix_tokens.

    Returns [num_layers, 2, num_windows * seqlen, inner], contiguous.
    """
    dtype = _product_dtype(features)
    num_windows, seqlen, _ = features.shape
    num_layers, _, inner, _ = weight.shape
    kv = torch.empty(
        (num_layers, 2, num_windows * seqlen, inner), dtype=features.dtype, device=features.device
    )
    weights = [w.to(dtype).t() for w in weight.flatten(0, 1)]
    parts = kv.view(2 * num_layers, num_windows, seqlen, inner)
    size = max(1, num_windows if positions is None else CHUNK_BYTES // max(1, features[:1].nbytes))
    for start in range(0, num_windows, size):
        windows = slice(start, start + size)
        places = None if positions is None else positions[windows]
        y = _placed(features[windows], places, *place).flatten(0, 1).to(dtype)
        for part, w in zip(parts, weights, strict=True):
            _product(y, w, part[windows].flatten(0, 1))
    return kv


def differentiable(features: Tensor, weight: Tensor, positions: Tensor | None, *place: object) -> Tensor:
    """`forward` for transforms."""
    dtype = _product_dtype(features)
    y = features if positions is None else position_2d.forward(features, positions, *place)
    y = y.flatten(0, 1).to(dtype)
    return (y @ weight.to(dtype).mT).to(features.dtype)


def backward_features(dkv: Tensor, weight: Tensor) -> Tensor:
    """dkv [num_layers, 2, total, inner], weight [num_layers, 2, inner, hidden] -> [total, hidden]."""
    dtype = _product_dtype(dkv)
    if dtype == compute_dtype(dtype):
        pairs = zip(dkv.flatten(0, 1), weight.flatten(0, 1), strict=True)
        products = (grad.to(dtype) @ w.to(dtype) for grad, w in pairs)
        return functools.reduce(Tensor.add_, products).to(weight.dtype)
    # One product with all layers in its inner dimension: a sum of products would be rounded once for each.
    rows = dkv.permute(2, 0, 1, 3).flatten(1)  # [total, num_layers * 2 * inner]
    return rows @ weight.flatten(0, 2)


def backward_weight(dkv: Tensor, features: Tensor, *place: object) -> Tensor:
    """dkv [num_layers, 2, total, inner], features and what follows as in `forward` -> the shape of weight."""
    dtype = _product_dtype(features)
    y = _placed(features, *place).flatten(0, 1).to(dtype)
    shape = (*dkv.shape[:2], dkv.shape[3], features.shape[2])
    dweight = torch.empty(shape, dtype=features.dtype, device=features.device)
    for result, grad in zip(dweight.flatten(0, 1), dkv.flatten(0, 1), strict=True):
        _product(grad.to(dtype).t(), y, result)
    return dweight


def _placed(features: Tensor, positions: Tensor | None, *place: object) -> Tensor:
    """features + PE in the dtype of features; themselves without positions."""
    if positions is None:
        return features
    y = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    position_2d.add_into(y, features, positions, *place)
    return y


def _product(a: Tensor, b: Tensor, result: Tensor) -> None:
    if a.dtype == result.dtype:
        torch.mm(a, b, out=result)
    else:
        result.copy_(a @ b)


def _product_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.bfloat16 else compute_dtype(x.dtype)

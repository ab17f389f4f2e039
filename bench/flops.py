"""Counts the floating-point operations and live bytes of a model's passes, with storage or without.

`FlopCounterMode` counts torch's own products; the formulas of this project's ops stand here. A multiply-add
is two operations; attention counts its two products in full, also where a causal mask hides half of them."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary

import infimm_kernels  # noqa: F401  registers the ops

_lengths = WeakTensorKeyDictionary()


def remember_lengths(cu_seqlens: Tensor, lengths: list[int]) -> None:
    """What stands in a `cu_seqlens` that has no storage; without it segments count as equally long."""
    _lengths[cu_seqlens] = lengths


def _segment_lengths(cu_seqlens: Tensor, total: int) -> list[float]:
    if not isinstance(cu_seqlens, FakeTensor):
        return cu_seqlens.diff().tolist()
    count = cu_seqlens.shape[0] - 1
    return _lengths.get(cu_seqlens, [total / count] * count)


def _window_attention(qkv: Tensor, cu_seqlens: Tensor | None, *args, **kwargs) -> int:
    num_heads, head_dim = qkv.shape[-2:]
    if cu_seqlens is None:
        return 4 * qkv.shape[0] * qkv.shape[1] ** 2 * num_heads * head_dim
    return round(4 * sum(n * n for n in _segment_lengths(cu_seqlens, qkv.shape[0])) * num_heads * head_dim)


def _window_attention_backward(
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    cu_seqlens: Tensor | None,
    *args,
    **kwargs,
) -> int:
    return _attention_backward(_window_attention(qkv, cu_seqlens))


def _varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *args, **kwargs
) -> int:
    pairs = zip(_segment_lengths(cu_seqlens_q, len(q)), _segment_lengths(cu_seqlens_k, len(k)), strict=True)
    return round(4 * sum(queries * keys for queries, keys in pairs) * q.shape[1] * q.shape[2])


def _overlapping_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    key_ranges: Tensor,
    *args,
    **kwargs,
) -> int:
    queries, (first, end) = cu_seqlens_q.diff(), key_ranges.unbind(1)
    return 4 * int((queries * (end - first)).sum()) * q.shape[1] * q.shape[2]


def _of_saved(forward):
    """The backward of an attention of q, k and v; its output and gradients stand behind them."""

    def backward(q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> int:
        return _attention_backward(forward(q, k, v, *args[4:], **kwargs))

    return backward


def _attention_backward(forward: int) -> int:
    """Five products, the scores made again among them, against the forward's two."""
    return forward * 5 // 2


def _vision_keys_values(features: Tensor, weight: Tensor, *args, **kwargs) -> int:
    return 2 * features.numel() // features.shape[-1] * weight.numel()


def _vision_keys_values_backward(dkv: Tensor, other: Tensor, *args, **kwargs) -> int:
    """`other`: the weight for the features' gradient, the features for the weight's."""
    return 2 * dkv.numel() * other.shape[-1]


def _gated_residual_projection(x: Tensor, o: Tensor, weight: Tensor, *args, **kwargs) -> int:
    return 2 * o.numel() // o.shape[-1] * weight.numel()


def _gated_residual_projection_backward(
    dy: Tensor,
    o: Tensor,
    weight: Tensor,
    gate: Tensor,
    row_mask: Tensor | None,
    needs: Sequence[bool] = (True, True, True),
    *args,
    **kwargs,
) -> int:
    """The gradients of weight and gate share their product; torch leaves out a `needs` of the default."""
    return (needs[0] + (needs[1] or needs[2])) * _gated_residual_projection(dy, o, weight)


def _sdpa_on_cpu(query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> int:
    batch, heads, queries, head_dim = query.shape
    return 2 * batch * heads * queries * key.shape[2] * (head_dim + value.shape[3])


def _sdpa_on_cpu_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> int:
    return _attention_backward(_sdpa_on_cpu(query, key, value))


def _counted(formula):
    def with_raw_tensors(*args, out_val=None, **kwargs) -> int:
        return formula(*args, **kwargs)

    with_raw_tensors._get_raw = True
    return with_raw_tensors


_ops, _aten = torch.ops.infimm_kernels, torch.ops.aten
FORMULAS = {
    op: _counted(formula)
    for op, formula in {
        _ops.window_attention: _window_attention,
        _ops.window_attention_backward: _window_attention_backward,
        _ops.varlen_attention: _varlen_attention,
        _ops.varlen_attention_backward: _of_saved(_varlen_attention),
        _ops.overlapping_attention: _overlapping_attention,
        _ops.overlapping_attention_backward: _of_saved(_overlapping_attention),
        _ops.vision_keys_values: _vision_keys_values,
        _ops.vision_keys_values_backward_features: _vision_keys_values_backward,
        _ops.vision_keys_values_backward_weight: _vision_keys_values_backward,
        _ops.gated_residual_projection: _gated_residual_projection,
        _ops.gated_residual_projection_backward: _gated_residual_projection_backward,
        _aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_on_cpu,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_on_cpu_backward,
    }.items()
}


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are alive, and their peak.

    What lives inside an operation (a kernel's workspace) is not seen; the weights, `before`, do not count."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._before = list(before)  # kept alive, so that no other storage gets the address of one of theirs
        self._storages: dict[int, weakref.ref | None] = {
            tensor.untyped_storage()._cdata: None for tensor in self._before
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()

        def forget(_, key=key, size=size) -> None:
            self._storages.pop(key, None)
            self.live -= size

        self._storages[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


@contextlib.contextmanager
def counting(model: nn.Module) -> Iterator[tuple[FlopCounterMode, LiveBytes]]:
    """(flops, bytes beside the weights of `model`) of what runs inside."""
    before = [*model.parameters(), *model.buffers()]
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as flops, LiveBytes(before) as live:
        yield flops, live

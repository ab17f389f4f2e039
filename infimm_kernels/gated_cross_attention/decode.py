"""gated_cross_attention for a few new tokens against cached vision keys and values: its registered op.

The public function goes here for the segments of `decode_segments`, where no gradient is recorded.
"""

import torch
from torch import Tensor

from infimm_kernels import autodiff, backends, checks
from infimm_kernels.attention import choice
from infimm_kernels.gated_cross_attention import decode_reference

MAX_TEXT_LEN = 8
MAX_HINT = 2**62  # what an op takes as an integer


def serves(
    x: Tensor, query: Tensor, key: Tensor, value: Tensor, out_weight: Tensor, attn_gate: Tensor
) -> bool:
    """Whether `gated_cross_attention_decode` may take a call that has key ranges."""
    if autodiff.transforms_active():
        return False
    if torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x, query, key, value, out_weight, attn_gate)
    ):
        return False
    return 1 <= query.shape[1] <= MAX_TEXT_LEN and query.shape[3] > 0 and x.shape[2] > 0


def gated_cross_attention_decode(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out_weight: Tensor,
    attn_gate: Tensor,
    key_ranges: Tensor,
    max_keys: int,
    softmax_scale: float | None,
    backend: str | None,
) -> Tensor:
    """x + tanh(attn_gate) * (attention @ out_weight^T), where sample b attends to the keys of its range.

    The tensors are those of `gated_cross_attention`, checked and in the dtype of autocast. key_ranges: int32
    [batch, 2], (first, end) of each sample, cut to the keys that there are; a sample without keys gets x bit
    for bit. max_keys: a hint of the longest range. At most MAX_TEXT_LEN tokens, see `serves`; no gradient.
    """
    checks.tensor("segments.key_ranges", key_ranges, 2, "[batch, 2]")
    if key_ranges.dtype != torch.int32:
        checks.fail("segments.key_ranges", "have dtype torch.int32", key_ranges.dtype)
    checks.same_device("segments.key_ranges", key_ranges, "x", x)
    checks.shape("segments.key_ranges", key_ranges, (x.shape[0], 2), "[batch, 2]")
    if not checks.is_int(max_keys) or not -MAX_HINT <= max_keys <= MAX_HINT:
        checks.fail("segments.max_keys", f"be an integer of at most {MAX_HINT}", max_keys)
    scale = checks.softmax_scale(softmax_scale, query.shape[3])
    backends.check(backend)
    return torch.ops.infimm_kernels.gated_cross_attention_decode.default(
        x, query, key, value, out_weight, attn_gate, key_ranges, max_keys, scale, backend
    )


_library = torch.library.Library("infimm_kernels", "FRAGMENT")
_library.define(
    "gated_cross_attention_decode(Tensor x, Tensor query, Tensor key, Tensor value, Tensor out_weight,"
    " Tensor attn_gate, Tensor key_ranges, SymInt max_keys, float softmax_scale, str? backend) -> Tensor"
)


# --- kernel choice ------------------------------------------------------------------------------------------


def why_not_triton(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out_weight: Tensor,
    attn_gate: Tensor,
    key_ranges: Tensor,
) -> str | None:
    """Why Triton cannot run this call; None when it can."""
    return choice.why_not_triton(query, key, value, out_weight, x, attn_gate)


def why_not_cuda(x: Tensor, *tensors: Tensor) -> str | None:
    """Why the compiled extension cannot run this call; None when it can."""
    from infimm_kernels.gated_cross_attention import cuda

    return cuda.why_not_cuda(x, *tensors)


CANDIDATES = (
    backends.Candidate("triton", why_not_triton),
    # Compiled but never yet run on hardware, so it has to be asked for.
    backends.Candidate("cuda", why_not_cuda, default=False),
)


@autodiff.without_autocast
def _kernel(x, query, key, value, out_weight, attn_gate, key_ranges, max_keys, softmax_scale, backend):
    query, key, value, out_weight = map(checks.unit_last_stride, (query, key, value, out_weight))
    tensors = x, query, key, value, out_weight, attn_gate, key_ranges
    chosen = backends.select("gated_cross_attention", CANDIDATES, backend, *tensors)
    if chosen == "cuda":
        from infimm_kernels.gated_cross_attention.cuda import launch_decode
    elif chosen == "triton":
        from infimm_kernels.gated_cross_attention.triton_decode import launch_decode
    else:
        return decode_reference.forward(*tensors, softmax_scale)
    return launch_decode(*tensors, max_keys, softmax_scale)


for _device in ("CPU", "CUDA"):
    _library.impl("gated_cross_attention_decode", _kernel, _device)


# --- fake ---------------------------------------------------------------------------------------------------


@torch.library.register_fake("infimm_kernels::gated_cross_attention_decode", lib=_library)
def _fake(x, query, key, value, out_weight, attn_gate, key_ranges, max_keys, softmax_scale, backend):
    return x.new_empty(x.shape)


# --- autograd -----------------------------------------------------------------------------------------------


def _refuse(ctx, inputs=None, output=None):
    raise RuntimeError(
        "gated_cross_attention_decode has no gradient; infimm_kernels.gated_cross_attention has one, and "
        "comes here only where none is recorded"
    )


torch.library.register_autograd(
    "infimm_kernels::gated_cross_attention_decode", _refuse, setup_context=_refuse, lib=_library
)

"""The CUDA C++ backend of decoding (csrc/decode_attention.cuh): when it can run, and its launch."""

import functools

import torch
from torch import Tensor

from infimm_kernels import backends, checks, extension

UNVERIFIED = "its device code is tested in emulation on a CPU; it has never run on a GPU"
MAX_TEXT_LEN = 8  # these as in csrc/decode_attention.h
MAX_BATCH = 2048
MAX_HEADS = 4096
MAX_HEAD_DIM = 256
MAX_TOKENS = 2**30
BLOCKS_PER_SM = 2  # at most: where fewer fit on an SM, the launcher starts fewer


def why_not_cuda(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out_weight: Tensor,
    attn_gate: Tensor,
    key_ranges: Tensor,
) -> str | None:
    """None when `launch_decode` can run on these tensors, else a sentence that says why not."""
    module = extension.load()
    if module is None:
        return extension.why_not()
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"needs tensors on an NVIDIA GPU, x is on {x.device}"
    tensors = {"query": query, "key": key, "value": value, "out_weight": out_weight, "attn_gate": attn_gate}
    for name, tensor in (tensors | {"key_ranges": key_ranges}).items():
        if tensor.device != x.device:
            return f"needs {name} on the device of x ({x.device}), it is on {tensor.device}"
    for name, tensor in ({"x": x} | tensors).items():
        if _name(tensor.dtype) not in module.DTYPES:
            return f"supports {', '.join(module.DTYPES)}, {name} is {_name(tensor.dtype)}"
    for name in ("key", "value", "out_weight"):
        if tensors[name].dtype != query.dtype:
            has = _name(tensors[name].dtype)
            return f"needs {name} in the dtype of query, {_name(query.dtype)}, it is {has}"
    if key_ranges.dtype != torch.int32:
        return f"needs int32 key_ranges, they are {_name(key_ranges.dtype)}"
    batch, text_len, num_heads, head_dim = query.shape
    if head_dim % 8 != 0 or not 0 < head_dim <= MAX_HEAD_DIM:
        return f"needs head_dim to be a multiple of 8 up to {MAX_HEAD_DIM}, it is {head_dim}"
    if text_len > MAX_TEXT_LEN or batch > MAX_BATCH or len(key) > MAX_TOKENS:
        return (
            f"serves up to {MAX_TEXT_LEN} new tokens, {MAX_BATCH} samples and {MAX_TOKENS} keys, "
            f"got {text_len}, {batch} and {len(key)}"
        )
    num_kv_heads = key.shape[1]
    if not 0 < num_heads <= MAX_HEADS or num_kv_heads == 0 or num_heads % num_kv_heads != 0:
        return (
            f"needs 1 to {MAX_HEADS} query heads in whole groups per key head, "
            f"got {num_heads} and {num_kv_heads}"
        )
    return extension.why_not_capability(backends.capability(x.device), module.build_info()["archs"])


def launch_decode(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out_weight: Tensor,
    attn_gate: Tensor,
    key_ranges: Tensor,
    max_keys: int,
    softmax_scale: float,
) -> Tensor:
    """x + tanh(attn_gate) * (attention @ out_weight^T) by one cooperative launch on the current stream.

    The arguments are already checked, and `why_not_cuda` returned None for them. Everything is computed in
    float32 and rounded once.

    Args:
        x: [batch, text_len, hidden], any dtype of the three; the others may be narrower.
        query: [batch, text_len, num_heads, head_dim].
        key, value: [total, num_kv_heads, head_dim], any strides; copied first when the last one is not 1.
        out_weight: [hidden, num_heads * head_dim].
        attn_gate: [hidden].
        key_ranges: int32 [batch, 2] = (first, end) of each sample's keys, clamped to [0, total]; a sample
            with an empty range keeps its x bit for bit.
        max_keys: not used, the kernel shares out the keys that the ranges name.
        softmax_scale: of the scores.

    Returns:
        A new contiguous tensor of the shape and dtype of x.

    Raises:
        ValueError: an argument the kernel cannot take.
        RuntimeError: a CUDA error, with its text and the shapes.
    """
    x, query, key, value, out_weight, attn_gate = map(
        checks.unit_last_stride, (x, query, key, value, out_weight, attn_gate)
    )
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, text_len, hidden = x.shape
    num_heads, head_dim = query.shape[2:]
    total, num_kv_heads = key.shape[:2]
    max_blocks = BLOCKS_PER_SM * _num_sms(x.device)
    # Of each block's partial results, and the attention rows: decode_workspace_floats in the header.
    slots = max_blocks + batch * num_kv_heads
    workspace_floats = slots * text_len * (num_heads // num_kv_heads) * (head_dim + 2)
    workspace_floats += batch * text_len * num_heads * head_dim
    workspace = torch.empty(workspace_floats, dtype=torch.float32, device=x.device)
    module = extension.load()
    module.decode_attention(
        x=x.data_ptr(),
        out=out.data_ptr(),
        query=query.data_ptr(),
        key=key.data_ptr(),
        value=value.data_ptr(),
        out_weight=out_weight.data_ptr(),
        attn_gate=attn_gate.data_ptr(),
        key_ranges=key_ranges.data_ptr(),
        workspace=workspace.data_ptr(),
        workspace_floats=workspace_floats,
        dtype=module.DTYPES[_name(query.dtype)],
        x_dtype=module.DTYPES[_name(x.dtype)],
        gate_dtype=module.DTYPES[_name(attn_gate.dtype)],
        max_blocks=max_blocks,
        batch=batch,
        text_len=text_len,
        hidden=hidden,
        total=total,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        x_stride_sample=x.stride(0),
        x_stride_row=x.stride(1),
        query_stride_sample=query.stride(0),
        query_stride_row=query.stride(1),
        query_stride_head=query.stride(2),
        key_stride_token=key.stride(0),
        key_stride_head=key.stride(1),
        value_stride_token=value.stride(0),
        value_stride_head=value.stride(1),
        out_weight_stride_row=out_weight.stride(0),
        key_ranges_stride_sample=key_ranges.stride(0),
        key_ranges_stride_bound=key_ranges.stride(1),
        softmax_scale=_float32(softmax_scale),
        device=x.device.index,
        # Asked for at every launch: a stream kept from before would leave a CUDA graph empty.
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )
    return out


@functools.lru_cache(maxsize=32)  # the properties take PyTorch microseconds
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _float32(value: float) -> float:
    """The nearest finite float32, which is what the kernel takes."""
    largest = torch.finfo(torch.float32).max
    return min(max(value, -largest), largest)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

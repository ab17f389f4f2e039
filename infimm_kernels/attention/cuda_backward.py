"""The CUDA C++ backend of attention's backward (csrc/window_attention_backward.cuh).

Triton's first kernel makes delta and the prefix keys' share, csrc's the five products over all other keys,
and Triton's last one sums up; see `triton_backward`.
"""

import torch
from torch import Tensor

from infimm_kernels import extension
from infimm_kernels.attention.cuda import difference, for_copies, is_trusted, name_of, test_problems

HEAD_DIMS = (64, 112)  # as in csrc/window_attention_backward.h; 128 channels do not fit the registers


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlen: int,
    softmax_scale: float,
    num_prefix_tokens: int,
    deterministic: bool,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """As `triton_launch.backward`, with csrc's main kernel once it has passed `self_test` on this device.

    A deterministic backward and other head_dims are Triton's alone.
    """
    from infimm_kernels.attention import triton_launch

    key = q.device, q.dtype, q.shape[-1]
    served = not deterministic and q.shape[-1] in HEAD_DIMS
    trusted = served and is_trusted("backward", key, lambda: self_test(*key, triton_launch))
    arguments = (q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k, seqlen, softmax_scale)
    arguments += (num_prefix_tokens, deterministic, dq, dk, dv)
    triton_launch.backward(*arguments, main=launch_main if trusted else None)


def launch_main(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq_sum: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlen: int,
    softmax_scale: float,
    num_prefix_tokens: int,
) -> None:
    """dk and dv behind the prefix keys, and their share of dq added to dq_sum, by one launch on q's stream.

    Args:
        q, k, v, dout, lse, cu_seqlens_q, cu_seqlens_k, seqlen, softmax_scale: as of the forward, contiguous
            cu_seqlens; dout is copied like q where the copy engine cannot read it.
        delta: float32 [num_heads, total_q], rowsum(out * dout) - dlse.
        dq_sum: float32 [total_q, num_heads, head_dim], contiguous; the gradient without softmax_scale.
        dk, dv: the shapes of k and v, even strides and a unit last one.
        num_prefix_tokens: leading keys of each segment that are left out.

    Raises:
        ValueError: an argument the kernel cannot take.
        RuntimeError: a CUDA error, with its text and the shapes.
    """
    q, k, v, dout = for_copies(q), for_copies(k), for_copies(v), for_copies(dout)
    total_q, num_heads, head_dim = q.shape
    num_segments = total_q // seqlen if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    module = extension.load()
    module.window_attention_backward(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        dout=dout.data_ptr(),
        lse=lse.data_ptr(),
        delta=delta.data_ptr(),
        dq_sum=dq_sum.data_ptr(),
        dk=dk.data_ptr(),
        dv=dv.data_ptr(),
        cu_seqlens_q=0 if cu_seqlens_q is None else cu_seqlens_q.data_ptr(),
        cu_seqlens_k=0 if cu_seqlens_k is None else cu_seqlens_k.data_ptr(),
        dtype=module.DTYPES[name_of(q.dtype)],
        total_q=total_q,
        total_k=k.shape[0],
        num_segments=num_segments,
        seqlen=seqlen,
        num_heads=num_heads,
        num_kv_heads=k.shape[1],
        head_dim=head_dim,
        num_prefix_tokens=num_prefix_tokens,
        q_stride_token=q.stride(0),
        q_stride_head=q.stride(1),
        k_stride_token=k.stride(0),
        k_stride_head=k.stride(1),
        v_stride_token=v.stride(0),
        v_stride_head=v.stride(1),
        dout_stride_token=dout.stride(0),
        dout_stride_head=dout.stride(1),
        dk_stride_token=dk.stride(0),
        dk_stride_head=dk.stride(1),
        dv_stride_token=dv.stride(0),
        dv_stride_head=dv.stride(1),
        softmax_scale=softmax_scale,
        device=q.device.index,
        # Asked for at every launch: a stream kept from before would leave a CUDA graph empty.
        stream=torch.cuda.current_stream(q.device).cuda_stream,
    )


@torch.no_grad()
def self_test(device: torch.device, dtype: torch.dtype, head_dim: int, triton) -> str | None:
    """None when the gradients with and without csrc's kernel agree, else a sentence that says where not.

    triton: `triton_launch`, or what has its `forward` and `backward`.
    """
    for problem, arguments in test_problems(device, dtype, head_dim):
        q, k, v, *segments = arguments
        out, lse = triton.forward(*arguments)
        dout = out.flip(0)  # numbers like any other
        gradients = []
        for main in (launch_main, None):
            found = [torch.empty(x.shape, dtype=dtype, device=device) for x in (q, k, v)]
            triton.backward(q, k, v, out, lse, dout, None, *segments, False, *found, main=main)
            gradients.append(found)
        for name, *results in zip(("dq", "dk", "dv"), *gradients, strict=True):
            if (found := difference(name, *results)) is not None:
                return f"{problem}: {found}"
    return None

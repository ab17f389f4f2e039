"""The CUDA C++ backend of add_position_2d (csrc/add_position_2d.cuh): when it can run, and its launch."""

import torch
from torch import Tensor

from infimm_kernels import checks, extension

UNVERIFIED = "its device code is tested in emulation on a CPU; it has never run on a GPU"


def why_not_cuda(x: Tensor, positions: Tensor) -> str | None:
    """None when `launch_add_position_2d` can run on these tensors, else a sentence that says why not."""
    module = extension.load()
    if module is None:
        return extension.why_not()
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"needs tensors on an NVIDIA GPU, x is on {x.device}"
    if positions.device != x.device:
        return f"needs positions on the device of x ({x.device}), they are on {positions.device}"
    if _name(x.dtype) not in module.DTYPES:
        return f"supports {', '.join(module.DTYPES)}, x is {_name(x.dtype)}"
    if positions.dtype not in (torch.int32, torch.int64):
        return f"needs int32 or int64 positions, they are {_name(positions.dtype)}"
    if x.shape[-1] == 0 or x.shape[-1] % 4 != 0:
        return f"needs hidden to be a positive multiple of 4, it is {x.shape[-1]}"
    return extension.why_not_capability(
        torch.cuda.get_device_capability(x.device), module.build_info()["archs"]
    )


def launch_add_position_2d(
    x: Tensor,
    positions: Tensor,
    granularity: str,
    window_shape: tuple[int, int] | None,
    num_prefix_tokens: int,
) -> Tensor:
    """x plus the 2-D sinusoidal position encoding, by one kernel on the current stream of x's device.

    The arguments are those of `infimm_kernels.add_position_2d`, already checked, and `why_not_cuda` returned
    None for them. The encoding is computed and added in float32 and rounded once.

    Args:
        x: [num_windows, seqlen, hidden], float16, bfloat16 or float32, on a GPU. Windows and tokens may have
            any stride; it is copied first when the last stride is not 1.
        positions: [num_windows, 2] = (row, column), int32 or int64, any strides; negative means no position.
        granularity: "window" or "token".
        window_shape: (height, width) in patches; used by "token" alone.
        num_prefix_tokens: leading tokens that "token" leaves unchanged.

    Returns:
        A new contiguous tensor of the shape and dtype of x.

    Raises:
        ValueError: an argument the kernel cannot take.
        RuntimeError: a CUDA error, with its text and the shapes.
    """
    x = checks.unit_last_stride(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_windows, seqlen, hidden = x.shape
    per_token = granularity == "token"
    height, width = window_shape if per_token else (0, 0)
    module = extension.load()
    module.add_position_2d(
        x=x.data_ptr(),
        out=out.data_ptr(),
        positions=positions.data_ptr(),
        dtype=module.DTYPES[_name(x.dtype)],
        positions_are_int64=positions.dtype == torch.int64,
        num_windows=num_windows,
        seqlen=seqlen,
        hidden=hidden,
        x_stride_window=x.stride(0),
        x_stride_token=x.stride(1),
        out_stride_window=out.stride(0),
        out_stride_token=out.stride(1),
        positions_stride_window=positions.stride(0),
        positions_stride_axis=positions.stride(1),
        per_token=per_token,
        window_height=height,
        window_width=width,
        num_prefix_tokens=num_prefix_tokens,
        device=x.device.index,
        # Asked for at every launch: a stream kept from before would leave a CUDA graph empty.
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )
    return out


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

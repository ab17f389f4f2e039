"""Argument checks shared by every op.

Each check raises ``ValueError("<argument> must <rule>, got <value>")``. Shapes, dtypes and devices are always
checked; values inside a tensor only where reading them cannot stop a GPU or a tracer (`is_readable`).
"""

import itertools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_PREFIX_TOKENS = 8


def fail(argument: str, rule: str, value: object) -> None:
    raise ValueError(f"{argument} must {rule}, got {value}")


def tensor(argument: str, value: object, rank: int | None = None, shape: str = "") -> None:
    """`value` must be a dense tensor on a device that a backend serves, of `rank` dimensions when given."""
    if not isinstance(value, Tensor):
        fail(argument, "be a torch.Tensor", type(value).__name__)
    if value.is_nested or value.layout is not torch.strided:
        fail(argument, "be a dense tensor", "a nested one" if value.is_nested else value.layout)
    if value.device.type not in ("cpu", "cuda", "meta"):
        fail(argument, "be on a CPU or CUDA device", value.device)
    if rank is not None and value.dim() != rank:
        fail(argument, f"have shape {shape}", list(value.shape))


def floating(argument: str, value: Tensor) -> None:
    if value.dtype not in FLOATING_DTYPES:
        fail(argument, "have dtype float16, bfloat16, float32 or float64", value.dtype)


def same_kind(argument: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    """`value` must have the dtype and the device of `reference`."""
    if value.dtype != reference.dtype:
        fail(argument, f"have the dtype of {reference_name} ({reference.dtype})", value.dtype)
    same_device(argument, value, reference_name, reference)


def same_device(argument: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    if value.device != reference.device:
        fail(argument, f"be on the device of {reference_name} ({reference.device})", value.device)


def shape(argument: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    if tuple(value.shape) != tuple(expected):
        fail(argument, f"have shape {meaning} = {list(expected)}", list(value.shape))


def prefix_tokens(num_prefix_tokens: object) -> None:
    if not is_int(num_prefix_tokens) or not 0 <= num_prefix_tokens <= MAX_PREFIX_TOKENS:
        fail("num_prefix_tokens", f"be an integer from 0 to {MAX_PREFIX_TOKENS}", num_prefix_tokens)


LARGEST_FLOAT = sys.float_info.max


def softmax_scale(value: object, head_dim: int) -> float:
    """The scale of the scores: `value`, or head_dim**-0.5 when it is None."""
    if value is None:
        return head_dim**-0.5
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= LARGEST_FLOAT:
        fail("softmax_scale", "be a finite number or None", value)
    return float(value)


def flag(argument: str, value: object) -> None:
    if not isinstance(value, bool):
        fail(argument, "be True or False", value)


def cu_seqlens(argument: str, value: object, reference_name: str, reference: Tensor) -> None:
    """`value` must be int32 [num_segments + 1] on the device of `reference`; see `cu_seqlens_values` too."""
    tensor(argument, value, 1, "[num_segments + 1]")
    if value.dtype != torch.int32:
        fail(argument, "have dtype torch.int32", value.dtype)
    if value.shape[0] < 1:
        fail(argument, "have at least one element", list(value.shape))
    same_device(argument, value, reference_name, reference)


def cu_seqlens_values(argument: str, values: Sequence[int], total: int) -> None:
    """`values` must start at 0, never decrease, and end at the number of tokens."""
    if values[0] != 0:
        fail(argument, "start at 0", values[0])
    for previous, current in itertools.pairwise(values):
        if current < previous:
            fail(argument, "be non-decreasing", f"{current} after {previous}")
    if values[-1] != total:
        fail(argument, f"end at the number of tokens ({total})", values[-1])


def max_seqlen(argument: str, value: object, lengths: Tensor | int) -> None:
    """A hint of the longest segment: None or an integer no smaller.

    lengths: the length itself, or cu_seqlens, which are compared where they can be read.
    """
    if value is None:
        return
    if not is_int(value) or value < 0:
        fail(argument, "be a non-negative integer or None", value)
    longest = 0
    if not isinstance(lengths, Tensor):
        longest = lengths
    elif is_readable(lengths) and lengths.shape[0] > 1:
        longest = int(lengths.diff().max())
    if value < longest:
        fail(argument, f"be at least the longest segment ({longest})", value)


def is_readable(value: Tensor) -> bool:
    """Whether the numbers in `value` can be read now: on the CPU, not traced, not transformed."""
    if torch.compiler.is_compiling() or value.device.type != "cpu":
        return False
    return type(value) in (
        Tensor,
        torch.nn.Parameter,
    ) and not torch._C._functorch.is_functorch_wrapped_tensor(value)


def unit_last_stride(value: Tensor) -> Tensor:
    """`value`, copied only when neighbouring elements of its last dimension are not neighbours in memory."""
    return value if value.shape[-1] <= 1 or value.stride(-1) == 1 else value.contiguous()


def is_int(value: object) -> bool:
    """Whether `value` is an integer, traced ones included; a bool is none."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)

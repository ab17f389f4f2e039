"""Helpers for testing kernels: the error rule, poisoned allocations, the interpreter's bfloat16."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def max_error(result: Tensor, exact: Tensor) -> float:
    """The largest absolute difference; equal infinities agree, other non-finite ones are infinitely off."""
    if result.shape != exact.shape:
        raise ValueError(f"result must have the shape of exact {list(exact.shape)}, got {list(result.shape)}")
    result, exact = result.detach().double().cpu(), exact.detach().double().cpu()
    difference = torch.where(result == exact, 0.0, (result - exact).abs())
    return float(difference.nan_to_num(nan=torch.inf).max()) if difference.numel() else 0.0


def assert_within_twice_eager(name: str, result: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The one error rule: against the float64 result, at most twice the error of same-dtype eager PyTorch.

    One rounding of the largest exact value to the dtype of `result` is always allowed: eager may be exact by
    luck.
    """
    if result.dtype != eager.dtype:
        raise AssertionError(f"{name} has dtype {result.dtype}, eager has {eager.dtype}")
    finite = exact.detach().double().cpu()
    finite = finite[finite.isfinite()]
    rounding = torch.finfo(result.dtype).eps / 2 * (float(finite.abs().max()) if finite.numel() else 0.0)
    ours, allowed = max_error(result, exact), 2 * max(max_error(eager, exact), rounding)
    if not ours <= allowed:
        raise AssertionError(
            f"{name} is off by {ours:.3g} ({result.dtype}), twice the eager error is {allowed:.3g}"
        )


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill what torch.empty, empty_like and new_empty return with NaN (integers: with the largest one).

    A kernel that relies on memory it did not write then shows it every time.
    """

    def poison(allocate: Callable) -> Callable:
        def allocate_poisoned(*args, **kwargs):
            result = allocate(*args, **kwargs)
            if result.device.type == "meta" or type(result) is not Tensor:
                return result
            if result.is_floating_point():
                return result.fill_(torch.nan)
            return (
                result
                if result.dtype == torch.bool or result.is_complex()
                else result.fill_(torch.iinfo(result.dtype).max)
            )

        return allocate_poisoned

    targets = ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"))
    originals = [getattr(owner, name) for owner, name in targets]
    try:
        for (owner, name), original in zip(targets, originals, strict=True):
            setattr(owner, name, poison(original))
        yield
    finally:
        for (owner, name), original in zip(targets, originals, strict=True):
            setattr(owner, name, original)


def packed_lengths(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Cumulative lengths, int32 [len(lengths) + 1], starting at 0."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def repair_interpreter_bf16() -> None:
    """Make Triton's CPU interpreter compute in bfloat16 as hardware does; a second call changes nothing.

    Up to Triton 3.7.1 at least, its dot multiplies the bit patterns of bfloat16 operands as integers, and its
    cast from float32 drops the low bits where hardware rounds to nearest even.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "bf16_repaired", False):
        return
    original_dot, original_cast = builder.create_dot, builder.cast_impl

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = np.left_shift(handle.data.astype(np.uint32), 16)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return original_dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return original_cast(self, src, dst_type)
        rounded = torch.from_numpy(np.array(src.data, dtype=np.float32)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    builder.create_dot, builder.cast_impl, builder.bf16_repaired = create_dot, cast_impl, True

"""What every op shares: the reference route for transforms, autocast, a differentiable backward."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the reference formulas compute: float32 at least, float64 stays."""
    return torch.promote_types(dtype, torch.float32)


def transforms_active() -> bool:
    """Whether forward-mode AD or a torch.func transform is running.

    A custom op has no forward-mode formula and PyTorch then returns a zero tangent without a word, so the
    level is looked at before anything else: under torch.compile too, where the functorch stack is hidden.
    """
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def transforms_go_to(reference: Callable) -> Callable:
    """Decorate a call of an op: under a transform the plain PyTorch `reference` runs instead."""

    def decorate(call: Callable) -> Callable:
        @functools.wraps(call)
        def guarded(*args):
            return reference(*args) if transforms_active() else call(*args)

        return guarded

    return decorate


def without_autocast(kernel: Callable) -> Callable:
    """Decorate an op's kernel: an enabled autocast would change the dtype of the matmuls in it."""

    @functools.wraps(kernel)
    def exact(*args):
        device_type = args[0].device.type
        if not torch.is_autocast_enabled(device_type):
            return kernel(*args)
        with torch.autocast(device_type, enabled=False):
            return kernel(*args)

    return exact


def to_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of the enabled autocast; unchanged when it is off, and float64 always."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def differentiable_backward(
    reference: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients of `reference(*inputs)`, themselves differentiable: for a backward that keeps its graph.

    `grads` pairs with the outputs of `reference`; None stands for zero. An input that needs no gradient gets
    None.
    """
    with torch.enable_grad():
        # An alias each: of inputs that are the same tensor, or made of each other, every one would be given
        # the gradient of all.
        aliases = [x.view_as(x) for x in inputs]
        outputs = reference(*aliases)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grads, strict=True)
        if grad is not None and output.requires_grad
    ]
    if not pairs:
        return (None,) * len(inputs)
    found = torch.autograd.grad(
        [output for output, _ in pairs],
        [alias for alias in aliases if alias.requires_grad],
        [grad for _, grad in pairs],
        create_graph=True,
        allow_unused=True,
    )
    by_input = iter(found)
    return tuple(next(by_input) if x.requires_grad else None for x in inputs)

"""Random texts that see all images before them: right results and gradients whatever the lengths."""

import random
from typing import NamedTuple

import torch

from infimm_kernels.attention.overlapping import overlapping_attention
from infimm_kernels.testing import max_error
from tests.kernels.cases import masked_attention
from tests.kernels.fuzzing import fuzz_tests
from tests.kernels.test_overlapping_attention import hidden_mask, segments_of

# Wider than the error rule's 2: in some of thousands of tiny problems eager is exact by luck.
FACTOR = 3


class ArgumentSet(NamedTuple):
    """samples as in test_overlapping_attention; layouts: of q, k, v."""

    seed: int
    backend: str
    samples: tuple
    num_kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype
    scale: float
    layouts: tuple[str, ...]
    deterministic: bool


def draw(seed: int, backend: str) -> ArgumentSet:
    rng = random.Random(seed)
    longest = rng.choice((3, 9, 40, 140 if backend == "triton" else 80))

    def sample():
        images = rng.choice((0, 1, 2, 4) if backend == "triton" else (0, 1, 2, 3, 8))
        lengths = [(rng.randint(0, 5), rng.choice((0, 1, rng.randint(0, longest)))) for _ in range(images)]
        return (rng.randint(0, 4), *lengths)

    dtypes = [torch.float32, torch.bfloat16, torch.float16] + [torch.float64] * (backend == "reference")
    return ArgumentSet(
        seed,
        backend,
        tuple(sample() for _ in range(rng.randint(1, 4))),
        rng.choice((1, 2)),
        rng.choice((1, 1, 3)),
        rng.choice((16, 20, 64) if backend == "triton" else (1, 3, 16, 64)),
        rng.choice(dtypes),
        rng.choice((0.25, 0.25, 1.0, -0.5, 0.0)),
        tuple(rng.choice(("plain", "heads first", "slice")) for _ in range(3)),
        rng.random() < 0.3,
    )


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "heads first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return torch.stack((x, x), 1)[:, 0] if layout == "slice" else x


def check(arguments: ArgumentSet) -> None:
    generator = torch.Generator().manual_seed(arguments.seed)
    hidden = hidden_mask(arguments.samples)
    heads = arguments.num_kv_heads * arguments.group, arguments.num_kv_heads, arguments.num_kv_heads
    inputs = []
    for total, num_heads, layout in zip(
        (*hidden.shape, hidden.shape[1]), heads, arguments.layouts, strict=True
    ):
        x = torch.randn(total, num_heads, arguments.head_dim, generator=generator, dtype=torch.float64)
        inputs.append(laid_out(x.to(arguments.dtype), layout).requires_grad_())
    dout = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64).to(arguments.dtype)
    torch.use_deterministic_algorithms(arguments.deterministic)
    try:
        out = overlapping_attention(
            *inputs, *segments_of(arguments.samples), arguments.scale, arguments.backend
        )
        found = out, *torch.autograd.grad(out, inputs, dout)
    finally:
        torch.use_deterministic_algorithms(False)
    eager, exact = (results(arguments, inputs, hidden, dout, d) for d in (arguments.dtype, torch.float64))
    # Where terms cancel that eager happens to round well: a few roundings of the numbers between.
    largest = max([1.0, *(float(x.detach().abs().max()) for x in (*inputs, dout) if x.numel())]) ** 3
    slack = 4 * torch.finfo(arguments.dtype).eps * largest * max(1, abs(arguments.scale))
    for name, ours, theirs, right in zip(("out", "dq", "dk", "dv"), found, eager, exact, strict=True):
        assert ours.dtype == arguments.dtype, f"{name} has {ours.dtype}"
        allowed = FACTOR * max_error(theirs, right) + slack
        assert max_error(ours, right) <= allowed, (
            f"{name} is off by {max_error(ours, right):.3g}, not {allowed:.3g}"
        )
    assert not out[hidden.all(1)].any(), "a row that sees nothing is not zero"


def results(arguments: ArgumentSet, inputs, hidden, dout, dtype) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    q, *keys_values = leaves
    k, v = (x.repeat_interleave(arguments.group, 1) for x in keys_values)
    out = masked_attention(q, k, v, hidden, arguments.scale)
    # A row that sees nothing has no gradient; the dense form has NaN for it.
    seen = ~hidden.all(1)
    grads = torch.autograd.grad(out[seen], leaves, dout[seen].to(dtype))
    return out, *(grad.nan_to_num(0.0) for grad in grads)


test_reference, test_triton, test_ten_thousand_in_reference, test_five_hundred_in_triton = fuzz_tests(
    draw, check, in_reference=200, in_triton=6
)

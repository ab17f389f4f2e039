"""Thousands of random argument sets of the attention ops: each ends in a right result or in a typed error.

A set with a wrong argument must raise ValueError or NotImplementedError that begins with the name of that
argument, or of one that disagrees with it. A failure prints its set; `check(draw(SEED, BACKEND))` repeats it.
"""

import contextlib
from unittest import mock

import torch
from torch import Tensor

from infimm_kernels import varlen_attention, window_attention
from infimm_kernels.testing import max_error, packed_lengths
from tests.kernels.cases import eager_attention
from tests.kernels.fuzz import LAYOUTS, ArgumentSet, draw
from tests.kernels.fuzzing import assert_refused, fuzz_tests

# Wider than the error rule's 2: in some of thousands of tiny problems eager is exact by luck.
FACTOR = 3
# Roundings in the dtype that a result is computed in, relative to its largest term or partial sum.
SLACK = {torch.float32: 2e-6, torch.float64: 1e-12}


def check(arguments: ArgumentSet) -> None:
    keywords = keyword_arguments(arguments)
    if arguments.wrong is None and arguments.is_served:
        check_result(arguments, keywords)
    else:
        check_refused(arguments, keywords)


def keyword_arguments(arguments: ArgumentSet) -> dict[str, object]:
    """What the public function takes, before anything in it is made wrong."""
    generator = torch.Generator().manual_seed(arguments.seed)
    lengths_q, lengths_k = arguments.lengths_q, arguments.lengths_k
    width = (arguments.num_heads, arguments.head_dim)
    cu_q, cu_k = packed_lengths(lengths_q), packed_lengths(lengths_k)
    if arguments.form == "varlen":
        keys = (sum(lengths_k), arguments.num_kv_heads, arguments.head_dim)
        shapes = ((sum(lengths_q), *width), keys, keys)
        cu_seqlens = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    elif arguments.form == "packed":
        shapes, cu_seqlens = ((sum(lengths_q), 3, *width),), {"cu_seqlens": cu_q}
    else:
        shapes, cu_seqlens = ((len(lengths_q), max(lengths_q, default=5), 3, *width),), {}
    inputs = {}
    for name, *how in zip(arguments.names, shapes, arguments.layouts, arguments.needs, strict=True):
        inputs[name] = random_tensor(*how[:2], arguments.dtype, generator).requires_grad_(how[2])
    if arguments.shared:
        inputs |= dict.fromkeys(arguments.shared, inputs[arguments.shared[0]])
    return inputs | cu_seqlens | arguments.options | {"backend": arguments.backend}


def random_tensor(shape, layout: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if layout == "ones":
        return torch.ones((), dtype=dtype).expand(shape)
    return LAYOUTS[layout](torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


@contextlib.contextmanager
def conditions(arguments: ArgumentSet):
    """Deterministic or not, the tiles of one architecture, and no graph where no gradient is wanted."""
    with contextlib.ExitStack() as stack:
        if arguments.backend == "triton":
            target = "infimm_kernels.attention.triton_launch._capability"
            stack.enter_context(mock.patch(target, lambda x: arguments.capability))
        if not any(arguments.needs):
            stack.enter_context(torch.inference_mode() if arguments.seed % 2 else torch.no_grad())
        torch.use_deterministic_algorithms(arguments.deterministic)
        stack.callback(torch.use_deterministic_algorithms, False)
        yield


def call(arguments: ArgumentSet, keywords: dict[str, object]) -> tuple[Tensor, ...]:
    result = (varlen_attention if arguments.form == "varlen" else window_attention)(**keywords)
    return result if isinstance(result, tuple) else (result,)


def check_refused(arguments: ArgumentSet, keywords: dict[str, object]) -> None:
    wrong, named = arguments.wrong, [] if arguments.is_served else ["backend"]
    if wrong is not None:
        keywords[wrong.argument] = wrong.change(keywords.get(wrong.argument))
        named += wrong.named
    with conditions(arguments):
        assert_refused(lambda: call(arguments, keywords), named)


def check_result(arguments: ArgumentSet, keywords: dict[str, object]) -> None:
    inputs = [keywords[name] for name in arguments.names]
    generator = torch.Generator().manual_seed(arguments.seed + 1)
    with conditions(arguments):
        results = call(arguments, keywords)
        assert len(results) == 1 + arguments.options.get("return_lse", False)
        layouts = (arguments.dout, arguments.dlse)[: len(results)]
        grads = [
            None if layout is None else random_tensor(result.shape, layout, result.dtype, generator)
            for result, layout in zip(results, layouts, strict=True)
        ]
        untouched = [*inputs, *(grad for grad in grads if grad is not None)]
        before = [x.detach().clone() for x in untouched]
        wanted = [x for x in inputs if x.requires_grad]
        found = gradients(results, wanted, grads, create_graph=arguments.create_graph)
    assert all(map(torch.equal, untouched, before)), "an input was written to"
    compute_dtype = torch.promote_types(arguments.dtype, torch.float32)
    dtypes = [x.dtype for x in results]
    assert dtypes == [arguments.dtype, compute_dtype][: len(results)], f"the results have {dtypes}"

    leaves, wide = (copies(inputs, dtype) for dtype in (arguments.dtype, torch.float64))
    (eager, eager_grads), (expected, expected_grads) = (
        eager_results(arguments, x, grads) for x in (leaves, wide)
    )
    sizes = term_sizes(arguments, wide, grads)
    for name, result, *others in zip(("out", "lse"), results, eager, expected, strict=False):
        assert_close(name, result, others[0].to(result.dtype), others[1], sizes[name])
    if not found:
        return
    remaining = iter(found)
    for name, x, *others in zip(arguments.names, inputs, eager_grads, expected_grads, strict=True):
        if not x.requires_grad:
            continue
        three = (next(remaining), *others)
        assert three[0].dtype == arguments.dtype, f"d{name} has {three[0].dtype}"
        if name == "qkv":
            for i, part in enumerate(("dq", "dk", "dv")):
                assert_close(part, *(grad.select(-3, i) for grad in three), sizes[part])
        else:
            names = arguments.shared if name in arguments.shared else (name,)
            assert_close(f"d{name}", *three, sum(sizes[f"d{one}"] for one in names))


def copies(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Contiguous leaves; the same one wherever an input is the same."""
    made = {id(x): x.detach().contiguous().to(dtype).requires_grad_() for x in inputs}
    return [made[id(x)] for x in inputs]


def gradients(results, inputs, grads, **options) -> tuple[Tensor, ...]:
    """Of the inputs; none where none of the results has a gradient."""
    pairs = [(x, grad.to(x.dtype)) for x, grad in zip(results, grads, strict=False) if grad is not None]
    if not pairs or not inputs:
        return ()
    outputs, outer = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, inputs, outer, materialize_grads=True, **options)


def eager_results(
    arguments: ArgumentSet, inputs: list[Tensor], grads
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    q, k, v = separate(arguments, inputs)
    lengths = packed_lengths(arguments.lengths_q), packed_lengths(arguments.lengths_k)
    out, lse = eager_attention(q, k, v, *lengths, arguments.scale)
    if arguments.form == "windows":
        out = out.view(*inputs[0].shape[:2], *out.shape[1:])
    return (out, lse), gradients((out, lse), inputs, grads)


def separate(arguments: ArgumentSet, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """q, k, v as `varlen_attention` takes them."""
    if arguments.form == "varlen":
        return tuple(inputs)
    return (inputs[0].flatten(0, 1) if arguments.form == "windows" else inputs[0]).unbind(1)


def term_sizes(arguments: ArgumentSet, inputs: list[Tensor], grads) -> dict[str, float]:
    """How large the terms of each result may be: where they cancel, their rounding errors stay."""

    def largest(x: Tensor | None) -> float:
        return float(x.detach().abs().max()) if x is not None and x.numel() else 0.0

    def longest(x: Tensor | None) -> float:
        return float(x.detach().double().norm(dim=-1).max()) if x is not None and x.numel() else 0.0

    q, k, v = separate(arguments, inputs)
    dout, dlse = (*grads, None)[:2]
    scale = abs(arguments.scale)
    scores = 1 + scale * longest(q) * longest(k)  # the relative error of a probability grows with them
    ds = scale * scores * (2 * longest(dout) * longest(v) + largest(dlse))
    return {
        "out": scores * largest(v),
        "lse": scores,
        "dq": ds * largest(k),
        "dk": ds * largest(q),
        "dv": scores * largest(dout),
    }


def assert_close(name: str, result: Tensor, eager: Tensor, exact: Tensor, term_size: float) -> None:
    """Within a few errors of eager, roundings of the result, and roundings of its terms as computed."""
    assert result.shape == exact.shape, f"{name} has shape {list(result.shape)}"
    finite = exact.detach()[exact.detach().isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    eager_error = max(max_error(eager, exact), torch.finfo(result.dtype).eps / 2 * largest)
    slack = SLACK[torch.promote_types(result.dtype, torch.float32)]
    allowed = FACTOR * eager_error + slack * (term_size + largest)
    error = max_error(result, exact)
    assert allowed < torch.inf, f"{name} of eager PyTorch is not finite"
    assert error <= allowed, f"{name} is off by {error:.3g}, {allowed:.3g} are allowed"


test_reference, test_triton, test_ten_thousand_in_reference, test_five_hundred_in_triton = fuzz_tests(
    draw, check, in_reference=400, in_triton=15
)

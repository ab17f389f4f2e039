"""Thousands of random argument sets of vision_keys_values: each ends in a right result or in a typed error.

A set with a wrong argument must raise ValueError that begins with the name of that argument, or of one that
disagrees with it. A failure prints its set; `check(draw(SEED, BACKEND))` repeats it.
"""

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from infimm_kernels.testing import max_error
from infimm_kernels.vision_keys_values import vision_keys_values
from tests.kernels.fuzz import GRADIENT_LAYOUTS, LAYOUTS
from tests.kernels.fuzzing import assert_refused, fuzz_tests
from tests.kernels.test_vision_keys_values import tiles_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AWKWARD_SIZES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 80, 127, 128, 129, 256, 257)
MAX_WORK = {"reference": 2_000_000, "triton": 1_000_000}  # multiply-adds of a forward
# Wider than the error rule's 2: in some of thousands of tiny problems eager is exact by luck.
FACTOR = 3
# Roundings in the dtype that a result is computed in, relative to the largest that its terms could make.
SLACK = {torch.float32: 2e-6, torch.float64: 1e-12}


@dataclasses.dataclass(frozen=True)
class ArgumentSet:
    """layouts: of features and weight in memory, names in tests.kernels.fuzz; needs: which need a gradient;
    used: the parts of the result that the gradients come from, and how each one's gradient lies in memory;
    capability: of the GPU whose tiles Triton takes; wrong: an argument, its change, the names that its error
    may begin with."""

    seed: int
    backend: str
    num_windows: int
    seqlen: int
    hidden: int
    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    layouts: tuple[str, str]
    options: dict[str, object]
    positions: tuple[tuple[int, int], ...] | None
    positions_dtype: torch.dtype
    needs: tuple[bool, bool]
    used: dict[int, str]
    create_graph: bool
    capability: tuple[int, int]
    wrong: tuple[str, str, tuple[str, ...]] | None

    @property
    def is_served(self) -> bool:
        return self.backend != "triton" or self.dtype != torch.float64

    @property
    def window_shape(self) -> tuple[int, int]:
        side = math.isqrt(self.seqlen - self.options["num_prefix_tokens"])
        return self.options.get("window_shape") or (side, side)


def draw(seed: int, backend: str) -> ArgumentSet:
    """The argument set of a seed; one in four has a wrong argument."""
    rng = random.Random(seed)
    with_positions, granularity = rng.random() < 0.7, rng.choice(("window", "token"))
    prefix, num_windows = rng.choice((0, 0, 1, 1, rng.randint(0, 8))), rng.choice((0, 1, 1, 2, 3, 5))
    num_layers, num_heads = rng.choice((1, 1, 2, 4)), rng.choice((1, 2, 3))
    head_dim = rng.choice((rng.choice(AWKWARD_SIZES), rng.randrange(8, 129, 8), rng.randint(1, 40)))
    hidden = rng.choice((rng.choice(AWKWARD_SIZES), rng.randint(1, 160), 64, 128))
    if with_positions:
        hidden = max(4, hidden // 4 * 4)
    budget = MAX_WORK[backend] // (2 * num_layers * num_heads * head_dim * hidden * max(1, num_windows))
    height, width = rng.choice((0, 1, 2, 4, 7, 16)), rng.choice((1, 2, 3, 8, 11))
    if rng.random() < 0.5:
        width = height
    height = min(height, budget // max(1, width))
    options: dict[str, object] = {"num_prefix_tokens": prefix, "granularity": granularity}
    if height != width or rng.random() < 0.2:
        options["window_shape"] = rng.choice(((height, width), [height, width]))
    if granularity == "window" and rng.random() < 0.3:
        options["window_shape"] = (17, 3)  # no "token": any will do
    positions = tuple((rng.randint(-1, 6), rng.randint(-1, 6)) for _ in range(num_windows))
    with_gradients = rng.random() < 0.7
    parts = rng.sample(range(2 * num_layers), rng.randint(1, 2 * num_layers))
    arguments = ArgumentSet(
        seed,
        backend,
        num_windows,
        height * width + prefix,
        hidden,
        num_layers,
        num_heads,
        head_dim,
        dtype=rng.choices(DTYPES, (3, 4, 3, 0.3 if backend == "triton" else 2))[0],
        layouts=tuple(rng.choice(("plain", *LAYOUTS)) for _ in range(2)),
        options=options,
        positions=positions if with_positions else None,
        positions_dtype=rng.choice((torch.int32, torch.int64)),
        needs=tuple(with_gradients and rng.random() < 0.8 for _ in range(2)),
        used={part: rng.choice(GRADIENT_LAYOUTS) for part in parts},
        create_graph=rng.random() < 0.1,
        capability=rng.choice(((8, 0), (9, 0))),
        wrong=None,
    )
    if rng.random() < 0.25:
        arguments = dataclasses.replace(arguments, wrong=_wrong(rng, arguments))
    return arguments


# --- wrong arguments ----------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Callable]] = {
    "features": {
        "None": lambda x: None,
        "a list": lambda x: [[[1.0]]],
        "integers": lambda x: x.detach().long(),
        "complex": lambda x: x.detach().to(torch.complex64),
        "sparse": lambda x: x.detach().to_sparse(),
        "one more dimension": lambda x: x.unsqueeze(0),
        "two dimensions": lambda x: x.flatten(0, 1),
        "one more channel": lambda x: torch.cat((x, x[..., :1]), -1),
        "no channels": lambda x: x[..., :0],
        "on the meta device": lambda x: x.detach().to("meta"),
        "another dtype": lambda x: x.to(torch.float32 if x.dtype != torch.float32 else torch.float64),
    },
    "weight": {
        "None": lambda x: None,
        "a number": lambda x: 1.0,
        "integers": lambda x: x.detach().int(),
        "three dimensions": lambda x: x.flatten(0, 1),
        "one more channel": lambda x: torch.cat((x, x[..., :1]), -1),
        "keys alone": lambda x: x[:, :1],
        "no layers": lambda x: x[:0],
        "no rows": lambda x: x[:, :, :0],
        "on the meta device": lambda x: x.detach().to("meta"),
        "another dtype": lambda x: x.to(torch.float32 if x.dtype != torch.float32 else torch.float64),
    },
    "num_heads": {
        "zero": lambda x: 0,
        "negative": lambda x: -x,
        "too many": lambda x: 10**6 + 3,
        "a float": lambda x: float(x),
        "a boolean": lambda x: True,
        "None": lambda x: None,
        "a tensor": lambda x: torch.tensor(x),
    },
    "positions": {
        "a list": lambda x: [[0, 0]],
        "a string": lambda x: "0",
        "floating": lambda x: torch.zeros(1, 2),
        "int16": lambda x: torch.zeros(1, 2, dtype=torch.int16),
        "one dimension": lambda x: torch.zeros(2).long(),
        "other windows": lambda x: torch.zeros(77, 2).long(),
        "three coordinates": lambda x: torch.zeros(77, 3).long(),
        "on the meta device": lambda x: torch.zeros(1, 2, device="meta").long(),
    },
    "granularity": {"unknown": lambda x: "patch", "None": lambda x: None, "a number": lambda x: 1},
    "num_prefix_tokens": {
        "nine": lambda x: 9,
        "negative": lambda x: -1,
        "a float": lambda x: 1.0,
        "a boolean": lambda x: True,
        "None": lambda x: None,
    },
    "window_shape": {
        "too large": lambda x: (1000, 1000),
        "negative": lambda x: (-1, -1),
        "a number": lambda x: 3,
        "floats": lambda x: (1.0, 2.0),
        "a string": lambda x: "11",
        "three": lambda x: (1, 1, 1),
    },
    "backend": {"unknown": lambda x: "cudnn", "of other ops": lambda x: "cuda", "a number": lambda x: 3},
}


def _wrong(rng: random.Random, arguments: ArgumentSet) -> tuple[str, str, tuple[str, ...]]:
    names = [name for name in CHANGES if name != "window_shape"]
    if arguments.positions is not None and arguments.options["granularity"] == "token":
        names.append("window_shape")
    name = rng.choice(names)
    others: tuple[str, ...] = ()
    if name in ("features", "weight") or (name == "positions" and arguments.hidden % 4):
        others = ("features", "weight")  # either side of what disagrees
    return name, rng.choice(list(CHANGES[name])), (name, *others)


# --- the checks ---------------------------------------------------------------------------------------------


def check(arguments: ArgumentSet) -> None:
    keywords = keyword_arguments(arguments)
    if arguments.wrong is None and arguments.is_served:
        check_result(arguments, keywords)
    else:
        check_refused(arguments, keywords)


def keyword_arguments(arguments: ArgumentSet) -> dict[str, object]:
    generator = torch.Generator().manual_seed(arguments.seed)
    inner, hidden = arguments.num_heads * arguments.head_dim, arguments.hidden
    shapes = (arguments.num_windows, arguments.seqlen, hidden), (arguments.num_layers, 2, inner, hidden)
    keywords: dict[str, object] = {"num_heads": arguments.num_heads, "backend": arguments.backend}
    keywords |= arguments.options
    for name, *how in zip(("features", "weight"), shapes, arguments.layouts, arguments.needs, strict=True):
        keywords[name] = random_tensor(*how[:2], arguments.dtype, generator).requires_grad_(how[2])
    if arguments.positions is not None:
        keywords["positions"] = torch.tensor(arguments.positions, dtype=arguments.positions_dtype).view(-1, 2)
    return keywords


def random_tensor(shape, layout: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if layout == "ones":
        return torch.ones((), dtype=dtype).expand(shape)
    return LAYOUTS[layout](torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


@contextlib.contextmanager
def conditions(arguments: ArgumentSet):
    """The tiles of one architecture, and no graph where no gradient is wanted."""
    with contextlib.ExitStack() as stack:
        if arguments.backend == "triton":
            stack.enter_context(tiles_of(arguments.capability))
        if not any(arguments.needs):
            stack.enter_context(torch.inference_mode() if arguments.seed % 2 else torch.no_grad())
        yield


def check_refused(arguments: ArgumentSet, keywords: dict[str, object]) -> None:
    named = [] if arguments.is_served else ["backend"]
    if arguments.wrong is not None:
        name, change, names = arguments.wrong
        keywords[name] = CHANGES[name][change](keywords.get(name))
        named += names
    with conditions(arguments):
        assert_refused(lambda: vision_keys_values(**keywords), named)


def check_result(arguments: ArgumentSet, keywords: dict[str, object]) -> None:
    inputs = [keywords["features"], keywords["weight"]]
    generator = torch.Generator().manual_seed(arguments.seed + 1)
    shape = (arguments.num_windows * arguments.seqlen, arguments.num_heads, arguments.head_dim)
    grads = {
        part: random_tensor(shape, layout, arguments.dtype, generator)
        for part, layout in arguments.used.items()
    }
    untouched = [*inputs, *grads.values()]
    before = [x.detach().clone() for x in untouched]
    with conditions(arguments):
        pairs = vision_keys_values(**keywords)
        assert len(pairs) == arguments.num_layers
        parts = [x for pair in pairs for x in pair]
        assert all(x.shape == shape and x.dtype == arguments.dtype and x.is_contiguous() for x in parts)
        wanted = [x for x in inputs if x.requires_grad]
        found = gradients(parts, wanted, grads, create_graph=arguments.create_graph)
    assert all(map(torch.equal, untouched, before)), "an input was written to"

    leaves, wide = (
        [x.detach().contiguous().to(dtype).requires_grad_() for x in inputs]
        for dtype in (arguments.dtype, torch.float64)
    )
    eager_parts, expected_parts = eager(arguments, *leaves), eager(arguments, *wide)
    sizes = term_sizes(arguments, wide, grads)
    for result, *others in zip(parts, eager_parts, expected_parts, strict=True):
        assert_close("kv", result, *(x.unflatten(-1, shape[1:]) for x in others), sizes["kv"])
    flat = {part: grad.flatten(1) for part, grad in grads.items()}
    eager_grads, expected_grads = gradients(eager_parts, leaves, flat), gradients(expected_parts, wide, flat)
    remaining = iter(found)
    for name, x, *others in zip(("features", "weight"), inputs, eager_grads, expected_grads, strict=True):
        if x.requires_grad:
            assert_close(f"d{name}", next(remaining), *others, sizes[name])


def gradients(parts, inputs, grads: dict[int, Tensor], **options) -> tuple[Tensor, ...]:
    if not inputs:
        return ()
    outer = [grad.to(parts[part].dtype) for part, grad in grads.items()]
    return torch.autograd.grad([parts[part] for part in grads], inputs, outer, **options)


def eager(arguments: ArgumentSet, features: Tensor, weight: Tensor) -> list[Tensor]:
    """The parts [total, inner], one linear each, after the position."""
    y = features
    if arguments.positions:
        y = features + encoding(arguments, torch.promote_types(features.dtype, torch.float32)).to(y.dtype)
    return [torch.nn.functional.linear(y.flatten(0, 1), w) for w in weight.flatten(0, 1)]


def encoding(arguments: ArgumentSet, dtype: torch.dtype) -> Tensor:
    """[num_windows, seqlen, hidden]; zero for prefix tokens by token and for windows without position."""
    hidden, prefix = arguments.hidden, arguments.options["num_prefix_tokens"]
    pe = torch.zeros(arguments.num_windows, arguments.seqlen, hidden, dtype=dtype)
    frequencies = 10000 ** -(torch.arange(0, hidden, 4, dtype=torch.float64) / hidden)
    tokens = torch.arange(arguments.seqlen)
    for window, (row, column) in enumerate(arguments.positions):
        if row < 0 or column < 0:
            continue
        xs, ys, first = torch.full_like(tokens, column), torch.full_like(tokens, row), 0
        if arguments.options["granularity"] == "token":
            (height, width), first = arguments.window_shape, prefix
            patches = tokens - prefix
            xs = column * width + patches % max(1, width)
            ys = row * height + patches.div(max(1, width), rounding_mode="floor")
        for half, places in enumerate((xs, ys)):
            angles = places.to(dtype)[:, None] * frequencies.to(dtype)
            pairs = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
            pe[window, first:, half * hidden // 2 : (half + 1) * hidden // 2] = pairs[first:]
    return pe


def term_sizes(arguments: ArgumentSet, inputs: list[Tensor], grads: dict[int, Tensor]) -> dict[str, float]:
    """The largest that a sum could be by the lengths of its two vectors: where terms cancel, errors stay."""

    def longest(x: Tensor, dim) -> float:
        return float(x.square().sum(dim).max().sqrt()) if x.numel() else 0.0

    features, weight = (x.detach() for x in inputs)
    if arguments.positions:
        features = features.abs() + encoding(arguments, torch.float64).abs()
    dkv = torch.stack([grad.double().flatten(1) for grad in grads.values()])  # [parts, total, inner]
    return {
        "kv": longest(features, -1) * longest(weight, -1),
        "features": longest(dkv, (0, 2)) * longest(weight, (0, 1, 2)),
        "weight": longest(dkv, 1) * longest(features, (0, 1)),
    }


def assert_close(name: str, result: Tensor, eager: Tensor, exact: Tensor, term_size: float) -> None:
    """Within a few errors of eager, roundings of the result, and roundings of its terms as computed."""
    assert result.shape == exact.shape, f"{name} has shape {list(result.shape)}"
    eps = torch.finfo(result.dtype).eps
    largest = float(exact.detach().abs().max()) if exact.numel() else 0.0
    eager_error = max(max_error(eager, exact), eps / 2 * largest)
    slack = SLACK[torch.promote_types(result.dtype, torch.float32)] + eps / 2
    allowed = FACTOR * eager_error + slack * (term_size + largest)
    error = max_error(result, exact)
    assert allowed < torch.inf, f"{name} of eager PyTorch is not finite"
    assert error <= allowed, f"{name} is off by {error:.3g}, {allowed:.3g} are allowed"


test_reference, test_triton, test_ten_thousand_in_reference, test_five_hundred_in_triton = fuzz_tests(
    draw, check, in_reference=300, in_triton=8
)

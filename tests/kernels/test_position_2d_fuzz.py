"""Thousands of random argument sets of add_position_2d: each ends in a right result or in a typed error.

A set with a wrong argument must raise ValueError that begins with the name of that argument, or of one that
disagrees with it. A failure prints its set; `check(draw(SEED, BACKEND))` repeats it.
"""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from infimm_kernels import add_position_2d
from infimm_kernels.testing import max_error
from tests.kernels.cases import eager_position
from tests.kernels.fuzz import LAYOUTS
from tests.kernels.fuzzing import assert_refused, fuzz_tests

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ROW_LAYOUTS = ("plain", "plain", "wide rows", "offset", "channel major", "every second channel")
OUTS = (None, None, "apart", "x", "channel major", "part", "shifted", "repeated")


class Place(NamedTuple):
    """Windows in their image, as add_position_2d takes them; seqlen, hidden and positions fit each other."""

    num_windows: int
    seqlen: int
    hidden: int
    positions: Tensor
    options: dict[str, object]


def draw_place(rng: random.Random, backend: str) -> Place:
    num_windows = rng.choice((0, 1, 1, 2, 3))
    height, width = (rng.choice((0, 1, 2, 3, 5, rng.randint(1, 40))) for _ in range(2))
    if height * width > 200:
        width = 2
    prefix = rng.choice((0, 0, 1, 1, rng.randint(0, 8)))
    granularity = rng.choice(("window", "token"))
    limit = rng.choice((3, 60, 1000))
    positions = torch.tensor(
        [[rng.randint(-1 if rng.random() < 0.2 else 0, limit) for _ in range(2)] for _ in range(num_windows)],
        dtype=rng.choice((torch.int32, torch.int64)),
    ).view(num_windows, 2)
    options: dict[str, object] = {"num_prefix_tokens": prefix}
    if granularity == "token" or rng.random() < 0.5:
        options["granularity"] = granularity
    if granularity == "token" and (height != width or rng.random() < 0.5):
        options["window_shape"] = (height, width)
    hidden = 4 * rng.choice((1, 2, 3, 7, 16, 32, rng.randint(1, 80 if backend == "reference" else 160)))
    return Place(num_windows, height * width + prefix, hidden, positions, options)


class Wrong(NamedTuple):
    """A change of a legal argument, and the names with which its error may begin."""

    argument: str
    what: str
    change: Callable[[object], object]
    named: tuple[str, ...]

    def __repr__(self) -> str:
        return f"<{self.argument}: {self.what}>"


TENSORS = {
    "None": lambda x: None,
    "a list": lambda x: [1.0],
    "complex": lambda x: torch.zeros(x.shape, dtype=torch.complex64),
    "booleans": lambda x: x.bool(),
    "sparse": lambda x: x.detach().to_sparse(),
    "one more dimension": lambda x: x[None],
    "no channels": lambda x: x[..., :0],
    "one more channel": lambda x: torch.cat((x, x[..., :1]), -1),
    "on the meta device": lambda x: x.to("meta"),
}
WRONG_PLACE = {
    "positions": {
        "a list": lambda x: x.tolist(),
        "float": lambda x: x.float(),
        "int16": lambda x: x.short(),
        "flat": lambda x: x.flatten(),
        "one more window": lambda x: torch.cat((x, x.new_zeros(1, 2))),
        "three axes": lambda x: torch.cat((x, x[:, :1]), 1),
        "on the meta device": lambda x: x.to("meta"),
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
        "a number": lambda x: 4,
        "one side": lambda x: (4,),
        "negative": lambda x: (-1, -1),
        "floats": lambda x: (2.0, 2.0),
        "too large": lambda x: (1000, 1000),
    },
    "backend": {"unknown": lambda x: "cudnn", "a number": lambda x: 3, "of a GPU": lambda x: "cuda"},
}


def wrong_in_place(rng: random.Random, place: Place) -> Wrong:
    names = [
        name for name in WRONG_PLACE if name != "window_shape" or place.options.get("granularity") == "token"
    ]
    name = rng.choice(names)
    what = rng.choice(list(WRONG_PLACE[name]))
    # A wrong number of prefix tokens leaves another number of patches.
    named = (name, "window_shape") if name == "num_prefix_tokens" else (name,)
    return Wrong(name, what, WRONG_PLACE[name][what], named)


class ArgumentSet(NamedTuple):
    seed: int
    backend: str
    place: Place
    dtype: torch.dtype
    layout: str
    out: str | None
    need: bool
    wrong: Wrong | None


def draw(seed: int, backend: str) -> ArgumentSet:
    rng = random.Random(seed)
    place = draw_place(rng, backend)
    dtype = rng.choices(DTYPES, (4, 4, 3, 2 if backend == "reference" else 0.3))[0]
    out, wrong = rng.choice(OUTS), None
    if rng.random() < 0.2:
        wrong = wrong_in_place(rng, place)
        if rng.random() < 0.4:
            what = rng.choice(list(TENSORS))
            # What disagrees is named by the later argument.
            others = ("positions", "num_prefix_tokens", "window_shape", "out")
            wrong = Wrong("x", what, TENSORS[what], ("x", *others))
    need = out is None and rng.random() < 0.5
    return ArgumentSet(seed, backend, place, dtype, rng.choice(ROW_LAYOUTS), out, need, wrong)


def check(arguments: ArgumentSet) -> None:
    place, wrong = arguments.place, arguments.wrong
    x = random_rows((place.num_windows, place.seqlen, place.hidden), arguments)
    x, out = with_memory(arguments.out, x)
    keywords = {"x": x.requires_grad_(arguments.need), "positions": place.positions, "out": out}
    keywords |= place.options | {"backend": arguments.backend}
    if wrong is not None:
        keywords[wrong.argument] = wrong.change(keywords.get(wrong.argument))
    num_tokens = place.num_windows * place.seqlen
    overlapping = num_tokens > {"shifted": 0, "repeated": 1}.get(arguments.out, num_tokens)
    named = wrong.named if wrong else ("out",) if overlapping else ()
    if arguments.backend == "triton" and arguments.dtype == torch.float64:
        named = (*named, "backend")
    if named:
        return assert_refused(lambda: add_position_2d(**keywords), (*named, "out") if overlapping else named)
    before = x.detach().clone()
    result = add_position_2d(**keywords)
    assert out is None or result is out
    assert result.dtype == arguments.dtype
    assert arguments.out == "x" or torch.equal(x.detach(), before), "x was written to"
    check_sum(result, before, place)
    fresh = add_position_2d(**keywords | {"x": before, "out": None})
    assert torch.equal(bits(result), bits(fresh)), "the result depends on where it is written"
    if arguments.need:
        dout = torch.randn_like(result)
        assert torch.equal(torch.autograd.grad(result, x, dout)[0], dout)
    return None


def check_sum(result: Tensor, x: Tensor, place: Place) -> None:
    """x + PE to one rounding, and PE as float32 angles of its coordinates have it."""
    exact = eager_position(x.double(), place.positions, **place.options)
    angle = 1e-15 if result.dtype == torch.float64 else 2e-7
    allowed = angle * (2 + largest_coordinate(place)) + torch.finfo(result.dtype).eps * (
        1 + float(max_of(exact))
    )
    error = max_error(result, exact)
    assert error <= allowed, f"off by {error:.3g}, {allowed:.3g} are allowed"


def largest_coordinate(place: Place) -> int:
    """Of a patch in its image, or more: a float32 angle is rounded at this size."""
    side = max(place.options.get("window_shape") or (math.isqrt(place.seqlen), 1))
    return side * (1 + max(0, *place.positions.flatten().tolist(), 0))


def max_of(x: Tensor) -> Tensor:
    return x.abs().max() if x.numel() else x.new_zeros(())


def random_rows(shape: tuple[int, ...], arguments) -> Tensor:
    generator = torch.Generator().manual_seed(arguments.seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(arguments.dtype)
    return LAYOUTS[arguments.layout](x)


def with_memory(out: str | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x and where to write: legal places, one that reaches into x, and one of overlapping elements."""
    if out == "shifted":
        memory = torch.cat((x.flatten(), x.new_zeros(1)))
        return memory[:-1].view(x.shape), memory[1:].view(x.shape)
    made = {
        None: lambda: None,
        "x": lambda: x,
        "apart": lambda: torch.zeros_like(x),
        "part": lambda: x.new_zeros(*x.shape[:2], 2, x.shape[2])[:, :, 1],
        "channel major": lambda: torch.zeros_like(x).mT.contiguous().mT,
        "repeated": lambda: x.new_zeros(x.shape[2]).expand(x.shape),
    }
    return x, made[out]()


def bits(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8)


test_reference, test_triton, test_ten_thousand_in_reference, test_five_hundred_in_triton = fuzz_tests(
    draw, check, in_reference=200, in_triton=8
)

"""Thousands of random argument sets of residual_post_norm: each ends in a right result or in a typed error.

As in test_position_2d_fuzz.py; a failure prints its set, and `check(draw(SEED, BACKEND))` repeats it.
"""

import math
import random
from typing import NamedTuple

import torch
from torch import Tensor

from infimm_kernels.post_norm import residual_post_norm
from infimm_kernels.testing import max_error
from tests.kernels.cases import eager_position, exact
from tests.kernels.fuzz import GRADIENT_LAYOUTS, LAYOUTS
from tests.kernels.fuzzing import assert_refused, fuzz_tests
from tests.kernels.test_position_2d_fuzz import (
    DTYPES,
    ROW_LAYOUTS,
    TENSORS,
    Place,
    Wrong,
    draw_place,
    largest_coordinate,
    wrong_in_place,
)

# Wider than the error rule's 2: in some of thousands of tiny problems eager is exact by luck.
FACTOR = 3
NAMES = ("x", "y", "weight", "bias")
SHAPES = ((), (0,), (1,), (7,), (40,), (3, 5), (2, 0, 3), (1, 2, 3, 2))
HIDDEN = (1, 2, 3, 4, 16, 63, 64, 255, 256, 257, 300, 512)
WRONG_TENSORS = TENSORS | {
    "wider": lambda x: x.double() if x.dtype != torch.float64 else x.to(torch.complex128),
    "another float": lambda x: x.to(torch.float16 if x.dtype == torch.bfloat16 else torch.bfloat16),
}
WRONG_EPS = {
    "negative": lambda x: -1e-6,
    "NaN": lambda x: math.nan,
    "infinite": lambda x: math.inf,
    "beyond float32": lambda x: 1e39,
    "a string": lambda x: "1e-6",
    "a boolean": lambda x: False,
    "None": lambda x: None,
    "a tensor": lambda x: torch.tensor(1e-6),
}


class ArgumentSet(NamedTuple):
    """dtypes of x, y, weight and bias; offset: how far y is from zero; needs: which want a gradient."""

    seed: int
    backend: str
    place: Place | None
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    layouts: tuple[str, ...]
    eps: float | None
    offset: float
    needs: tuple[bool, ...]
    dout: str
    create_graph: bool
    wrong: Wrong | None

    @property
    def is_served(self) -> bool:
        return self.backend != "triton" or torch.float64 not in self.dtypes


def draw(seed: int, backend: str) -> ArgumentSet:
    rng = random.Random(seed)
    place = draw_place(rng, backend) if rng.random() < 0.4 else None
    if place is None:
        wide = (1792, 2304) if rng.random() < 0.1 else (rng.randint(1, 400),)
        shape = (*rng.choice(SHAPES), rng.choice((*HIDDEN, *wide)))
    else:
        shape = (place.num_windows, place.seqlen, place.hidden)
    stream = rng.choices(DTYPES, (4, 4, 4, 2 if backend == "reference" else 0.3))[0]
    narrower = [dtype for dtype in DTYPES if torch.promote_types(dtype, stream) == stream]
    branch = stream if rng.random() < 0.6 else rng.choice(narrower)
    norm = rng.choice((stream, branch, branch, torch.float32))
    arguments = ArgumentSet(
        seed,
        backend,
        place,
        shape,
        (stream, branch, norm, norm),
        layouts=tuple(rng.choice(ROW_LAYOUTS) for _ in NAMES),
        eps=rng.choice((None, 1e-6, 1e-5, 1e-12, 0.3, 2)),
        offset=rng.choice((0.0, 0.0, 0.0, 3.0, 100.0)),
        needs=tuple(rng.random() < 0.7 for _ in NAMES),
        dout=rng.choice([layout for layout in GRADIENT_LAYOUTS if layout != "one head for all"]),
        create_graph=rng.random() < 0.1,
        wrong=None,
    )
    return arguments._replace(wrong=_wrong(rng, arguments)) if rng.random() < 0.25 else arguments


def _wrong(rng: random.Random, arguments: ArgumentSet) -> Wrong:
    kind = rng.random()
    if kind < 0.2:
        what = rng.choice(list(WRONG_EPS))
        return Wrong("eps", what, WRONG_EPS[what], ("eps",))
    if kind < 0.5 and arguments.place is not None:
        wrong = wrong_in_place(rng, arguments.place)
        # Without positions the other arguments of a place are ignored; x may be named for its hidden size.
        return wrong._replace(named=(*wrong.named, "x"))
    name = rng.choice(NAMES[1:])
    dtypes = set(arguments.dtypes)
    # Of one dtype with the others, another one is wrong everywhere; else it may be a legal mixture.
    mixed = len(dtypes) > 1 or dtypes & {torch.float32, torch.float64}
    legal = ("another float", "wider") if mixed else ()
    same_shape = ("one more dimension",) if arguments.shape == () else ()
    what = rng.choice([what for what in WRONG_TENSORS if what not in (*legal, *same_shape)])
    if what == "wider" and name != "y":
        what = "complex"
    # What disagrees is named by the later argument.
    return Wrong(name, what, WRONG_TENSORS[what], NAMES[NAMES.index(name) :])


def tensors_of(arguments: ArgumentSet) -> list[Tensor]:
    generator = torch.Generator().manual_seed(arguments.seed)
    hidden = arguments.shape[-1]
    shapes = (arguments.shape, arguments.shape, (hidden,), (hidden,))
    made = []
    for name, shape, dtype, layout in zip(NAMES, shapes, arguments.dtypes, arguments.layouts, strict=True):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values = values + arguments.offset if name == "y" else values
        made.append(LAYOUTS[layout](values.to(dtype)))
    return [t.requires_grad_(need) for t, need in zip(made, arguments.needs, strict=True)]


def check(arguments: ArgumentSet) -> None:
    tensors = tensors_of(arguments)
    keywords: dict[str, object] = dict(zip(NAMES, tensors, strict=True))
    options = {} if arguments.eps is None else {"eps": arguments.eps}
    place = {}
    if arguments.place is not None:
        place = {"positions": arguments.place.positions} | arguments.place.options
    keywords |= options | place | {"backend": arguments.backend}
    wrong = arguments.wrong
    named = () if arguments.is_served else ("backend",)
    if wrong is not None:
        keywords[wrong.argument] = wrong.change(keywords.get(wrong.argument))
        named += wrong.named
    if named:
        return assert_refused(lambda: residual_post_norm(**keywords), named)

    before = [t.detach().clone() for t in tensors]
    out = residual_post_norm(**keywords)
    assert (out.shape, out.dtype, out.is_contiguous()) == (arguments.shape, arguments.dtypes[0], True)
    generator = torch.Generator().manual_seed(arguments.seed + 1)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    dout = torch.ones((), dtype=out.dtype).expand(out.shape) if arguments.dout == "ones" else dout
    dout = dout if arguments.dout == "ones" else LAYOUTS[arguments.dout](dout)
    wanted = [t for t in tensors if t.requires_grad]
    found = torch.autograd.grad(out, wanted, dout, create_graph=arguments.create_graph) if wanted else ()
    assert all(map(torch.equal, before, tensors)), "an input was written to"

    leaves, wide = [t.requires_grad_() for t in before], exact(*tensors)
    eager, right = eager_sum(leaves, options, place), eager_sum(wide, options, place)
    grads = (
        torch.autograd.grad(result, inputs, dout.to(result.dtype))
        for result, inputs in ((eager, leaves), (right, wide))
    )
    eager_grads, right_grads = grads
    sizes = term_sizes(arguments, wide, dout)
    assert_close("out", out, eager, right, sizes["out"])
    remaining = iter(found)
    for name, tensor, *others in zip(NAMES, tensors, eager_grads, right_grads, strict=True):
        if tensor.requires_grad:
            grad = next(remaining)
            assert grad.dtype == tensor.dtype, f"d{name} has {grad.dtype}"
            assert_close(f"d{name}", grad, *others, sizes[f"d{name}"])
    return None


def eager_sum(tensors, options: dict, place: dict) -> Tensor:
    x, y, weight, bias = tensors
    shape = y.shape[-1:]
    norm = torch.nn.functional.layer_norm(
        y, shape, weight.to(y.dtype), bias.to(y.dtype), options.get("eps", 1e-6)
    )
    out = x + norm
    return eager_position(out, **place) if place else out


def term_sizes(arguments: ArgumentSet, wide: list[Tensor], dout: Tensor) -> dict[str, float]:
    """How large the terms of each result may be: where they cancel, their rounding errors stay."""
    x, y, weight, bias = (t.detach() for t in wide)
    eps = 1e-6 if arguments.eps is None else arguments.eps
    hidden = y.shape[-1]
    rows = y.reshape(-1, hidden)
    if rows.shape[0] == 0:
        return dict.fromkeys(("out", *(f"d{name}" for name in NAMES)), 0.0)
    rstd = float((rows.var(1, correction=0) + eps).rsqrt().max())
    largest = float(rows.abs().max())
    normed = min(2 * largest * rstd, hidden**0.5) + 1
    # A rounding of y, or of a mean at its size, moves a row this many times as far after the division.
    magnified = 1 + largest * rstd
    d, w = float(dout.abs().max()), float(weight.abs().max())
    angles = 0.2 * largest_coordinate(arguments.place) if arguments.place is not None else 0.0
    return {
        "out": float(x.abs().max() + bias.abs().max()) + w * normed * magnified + angles,
        "dx": d,
        "dy": rstd * d * w * (2 + normed * normed) * magnified,
        "dweight": rows.shape[0] * d * normed * magnified,
        "dbias": rows.shape[0] * d,
    }


def assert_close(name: str, result: Tensor, eager: Tensor, right: Tensor, term_size: float) -> None:
    """Within a few errors of eager, roundings of the result, and roundings of its terms as computed."""
    assert result.shape == right.shape, f"{name} has shape {list(result.shape)}"
    largest = float(right.detach().abs().max()) if right.numel() else 0.0
    eager_error = max_error(eager, right)
    eager_error = (
        0.0 if math.isinf(eager_error) else eager_error
    )  # one channel, whose rstd is 1e6, in float16
    eager_error = max(eager_error, torch.finfo(result.dtype).eps / 2 * largest)
    slack = 1e-12 if result.dtype == torch.float64 else 1e-6
    allowed = FACTOR * eager_error + slack * (term_size + largest)
    error = max_error(result, right)
    assert error <= allowed < math.inf, f"{name} is off by {error:.3g}, {allowed:.3g} are allowed"


test_reference, test_triton, test_ten_thousand_in_reference, test_five_hundred_in_triton = fuzz_tests(
    draw, check, in_reference=200, in_triton=20
)

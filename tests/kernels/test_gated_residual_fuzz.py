"""Thousands of random argument sets of the gated ops: each ends in a right result or in a typed error.

A set with a wrong argument must raise ValueError or NotImplementedError that begins with the name of that
argument, or of one that disagrees with it. A failure prints its set; `check(draw(SEED, BACKEND))` repeats it.
"""

import contextlib
import dataclasses
import math
import random
from unittest import mock

import torch
from torch import Tensor

from infimm_kernels import gated_residual_projection
from infimm_kernels.gated_feed_forward import gated_feed_forward
from infimm_kernels.testing import max_error
from tests.kernels.cases import MIXED_DTYPES
from tests.kernels.fuzzing import assert_refused, fuzz_tests

# Wider than the error rule's 2: in some of thousands of tiny problems eager is exact by luck.
FACTOR = 3
# Roundings in the dtype that sums are computed in, relative to the size of their terms.
SLACK = {torch.float32: 1e-6, torch.float64: 1e-13}
SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 80, 127, 128, 129, 200, 256)
LARGE_INNERS = (1024, 1025, 1040)
ROWS = (0, 1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 66, 100, 129)
MAX_WORK = {"reference": 1_000_000, "triton": 600_000}
SAME = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DTYPES = (
    *((dtype,) * 3 for dtype in SAME),
    *MIXED_DTYPES,
    (torch.float64, torch.float32, torch.float64),
    (torch.float64, torch.bfloat16, torch.bfloat16),
)
PROJECTION = ("x", "o", "weight", "gate")
FEED_FORWARD = ("x", "norm_weight", "norm_bias", "weight_in", "weight_out", "gate")
LAYOUTS = {
    "plain": lambda x: x,
    "wide rows": lambda x: torch.cat([torch.full_like(x, math.nan), x], -1)[..., x.shape[-1] :],
    "offset": lambda x: torch.cat([x.new_full((3,), math.nan), x.flatten()])[3:].view(x.shape),
    "every second channel": lambda x: torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0],
    "column major": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x,
    "one number for all channels": lambda x: x[..., :1].expand(x.shape),
}
MASKS = (None, None, "random", "random", "all", "none", "column major")


@dataclasses.dataclass(frozen=True)
class ArgumentSet:
    """dtypes: of x, of the branch and of the gate; layouts, needs: of each of `names`; wrong: the argument
    that is made wrong, how, and the names with which the error may begin."""

    seed: int
    backend: str
    names: tuple[str, ...]
    leading: tuple[int, ...]
    hidden: int
    inner: int
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    gate_size: float
    layouts: tuple[str, ...]
    mask: str | None
    needs: tuple[bool, ...]
    dy: str
    create_graph: bool
    deterministic: bool
    capability: tuple[int, int]
    wrong: tuple[str, str, tuple[str, ...]] | None

    @property
    def is_served(self) -> bool:
        return self.backend != "triton" or torch.float64 not in self.dtypes


def draw(seed: int, backend: str) -> ArgumentSet:
    """The argument set of a seed; one in four has a wrong argument."""
    rng = random.Random(seed)
    names = rng.choices((PROJECTION, FEED_FORWARD), (3, 1))[0]
    hidden, inner = rng.choice(SIZES), rng.choice(SIZES)
    if rng.random() < 0.1:
        hidden, inner = rng.choice(SIZES[:6]), rng.choice(LARGE_INNERS)
    rows = rng.choice(ROWS)
    while rows * hidden * inner > MAX_WORK[backend]:
        rows, hidden = rng.choice(ROWS), rng.choice(SIZES)
    leading = rng.choice(((rows,), (rows,), (1, rows), (rows, 1), (2, rows // 2), (rows, 1, 1)))
    if rng.random() < 0.05:
        leading = ()
    with_gradients = rng.random() < 0.75
    dtypes = rng.choice(DTYPES)
    if backend == "triton" and torch.float64 in dtypes and rng.random() < 0.8:
        dtypes = rng.choice(DTYPES[:3] + MIXED_DTYPES)
    wrong = None
    if rng.random() < 0.25:
        argument = rng.choice((*names, *names, "row_mask", "backend"))
        # The feed-forward takes any number of rows, unless a mask has another.
        legal = ("one more dimension", "one row too many") if (argument, names) == ("x", FEED_FORWARD) else ()
        what = rng.choice([what for what in WRONG.get(argument, TENSORS) if what not in legal])
        later = names if argument in names else ()
        wrong = (argument, what, (argument, *later, "row_mask") if argument == "x" else (argument, *later))
    return ArgumentSet(
        seed,
        backend,
        names,
        leading,
        hidden,
        inner,
        dtypes,
        gate_size=rng.choice((0.0, 1e-4, 0.3, 1.0, 1.0, 30.0)),
        layouts=tuple(rng.choice(("plain", "plain", *LAYOUTS)) for _ in names),
        mask=rng.choice(MASKS),
        needs=tuple(with_gradients and rng.random() < 0.8 for _ in names),
        dy=rng.choice(("plain", "plain", "ones", *LAYOUTS)),
        create_graph=rng.random() < 0.1,
        deterministic=rng.random() < 0.3,
        capability=rng.choice(((8, 0), (9, 0))),
        wrong=wrong,
    )


TENSORS = {
    "None": lambda x: None,
    "a string": lambda x: "x",
    "a list": lambda x: [[1.0]],
    "a NumPy array": lambda x: x.detach().float().numpy(),
    "integers": lambda x: x.detach().long(),
    "booleans": lambda x: x.detach().bool(),
    "complex": lambda x: x.detach().to(torch.complex64),
    "sparse": lambda x: x.detach().to_sparse(),
    "one more dimension": lambda x: x.unsqueeze(0),
    "a number": lambda x: x.detach().sum(),
    "no channels": lambda x: x[..., :0],
    "one more channel": lambda x: torch.cat([x, x[..., :1]], -1),
    "one row too many": lambda x: torch.cat([x, x.new_ones(1, *x.shape[1:])]),
    "on the meta device": lambda x: x.detach().to("meta"),
}
WRONG = {
    "row_mask": {
        "a float mask": lambda x: torch.ones(3),
        "integers": lambda x: torch.ones(3, dtype=torch.int64),
        "too many dimensions": lambda x: torch.ones(1, 1, 1, 1, 1, dtype=torch.bool),
        "a list": lambda x: [True],
        "a boolean": lambda x: True,
    },
    "backend": {
        "unknown": lambda x: "cudnn",
        "of other ops": lambda x: "cuda",
        "a number": lambda x: 3,
        "a list": lambda x: ["triton"],
    },
}


def check(arguments: ArgumentSet) -> None:
    keywords = keyword_arguments(arguments)
    if arguments.wrong is None and arguments.is_served:
        check_result(arguments, keywords)
    else:
        check_refused(arguments, keywords)


def keyword_arguments(arguments: ArgumentSet) -> dict[str, object]:
    """What the public function takes, before anything in it is made wrong."""
    generator = torch.Generator().manual_seed(arguments.seed)
    leading, hidden, inner = arguments.leading, arguments.hidden, arguments.inner
    stream, branch, gate = arguments.dtypes
    specs = {
        "x": ((*leading, hidden), stream, 1.0),
        "o": ((*leading, inner), branch, 1.0),
        "weight": ((hidden, inner), branch, 1.0),
        "gate": ((hidden,), gate, arguments.gate_size),
        "norm_weight": ((hidden,), stream, 1.0),
        "norm_bias": ((hidden,), stream, 1.0),
        "weight_in": ((inner, hidden), branch, hidden**-0.5),
        "weight_out": ((hidden, inner), branch, 1.0),
    }
    inputs = {}
    for name, layout, needed in zip(arguments.names, arguments.layouts, arguments.needs, strict=True):
        shape, dtype, size = specs[name]
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * size
        # Equal channels have no variance: their norm is all rounding.
        layout = "plain" if (name, layout) == ("x", "one number for all channels") else layout
        inputs[name] = LAYOUTS[layout](x.to(dtype)).requires_grad_(needed)
    if arguments.mask is not None:
        mask = torch.rand(leading, generator=generator) > 0.4
        masks = {"all": torch.ones_like(mask), "none": torch.zeros_like(mask)}
        mask = masks.get(arguments.mask, mask)
        inputs["row_mask"] = LAYOUTS["column major"](mask) if arguments.mask == "column major" else mask
    return inputs | {"backend": arguments.backend}


@contextlib.contextmanager
def conditions(arguments: ArgumentSet):
    """Deterministic or not, the tiles of one architecture, and no graph where no gradient is wanted."""
    with contextlib.ExitStack() as stack:
        if arguments.backend == "triton":
            for module in ("triton_forward", "triton_backward"):
                target = f"infimm_kernels.gated_residual.{module}.capability_of"
                stack.enter_context(mock.patch(target, lambda x: arguments.capability))
        if not any(arguments.needs):
            stack.enter_context(torch.inference_mode() if arguments.seed % 2 else torch.no_grad())
        torch.use_deterministic_algorithms(arguments.deterministic)
        stack.callback(torch.use_deterministic_algorithms, False)
        yield


def call(arguments: ArgumentSet, keywords: dict[str, object]) -> Tensor:
    function = gated_residual_projection if arguments.names == PROJECTION else gated_feed_forward
    return function(**keywords)


def check_refused(arguments: ArgumentSet, keywords: dict[str, object]) -> None:
    named = [] if arguments.is_served else ["backend"]
    if arguments.wrong is not None:
        argument, what, names = arguments.wrong
        change = WRONG.get(argument, TENSORS)[what]
        keywords[argument] = change(keywords.get(argument))
        named += names
    with conditions(arguments):
        assert_refused(lambda: call(arguments, keywords), named)


def check_result(arguments: ArgumentSet, keywords: dict[str, object]) -> None:
    inputs = [keywords[name] for name in arguments.names]
    mask = keywords.get("row_mask")
    generator = torch.Generator().manual_seed(arguments.seed + 1)
    shape, dtype = inputs[0].shape, inputs[0].dtype
    dy = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    dy = torch.ones((), dtype=dtype).expand(shape) if arguments.dy == "ones" else LAYOUTS[arguments.dy](dy)
    before = [x.detach().clone() for x in (*inputs, dy)]
    with conditions(arguments):
        y = call(arguments, keywords)
        found = gradients(y, inputs, dy, create_graph=arguments.create_graph)
    assert all(map(torch.equal, (*inputs, dy), before)), "an input was written to"
    assert (y.shape, y.dtype, y.is_contiguous()) == (shape, dtype, True)
    if mask is not None:
        assert torch.equal(y[~mask], inputs[0][~mask]), "a masked row changed"
    same = [x.detach().requires_grad_() for x in inputs]  # strides too: sums may go in another order
    wide = [x.detach().double().requires_grad_() for x in inputs]
    eager, exact = eager_result(same, mask), eager_result(wide, mask)
    y_slack, slack = slacks(arguments, wide, dy)
    assert_close("y", y, eager, exact, y_slack)
    wanted = [i for i, x in enumerate(inputs) if x.requires_grad]
    eager_grads = torch.autograd.grad(eager, same, dy)
    exact_grads = torch.autograd.grad(exact, wide, dy.double())
    for i, grad in zip(wanted, found, strict=True):
        name = f"d{arguments.names[i]}"
        assert grad.dtype == inputs[i].dtype, f"{name} has {grad.dtype}"
        assert_close(name, grad, eager_grads[i], exact_grads[i], slack)


def gradients(y: Tensor, inputs: list[Tensor], dy: Tensor, **options) -> tuple[Tensor, ...]:
    wanted = [x for x in inputs if x.requires_grad]
    return torch.autograd.grad(y, wanted, dy, **options) if wanted else ()


def eager_result(inputs: list[Tensor], mask: Tensor | None) -> Tensor:
    x, *rest, gate = inputs
    if len(rest) == 2:
        o, weight = rest
    else:
        norm_weight, norm_bias, weight_in, weight = rest
        norm = torch.nn.functional.layer_norm(x, x.shape[-1:], norm_weight, norm_bias).to(weight_in.dtype)
        o = torch.nn.functional.gelu(norm @ weight_in.t())
    update = gate.tanh() * (o @ weight.t())
    return x + (update if mask is None else update * mask.unsqueeze(-1))


def largest(x: Tensor) -> float:
    return float(x.detach().double().abs().max()) if x.numel() else 0.0


def slacks(arguments: ArgumentSet, wide: list[Tensor], dy: Tensor) -> tuple[float, float]:
    """What roundings may do to y and to a gradient where terms cancel that eager happens to round well."""
    stream, branch, gate = arguments.dtypes
    terms = math.prod(1 + largest(x) for x in wide[1:-1])
    most = max(1, math.prod(arguments.leading), arguments.hidden, arguments.inner)
    # Some numbers between are rounded to the dtype of the branch; where few are, eager may be exact by luck.
    rounding = max(SLACK[torch.float64], torch.finfo(branch).eps / 16)
    slack = rounding * largest(dy) * terms * most**0.5
    if arguments.names == FEED_FORWARD:
        return rounding * terms * arguments.inner**0.5, 2 * slack
    rounding = SLACK[torch.promote_types(torch.promote_types(stream, gate), torch.float32)]
    return rounding * terms * arguments.inner, slack / 4 + rounding * largest(dy) * terms * most


def assert_close(name: str, result: Tensor, eager: Tensor, exact: Tensor, slack: float) -> None:
    """Within a few errors of eager, roundings of the result, and `slack`."""
    assert result.shape == exact.shape, f"{name} has shape {list(result.shape)}"
    eager_error = max(max_error(eager, exact), torch.finfo(result.dtype).eps / 2 * largest(exact))
    allowed = FACTOR * eager_error + slack
    error = max_error(result, exact)
    assert allowed < torch.inf, f"{name} of eager PyTorch is not finite"
    assert error <= allowed, f"{name} is off by {error:.3g}, {allowed:.3g} are allowed"


test_reference, test_triton, test_ten_thousand_in_reference, test_five_hundred_in_triton = fuzz_tests(
    draw, check, in_reference=300, in_triton=25
)

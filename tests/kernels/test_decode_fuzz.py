"""Thousands of random calls with a few new tokens: each ends in a right result or in a typed error.

A failure prints its set; `check(draw(SEED, BACKEND))` repeats it.
"""

import dataclasses
import random
from unittest import mock

import torch
from torch import Tensor

from infimm_kernels import decode_segments, gated_cross_attention
from infimm_kernels.testing import max_error
from tests.kernels.cases import MIXED_DTYPES
from tests.kernels.fuzz import LAYOUTS, OPTIONS, TENSORS
from tests.kernels.fuzzing import assert_refused, fuzz_tests
from tests.kernels.test_decode import NAMES, eager

AWKWARD_LENGTHS = (0, 1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 129, 255, 257, 511, 512, 513, 600)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *MIXED_DTYPES)
SCALES = (None, 0, 1e-3, -0.1, -1.5, 2, 5.0, 1e-40)
# Multiply-adds of q k^T in one set: little for a CPU, much for the interpreter.
MAX_WORK = {"reference": 2_000_000, "triton": 600_000}
# Wider than the error rule's 2: in some of thousands of tiny problems eager is exact by luck.
FACTOR = 3
# Roundings in the dtype that sums are made in, relative to the largest terms.
SLACK = {torch.float32: 2e-6, torch.float64: 1e-12}
DISAGREEING = {
    "another dtype": lambda x: x.to(torch.float16 if x.dtype != torch.float16 else torch.float64),
    "on the meta device": lambda x: x.to("meta"),
    "one more at the end": lambda x: torch.cat((x, x[..., :1]), -1),
    "one more in front": lambda x: torch.cat((x, x.new_ones(1, *x.shape[1:]))),
}
RANGES = {
    "float": lambda x: x.float(),
    "int64": lambda x: x.long(),
    "a list": lambda x: x.tolist(),
    "one sample more": lambda x: torch.cat((x, x.new_zeros(1, 2))),
    "three numbers": lambda x: torch.cat((x, x[:, :1]), 1),
    "one dimension": lambda x: x.flatten(),
    "on the meta device": lambda x: x.to("meta"),
}
# By argument, without what is no change or makes another legal call.
CHANGES = {name: {**TENSORS, **DISAGREEING} for name in NAMES}
for _name, _harmless in (
    ("x", ("another dtype",)),
    ("attn_gate", ("another dtype", "one dimension", "no heads")),
):
    for _what in _harmless:
        del CHANGES[_name][_what]
CHANGES |= {name: OPTIONS[name] for name in ("softmax_scale", "backend")} | {"key_ranges": RANGES}


@dataclasses.dataclass(frozen=True)
class ArgumentSet:
    """images: tokens of those of each sample; dtypes: of (x, branch, gate); layouts: names of LAYOUTS.

    ranges: instead of those of the segments; max_keys: instead of theirs; wrong: (argument, what is wrong).
    """

    seed: int
    backend: str
    images: tuple[tuple[int, ...], ...]
    text_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    dtypes: tuple[torch.dtype, ...]
    layouts: tuple[str, ...]
    scale: float | None
    ranges: tuple[tuple[int, int], ...] | None
    max_keys: int | None
    splits: int | None
    inference: bool
    wrong: tuple[str, str] | None

    @property
    def is_served(self) -> bool:
        return self.backend != "triton" or (torch.float64 not in self.dtypes and 16 <= self.head_dim <= 256)


def draw(seed: int, backend: str) -> ArgumentSet:
    """The argument set of a seed; one in five has a wrong argument."""
    rng = random.Random(seed)
    num_kv_heads = rng.choice((1, 1, 2, 3))
    num_heads = num_kv_heads * rng.choice((1, 1, 1, 2, 4))
    head_dim = rng.choices((rng.randrange(16, 129, 16), rng.randint(1, 256)), (7, 3))[0]
    text_len = rng.choice((1, 1, 1, 1, 2, 3, 4, 8, rng.randint(1, 8)))
    budget = MAX_WORK[backend] // (num_heads * head_dim)
    images = []
    for _ in range(rng.choice((0, 1, 1, 2, 3, rng.randint(1, 9)))):
        kinds = (
            rng.choice(AWKWARD_LENGTHS),
            rng.randint(0, 150),
            images[-1][-1] if images and images[-1] else 7,
        )
        sample = [rng.choice(kinds) for _ in range(rng.choice((0, 1, 1, 1, 2, rng.randint(0, 8))))]
        while sum(sample) * text_len > budget:
            sample.pop()
        budget -= sum(sample) * text_len
        images.append(tuple(sample))
    total = sum(map(sum, images))
    ranges = None
    if rng.random() < 0.25:
        bounds = (-(2**31), -5, 0, total, total + 9, 2**31 - 1)
        ranges = tuple(
            tuple(rng.choice((*bounds, rng.randint(0, total), rng.randint(0, total))) for _ in range(2))
            for _ in images
        )
    dtype = rng.choices(DTYPES, (4, 4, 4, 1, 1, 1, 1, 1))[0]
    wrong = None
    if rng.random() < 0.2:
        argument = rng.choice(list(CHANGES))
        wrong = argument, rng.choice(list(CHANGES[argument]))
    return ArgumentSet(
        seed,
        backend,
        tuple(images),
        text_len,
        num_heads,
        num_kv_heads,
        head_dim,
        hidden=rng.choice((1, 16, 33, 64, rng.randint(1, 80))),
        dtypes=dtype if isinstance(dtype, tuple) else (dtype,) * 3,
        layouts=tuple(rng.choice(("plain", *LAYOUTS)) for _ in range(4)),
        scale=rng.choice((*SCALES, rng.uniform(-1, 1))) if rng.random() < 0.4 else None,
        ranges=ranges,
        max_keys=rng.choice((-1, 0, 1, 10**5)) if rng.random() < 0.3 else None,
        splits=rng.randint(1, 9) if rng.random() < 0.4 else None,
        inference=rng.random() < 0.5,
        wrong=wrong,
    )


def check(arguments: ArgumentSet) -> None:
    if arguments.wrong is None and arguments.is_served:
        check_result(arguments)
    else:
        check_refused(arguments)


def keyword_arguments(arguments: ArgumentSet) -> dict[str, object]:
    generator = torch.Generator().manual_seed(arguments.seed)
    batch, total = len(arguments.images), sum(map(sum, arguments.images))
    stream, branch, gate = arguments.dtypes
    width = arguments.num_heads * arguments.head_dim
    keys = (total, arguments.num_kv_heads, arguments.head_dim)
    wanted = (
        ((batch, arguments.text_len, arguments.hidden), stream, "plain"),
        ((batch, arguments.text_len, arguments.num_heads, arguments.head_dim), branch, arguments.layouts[0]),
        (keys, branch, arguments.layouts[1]),
        (keys, branch, arguments.layouts[2]),
        ((arguments.hidden, width), branch, "plain"),
        ((arguments.hidden,), gate, "plain"),
    )
    tensors = {}
    for name, (shape, dtype, layout) in zip(NAMES, wanted, strict=True):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        tensors[name] = LAYOUTS[layout]((x * width**-0.5 if name == "out_weight" else x).to(dtype))
    tensors["x"] = LAYOUTS[arguments.layouts[3]](tensors["x"])
    lengths = [n for sample in arguments.images for n in sample]
    segments = decode_segments(lengths, list(map(len, arguments.images)), text_len=arguments.text_len)
    if arguments.ranges is not None:
        key_ranges = torch.tensor(arguments.ranges, dtype=torch.int32).view(batch, 2)
        segments = segments._replace(key_ranges=key_ranges)
    if arguments.max_keys is not None:
        segments = segments._replace(max_keys=arguments.max_keys)
    options = {"softmax_scale": arguments.scale, "backend": arguments.backend}
    return tensors | {"segments": segments} | options


def call(arguments: ArgumentSet, keywords: dict[str, object]) -> Tensor:
    if arguments.backend != "triton" or arguments.splits is None:
        return _call(arguments, keywords)
    target = "infimm_kernels.gated_cross_attention.triton_decode.splits_for"
    with mock.patch(target, lambda *sizes: arguments.splits):
        return _call(arguments, keywords)


def _call(arguments: ArgumentSet, keywords: dict[str, object]) -> Tensor:
    with torch.inference_mode() if arguments.inference else torch.no_grad():
        return gated_cross_attention(**keywords)


def check_refused(arguments: ArgumentSet) -> None:
    keywords, named = keyword_arguments(arguments), [] if arguments.is_served else ["backend"]
    if arguments.wrong is not None:
        argument, what = arguments.wrong
        change = CHANGES[argument][what]
        if argument == "key_ranges":
            segments = keywords["segments"]
            keywords["segments"] = segments._replace(key_ranges=change(segments.key_ranges))
            named.append(r"segments\.key_ranges")
        else:
            keywords[argument] = change(keywords[argument])
            # Tensors that disagree are named by either of them.
            named += [*NAMES, r"segments\.\w+"] if argument in NAMES else [argument]
    assert_refused(lambda: call(arguments, keywords), named)


def check_result(arguments: ArgumentSet) -> None:
    keywords = keyword_arguments(arguments)
    tensors, segments = [keywords[name] for name in NAMES], keywords["segments"]
    before = [x.clone() for x in tensors]
    y = call(arguments, keywords)
    assert all(map(torch.equal, tensors, before)), "an input was written to"
    assert y.dtype == arguments.dtypes[0]
    assert y.shape == tensors[0].shape
    total = tensors[2].shape[0]
    cut = [[min(max(bound, 0), total) for bound in bounds] for bounds in segments.key_ranges.tolist()]
    ranges = [[first, max(first, end)] for first, end in cut]
    keyless = torch.tensor([first == end for first, end in ranges], dtype=torch.bool)
    assert torch.equal(y[keyless], tensors[0][keyless]), "a sample without keys is not x"

    wide = [x.double() for x in tensors]
    same, exact = eager(tensors, ranges, arguments.scale), eager(wide, ranges, arguments.scale)
    if not exact.numel():
        return
    largest = float(exact.abs().max())
    scale = arguments.head_dim**-0.5 if arguments.scale is None else abs(arguments.scale)
    longest = [float(x.norm(dim=-1).max()) if x.numel() else 0.0 for x in wide[1:4]]
    # The relative error of a probability grows with the scores; out_weight has rows of about unit length.
    terms = (1 + scale * longest[0] * longest[1]) * longest[2] * float(wide[4].norm(dim=-1).max())
    eager_error = max(max_error(same, exact), torch.finfo(y.dtype).eps / 2 * largest)
    slack = SLACK[torch.promote_types(tensors[1].dtype, torch.float32)]
    allowed = FACTOR * eager_error + slack * (terms + largest)
    error = max_error(y, exact)
    assert allowed < torch.inf, "eager PyTorch is not finite"
    assert error <= allowed, f"off by {error:.3g}, {allowed:.3g} are allowed"


test_reference, test_triton, test_ten_thousand_in_reference, test_five_hundred_in_triton = fuzz_tests(
    draw, check, in_reference=200, in_triton=20
)

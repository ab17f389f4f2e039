"""Random argument sets of the attention ops, legal or with one wrong argument; each is made of a seed."""

import dataclasses
import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

AWKWARD_LENGTHS = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257)
AWKWARD_HEAD_DIMS = (1, 2, 7, 8, 15, 16, 17, 24, 32, 33, 160, 192, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCALES = (None, 0, 0.0, 1e-3, -0.1, -1.5, 1.0, 2, 5.0)
# Multiply-adds of q k^T in one set: little for a CPU, much for the interpreter.
MAX_WORK = {"reference": 3_000_000, "triton": 1_500_000}


class Wrong(NamedTuple):
    """A change of a legal argument, and the names with which its error may begin."""

    argument: str
    what: str
    change: Callable[[object], object]
    named: tuple[str, ...]

    def __repr__(self) -> str:
        return f"<{self.argument}: {self.what}>"


@dataclasses.dataclass(frozen=True)
class ArgumentSet:
    """form: "varlen" (q, k, v), "packed" (qkv and cu_seqlens) or "windows" (equal ones).

    layouts: how q, k and v, or qkv, lie in memory, a name in LAYOUTS; needs: which of them need a gradient;
    shared: the names of those that are one and the same tensor; dout, dlse: how the gradients of the results
    lie, None for no gradient; capability: of the GPU whose tiles Triton takes.
    """

    seed: int
    backend: str
    form: str
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    layouts: tuple[str, ...]
    options: dict[str, object]
    needs: tuple[bool, ...]
    shared: tuple[str, ...]
    dout: str | None
    dlse: str | None
    create_graph: bool
    deterministic: bool
    capability: tuple[int, int]
    wrong: Wrong | None

    @property
    def names(self) -> tuple[str, ...]:
        return ("q", "k", "v") if self.form == "varlen" else ("qkv",)

    @property
    def is_served(self) -> bool:
        """Whether the backend can run the set if nothing in it is wrong."""
        return self.backend != "triton" or (self.dtype != torch.float64 and 16 <= self.head_dim <= 256)

    @property
    def scale(self) -> float:
        scale = self.options.get("softmax_scale")
        return self.head_dim**-0.5 if scale is None else scale


def draw(seed: int, backend: str) -> ArgumentSet:
    """The argument set of a seed; one in four has a wrong argument."""
    rng = random.Random(seed)
    form = rng.choice(("varlen", "varlen", "packed", "windows"))
    separate = form == "varlen"
    kinds = (rng.randrange(64, 129, 8), rng.choice(AWKWARD_HEAD_DIMS), rng.randint(1, 256))
    head_dim = rng.choices(kinds, (6, 2, 2))[0]
    num_kv_heads = rng.choice((1, 1, 2, 3))
    num_heads = num_kv_heads * (rng.choice((1, 1, 2, 4)) if separate else 1)
    num_prefix_tokens = rng.choice((0, 0, 1, 1, rng.randint(0, 8)))
    budget = MAX_WORK[backend] // (num_heads * head_dim)
    lengths_q, lengths_k = _draw_lengths(rng, form, budget, num_prefix_tokens)
    options: dict[str, object] = {"num_prefix_tokens": num_prefix_tokens}
    if rng.random() < 0.4:
        options["softmax_scale"] = rng.choice((*SCALES, rng.uniform(-1, 1)))
    hints = {"max_seqlen_q": lengths_q, "max_seqlen_k": lengths_k} if separate else {"max_seqlen": lengths_q}
    for name, lengths in hints.items():
        if rng.random() < 0.3:
            longest = max(lengths, default=0)
            options[name] = rng.choice((None, longest, longest + rng.randint(0, 200)))
    # Without windows there still is their length, which the hint must not fall short of.
    if form == "windows" and not lengths_q:
        options.pop("max_seqlen", None)
    with_lse = rng.random() < 0.6
    if with_lse or rng.random() < 0.5:
        options["return_lse"] = with_lse
    inputs = range(3 if separate else 1)
    with_gradients = rng.random() < 0.7
    needs = tuple(with_gradients and rng.random() < 0.8 for _ in inputs)
    shared: tuple[str, ...] = ()
    if separate and rng.random() < 0.2:
        alike = (lengths_q, num_heads) == (lengths_k, num_kv_heads)
        shared = ("q", "k", "v") if alike else ("k", "v")
    arguments = ArgumentSet(
        seed,
        backend,
        form,
        lengths_q,
        lengths_k,
        num_heads,
        num_kv_heads,
        head_dim,
        dtype=rng.choices(DTYPES, (4, 4, 3, 0.3 if backend == "triton" else 2))[0],
        layouts=tuple(rng.choice(("plain", *LAYOUTS)) for _ in inputs),
        options=options,
        needs=needs,
        shared=shared,
        dout=rng.choice(GRADIENT_LAYOUTS) if rng.random() < 0.85 else None,
        dlse=rng.choice(GRADIENT_LAYOUTS) if with_lse and rng.random() < 0.5 else None,
        create_graph=rng.random() < 0.1,
        deterministic=rng.random() < 0.3,
        capability=rng.choice(((8, 0), (9, 0))),
        wrong=None,
    )
    if rng.random() < 0.25:
        arguments = dataclasses.replace(arguments, wrong=rng.choice(_applicable(arguments)))
    return arguments


def _draw_lengths(
    rng: random.Random, form: str, budget: int, num_prefix_tokens: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of the segments, of queries and of keys, with about `budget` scores of a head at most."""

    def length() -> int:
        kind = rng.random()
        if kind < 0.3:  # whole tiles, behind the prefix or with it
            return rng.choice((0, num_prefix_tokens)) + rng.choice((64, 128, 256))
        return rng.choice(AWKWARD_LENGTHS) if kind < 0.75 else rng.randint(0, 140)

    if form == "windows":
        seqlen = length()
        num_windows = rng.randint(0, min(4, max(1, budget // max(1, seqlen * seqlen))))
        return ((seqlen,) * num_windows,) * 2
    pairs = []
    same = form == "packed" or rng.random() < 0.4
    no_keys = not same and rng.random() < 0.1
    for _ in range(rng.randint(0, 6)):
        len_q = length()
        len_k = len_q if same else 0 if no_keys else length()
        if len_q * len_k > budget:
            len_q = len_k = rng.randint(0, 5)
        budget -= len_q * len_k
        pairs.append((len_q, len_k))
    return tuple(len_q for len_q, _ in pairs), tuple(len_k for _, len_k in pairs)


# --- layouts: the same numbers elsewhere in memory, with NaN between them -----------------------------------


def _apart(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """A copy of x that is a part, along `dim`, of a larger tensor."""
    shape = list(x.shape)
    shape[dim] += before + after
    return x.new_full(shape, torch.nan).narrow(dim, before, x.shape[dim]).copy_(x)


# The last two read the same numbers several times. Tokens are never all equal: their gradients would cancel.
LAYOUTS = {
    "plain": lambda x: x,
    "slice of packed": lambda x: _apart(x.unsqueeze(1), 1, 1, 1).squeeze(1),
    "wide rows": lambda x: _apart(x, -1, 8, 0),
    "head major": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
    "channel major": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "offset": lambda x: _apart(x.flatten(), 0, 3, 0).view(x.shape),
    "every second channel": lambda x: _apart(x.unsqueeze(-1), -1, 0, 1).squeeze(-1),
    "one head for all": lambda x: x[..., :1, :].expand_as(x),
    "overlapping tokens": lambda x: x.as_strided(x.shape, (min(7, math.prod(x.shape[1:])), *x.stride()[1:])),
}
# "ones" is the gradient of a sum: one number for all.
GRADIENT_LAYOUTS = ("plain", "plain", "wide rows", "every second channel", "one head for all", "ones")


# --- wrong arguments ----------------------------------------------------------------------------------------

TENSORS = {
    "None": lambda x: None,
    "a string": lambda x: "q",
    "a number": lambda x: 3,
    "a list": lambda x: [[[1.0]]],
    "a NumPy array": lambda x: x.detach().float().numpy(),
    "integers": lambda x: x.detach().long(),
    "booleans": lambda x: x.detach().bool(),
    "complex": lambda x: x.detach().to(torch.complex64),
    "sparse": lambda x: x.detach().to_sparse(),
    "one more dimension": lambda x: x.unsqueeze(0),
    "one dimension": lambda x: x.flatten(),
    "no channels": lambda x: x[..., :0],
    "no heads": lambda x: x[..., :0, :],
}
# q, k and v must agree with each other.
SEPARATE = {
    "on the meta device": lambda x: x.detach().to("meta"),
    "another dtype": lambda x: x.to(torch.float32 if x.dtype != torch.float32 else torch.float64),
    "one more channel": lambda x: torch.cat([x, x[..., :1]], -1),
    "one more token": lambda x: torch.cat([x, x.new_ones(1, *x.shape[1:])]),
}
CU_SEQLENS = {
    "None": lambda x: None,
    "a list": lambda x: x.tolist(),
    "int64": lambda x: x.long(),
    "float": lambda x: x.float(),
    "two dimensions": lambda x: x[None],
    "no elements": lambda x: x[:0],
    "on the meta device": lambda x: x.to("meta"),
    "one element too many": lambda x: torch.cat([x, x[-1:] + 1]),
    "later by one": lambda x: x + 1,
    "earlier by one": lambda x: x - 1,
    "past the end": lambda x: torch.cat([x[:-1], x[-1:] + 1]),
    "far past the end": lambda x: torch.cat([x[:-1], torch.full_like(x[-1:], 2**31 - 1)]),
    "the lowest number": lambda x: torch.full_like(x, -(2**31)),
}
HINTS = {
    "negative": lambda x: -1,
    "a string": lambda x: "3",
    "a float": lambda x: 300.0,
    "NaN": lambda x: math.nan,
    "a boolean": lambda x: True,
    "a tensor": lambda x: torch.tensor(300),
}
# Wrong only where there are two segments; where some segment has tokens.
DECREASING = {"decreasing": lambda x: torch.cat([x[:1], x[-1:] + 1, x[2:]])}
BACKWARDS = {"backwards": lambda x: x.flip(0)}
TOO_SHORT = {"too short": lambda x: 0}
OPTIONS = {
    "num_prefix_tokens": {
        "nine": lambda x: 9,
        "negative": lambda x: -1,
        "many": lambda x: 10**12,
        "a float": lambda x: 1.0,
        "NaN": lambda x: math.nan,
        "a boolean": lambda x: True,
        "None": lambda x: None,
        "a string": lambda x: "1",
        "a list": lambda x: [1],
        "a tensor": lambda x: torch.tensor(1),
    },
    "softmax_scale": {
        "NaN": lambda x: math.nan,
        "infinite": lambda x: -math.inf,
        "too large": lambda x: 10**400,
        "a boolean": lambda x: True,
        "a string": lambda x: "0.1",
        "complex": lambda x: 1j,
        "a tensor": lambda x: torch.tensor(0.1),
        "a list": lambda x: [0.1],
    },
    "return_lse": {"one": lambda x: 1, "None": lambda x: None, "a string": lambda x: "yes"},
    "backend": {
        "unknown": lambda x: "cudnn",
        "of other ops": lambda x: "cuda",
        "empty": lambda x: "",
        "a number": lambda x: 3,
        "bytes": lambda x: b"triton",
        "a list": lambda x: ["triton"],
    },
}


def _applicable(arguments: ArgumentSet) -> list[Wrong]:
    """What can be made wrong in a legal set."""
    separate = arguments.form == "varlen"
    tensors = arguments.names
    lengths = (arguments.lengths_q, arguments.lengths_k)
    of_form = {"varlen": ("cu_seqlens_q", "cu_seqlens_k"), "packed": ("cu_seqlens",), "windows": ()}
    cu_seqlens = of_form[arguments.form]
    hints = ("max_seqlen_q", "max_seqlen_k") if separate else ("max_seqlen",)
    found = []

    def add(argument: str, changes: dict[str, Callable[[Tensor], object]], *others: str) -> None:
        found.extend(Wrong(argument, what, change, (argument, *others)) for what, change in changes.items())

    for name in tensors:
        # What disagrees is named by its later argument; a number of tokens, by cu_seqlens.
        add(name, TENSORS, *(tensors[1:] if separate else ()))
        if separate:
            add(name, SEPARATE, *tensors[1:], *cu_seqlens)
    for name, of_segments in zip(cu_seqlens, lengths, strict=False):
        # A hint may be the first to disagree; without cu_seqlens qkv has another shape.
        others = (*cu_seqlens, *hints, *(() if separate else tensors))
        add(name, CU_SEQLENS, *others)
        add(name, DECREASING if len(of_segments) > 1 else {}, *others)
        add(name, BACKWARDS if any(of_segments) else {}, *others)
    for name, of_segments in zip(hints, lengths, strict=False):
        add(name, HINTS)
        add(name, TOO_SHORT if any(of_segments) else {})
    for name, changes in OPTIONS.items():
        add(name, changes)
    return found

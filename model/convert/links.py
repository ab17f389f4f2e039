"""How tensors of two checkpoint forms correspond: rules with placeholders, and the links that they make.

A rule reads in both directions: `Rule("vision.cls_token", "cls_token", leading_ones(2))`. Its names may hold
`{block}`, `{layer}` and `{gated}` (a number), `{rest}` (anything), and on their side `{every_gated}`: one
tensor for each gated block, all of them in one link."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

Shapes = dict[str, list[int]]
Side = Literal["ours", "theirs"]
_Convert = Callable[[list[Tensor], int], list[Tensor]]


@dataclasses.dataclass(frozen=True)
class Transform:
    """What happens to the tensors of a link; each function gets them and the number that it has to return."""

    to_ours: _Convert
    to_theirs: _Convert


def leading_ones(count: int) -> Transform:
    """Their tensor has `count` leading dimensions of size 1 that ours does not have."""
    return Transform(
        to_ours=lambda tensors, _: [tensors[0][(0,) * count]],
        to_theirs=lambda tensors, _: [tensors[0][(None,) * count]],
    )


def _patch_kernel(weight: Tensor) -> Tensor:
    side = math.isqrt(weight.shape[1] // 3)
    return weight.reshape(weight.shape[0], 3, side, side)


def _stack_keys_values(weights: list[Tensor], _: int) -> list[Tensor]:
    """Keys stand before values in the rows of each block's weight [2 * inner, vision_hidden]."""
    return [torch.stack([weight.unflatten(0, (2, -1)) for weight in weights])]


RENAMED = Transform(lambda tensors, _: tensors, lambda tensors, _: tensors)
PATCH_KERNEL = Transform(
    to_ours=lambda tensors, _: [tensors[0].flatten(1)],
    to_theirs=lambda tensors, _: [_patch_kernel(tensors[0])],
)
"""A linear layer over flattened patches is their strided convolution."""
JOINED = Transform(
    to_ours=lambda tensors, _: [torch.cat(tensors)], to_theirs=lambda tensors, n: list(tensors[0].chunk(n))
)
"""Their several tensors are the rows of ours, one under the other."""
DIVIDED = Transform(to_ours=JOINED.to_theirs, to_theirs=JOINED.to_ours)
"""Their one tensor holds several of ours, one under the other."""
KEYS_VALUES = Transform(
    to_ours=_stack_keys_values, to_theirs=lambda tensors, _: [weight.flatten(0, 1) for weight in tensors[0]]
)
"""Ours [num_blocks, 2, inner, vision_hidden] is the stack of all their blocks' weights."""


@dataclasses.dataclass(frozen=True)
class Link:
    """Tensors of ours that come from tensors of theirs, and the other way round."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transform: Transform

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        return self.transform.to_ours(tensors, len(self.ours))

    def to_theirs(self, tensors: list[Tensor]) -> list[Tensor]:
        return self.transform.to_theirs(tensors, len(self.theirs))


class Rule:
    """A relation between names of ours and names of theirs (one name or a tuple), with its transform."""

    def __init__(
        self, ours: str | tuple[str, ...], theirs: str | tuple[str, ...], transform: Transform = RENAMED
    ) -> None:
        self.ours = (ours,) if isinstance(ours, str) else ours
        self.theirs = (theirs,) if isinstance(theirs, str) else theirs
        self.transform = transform
        self._patterns = {
            "ours": [template_pattern(name) for name in self.ours],
            "theirs": [template_pattern(name) for name in self.theirs],
        }

    def match(self, name: str, side: Side) -> dict[str, str] | None:
        """The placeholders' values in `name`, or None where the rule is not about it."""
        for pattern in self._patterns[side]:
            if found := pattern.fullmatch(name):
                return found.groupdict()
        return None

    def link(self, values: dict[str, str], gated_layers: Iterable[int]) -> Link:
        theirs: list[str] = []
        for name in self.theirs:
            if "{every_gated}" in name:
                theirs += [name.format(**values, every_gated=layer) for layer in gated_layers]
            else:
                theirs.append(name.format(**values))
        return Link(tuple(name.format(**values) for name in self.ours), tuple(theirs), self.transform)


def template_pattern(template: str) -> re.Pattern[str]:
    """A regular expression with one group for every placeholder of `template`."""
    pieces = re.split(r"\{(\w+)\}", template)
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            pieces[index] = re.escape(piece)
        else:
            pieces[index] = f"(?P<{piece}>{'.+' if piece == 'rest' else '[0-9]+'})"
    return re.compile("".join(pieces))


def make_links(
    rules: Sequence[Rule], names: Iterable[str], side: Side, gated_layers: Iterable[int] = ()
) -> tuple[list[Link], list[str]]:
    """The links that the rules make of `names`, which stand on `side`, and the names that no rule is about.

    The first rule that matches a name decides. A link is made whole if one of its names is there, so that the
    lack of another is found. `gated_layers` are needed on our side, where `{every_gated}` does not occur."""
    found: dict[tuple, tuple[Rule, dict[str, str], set[int]]] = {}
    unmatched = []
    for name in names:
        for number, rule in enumerate(rules):
            values = rule.match(name, side)
            if values is not None:
                gated = values.pop("every_gated", None)
                entry = found.setdefault((number, *sorted(values.items())), (rule, values, set()))
                if gated is not None:
                    entry[2].add(int(gated))
                break
        else:
            unmatched.append(name)
    links = [
        rule.link(values, sorted(gated) if side == "theirs" else gated_layers)
        for rule, values, gated in found.values()
    ]
    return links, unmatched


def our_shapes(links: Iterable[Link], their_shapes: Shapes) -> Shapes:
    """Shapes on our side, as far as their shapes fit the rules."""
    shapes: Shapes = {}
    for link in links:
        if all(name in their_shapes for name in link.theirs):
            sources = [torch.empty(their_shapes[name], device="meta") for name in link.theirs]
            try:
                results = link.to_ours(sources)
            except (
                RuntimeError,
                IndexError,
            ):  # a misshapen tensor is named when all expected shapes are known
                continue
            shapes |= {name: list(result.shape) for name, result in zip(link.ours, results, strict=True)}
    return shapes


def their_shapes(link: Link, shapes: Shapes) -> Shapes:
    """Shapes on their side for ours."""
    results = link.to_theirs([torch.empty(shapes[name], device="meta") for name in link.ours])
    return {name: list(result.shape) for name, result in zip(link.theirs, results, strict=True)}

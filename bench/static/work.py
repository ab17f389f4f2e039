"""How much of the matrix work that a kernel issues is useful, for a whole problem of one head of one window.

Useful are 2 S^2 D multiply-adds forward and 5 S^2 D backward: S tokens, prefix tokens among them, D channels.
Issued are those of the matrix instructions, masked and padded parts included, and the scalar multiply-adds
spent on prefix rows and columns. The trips come from the tile sizes; what one trip issues is read from the
machine code, and must not be less than the tile says.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import NamedTuple

from bench.static.sass import MmaRegion, mma_macs


class Problem(NamedTuple):
    seqlen: int
    num_prefix_tokens: int
    head_dim: int


class Region(NamedTuple):
    """A place of a kernel's source with matrix work: multiply-adds of one trip, trips of all programs.

    depth: how many loops it stands in; dead: multiply-adds of a trip that a compiler may see to be unused.
    """

    macs: int
    trips: int
    depth: int = 1
    dead: int = 0


class Work(NamedTuple):
    regions: tuple[Region, ...]
    scalar: int = 0


USEFUL_GEMMS = {"fwd": 2, "bwd": 5}


def useful_macs(direction: str, problem: Problem) -> int:
    return USEFUL_GEMMS[direction] * problem.seqlen**2 * problem.head_dim


def problems(head_dim: int, num_prefix_tokens: int) -> tuple[Problem, ...]:
    """Windows of 448 x 448 pixels behind the prefix tokens; for the heads of ViT-E 224 x 224 pixels too."""
    patches = (1024, 256) if (head_dim, num_prefix_tokens) == (112, 1) else (1024,)
    return tuple(Problem(count + num_prefix_tokens, num_prefix_tokens, head_dim) for count in patches)


def _attention_forward(tile: Mapping, problem: Problem) -> Work | None:
    if not _serves(tile, problem):
        return None
    prefix, width, block_m = tile["NUM_PREFIX"], sum(tile["PIECES"]), tile["BLOCK_M"]
    rest = problem.seqlen - prefix
    programs = max(1, ceil(rest / block_m))
    regions, scalar = [], 0
    if prefix == 1:
        # The prefix key of every query row, and the row of the prefix query itself.
        scalar = 2 * width * (programs * block_m + 1 + _up(rest, tile["PREFIX_BLOCK_N"]))
    elif prefix > 1:
        regions += [
            Region(2 * block_m * 16 * width, programs, depth=0),
            Region(2 * 8 * 16 * width, 1, depth=0),
        ]
    for rows, block_n, count in (
        (block_m + (8 if prefix > 1 else 0), tile["PREFIX_BLOCK_N"], 1 if prefix else 0),
        (block_m, tile["BLOCK_N"], programs - 1 if prefix else programs),
    ):
        if prefix or count:
            macs = 2 * rows * block_n * width
            one_loop = tile["ONE_LOOP"]
            regions.append(Region(macs, count * (ceil(rest / block_n) if one_loop else rest // block_n)))
            if not tile["EVEN_K"] and not one_loop:
                regions.append(Region(macs, count if rest % block_n else 0, depth=0))
    return Work(tuple(regions), scalar)


def window_tile(kernel: str, head_dim: int) -> dict[str, int]:
    """The sizes of csrc's attention for what it is compared at: ViT-E's windows have a prefix token."""
    return {
        "HEAD_DIM": head_dim,
        "NUM_PREFIX": 1 if head_dim == 112 else 0,
        "BLOCK_M": 64 if "backward" in kernel else 128,
        "BLOCK_N": 128,
        "STAGES": 2,
        "MATRIX_WARPS": 8,
    }


def window_shared_bytes(head_dim: int, prefix: bool) -> int:
    """As WindowShared in csrc/window_attention_shared.cuh; a test compares the two."""
    width = _up(head_dim, 64)
    tiles = 5 * 128 * width * 2  # queries, two stages of keys, two of values
    work, barriers = 2 * 32, 8 * 2 * (2 + 1 + 2 + 2)
    states = 3 * 8 * (2 * width + 4) * 4
    return 1024 + _up(tiles + work + barriers, 128) + (states if prefix else 0)


def window_backward_shared_bytes(head_dim: int) -> int:
    """As BackwardShared in csrc/window_attention_backward_shared.cuh; a test compares the two."""
    width = _up(head_dim, 64)
    tiles = (2 * 128 + 2 * 2 * 64) * width * 2  # keys and values, two stages of queries and dout
    scores, statistics, barriers = 2 * 128 * 64 * 2, 2 * 2 * 64 * 4, 8 * (1 + 2 * 2)
    return 1024 + tiles + scores + statistics + barriers


def _window_attention(tile: Mapping, problem: Problem) -> Work | None:
    """The kernel of csrc: scores of the first key tile, a loop over the others, values of the last."""
    if tile["NUM_PREFIX"] != problem.num_prefix_tokens:
        return None
    block_m, block_n, width = tile["BLOCK_M"], tile["BLOCK_N"], tile["HEAD_DIM"]
    rest = problem.seqlen - problem.num_prefix_tokens
    programs, key_tiles = ceil(rest / block_m), ceil(rest / block_n)
    product = block_m * block_n * width
    # The prefix keys meet every row, the prefix queries every key.
    scalar = 2 * width * problem.num_prefix_tokens * (programs * block_m + problem.seqlen)
    # The loop over the tiles of a block stands around all of it.
    return Work(
        (Region(2 * product, programs, depth=1), Region(2 * product, programs * (key_tiles - 1), depth=2)),
        scalar,
    )


def _window_attention_backward(tile: Mapping, problem: Problem) -> Work | None:
    """The kernel of csrc: a loop over the queries, prefix included, in one over the heads of a key head."""
    if tile["NUM_PREFIX"] != problem.num_prefix_tokens:
        return None
    block_m, block_n = tile["BLOCK_M"], tile["BLOCK_N"]
    programs = ceil((problem.seqlen - problem.num_prefix_tokens) / block_n)
    steps = programs * ceil(problem.seqlen / block_m)
    product = block_m * block_n * tile["HEAD_DIM"]
    # dq stands in the code of both warpgroups, which take turns with it: once too often.
    return Work((Region(6 * product, steps, depth=2),), -product * steps)


def _backward_prepare(tile: Mapping, problem: Problem) -> Work | None:
    """Five products of every query with every prefix key; delta is no product of the pass."""
    if not _serves(tile, problem):
        return None
    return Work((), 5 * tile["NUM_PREFIX"] * _up(problem.seqlen, tile["BLOCK_M"]) * sum(tile["PIECES"]))


def _backward_main(tile: Mapping, problem: Problem) -> Work | None:
    if not _serves(tile, problem):
        return None
    prefix, block_m, block_n = tile["NUM_PREFIX"], tile["BLOCK_M"], tile["BLOCK_N"]
    rest = problem.seqlen - prefix
    programs = ceil(rest / block_n)
    per_row = (5 if tile["WITH_DQ"] else 4) * block_n * sum(tile["PIECES"])
    depth = 1 if tile["HEADS_PER_KV_HEAD"] > 1 else 0  # in its loop over the query heads
    regions = [Region(per_row * block_m, programs * (rest // block_m), depth + 1)]
    if not tile["EVEN_Q"]:
        regions.append(Region(per_row * block_m, programs if rest % block_m else 0, depth))
    if prefix > 1:
        # Of up to 8 prefix queries half of the scores and of dP is masked by constants.
        unused = block_n * sum(tile["PIECES"]) * 16 if prefix <= 8 else 0
        regions.append(Region(per_row * 16, programs, depth, unused))
    return Work(tuple(regions), per_row * programs if prefix == 1 else 0)


def _backward_dq(tile: Mapping, problem: Problem) -> Work | None:
    if not _serves(tile, problem):
        return None
    block_m, block_n = tile["BLOCK_M"], tile["BLOCK_N"]
    rest = problem.seqlen - tile["NUM_PREFIX"]
    programs = ceil(problem.seqlen / block_m)
    macs = 3 * block_m * block_n * sum(tile["PIECES"])
    regions = [Region(macs, programs * (rest // block_n))]
    if not tile["EVEN_K"]:
        regions.append(Region(macs, programs if rest % block_n else 0, depth=0))
    return Work(tuple(regions))


def _backward_finish(tile: Mapping, problem: Problem) -> Work | None:
    """dk and dv of the prefix keys, added up over the tiles."""
    if not _serves(tile, problem):
        return None
    return Work((), 2 * tile["NUM_PREFIX"] * ceil(problem.seqlen / tile["BLOCK_M"]) * sum(tile["PIECES"]))


def _serves(tile: Mapping, problem: Problem) -> bool:
    """Whether the launcher may choose these constexprs for equal windows like `problem`."""
    rest = problem.seqlen - problem.num_prefix_tokens
    return (
        tile["NUM_PREFIX"] == problem.num_prefix_tokens
        and not (tile.get("EVEN_Q") and rest % tile["BLOCK_M"])
        and not (tile.get("EVEN_K") and rest % tile["BLOCK_N"])
    )


def _up(x: int, block: int) -> int:
    return ceil(x / block) * block


# By the name of the kernel, from its constexprs; attention's kernels alone have a problem.
ATTENTION: dict[str, Callable[[Mapping, Problem], Work | None]] = {
    "attention_forward_kernel": _attention_forward,
    "window_attention_kernel": _window_attention,
    "window_attention_backward_kernel": _window_attention_backward,
    "attention_backward_prepare_kernel": _backward_prepare,
    "attention_backward_kernel": _backward_main,
    "attention_backward_dq_kernel": _backward_dq,
    "attention_backward_finish_kernel": _backward_finish,
}


class Part(NamedTuple):
    """A kernel of a pass, with the constexprs that it has there."""

    kernel: str
    constexprs: dict[str, object] = {}
    with_prefix_only: bool = False

    def matches(self, tile: Mapping) -> bool:
        return all(tile[name] == value for name, value in self.constexprs.items())


PREPARE = Part("attention_backward_prepare_kernel")
PASSES: tuple[tuple[Part, ...], ...] = (
    (Part("attention_forward_kernel"),),
    (Part("window_attention_kernel"),),
    (
        PREPARE,
        Part("attention_backward_kernel", {"WITH_DQ": True}),
        Part("attention_backward_finish_kernel", {"WITH_DQ": True}),
    ),
    (
        PREPARE,
        Part("attention_backward_kernel", {"WITH_DQ": False}),
        Part("attention_backward_dq_kernel"),
        Part("attention_backward_finish_kernel", {"WITH_DQ": False}, with_prefix_only=True),
    ),
    (
        PREPARE,
        Part("window_attention_backward_kernel"),
        Part("attention_backward_finish_kernel", {"WITH_DQ": True}),
    ),
)


def parts_of_pass(kernel: str, tile: Mapping, problem: Problem) -> tuple[Part, ...]:
    """The kernels that together do the first pass which this one is a part of."""
    parts = next(
        parts for parts in PASSES if any(part.kernel == kernel and part.matches(tile) for part in parts)
    )
    return tuple(part for part in parts if problem.num_prefix_tokens or not part.with_prefix_only)


NO_MATRIX_WORK = "no matrix instructions"


class Issued(NamedTuple):
    """macs: of the whole problem; source: what they were counted from."""

    macs: float
    source: str


def issued_macs(work: Work, regions: Sequence[MmaRegion], num_warps: int) -> Issued:
    """What a kernel issues: trips from `work`, multiply-adds per trip from the machine code's `regions`.

    They are matched by the number of loops around them and by size. Where the assembler merged or copied
    some, all of them together give one factor; where the instructions do not show their shape (sm_100), the
    tiles alone are counted. Raises ValueError where the code holds less matrix work than the tiles say: then
    one of the two is misread.
    """
    tiles = sum(region.macs * region.trips for region in work.regions)
    if not work.regions and not regions:
        return Issued(work.scalar, NO_MATRIX_WORK)
    if any(mma_macs(shape) == 0 for region in regions for shape in region.shapes):
        return Issued(tiles + work.scalar, "tile sizes")
    depths = {region.depth for region in (*work.regions, *regions)}
    matched = [_match(work, regions, num_warps, depth) for depth in depths]
    if None not in matched:
        return Issued(sum(matched) + work.scalar, "machine code")
    in_code = sum(region.macs for region in regions) * num_warps
    in_tiles = sum(region.macs for region in work.regions)
    if not in_tiles or in_code < sum(region.macs - region.dead for region in work.regions):
        raise ValueError(
            f"machine code must hold the multiply-adds of the tiles, {in_tiles} in all regions, got {in_code}"
        )
    return Issued(tiles * in_code / in_tiles + work.scalar, "machine code as a whole")


def _match(work: Work, regions: Sequence[MmaRegion], num_warps: int, depth: int) -> float | None:
    """What the regions of this depth issue in the whole problem; None where they do not match."""
    expected = sorted((region for region in work.regions if region.depth == depth), key=lambda r: r.macs)
    found = sorted(region.macs * num_warps for region in regions if region.depth == depth)
    if len(found) != len(expected):
        return None
    pairs = list(zip(found, expected, strict=True))
    if any(macs < region.macs - region.dead for macs, region in pairs):
        return None
    return sum(macs * region.trips for macs, region in pairs)

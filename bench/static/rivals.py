"""The same figures for other libraries' attention, from the tile sizes in their sources.

Their registers and shared memory are not read: nothing is compiled. bf16, not causal, no dropout, dense.
"""

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

from bench.static.work import Problem, useful_macs


class Rival(NamedTuple):
    """issued: multiply-adds of the whole problem, for (problem, arch); None where it has no kernel."""

    name: str
    backend: str
    direction: str
    issued: Callable[[Problem, int], float | None]
    source: str


def _up(x: int, block: int) -> int:
    return ceil(x / block) * block


def _tiles(problem: Problem, block_m: int, block_n: int, width: int, gemms: int) -> int:
    return gemms * _up(problem.seqlen, block_m) * _up(problem.seqlen, block_n) * width


def _width(problem: Problem, *templates: int) -> int:
    return next(width for width in templates if problem.head_dim <= width)


def _fa2_forward(problem: Problem, arch: int) -> float:
    width = _width(problem, 64, 128)
    return _tiles(problem, 128, {64: 128, 128: 64}[width], width, 2)


def _fa2_backward(problem: Problem, arch: int) -> float:
    width = _width(problem, 64, 128)
    return _tiles(problem, {64: 128, 128: 64}[width], 128, width, 5)


def _fa3_forward(problem: Problem, arch: int) -> float:
    width = _width(problem, 64, 128)
    tiles = {(80, 64): (128, 112), (80, 128): (128, 64), (90, 64): (192, 192), (90, 128): (128, 176)}
    return _tiles(problem, *tiles[arch, width], width, 2)


def _fa3_backward(problem: Problem, arch: int) -> float:
    width = _width(problem, 64, 128)
    tiles = {(80, 64): (128, 128), (80, 128): (64, 128), (90, 64): (128, 128), (90, 128): (80, 128)}
    return _tiles(problem, *tiles[arch, width], width, 5)


def _fa4_forward(problem: Problem, arch: int) -> float | None:
    if arch != 90:
        return None
    return _tiles(problem, 128, 192 if problem.head_dim == 128 else 128, _up(problem.head_dim, 16), 2)


def _fa4_backward(problem: Problem, arch: int) -> float | None:
    if arch != 90:
        return None
    return _tiles(problem, 80, 128, _up(problem.head_dim, 16), 5)


def _xformers_forward(problem: Problem, arch: int) -> float:
    # CUTLASS steps a contraction by 32, so the last tile's P V runs over the keys there are; Q K^T does not.
    block_n = width = _width(problem, 64, 128)
    rows = _up(problem.seqlen, 64)
    return rows * (_up(problem.seqlen, block_n) * _up(problem.head_dim, 32) + _up(problem.seqlen, 32) * width)


def _xformers_backward(problem: Problem, arch: int) -> float:
    # Contractions over channels for the scores and dP, over queries for dV and dK, over keys for dQ.
    block = width = _width(problem, 64, 128)
    padded, stepped = _up(problem.seqlen, block), _up(problem.seqlen, 32)
    return 2 * padded * padded * _up(problem.head_dim, 32) + 3 * padded * stepped * width


def _flex_forward(problem: Problem, arch: int) -> float:
    # Inductor has tiles for head_dim 64 and 128 of each GPU, one for the others, and pads to a power of 2.
    tiles = {(80, 64): (128, 64), (80, 128): (128, 64), (90, 64): (128, 128), (90, 128): (128, 64)}
    block_m, block_n = tiles.get((arch, problem.head_dim), (64, 64))
    return _tiles(problem, block_m, block_n, 1 << (problem.head_dim - 1).bit_length(), 2)


def _flex_backward(problem: Problem, arch: int) -> float:
    # Two loops: four products for dK and dV, three for dQ.
    block_m, block_n = (64, 64) if arch == 80 else (64, 128)
    width = 1 << (problem.head_dim - 1).bit_length()
    return _tiles(problem, block_m, block_n, width, 4) + _tiles(problem, block_n, block_m, width, 3)


FLASH = "flash-attention:"
RIVALS = (
    Rival("FlashAttention-2", "cuda", "fwd", _fa2_forward, f"{FLASH}csrc/.../flash_fwd_launch_template.h"),
    Rival("FlashAttention-2", "cuda", "bwd", _fa2_backward, f"{FLASH}csrc/.../flash_bwd_launch_template.h"),
    Rival("FlashAttention-3", "cuda", "fwd", _fa3_forward, f"{FLASH}hopper/tile_size.h"),
    Rival("FlashAttention-3", "cuda", "bwd", _fa3_backward, f"{FLASH}hopper/flash_bwd_launch_template.h"),
    Rival("FlashAttention-4", "cuda", "fwd", _fa4_forward, f"{FLASH}flash_attn/cute/interface.py"),
    Rival("FlashAttention-4", "cuda", "bwd", _fa4_backward, f"{FLASH}flash_attn/cute/interface.py"),
    Rival("xformers", "cuda", "fwd", _xformers_forward, "pytorch:mem_eff_attention/generate_kernels.py"),
    Rival("xformers", "cuda", "bwd", _xformers_backward, "pytorch:mem_eff_attention/generate_kernels.py"),
    Rival("FlexAttention", "triton", "fwd", _flex_forward, "torch 2.13:template_heuristics/triton.py"),
    Rival("FlexAttention", "triton", "bwd", _flex_backward, "torch 2.13:template_heuristics/triton.py"),
)
PROBLEMS = (Problem(1025, 1, 112), Problem(257, 1, 112), Problem(1024, 0, 64))


def rows() -> list[dict]:
    """The ledger's rows of the rivals; what nobody compiled is the string "not read"."""
    found = []
    for rival in RIVALS:
        for arch in (80, 90):
            for problem in PROBLEMS:
                issued = rival.issued(problem, arch)
                if issued is not None:
                    found.append(
                        {
                            "rival": rival.name,
                            "kernel": rival.name,
                            "backend": rival.backend,
                            "pass": rival.direction,
                            "arch": f"sm_{arch}",
                            "default": False,
                            "head_dim": problem.head_dim,
                            "seqlen": problem.seqlen,
                            "useful_over_issued": round(useful_macs(rival.direction, problem) / issued, 4),
                            "source": rival.source,
                        }
                        | dict.fromkeys(NOT_READ, "not read")
                    )
    return found


NOT_READ = ("registers", "spills", "spills_in_loop", "shared_memory", "triton", "ptxas")

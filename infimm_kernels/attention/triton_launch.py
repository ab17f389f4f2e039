"""The launches of an attention forward and of a backward, and what of them is compiled ahead of time.

No launch waits for the GPU or needs a length of a segment: `Grid` counts tokens and segments alone.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infimm_kernels.attention.triton_backward import attention_backward_dq_kernel, attention_backward_kernel
from infimm_kernels.attention.triton_backward_sums import (
    attention_backward_finish_kernel,
    attention_backward_prepare_kernel,
)
from infimm_kernels.attention.triton_config import (
    BackwardConfig,
    ForwardConfig,
    backward_config,
    float32_scale,
    forward_config,
    fused_scale,
    peeled_tokens,
    whole_tiles,
)
from infimm_kernels.attention.triton_forward import attention_forward_kernel
from infimm_kernels.backends import AotConfig
from infimm_kernels.backends import capability_of as _capability
from infimm_kernels.checks import unit_last_stride

MAX_TILE_ROWS = 128
ROWS = 64  # of a tile in the prepare and finish kernels


class Grid(NamedTuple):
    """The tiles of the queries, or of the keys, of all segments, with the cu_seqlens of that side first.

    Without cu_seqlens every segment has `seqlen` tokens and `num_tiles` tiles.
    """

    cu_seqlens: Tensor | None
    other_cu_seqlens: Tensor | None
    seqlen: int
    num_segments: int
    num_tiles: int
    num_slots: int


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlen: int,
    softmax_scale: float,
    num_prefix_tokens: int,
    key_ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [total_q, num_heads, head_dim], k v [total_k, num_kv_heads, head_dim] -> out, lse [heads, total_q].

    Without cu_seqlens all segments have `seqlen` tokens; with them seqlen is 0. key_ranges: contiguous int32
    [num_segments, 2], the keys that each segment sees where those are not cu_seqlens_k's; without prefix.
    """
    total_q, num_heads, head_dim = q.shape
    num_prefix_tokens = peeled_tokens(num_prefix_tokens, head_dim, q.dtype)
    softmax_scale = float32_scale(softmax_scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, total_q), dtype=torch.float32, device=q.device)
    tile = forward_config(head_dim, q.dtype, _capability(q))
    slots = _grid(cu_seqlens_q, cu_seqlens_k, total_q, seqlen, num_prefix_tokens, tile.block_m)
    if total_q == 0 or slots.num_segments == 0:
        return out, lse
    q, k, v = _near(q), _near(k), _near(v)
    with torch.cuda.device_of(q):
        attention_forward_kernel[slots.num_slots, num_heads](
            q,
            k,
            v,
            out,
            lse,
            slots.cu_seqlens,
            slots.other_cu_seqlens,
            key_ranges,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            out.stride(0),
            total_q,
            k.shape[0],
            slots.num_segments,
            seqlen,
            slots.num_tiles,
            softmax_scale,
            **_forward_options(
                tile,
                num_heads // k.shape[1],
                num_prefix_tokens,
                head_dim,
                seqlen,
                fused_scale(q.dtype, softmax_scale),
            ),
        )
    return out, lse


@functools.lru_cache(maxsize=256)  # half of the time of a launch would go into making it
def _forward_options(
    tile: ForwardConfig, group: int, num_prefix_tokens: int, head_dim: int, seqlen: int, fused: bool
) -> dict[str, object]:
    return {
        "HEADS_PER_KV_HEAD": group,
        "NUM_PREFIX": num_prefix_tokens,
        "HEAD_DIM": head_dim,
        "PIECES": tile.pieces,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "PREFIX_BLOCK_N": tile.prefix_block_n,
        "EVEN_Q": whole_tiles(seqlen, num_prefix_tokens, tile.block_m),
        "EVEN_K": tile.drop_tail and whole_tiles(seqlen, num_prefix_tokens, tile.block_n),
        "ONE_LOOP": tile.one_loop,
        "FUSED_SCALE": fused,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlen: int,
    softmax_scale: float,
    num_prefix_tokens: int,
    deterministic: bool,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    key_ranges: Tensor | None = None,
    query_ranges: Tensor | None = None,
    main: Callable[..., None] | None = None,
) -> None:
    """Write the gradients into dq, dk and dv: the shapes of q, k and v, any strides with a unit last one.

    out, lse: the results of the forward, float16 or bfloat16 and float32; dlse: float32 [num_heads, total_q]
    or None. cu_seqlens, seqlen and key_ranges as in `forward`; query_ranges: the queries that see the keys of
    each segment. main: `cuda_backward.launch_main`, in the place of the main kernel, not with ranges or
    deterministic.
    """
    total_q, num_heads, head_dim = q.shape
    total_k, num_kv_heads = k.shape[:2]
    num_prefix_tokens = peeled_tokens(num_prefix_tokens, head_dim, q.dtype)
    softmax_scale = float32_scale(softmax_scale)
    rows = _grid(cu_seqlens_q, cu_seqlens_k, total_q, seqlen, 0, ROWS)
    if total_q == 0 or total_k == 0 or rows.num_segments == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    q, k, v, out = _near(q), _near(k), _near(v), _near(out)
    dout = torch.zeros_like(out) if dout is None else _near(unit_last_stride(dout))
    dlse = None if dlse is None else dlse.contiguous()
    configs = backward_config(head_dim, _capability(q))

    def workspace(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    delta = workspace(num_heads, total_q)
    dq_sum = prefix_sum = None
    if num_prefix_tokens or not deterministic:
        dq_sum = workspace(total_q, num_heads, head_dim)
    if num_prefix_tokens:
        prefix_sum = workspace(rows.num_slots, num_heads, num_prefix_tokens, 2, head_dim)

    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
    problem = {
        "HEADS_PER_KV_HEAD": num_heads // num_kv_heads,
        "NUM_PREFIX": num_prefix_tokens,
        "HEAD_DIM": head_dim,
    }
    scale_in = {"FUSED_SCALE": fused_scale(q.dtype, softmax_scale)}

    def sizes(grid: Grid) -> tuple[int | float, ...]:
        return total_q, total_k, grid.num_segments, seqlen, grid.num_tiles, softmax_scale

    def tiles(config: BackwardConfig) -> dict[str, object]:
        block = {"PIECES": config.pieces, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        return block | {"num_warps": config.num_warps, "num_stages": config.num_stages}

    with torch.cuda.device_of(q):
        attention_backward_prepare_kernel[rows.num_slots, num_heads](
            *(q, k, v, out, dout, lse, dlse, delta, dq_sum, prefix_sum),
            *(rows.cu_seqlens, rows.other_cu_seqlens),
            *strides,
            *out.stride()[:2],
            *sizes(rows),
            **problem,
            **scale_in,
            PIECES=configs.fused.pieces,
            BLOCK_M=ROWS,
            num_warps=8,
        )
        if main is not None:
            tensors = (q, k, v, dout, lse, delta, dq_sum, dk, dv, rows.cu_seqlens, rows.other_cu_seqlens)
            main(*tensors, seqlen, softmax_scale, num_prefix_tokens)
        else:
            config = configs.dkdv if deterministic else configs.fused
            slots = _grid(cu_seqlens_k, cu_seqlens_q, total_k, seqlen, num_prefix_tokens, config.block_n)
            attention_backward_kernel[slots.num_slots, num_kv_heads](
                *(q, k, v, dout, lse, delta, None if deterministic else dq_sum, dk, dv),
                *(slots.other_cu_seqlens, slots.cu_seqlens, query_ranges),
                *strides[1::2],
                *dk.stride()[:2],
                *dv.stride()[:2],
                *sizes(slots),
                NUM_HEADS=num_heads,
                STRIDE_Q=q.stride(0),
                STRIDE_K=k.stride(0),
                STRIDE_V=v.stride(0),
                STRIDE_DOUT=dout.stride(0),
                EVEN_Q=whole_tiles(seqlen, num_prefix_tokens, config.block_m),
                EVEN_K=whole_tiles(seqlen, num_prefix_tokens, config.block_n),
                WITH_DQ=not deterministic,
                **problem,
                **scale_in,
                **tiles(config),
            )
        if deterministic:
            config = configs.dq
            slots = _grid(cu_seqlens_q, cu_seqlens_k, total_q, seqlen, 0, config.block_m)
            attention_backward_dq_kernel[slots.num_slots, num_heads](
                *(q, k, v, dout, lse, delta, dq_sum, dq),
                *(slots.cu_seqlens, slots.other_cu_seqlens, key_ranges),
                *strides,
                *dq.stride()[:2],
                *sizes(slots),
                EVEN_K=whole_tiles(seqlen, num_prefix_tokens, config.block_n),
                **problem,
                **scale_in,
                **tiles(config),
            )
        if dq_sum is not None:
            attention_backward_finish_kernel[rows.num_slots, num_heads](
                *(dq_sum, prefix_sum, dq, dk, dv, rows.cu_seqlens, rows.other_cu_seqlens),
                *dq.stride()[:2],
                *dk.stride()[:2],
                *dv.stride()[:2],
                *sizes(rows),
                **problem,
                PIECES=configs.fused.pieces,
                BLOCK_M=ROWS,
                WITH_DQ=not deterministic,
                num_warps=4,
            )


def _grid(
    cu_seqlens: Tensor | None,
    other_cu_seqlens: Tensor | None,
    total: int,
    seqlen: int,
    num_prefix_tokens: int,
    block: int,
) -> Grid:
    """Tiles of `block` of the `total` tokens of one side, behind num_prefix_tokens of each segment."""
    if cu_seqlens is None:
        num_segments = total // seqlen if seqlen else 0
        num_tiles = max(1, -(-(seqlen - num_prefix_tokens) // block))
        return Grid(None, None, seqlen, num_segments, num_tiles, num_segments * num_tiles)
    num_segments = cu_seqlens.shape[0] - 1
    num_slots = total // block + num_segments
    return Grid(cu_seqlens.contiguous(), other_cu_seqlens.contiguous(), 0, num_segments, 0, num_slots)


def _near(x: Tensor) -> Tensor:
    """`x`, copied where rows of one tile lie 2^31 elements apart: offsets within a tile are 32-bit."""
    return x if abs(x.stride(0)) * MAX_TILE_ROWS < 2**31 else x.contiguous()


# --- ahead of time ------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A kind of call whose kernels are compiled ahead of time; `even`: equal windows of whole tiles."""

    head_dim: int
    num_prefix_tokens: int
    even: bool
    dtype: str = "bf16"
    heads_per_kv_head: int = 1
    negative_scale: bool = False
    overlapping: bool = False

    def __str__(self) -> str:
        parts = [f"head_dim={self.head_dim}", f"prefix={self.num_prefix_tokens}", self.dtype]
        parts.append("even" if self.even else "ragged")
        if self.heads_per_kv_head > 1:
            parts.append(f"group={self.heads_per_kv_head}")
        return " ".join(parts + ["negative_scale"] * self.negative_scale + ["overlapping"] * self.overlapping)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The windows of ViT-E (448 and 224 pixels), of ViTs with 64 channels a head, and the text of an LLM.
DEFAULT_CASES = (Case(112, 1, True), Case(64, 0, True))
CASES = (
    *DEFAULT_CASES,
    *(Case(head_dim, 1, False) for head_dim in (64, 72, 80, 88, 96, 104, 112, 128)),
    *(Case(head_dim, 0, False) for head_dim in (16, 64, 112, 256)),
    *(Case(112, 5, even) for even in (True, False)),
    Case(64, 0, False, heads_per_kv_head=4),
    Case(112, 1, False, "fp16"),
    Case(112, 1, False, negative_scale=True),
    Case(64, 0, False, overlapping=True),
    *(Case(head_dim, 0, False, "fp32") for head_dim in (16, 64, 112, 256)),
)


def aot_configs() -> Iterator[AotConfig]:
    """The kernels of every kind of call, forward, backward and deterministic backward, per architecture.

    sm_100 is compiled for the default ones alone: nothing of it was tuned.
    """
    for capability in ((8, 0), (9, 0), (10, 0)):
        for case in CASES if capability < (10, 0) else DEFAULT_CASES:
            yield from _forward_configs(case, capability)
            if case.dtype != "fp32":
                yield from _backward_configs(case, capability, deterministic=False)
                if case.head_dim in (64, 112):
                    yield from _backward_configs(case, capability, deterministic=True)


def _forward_configs(case: Case, capability: tuple[int, int]) -> Iterator[AotConfig]:
    tile = forward_config(case.head_dim, DTYPES[case.dtype], capability)
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "PREFIX_BLOCK_N": tile.prefix_block_n}
    blocks |= {"EVEN_K": case.even and tile.drop_tail, "ONE_LOOP": tile.one_loop}
    yield _aot_config(attention_forward_kernel, "fwd", case, capability, tile, blocks)


def _backward_configs(case: Case, capability: tuple[int, int], deterministic: bool) -> Iterator[AotConfig]:
    configs = backward_config(case.head_dim, capability)
    rows = BackwardConfig(configs.fused.pieces, ROWS, 0, 8, 3)
    main = configs.dkdv if deterministic else configs.fused
    with_dq = {"WITH_DQ": not deterministic}
    absent = ["dlse_ptr"] + ["prefix_sum_ptr"] * (not case.num_prefix_tokens)
    if deterministic:
        without_sum = [] if case.num_prefix_tokens else ["dq_sum_ptr"]
        kernels = [
            (attention_backward_kernel, main, with_dq, ["dq_sum_ptr"]),
            (attention_backward_dq_kernel, configs.dq, {}, without_sum),
        ]
        if without_sum:
            kernels.append((attention_backward_prepare_kernel, rows, {}, absent + without_sum))
        else:
            kernels.append((attention_backward_finish_kernel, rows._replace(num_warps=4), with_dq, []))
    else:
        kernels = [
            (attention_backward_prepare_kernel, rows, {}, absent),
            (attention_backward_kernel, main, with_dq, []),
            (attention_backward_finish_kernel, rows._replace(num_warps=4), with_dq, absent),
        ]
    for kernel, config, options, none in kernels:
        if case.overlapping and not any(name.endswith("_ranges_ptr") for name in kernel.arg_names):
            continue  # the same as without
        blocks = options | {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        direction = "bwd deterministic" if deterministic else "bwd"
        yield _aot_config(kernel, direction, case, capability, config, blocks, none)


def _aot_config(
    kernel: Any,
    direction: str,
    case: Case,
    capability: tuple[int, int],
    config: ForwardConfig | BackwardConfig,
    options: dict[str, object],
    absent: list[str] = (),
) -> AotConfig:
    """`kernel` as a call of this kind launches it; `absent` arguments are None."""
    heads = 16
    constexprs = {
        "HEADS_PER_KV_HEAD": case.heads_per_kv_head,
        "NUM_HEADS": heads,
        "NUM_PREFIX": case.num_prefix_tokens,
        "HEAD_DIM": case.head_dim,
        "PIECES": config.pieces,
        "EVEN_Q": case.even,
        "EVEN_K": case.even,
        "FUSED_SCALE": fused_scale(DTYPES[case.dtype], -1.0 if case.negative_scale else 1.0),
        "STRIDE_DOUT": heads * case.head_dim,
    }
    constexprs |= options
    constexprs |= {f"STRIDE_{name}": 3 * heads * case.head_dim for name in "QKV"}
    absent = [*absent, *(["cu_seqlens_q_ptr", "cu_seqlens_k_ptr"] if case.even else [])]
    absent += [] if case.overlapping else ["key_ranges_ptr", "query_ranges_ptr"]
    constexprs |= dict.fromkeys(absent)
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            continue
        if name.startswith("cu_seqlens") or name.endswith("_ranges_ptr"):
            signature[name] = "*i32"
        elif name in ("lse_ptr", "dlse_ptr", "delta_ptr", "dq_sum_ptr", "prefix_sum_ptr"):
            signature[name] = "*fp32"
        elif name.endswith("_ptr"):
            signature[name] = f"*{case.dtype}"
        else:
            signature[name] = "fp32" if name == "softmax_scale" else "i32"
    label = kernel.__name__.removeprefix("attention_").removesuffix("_kernel")
    return AotConfig(
        kernel,
        f"{direction} {label} {case}",
        signature,
        constexprs,
        config.num_warps,
        config.num_stages,
        capability,
        direction[:3],
        case in DEFAULT_CASES and "deterministic" not in direction,
        case.head_dim,
        case.dtype,
    )

"""Which backend serves a call, and why another does not.

A backend is a name: "reference" (eager PyTorch, any device), "triton", "cuda". Each op lists those it has in
order of preference with a predicate that returns None for "can run" and a sentence otherwise. A CPU tensor
goes to the reference. A CUDA tensor goes to the first default backend that can run; the reference is never
chosen there unless it is named, so nothing becomes slow in silence. ``backend=`` and the environment variable
``INFIMM_BACKEND`` (for debugging; the argument wins) name one.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMES = ("reference", "triton", "cuda")
ENVIRONMENT_VARIABLE = "INFIMM_BACKEND"
ATTENTION_BACKWARD = "float32: the reference's formula on the same device"


class Candidate(NamedTuple):
    """One backend of one op. `why_not` takes the op's tensors; `default` False means "only when named"."""

    name: str
    why_not: Callable[..., str | None]
    default: bool = True


class Availability(NamedTuple):
    """One line of `availability`: `reason` is None where the backend runs, else why it cannot."""

    op: str
    backend: str
    direction: str
    reason: str | None
    note: str


class AotConfig(NamedTuple):
    """One shipped configuration of a Triton kernel, as ahead-of-time compilation needs it.

    signature: Triton's type of every argument that is not a constexpr; capability: the GPU's, e.g. (9, 0);
    direction: "fwd" or "bwd"; default: whether it serves a call that asks for nothing special, in attention
    one with equal windows; head_dim: 0 where there are no heads; dtype: "bf16", "fp16" or "fp32".
    """

    kernel: Any
    name: str
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    capability: tuple[int, int]
    direction: str = "fwd"
    default: bool = True
    head_dim: int = 0
    dtype: str = "bf16"


def check(backend: object) -> None:
    """Raise ValueError unless `backend` is None or a known name."""
    if backend is not None and backend not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(NAMES)}, got {backend!r}")


def select(op_name: str, candidates: Sequence[Candidate], backend: str | None, *tensors: Tensor) -> str:
    """The name of the backend for this call; see the module's text for the rule.

    Raises ValueError for a named backend that cannot run, NotImplementedError when a CUDA call fits no
    default one.
    """
    source = "backend"
    if backend is None:
        backend = os.environ.get(ENVIRONMENT_VARIABLE) or None
        source = ENVIRONMENT_VARIABLE
    if backend == "reference":
        return backend
    if backend is not None:
        if backend not in NAMES:
            raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {backend!r}")
        reason = next(
            (c.why_not(*tensors) for c in candidates if c.name == backend), f"{op_name} has no such backend"
        )
        if reason is not None:
            raise ValueError(
                f"{source} must name a backend that can run {op_name}, got {backend!r}: {reason}"
            )
        return backend
    if tensors[0].device.type == "cpu":
        return "reference"
    reasons = []
    for candidate in candidates:
        reason = candidate.why_not(*tensors) if candidate.default else "runs only when it is named"
        if reason is None:
            return candidate.name
        reasons.append(f"{candidate.name}: {reason}")
    raise NotImplementedError(
        f"no backend can run {op_name} on {tensors[0].device} ({'; '.join(reasons)}); "
        "backend='reference' runs it in eager PyTorch"
    )


@functools.lru_cache(maxsize=1)
def why_not_triton_here() -> str | None:
    """Whether the triton package can be imported; it is looked for, not imported."""
    return None if importlib.util.find_spec("triton") is not None else "the triton package is not installed"


@functools.lru_cache(maxsize=32)  # asked by every call, and PyTorch takes microseconds for it
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device, e.g. (9, 0)."""
    return torch.cuda.get_device_capability(device)


def capability_of(x: Tensor) -> tuple[int, int]:
    """The compute capability to choose a tile by: that of the tensor's GPU, in the interpreter an A100's."""
    return capability(x.device) if x.is_cuda else (8, 0)


def why_not_triton(*tensors: Tensor) -> str | None:
    """The conditions common to every Triton kernel here: the package, the device, the dtype."""
    reason = why_not_triton_here()
    if reason is not None:
        return reason
    x = tensors[0]
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "CPU tensors need Triton's interpreter (TRITON_INTERPRET=1 set before the first import of triton)"
        )
    if x.is_cuda and torch.version.hip is None and capability(x.device) < (8, 0):
        return f"needs compute capability 8.0 or newer, {x.device} has {capability(x.device)}"
    for y in tensors:
        if y.dtype == torch.float64:
            return "float64 is not supported"
    return None


def availability() -> list[Availability]:
    """Every op, backend and direction, with the reason a bf16 call cannot run on this machine's GPU."""
    from infimm_kernels.attention.choice import VARLEN_CANDIDATES, WINDOW_CANDIDATES
    from infimm_kernels.gated_cross_attention.decode import CANDIDATES as DECODE_CANDIDATES
    from infimm_kernels.gated_residual.op import CANDIDATES as GATED_CANDIDATES
    from infimm_kernels.position_2d.op import CANDIDATES as POSITION_CANDIDATES
    from infimm_kernels.post_norm.op import CANDIDATES as POST_NORM_CANDIDATES
    from infimm_kernels.vision_keys_values.op import CANDIDATES as KEYS_VALUES_CANDIDATES

    has_gpu = torch.cuda.is_available()
    device = "cuda" if has_gpu else "cpu"

    def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [torch.empty(s, dtype=torch.bfloat16, device=device) for s in shapes]

    place = torch.empty((1, 2), dtype=torch.int32, device=device)
    decode = tensors((1, 1, 64), (1, 1, 1, 64), (8, 1, 64), (8, 1, 64), (64, 64), (64,))
    ops = (  # name, candidates, the tensors that their predicates take, a note on the backward
        ("varlen_attention", VARLEN_CANDIDATES, tensors(*((8, 1, 64),) * 3), ATTENTION_BACKWARD),
        ("window_attention", WINDOW_CANDIDATES, tensors((1, 8, 3, 1, 64)), ATTENTION_BACKWARD),
        ("add_position_2d", POSITION_CANDIDATES, [*tensors((1, 8, 64)), place], "backward is the identity"),
        ("residual_post_norm", POST_NORM_CANDIDATES, tensors((8, 64), (8, 64), (64,), (64,)), ""),
        ("vision_keys_values", KEYS_VALUES_CANDIDATES, tensors((1, 8, 64), (1, 2, 64, 64)), ""),
        ("gated_residual_projection", GATED_CANDIDATES, tensors((8, 64), (8, 64), (64, 64), (64,)), ""),
        ("gated_cross_attention_decode", DECODE_CANDIDATES, [*decode, place], None),
    )
    rows = []
    for op_name, candidates, arguments, backward_note in ops:
        directions = ("forward",) if backward_note is None else ("forward", "backward")
        notes = {"forward": "", "backward": backward_note}
        for direction in directions:
            rows.append(Availability(op_name, "reference", direction, None, "any device, eager PyTorch"))
        for candidate in candidates:
            if candidate.name == "triton" and not has_gpu:
                reason = why_not_triton_here() or "no CUDA device is visible"
            else:
                reason = candidate.why_not(*arguments)
            for direction in directions:
                note = notes[direction]
                if direction == "forward" and not candidate.default:
                    note = "runs only when it is named"
                elif candidate.name == "cuda" and note == ATTENTION_BACKWARD:
                    note = "head_dim 128 and deterministic: Triton's"
                rows.append(Availability(op_name, candidate.name, direction, reason, note))
    rows += _composed("gated_cross_attention", ("varlen_attention", "gated_residual_projection"), rows)
    rows += _composed("gated_feed_forward", ("gated_residual_projection",), rows)
    return rows


def _composed(op_name: str, parts: tuple[str, ...], rows: list[Availability]) -> list[Availability]:
    """Rows of an op that is made of others: it runs where all of them do, for the first one's reason else.

    A part without a backend of this name runs on the one it chooses itself.
    """
    first, *others = ({(r.backend, r.direction): r for r in rows if r.op == part} for part in parts)
    composed = []
    for key, row in first.items():
        parts_here = (row, *(other[key] for other in others if key in other))
        reasons = [r.reason for r in parts_here if r.reason is not None]
        note = f"made of {' and '.join(parts)}" + (
            f"; {row.note}" if row.backend == "cuda" and row.note else ""
        )
        composed.append(Availability(op_name, *key, reasons[0] if reasons else None, note))
    return composed

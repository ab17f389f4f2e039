"""The CUDA C++ backend of attention (csrc/window_attention.cuh): when it can run, launch, self-test."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from infimm_kernels import backends, checks, extension

UNVERIFIED = "its device code is tested in emulation on a CPU; it has never run on a GPU"
HEAD_DIMS = (64, 112, 128)  # these as in csrc/window_attention.h and .cu
DTYPES = (torch.bfloat16, torch.float16)
MAX_TOKENS = 2**30
MAX_HEADS = 4096
# Lengths around one tile of 128; what differs may do so by this many roundings of the largest number.
SELF_TEST_LENGTHS = (130, 1, 257, 0, 64)
SELF_TEST_ROUNDINGS = 4.0

Forward = Callable[..., tuple[Tensor, Tensor]]


def why_not_cuda(*tensors: Tensor) -> str | None:
    """None when the kernel can run on these q, k, v (or this qkv), else a sentence that says why not."""
    module = extension.load()
    if module is None:
        return extension.why_not()
    x = tensors[0]
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"needs tensors on an NVIDIA GPU, got {x.device}"
    if x.dtype not in DTYPES:
        return f"supports {' and '.join(map(name_of, DTYPES))}, got {name_of(x.dtype)}"
    if x.shape[-1] not in HEAD_DIMS:
        return f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {x.shape[-1]}"
    if x.shape[-2] > MAX_HEADS or any(y.shape[0] > MAX_TOKENS for y in tensors):
        return f"serves up to {MAX_HEADS} heads and {MAX_TOKENS} tokens, got {list(x.shape)}"
    if not hasattr(module, "window_attention"):
        return f"the CUDA extension is built for {';'.join(module.build_info()['archs'])}, without 90a"
    reason = extension.why_not_capability(backends.capability(x.device), ["90a"])
    return reason or backends.why_not_triton(*tensors)  # its backward, and what the self-test compares with


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlen: int,
    softmax_scale: float,
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor]:
    """`triton_launch.forward`, by the kernel once it has passed `self_test` on this device, else by Triton.

    Raises ValueError where the kernel takes no such softmax_scale.
    """
    from infimm_kernels.attention import triton_launch

    arguments = (q, k, v, cu_seqlens_q, cu_seqlens_k, seqlen, softmax_scale, num_prefix_tokens)
    largest = torch.finfo(torch.float32).max / 2
    if not torch.finfo(torch.float32).tiny <= softmax_scale <= largest:
        checks.fail("softmax_scale", "be a positive float32 for backend 'cuda'", softmax_scale)
    key = q.device, q.dtype, q.shape[-1]
    if not is_trusted("forward", key, lambda: self_test(*key, triton_launch.forward)):
        return triton_launch.forward(*arguments)
    return launch(*arguments)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlen: int,
    softmax_scale: float,
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Attention inside segments by one launch on the current stream of q's device; nothing is waited for.

    Args:
        q: [total_q, num_heads, head_dim]; k, v: [total_k, num_kv_heads, head_dim]; float16 or bfloat16,
            copied first where an address or a stride is not a multiple of 16 bytes.
        cu_seqlens_q, cu_seqlens_k: int32 [num_segments + 1], or None for segments of `seqlen` tokens.
        seqlen: 0 with cu_seqlens.
        softmax_scale: positive.
        num_prefix_tokens: 0 to 8 leading tokens of each segment that stay outside the tiles.

    Returns:
        out, contiguous and shaped like q, and lse, float32 [num_heads, total_q].

    Raises:
        ValueError: an argument the kernel cannot take.
        RuntimeError: a CUDA error, with its text and the shapes.
    """
    q, k, v = for_copies(q), for_copies(k), for_copies(v)
    total_q, num_heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, total_q), dtype=torch.float32, device=q.device)
    if cu_seqlens_q is None:
        num_segments = total_q // seqlen if seqlen else 0
    else:
        num_segments = len(cu_seqlens_q) - 1
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    module = extension.load()
    module.window_attention(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        cu_seqlens_q=0 if cu_seqlens_q is None else cu_seqlens_q.data_ptr(),
        cu_seqlens_k=0 if cu_seqlens_k is None else cu_seqlens_k.data_ptr(),
        dtype=module.DTYPES[name_of(q.dtype)],
        total_q=total_q,
        total_k=k.shape[0],
        num_segments=num_segments,
        seqlen=seqlen,
        num_heads=num_heads,
        num_kv_heads=k.shape[1],
        head_dim=head_dim,
        num_prefix_tokens=num_prefix_tokens,
        q_stride_token=q.stride(0),
        q_stride_head=q.stride(1),
        k_stride_token=k.stride(0),
        k_stride_head=k.stride(1),
        v_stride_token=v.stride(0),
        v_stride_head=v.stride(1),
        softmax_scale=softmax_scale,
        device=q.device.index,
        # Asked for at every launch: a stream kept from before would leave a CUDA graph empty.
        stream=torch.cuda.current_stream(q.device).cuda_stream,
    )
    return out, lse


def for_copies(x: Tensor) -> Tensor:
    """`x`, copied where the copy engine cannot read it: it moves 16 bytes, and repeats no row."""
    element = x.element_size()
    fits = x.data_ptr() % 16 == 0 and x.stride(-1) == 1
    for size, stride in zip(x.shape[:2], x.stride()[:2], strict=True):
        fits = fits and stride * element % 16 == 0 and (stride > 0 or size <= 1)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


# --- self-test ----------------------------------------------------------------------------------------------

Key = tuple[torch.device, torch.dtype, int]  # the last is head_dim
_verdicts: dict[tuple[str, Key], str | None] = {}


def is_trusted(direction: str, key: Key, test: Callable[[], str | None]) -> bool:
    """Whether the kernel for this dtype and head_dim has passed `test` on this device.

    Tried once per process; a difference is a warning, and Triton serves from then on. While a CUDA graph is
    captured nothing can be tried: an untried kernel then leaves the call to Triton.
    """
    device, dtype, head_dim = key
    if (direction, key) not in _verdicts:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            warnings.warn(
                f"infimm_kernels: the {direction} of attention on backend 'cuda' was not called before this "
                "capture, so the CUDA graph uses Triton; call it once before",
                stacklevel=2,
            )
            return False
        try:
            verdict = test()
        except RuntimeError as error:
            verdict = str(error)
        _verdicts[direction, key] = verdict
        if verdict is not None:
            warnings.warn(
                f"infimm_kernels: the {direction} of attention on backend 'cuda' is disabled for "
                f"{name_of(dtype)}, head_dim {head_dim} on {device}, Triton serves instead: {verdict}",
                stacklevel=2,
            )
    return _verdicts[direction, key] is None


class Problem(NamedTuple):
    """One problem of a self-test: what it is, and arguments of `forward`."""

    name: str
    arguments: tuple


def test_problems(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[Problem]:
    """Small ones: ragged windows with a prefix token, equal windows, text over windows in groups of heads."""
    generator = torch.Generator().manual_seed(0)  # on the CPU: the device's own state stays as it is

    def tokens(total: int, heads: int) -> Tensor:
        return torch.randn(total, heads, head_dim, generator=generator).to(device, dtype)

    def cumulative(lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)

    total = sum(SELF_TEST_LENGTHS)
    windows, text = cumulative(SELF_TEST_LENGTHS), cumulative(SELF_TEST_LENGTHS[::-1])
    q, k, v = tokens(total, 2), tokens(total, 2), tokens(total, 2)
    scale = head_dim**-0.5
    text_problem = (q, k[:, :1], v[:, :1], text, windows, 0, scale, 0)
    return [
        Problem("ragged windows with a prefix token", (q, k, v, windows, windows, 0, scale, 1)),
        Problem("equal windows", (q, k, v, None, None, total // 2, scale, 0)),
        Problem("text over windows, one key head", text_problem),
    ]


def difference(name: str, result: Tensor, expected: Tensor) -> str | None:
    """None where two kernels agree but for a few roundings of the largest number, else a sentence."""
    rounding = torch.finfo(result.dtype).eps / 2
    result, expected = result.float(), expected.float()
    finite = expected.isfinite()
    if not torch.equal(result.isfinite(), finite):
        return f"{name} is finite in other places than Triton's"
    limit = SELF_TEST_ROUNDINGS * rounding * expected[finite].abs().max().item()
    found = (result - expected)[finite].abs().max().item()
    return f"{name} differs from Triton's by {found:.3g}, {limit:.3g} is allowed" if found > limit else None


@torch.no_grad()
def self_test(device: torch.device, dtype: torch.dtype, head_dim: int, compare_with: Forward) -> str | None:
    """None when `launch` and `compare_with` agree on small problems, else a sentence that says where not."""
    for problem, arguments in test_problems(device, dtype, head_dim):
        for name, *results in zip(("out", "lse"), launch(*arguments), compare_with(*arguments), strict=True):
            if (found := difference(name, *results)) is not None:
                return f"{problem}: {found}"
    return None


def name_of(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")

"""The CUDA C++ backend of attention (csrc/window_attention.cuh, sm_90a): when it can run, and its launch."""

import warnings
from collections.abc import Callable

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
        return f"supports {' and '.join(map(_name, DTYPES))}, got {_name(x.dtype)}"
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
    if not is_trusted(q, triton_launch.forward):
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
    q, k, v = _for_copies(q), _for_copies(k), _for_copies(v)
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
        dtype=module.DTYPES[_name(q.dtype)],
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


def _for_copies(x: Tensor) -> Tensor:
    """`x`, copied where the copy engine cannot read it: it moves 16 bytes, and repeats no row."""
    element = x.element_size()
    fits = x.data_ptr() % 16 == 0 and x.stride(-1) == 1
    for size, stride in zip(x.shape[:2], x.stride()[:2], strict=True):
        fits = fits and stride * element % 16 == 0 and (stride > 0 or size <= 1)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


# --- self-test ----------------------------------------------------------------------------------------------

_verdicts: dict[tuple[torch.device, torch.dtype, int], str | None] = {}


def is_trusted(x: Tensor, compare_with: Forward) -> bool:
    """Whether the kernel for the dtype and head_dim of `x` gives Triton's numbers on its device.

    Tried once per process, device, dtype and head_dim; a difference is a warning, and Triton serves from then
    on. While a CUDA graph is captured nothing can be tried: an untried kernel then leaves the call to Triton.
    """
    key = (x.device, x.dtype, x.shape[-1])
    if key not in _verdicts:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            warnings.warn(
                "infimm_kernels: attention on backend 'cuda' was not called before this capture, "
                "so the CUDA graph uses Triton; call it once before",
                stacklevel=2,
            )
            return False
        try:
            _verdicts[key] = self_test(*key, compare_with)
        except RuntimeError as error:
            _verdicts[key] = str(error)
        if _verdicts[key] is not None:
            warnings.warn(
                f"infimm_kernels: attention on backend 'cuda' is disabled for {_name(x.dtype)}, head_dim "
                f"{x.shape[-1]} on {x.device}, Triton serves instead: {_verdicts[key]}",
                stacklevel=2,
            )
    return _verdicts[key] is None


@torch.no_grad()
def self_test(device: torch.device, dtype: torch.dtype, head_dim: int, compare_with: Forward) -> str | None:
    """None when `launch` and `compare_with` agree on a small problem, else a sentence that says where not.

    Ragged windows with a prefix token, then text that attends to them by groups of heads.
    """
    generator = torch.Generator().manual_seed(0)  # on the CPU: the device's own state stays as it is

    def tokens(total: int, heads: int) -> Tensor:
        return torch.randn(total, heads, head_dim, generator=generator).to(device, dtype)

    def cumulative(lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)

    total = sum(SELF_TEST_LENGTHS)
    windows, text = cumulative(SELF_TEST_LENGTHS), cumulative(SELF_TEST_LENGTHS[::-1])
    q, k, v = tokens(total, 2), tokens(total, 2), tokens(total, 2)
    shared_k, shared_v = tokens(total, 1), tokens(total, 1)
    scale = head_dim**-0.5
    problems = {
        "ragged windows with a prefix token": (q, k, v, windows, windows, 0, scale, 1),
        "equal windows": (q, k, v, None, None, total // 2, scale, 0),
        "text over windows, one key head": (q, shared_k, shared_v, text, windows, 0, scale, 0),
    }
    for problem, arguments in problems.items():
        named = zip(("out", "lse"), launch(*arguments), compare_with(*arguments), strict=True)
        for name, result, expected in named:
            result, expected = result.float(), expected.float()
            if not torch.equal(result.isfinite(), expected.isfinite()):
                return f"{problem}: {name} is finite in other places than Triton's"
            finite = expected.isfinite()
            rounding = torch.finfo(dtype if name == "out" else torch.float32).eps / 2
            limit = SELF_TEST_ROUNDINGS * rounding * expected[finite].abs().max().item()
            difference = (result - expected)[finite].abs().max().item()
            if difference > limit:
                return f"{problem}: {name} differs from Triton's by {difference:.3g}, {limit:.3g} is allowed"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""window_attention against one SDPA call on the same packed tensor, forward and backward.

Groups by shape and pass, so that pytest-benchmark prints the ratio in each. Runs on the GPU at hand, else on
the CPU; a kernel whose result is wrong is not timed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infimm_kernels import window_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (
    {"bf16": torch.bfloat16} if DEVICE.type == "cuda" else {"fp32": torch.float32, "bf16": torch.bfloat16}
)
SHAPES = {
    # num_windows, seqlen, num_heads, head_dim
    "demo": (160, 65, 1, 112),
    "vit_e_224": (4, 257, 16, 112),
    "vit_e_448": (40 if DEVICE.type == "cuda" else 1, 1025, 16, 112),
}


def sdpa(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def ours(qkv: Tensor) -> Tensor:
    return window_attention(qkv, num_prefix_tokens=1)


def forward(attention, qkv: Tensor) -> Tensor:
    with torch.no_grad():
        out = attention(qkv)
    _synchronize()
    return out


def forward_backward(attention, qkv: Tensor) -> Tensor:
    qkv = qkv.detach().requires_grad_()
    attention(qkv).sum().backward()
    _synchronize()
    return qkv.grad


def _synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.kernels
@pytest.mark.parametrize("attention", [sdpa, ours], ids=lambda function: function.__name__)
@pytest.mark.parametrize("run", [forward, forward_backward], ids=lambda function: function.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_window_attention(benchmark, shape, dtype, run, attention):
    benchmark.group = f"window_attention {shape} {dtype} {run.__name__} {DEVICE.type}"
    num_windows, seqlen, num_heads, head_dim = SHAPES[shape]
    generator = torch.Generator(DEVICE).manual_seed(0)
    size = (num_windows, seqlen, 3, num_heads, head_dim)
    qkv = torch.randn(size, generator=generator, device=DEVICE).to(DTYPES[dtype])
    exact = run(sdpa, qkv[:1].double())
    error, eager_error = ((run(f, qkv[:1]).double() - exact).abs().max() for f in (attention, sdpa))
    assert error <= 2 * eager_error, (
        f"{attention.__name__} errs by {error}, eager by {eager_error}: not timed"
    )
    benchmark(run, attention, qkv)

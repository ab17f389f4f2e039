"""`python -m bench.hopper`: csrc's Hopper attention on small problems, against fp64; for compute-sanitizer.

Every head_dim and dtype over lengths around a tile, with prefix tokens, key heads shared by groups and empty
segments; the tensors end where their memory does. Exit code 1 and a line for each problem that is wrong.
"""

import itertools
import sys

import torch

from infimm_kernels.attention import cuda, cuda_backward, reference
from infimm_kernels.attention.plan import plan
from infimm_kernels.testing import max_error

LENGTHS = ((130, 1, 0, 257), (64, 5, 128, 0))  # of queries and of keys
FACTOR = 2.0


def problems():
    """(head_dim, dtype, num_heads, num_kv_heads, num_prefix_tokens)"""
    yield from itertools.product(cuda.HEAD_DIMS, cuda.DTYPES, (2,), (1, 2), (0, 1, 5))


def wrong(
    head_dim: int, dtype: torch.dtype, num_heads: int, num_kv_heads: int, prefix: int, device: str = "cuda"
) -> str | None:
    """What is wrong with the kernels' results, or None."""
    generator = torch.Generator(device).manual_seed(0)
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in LENGTHS)

    def random(total: int, heads: int) -> torch.Tensor:
        return torch.randn(total, heads, head_dim, device=device, generator=generator).to(dtype)

    q, k, v = random(sum(LENGTHS[0]), num_heads), *(random(sum(LENGTHS[1]), num_kv_heads) for _ in "kv")
    out, lse = cuda.launch(q, k, v, cu_q, cu_k, 0, head_dim**-0.5, prefix)
    segments = plan(cu_q.cpu(), cu_k.cpu(), len(q), len(k))
    exact, exact_lse = reference.forward(*(x.double() for x in (q, k, v)), head_dim**-0.5, segments)
    eager, _ = reference.forward(q, k, v, head_dim**-0.5, segments)
    error, allowed = max_error(out, exact), FACTOR * max_error(eager, exact)
    if not error <= allowed:
        return f"out errs by {error:.3g}, {allowed:.3g} is allowed"
    if not torch.allclose(lse.double(), exact_lse, rtol=1e-5, atol=1e-5):
        return "lse is wrong"
    if prefix == 0 and head_dim in cuda_backward.HEAD_DIMS:
        return _wrong_gradient(q, k, v, exact, exact_lse, (cu_q, cu_k))
    return None


def _wrong_gradient(q, k, v, out, lse, cu_seqlens) -> str | None:
    """What is wrong with the backward's main kernel, which without prefix keys gives whole gradients."""
    scale, dout = q.shape[-1] ** -0.5, q.flip(0).contiguous()
    delta = (out * dout.double()).sum(-1).T.float().contiguous()
    dq_sum = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    arguments = (q, k, v, dout, lse.float().contiguous(), delta, dq_sum, dk, dv)
    cuda_backward.launch_main(*arguments, *cu_seqlens, 0, scale, 0)
    eagers, exacts = (
        _eager_gradients(q, k, v, dout, cu_seqlens, scale, dtype) for dtype in (q.dtype, torch.float64)
    )
    found = (dq_sum * scale).to(q.dtype), dk, dv
    for name, result, eager, exact in zip(("dq", "dk", "dv"), found, eagers, exacts, strict=True):
        error, allowed = max_error(result, exact), FACTOR * max_error(eager, exact)
        if not error <= allowed:
            return f"{name} errs by {error:.3g}, {allowed:.3g} is allowed"
    return None


def _eager_gradients(q, k, v, dout, cu_seqlens, scale, dtype) -> tuple[torch.Tensor, ...]:
    """As PyTorch's autograd has them, in `dtype`."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
    bounds = zip(*(itertools.pairwise(cu.tolist()) for cu in cu_seqlens), strict=True)
    total = 0
    for rows, keys in bounds:
        queries = leaves[0][slice(*rows)].transpose(0, 1)
        groups = q.shape[1] // k.shape[1]
        key, value = (x[slice(*keys)].repeat_interleave(groups, 1).transpose(0, 1) for x in leaves[1:])
        if queries.numel() and key.numel():
            out = ((queries @ key.mT * scale).softmax(-1) @ value).transpose(0, 1)
            total = total + (out * dout[slice(*rows)].to(dtype)).sum()
    return torch.autograd.grad(total, leaves)


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device is visible", file=sys.stderr)
        return 2
    found = {problem: wrong(*problem) for problem in problems()}
    for problem, reason in found.items():
        if reason is not None:
            print(*problem, reason)
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())

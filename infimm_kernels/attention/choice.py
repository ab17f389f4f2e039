"""Which backend serves attention: what each can run, and what runs only when it is named."""

import torch
from torch import Tensor

from infimm_kernels import backends
from infimm_kernels.attention.cuda import why_not_cuda

MIN_TRITON_HEAD_DIM, MAX_TRITON_HEAD_DIM = 16, 256


def why_not_triton(*tensors: Tensor) -> str | None:
    """Why Triton cannot run attention on these q, k, v (or this qkv); None when it can."""
    head_dim = tensors[0].shape[-1]
    if not MIN_TRITON_HEAD_DIM <= head_dim <= MAX_TRITON_HEAD_DIM:
        return f"head_dim must be from {MIN_TRITON_HEAD_DIM} to {MAX_TRITON_HEAD_DIM}, got {head_dim}"
    return backends.why_not_triton(*tensors)


OVERLAPPING_CANDIDATES = (backends.Candidate("triton", why_not_triton),)
# "cuda" only when it is named: it has never run on a GPU.
VARLEN_CANDIDATES = (*OVERLAPPING_CANDIDATES, backends.Candidate("cuda", why_not_cuda, default=False))
WINDOW_CANDIDATES = VARLEN_CANDIDATES


def backward_backend(op_name: str, candidates, backend: str | None, *tensors: Tensor) -> str:
    """The backend of the backward: that of the forward, but for float32.

    From a saved lse, rounded at its own size, float32 probabilities would miss the error rule.
    """
    selected = backends.select(op_name, candidates, backend, *tensors)
    return "reference" if tensors[0].dtype == torch.float32 else selected

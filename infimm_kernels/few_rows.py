"""The product of a few rows with a large weight on a CPU, as generated text asks for it."""

import torch
from torch import Tensor

FEW_ROWS = 16
LARGE_WEIGHT = 1 << 20  # numbers; smaller ones are read sooner than threads are woken


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """torch.nn.functional.linear: x [..., inner], weight [outer, inner] -> [..., outer].

    A single row is multiplied in one thread there, and memory then waits for the processor. A few rows of
    float32 or float64 are multiplied with one part of the weight per thread here.
    """
    (outer, inner), rows = weight.shape, x.shape[:-1].numel()
    few = 1 <= rows <= FEW_ROWS and weight.numel() >= LARGE_WEIGHT and weight.is_contiguous()
    if torch.compiler.is_compiling() or not few or x.device.type != "cpu" or x.element_size() < 4:
        return torch.nn.functional.linear(x, weight)
    threads = torch.get_num_threads()
    if threads == 1 or outer % threads:
        return torch.nn.functional.linear(x, weight)
    parts, flat = weight.view(threads, outer // threads, inner), x.reshape(rows, inner)
    if rows <= 2:
        product = torch.bmm(parts, flat.t().expand(threads, inner, rows)).permute(2, 0, 1)
    else:
        product = torch.bmm(flat.expand(threads, rows, inner), parts.mT).transpose(0, 1)
    return product.reshape(*x.shape[:-1], outer)

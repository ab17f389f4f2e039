"""What a step's record holds of the model and the device: how far the gates are open, and memory."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def gate_parameters(model: Any) -> list[nn.Parameter]:
    """Both gates of every gated block, as `deepspeed.zero.GatheredParameters` takes them."""
    return [gate for _, gates in _gates(model) for gate in gates]


@torch.no_grad()
def gate_values(model: Any) -> dict[int, tuple[float, float]]:
    """Mean |tanh| over the channels of (attn_gate, ffn_gate) by the index of the LLM layer behind the block;
    empty for a model without gated blocks. One transfer to the host.

    With ZeRO 3 every rank calls it under `GatheredParameters(gate_parameters(model))`; ValueError for a gate
    that is not gathered."""
    layers, means = [], []
    for layer, gates in _gates(model):
        for name, gate in zip(("attn_gate", "ffn_gate"), gates, strict=True):
            if gate.numel() == 0:
                rule = f"{name} of layer {layer} must be gathered (deepspeed.zero.GatheredParameters)"
                raise ValueError(f"{rule}, got shape {list(gate.shape)}")
            means.append(gate.float().tanh().abs().mean())
        layers.append(layer)
    if not layers:
        return {}
    values: list[list[float]] = torch.stack(means).view(-1, 2).tolist()
    return {layer: (attn, ffn) for layer, (attn, ffn) in zip(layers, values, strict=True)}


def _gates(model: Any) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    for layer, block in model.gated_blocks.items():
        yield int(layer), (block.attn_gate, block.ffn_gate)


def memory_bytes(device: torch.device) -> int:
    """Most bytes that tensors held at one time on a CUDA device; on a CPU the process's resident size now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes()


def resident_bytes() -> int:
    """Resident size of this process; where there is no /proc, its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")

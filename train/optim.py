"""AdamW's parameter groups and the learning-rate schedule."""

import math

import torch
from torch import nn

from model import InfiMMHD

from .config import OptimizerConfig, ScheduleConfig
from .distributed import deepspeed

NO_DECAY_NAMES = ("position_table",)
"""Matrices that are tables of positions, not maps, do not decay."""


def learning_rate(step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Of step `step` = 1 .. steps: peak * step / warmup_steps, then a half cosine that ends at `lr_min`."""
    if step <= schedule.warmup_steps:
        return optimizer.lr_peak * (step / schedule.warmup_steps)
    progress = (step - schedule.warmup_steps) / (schedule.steps - schedule.warmup_steps)
    return optimizer.lr_min + (optimizer.lr_peak - optimizer.lr_min) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )


def parameter_groups(model: InfiMMHD, config: OptimizerConfig) -> list[dict]:
    """Trainable parameters by part and by whether they decay, every one exactly once; no frozen ones."""
    groups = []
    for part, parameters in model.parameter_groups().items():
        trainable = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        decaying = [parameter for name, parameter in trainable if _decays(name, parameter)]
        others = [parameter for name, parameter in trainable if not _decays(name, parameter)]
        lr = config.lr_peak * config.lr_scale.get(part, 1.0)
        for members, weight_decay in ((decaying, config.weight_decay), (others, 0.0)):
            if members:
                groups.append({"params": members, "lr": lr, "weight_decay": weight_decay})
    return groups


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and name.rpartition(".")[2] not in NO_DECAY_NAMES


def build_optimizer(model: InfiMMHD, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`: DeepSpeed's FusedAdam on a GPU where it builds, else torch's."""
    groups = parameter_groups(model, config)
    arguments = dict(betas=tuple(config.betas), eps=config.eps)
    if device.type == "cuda":
        try:
            return deepspeed.ops.adam.FusedAdam(groups, adam_w_mode=True, **arguments)
        except Exception as error:  # the build fails in many ways: no nvcc, another CUDA version, no compiler
            print(f"train: torch.optim.AdamW in place of FusedAdam, which did not build: {error}", flush=True)
    return torch.optim.AdamW(groups, fused=True, **arguments)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, schedule: ScheduleConfig
) -> torch.optim.lr_scheduler.LambdaLR:
    """Scales every group's rate by the same curve, `learning_rate` over `lr_peak`."""

    def factor(steps_done: int) -> float:
        return learning_rate(min(steps_done + 1, schedule.steps), config, schedule) / config.lr_peak

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

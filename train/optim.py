"""AdamW's parameter groups and the learning-rate schedule."""

import math
from collections.abc import Iterator

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
    for part, decays, members in _grouped(model):
        groups.append(
            {
                "params": [parameter for _, parameter in members],
                "lr": config.lr_peak * config.lr_scale.get(part, 1.0),
                "weight_decay": config.weight_decay if decays else 0.0,
            }
        )
    return groups


def grouped_names(model: InfiMMHD) -> list[str]:
    """Names of the parameters in the order of `parameter_groups`."""
    return [name for _, _, members in _grouped(model) for name, _ in members]


def _grouped(model: InfiMMHD) -> Iterator[tuple[str, bool, list[tuple[str, nn.Parameter]]]]:
    for part, parameters in model.parameter_groups().items():
        trainable = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        for decays in (True, False):
            members = [
                (name, parameter) for name, parameter in trainable if _decays(name, parameter) == decays
            ]
            if members:
                yield part, decays, members


def _decays(name: str, parameter: nn.Parameter) -> bool:
    # under ZeRO 3 a parameter's own shape is empty between its uses
    return (
        len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
        and name.rpartition(".")[2] not in NO_DECAY_NAMES
    )


def build_optimizer(
    model: InfiMMHD, config: OptimizerConfig, device: torch.device, *, offload: bool = False
) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`: DeepSpeed's FusedAdam on a GPU, or its CPU optimizer when the states are
    offloaded from one, where they build; else torch's."""
    groups = parameter_groups(model, config)
    arguments = dict(betas=tuple(config.betas), eps=config.eps)
    if device.type == "cuda":
        name = "DeepSpeedCPUAdam" if offload else "FusedAdam"
        try:
            if offload:
                return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
            return deepspeed.ops.adam.FusedAdam(groups, adam_w_mode=True, **arguments)
        except Exception as error:  # the build fails in many ways: no nvcc, another CUDA version, no compiler
            print(f"train: torch.optim.AdamW in place of {name}, which did not build: {error}", flush=True)
    return torch.optim.AdamW(groups, fused=True, **arguments)


class LearningRate:
    """Sets every group's rate to its own peak times the same curve, `learning_rate` over `lr_peak`."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: OptimizerConfig, schedule: ScheduleConfig
    ) -> None:
        self.config, self.schedule = config, schedule
        self._peaks = [group["lr"] for group in optimizer.param_groups]

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Before step `step` = 1 .. steps; the rate of a group whose scale is 1."""
        rate = learning_rate(step, self.config, self.schedule)
        for group, peak in zip(optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * (rate / self.config.lr_peak)
        return rate

"""A bare PyTorch training loop, what `bench.trainer` holds the DeepSpeed loop against.

Forward, backward, clipping, AdamW, one process, whole batches. It shares the model, the reader of batches and
the numbers of the config with `train`, and nothing of its loop."""

import dataclasses
import math
import time

import torch

from model import InfiMMHD
from train.batch import StepReader
from train.config import TrainConfig


@dataclasses.dataclass(slots=True)
class LoopTimes:
    """Of every step."""

    losses: list[float]
    seconds: list[float]
    """Reading the batch included."""
    read_seconds: list[float]


def train_plainly(
    config: TrainConfig, model: InfiMMHD, reader: StepReader, device: torch.device
) -> LoopTimes:
    """Trains `model` in place, as `config` says, on one rank in fp32 without accumulation."""
    optimizer_config, schedule = config.optimizer, config.schedule
    model.set_window_size(config.image.window_size)
    model.set_trainable(config.trainable)
    model.to(device).train()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trainable = [p for _, p in named]
    is_matrix = {name: p.ndim >= 2 and not name.endswith("position_table") for name, p in named}
    groups = [
        {
            "params": [p for name, p in named if is_matrix[name]],
            "weight_decay": optimizer_config.weight_decay,
        },
        {"params": [p for name, p in named if not is_matrix[name]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=tuple(optimizer_config.betas), eps=optimizer_config.eps, fused=True
    )
    times = LoopTimes([], [], [])
    for step in range(1, schedule.steps + 1):
        start = time.perf_counter()
        (batch,) = reader(step - 1).micro_batches
        read = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = _warm_up_and_cosine(step, config)
        on_host = ("windows_per_image", "images_per_sample")
        loss = model(**{k: t if k in on_host else t.to(device) for k, t in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, optimizer_config.clip)
        optimizer.step()
        optimizer.zero_grad()
        times.losses.append(loss.item())
        times.read_seconds.append(read - start)
        times.seconds.append(time.perf_counter() - start)
    return times


def _warm_up_and_cosine(step: int, config: TrainConfig) -> float:
    low, high = config.optimizer.lr_min, config.optimizer.lr_peak
    warmup, steps = config.schedule.warmup_steps, config.schedule.steps
    if step <= warmup:
        return high * step / warmup
    return low + (high - low) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

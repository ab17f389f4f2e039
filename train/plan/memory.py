"""Bytes that a rank holds beside activations: parameters, gradients, AdamW's states, DeepSpeed's buffers."""

import dataclasses
from collections.abc import Collection, Iterable

import torch

from model import InfiMMHD, InfiMMHDConfig

from ..config import PARTS
from ..settings import ZERO_BUCKET_ELEMENTS

PERSISTENT_ELEMENTS = 100_000
"""ZeRO 3 leaves smaller parameters whole (DeepSpeed's stage3_param_persistence_threshold)."""
LIVE_ELEMENTS = 1_000_000_000
"""Parameters that ZeRO 3 may hold gathered (DeepSpeed's stage3_max_live_parameters)."""
OFFLOADS = ("none", "optimizer", "parameters")


@dataclasses.dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Numbers of a model, by what happens to them."""

    by_part: dict[str, int]
    trainable: int
    small: int
    """In parameters that ZeRO 3 leaves whole."""

    @property
    def total(self) -> int:
        return sum(self.by_part.values())


def count_parameters(config: InfiMMHDConfig, trainable: Collection[str]) -> ParameterCounts:
    """Of the model that the trainer would build, made without storage."""
    with torch.device("meta"):
        model = InfiMMHD(config)
    return counts_of(model, trainable)


def counts_of(model: InfiMMHD, trainable: Collection[str]) -> ParameterCounts:
    model.set_trainable(trainable)
    parameters = list(model.parameters())
    return ParameterCounts(
        by_part={
            part: sum(parameter.numel() for _, parameter in members)
            for part, members in model.parameter_groups().items()
        },
        trainable=_numel(p for p in parameters if p.requires_grad),
        small=_numel(p for p in parameters if p.numel() < PERSISTENT_ELEMENTS),
    )


def _numel(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@dataclasses.dataclass(frozen=True, slots=True)
class HeldBytes:
    """What a rank holds beside activations."""

    parameters: float
    """Of the model, frozen ones too."""
    gradients: float
    """Of the trainable parameters, between the backward and the step."""
    optimizer: float
    """AdamW's two moments, and the separate weights in float32 that DeepSpeed keeps for ZeRO 1 to 3."""
    buffers: float
    """Of the backward: buckets of gradients to reduce, and what ZeRO 3 or offloading has gathered."""
    step: float
    """Of the optimizer step, when no activations are there: gradients in float32."""
    host: float
    """In the host's memory, for this rank."""

    @property
    def total(self) -> float:
        """Of the GPU, all but what comes and goes."""
        return self.parameters + self.gradients + self.optimizer


def held_bytes(
    counts: ParameterCounts,
    *,
    precision: str,
    zero_stage: int,
    world_size: int,
    offload: str = "none",
    overlap_comm: bool = True,
) -> HeldBytes:
    """Of each of `world_size` ranks, by the rules of DeepSpeed's ZeRO.

    `offload` "optimizer" moves its states and the gradients to the host, "parameters" with ZeRO 3 the
    parameters too. `overlap_comm` doubles the bucket, one filling while the other is reduced."""
    if offload not in OFFLOADS:
        raise ValueError(f"offload must be one of {', '.join(OFFLOADS)}, got {offload!r}")
    least = {"none": 0, "optimizer": 1, "parameters": 3}[offload]
    if zero_stage < least:
        raise ValueError(f"zero_stage must be at least {least} with offload {offload!r}, got {zero_stage}")
    size = 2 if precision in ("bf16", "fp16") else 4
    share = 1 / world_size
    whole = counts.small if zero_stage == 3 else counts.total
    parameters = size * (whole + (counts.total - whole) * share)
    gradients = size * counts.trainable * (share if zero_stage >= 2 else 1)
    states = 4 * counts.trainable * (2 * share if zero_stage else 2)
    if zero_stage:
        states += 4 * counts.trainable * share
    buffers = 0.0
    if zero_stage:
        buckets = 2 if overlap_comm and zero_stage < 3 else 1
        buffers = buckets * size * ZERO_BUCKET_ELEMENTS
    if zero_stage == 3 and (world_size > 1 or offload == "parameters"):
        buffers += size * min(counts.total - counts.small, LIVE_ELEMENTS)
    step = 4.0 * counts.trainable * share if size == 2 else 0.0
    host = 0.0
    if offload != "none":
        # gradients are added up there in float32
        host = states + 4 * counts.trainable * share
        gradients, states, step = (gradients if zero_stage == 1 else 0.0), 0.0, 0.0
    if offload == "parameters":
        moved = size * (counts.total - whole) * share
        host, parameters = host + moved, parameters - moved
    return HeldBytes(
        parameters=parameters, gradients=gradients, optimizer=states, buffers=buffers, step=step, host=host
    )


def cast_weight_bytes(counts: ParameterCounts, precision: str, vision_learns: bool) -> float:
    """Half-precision copies of the weights that autocast makes and the backward keeps."""
    if precision != "bf16_autocast":
        return 0.0
    unseen = 0 if vision_learns else counts.by_part[PARTS[0]]
    return 2.0 * (counts.total - unseen)

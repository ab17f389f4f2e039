"""The four stages of InfiMM-HD (Wei et al. 2024, Table 8) as functions that return a `TrainConfig`.

Each call returns a fresh config; a variant is a `dataclasses.replace` of one, or an override on the command
line. Any number of ranks works that divides the global batch over the accumulation steps: the paper's 64, and
for IFT at most 32."""

from collections.abc import Callable

from .config import (
    DataConfig,
    ImageConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)


def PT() -> TrainConfig:
    """Pretraining on image-text pairs at 224 px: only the gated cross-attention learns.

    The paper's interleaved documents use rows of 384 tokens and batches of 768."""
    return TrainConfig(
        stage="PT",
        trainable=("gated_cross_attention",),
        output_dir="runs/pt",
        image=ImageConfig(window_size=224, mode="single"),
        data=DataConfig(prompt="plain", sequence_length=32),
        optimizer=OptimizerConfig(lr_peak=1e-4, lr_min=1e-4, betas=(0.9, 0.95), eps=1e-8),
        schedule=ScheduleConfig(steps=120_000, warmup_steps=6_000),
        parallel=ParallelConfig(global_batch_size=10_240, gradient_accumulation_steps=2),
    )


def CPT() -> TrainConfig:
    """Continued pretraining at 448 px: the ViT learns too, its position table enlarged from 224."""
    return TrainConfig(
        stage="CPT",
        trainable=("vision", "gated_cross_attention"),
        output_dir="runs/cpt",
        image=ImageConfig(window_size=448, mode="single"),
        data=DataConfig(sequence_length=128),
        optimizer=OptimizerConfig(lr_peak=1e-5, lr_min=1e-6),
        schedule=ScheduleConfig(steps=8_000, warmup_steps=400),
        parallel=ParallelConfig(global_batch_size=256, gradient_accumulation_steps=1),
    )


def DRA() -> TrainConfig:
    """Dynamic-resolution adaptation: images of 448 to 1344 px a side, in windows of 448 and a thumbnail."""
    return TrainConfig(
        stage="DRA",
        trainable=("vision", "gated_cross_attention"),
        gradient_checkpointing=True,
        output_dir="runs/dra",
        image=ImageConfig(window_size=448, mode="dynamic", max_windows_per_side=3),
        data=DataConfig(sequence_length=128),
        optimizer=OptimizerConfig(lr_peak=1e-5, lr_min=1e-6),
        schedule=ScheduleConfig(steps=8_000, warmup_steps=400),
        parallel=ParallelConfig(global_batch_size=256, gradient_accumulation_steps=1),
    )


def IFT() -> TrainConfig:
    """Instruction fine-tuning at dynamic resolution: the LLM learns, the ViT is frozen."""
    return TrainConfig(
        stage="IFT",
        trainable=("gated_cross_attention", "language"),
        output_dir="runs/ift",
        image=ImageConfig(window_size=448, mode="dynamic", max_windows_per_side=3),
        data=DataConfig(sequence_length=1024),
        optimizer=OptimizerConfig(lr_peak=5e-6, lr_min=5e-7),
        schedule=ScheduleConfig(steps=11_000, warmup_steps=550),
        parallel=ParallelConfig(global_batch_size=64, gradient_accumulation_steps=2),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {"PT": PT, "CPT": CPT, "DRA": DRA, "IFT": IFT}

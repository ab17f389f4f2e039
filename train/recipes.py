"""The four stages of InfiMM-HD (Wei et al. 2024, Table 8) and the two of LLaVA-HR (Luo et al. 2024) as
functions that return a `TrainConfig`.

Each call returns a fresh config; a variant is a `dataclasses.replace` of one, or an override on the command
line. Any number of ranks works that divides the global batch, one included: the fewer they are, the more
steps they accumulate. On the paper's 64 GPUs that gives Table 8's 2, 1 and 1 steps; IFT's batch of 64 with 2
accumulation steps fits 32 of them."""

from collections.abc import Callable

from .config import (
    DataConfig,
    ImageConfig,
    ModelConfig,
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
        parallel=ParallelConfig(global_batch_size=10_240, max_micro_batch_size=80),
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
        parallel=ParallelConfig(global_batch_size=256, max_micro_batch_size=4),
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
        parallel=ParallelConfig(global_batch_size=256, max_micro_batch_size=4),
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
        parallel=ParallelConfig(global_batch_size=64, max_micro_batch_size=1),
    )


def mra_pretrain() -> TrainConfig:
    """LLaVA-HR's first stage: 558k captions, one epoch; projector and adapters learn.

    Images of 1024 px become 1024 tokens of the LLM. The paper gives the rates and batches, LLaVA-1.5, whose
    recipe it follows, the rest: 3 % warm-up, cosine to zero, no weight decay."""
    return TrainConfig(
        stage="mra_pretrain",
        trainable=("gated_cross_attention",),
        output_dir="runs/mra_pretrain",
        model=ModelConfig(preset="llava_hr_7b"),
        image=ImageConfig(window_size=1024, mode="single"),
        data=DataConfig(prompt="plain", sequence_length=2048),
        optimizer=OptimizerConfig(lr_peak=1e-3, lr_min=0.0, eps=1e-8, weight_decay=0.0),
        schedule=ScheduleConfig(steps=2_181, warmup_steps=66),
        parallel=ParallelConfig(global_batch_size=256, max_micro_batch_size=16),
    )


def mra_finetune() -> TrainConfig:
    """LLaVA-HR's second stage: 665k instructions, one epoch; everything learns."""
    return TrainConfig(
        stage="mra_finetune",
        trainable=("vision", "gated_cross_attention", "language"),
        gradient_checkpointing=True,
        output_dir="runs/mra_finetune",
        model=ModelConfig(preset="llava_hr_7b"),
        image=ImageConfig(window_size=1024, mode="single"),
        data=DataConfig(sequence_length=2048),
        optimizer=OptimizerConfig(lr_peak=2e-5, lr_min=0.0, eps=1e-8, weight_decay=0.0),
        schedule=ScheduleConfig(steps=5_197, warmup_steps=156),
        parallel=ParallelConfig(global_batch_size=128, max_micro_batch_size=8, zero_stage=3),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe for recipe in (PT, CPT, DRA, IFT, mra_pretrain, mra_finetune)
}

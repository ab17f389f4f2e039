"""The stage that `bench.trainer` trains: a model, a config, JPEG photographs with questions, their reader."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.images import write_photographs
from model import ImageProcessor, InfiMMHD, InfiMMHDConfig, preset
from train.batch import RowEncoder, StepReader
from train.config import TrainConfig
from train.data import ConversationDataset, Dataset
from train.demo.vocabulary import build_tokenizer
from train.overrides import override
from train.recipes import RECIPES

BATCH = 8
STEP_WINDOW = 56
"""Side in pixels of the windows that are trained on."""
MEDIUM = {  # 23 M parameters
    "vision_config": {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "intermediate_size": 1024},
    "gated_cross_attention": {"num_heads": 6, "head_dim": 64, "interval": 2},
    "text_config": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 10,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
}
TINY = {
    "vision_config": {"hidden_size": 32, "num_layers": 2, "num_heads": 1, "intermediate_size": 64},
    "gated_cross_attention": {"num_heads": 2, "head_dim": 16},
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}


def build_model(options: dict[str, dict[str, Any]]) -> InfiMMHD:
    """The preset "tiny" with these fields, the same weights every time, its gates open."""
    torch.manual_seed(0)
    values = preset("tiny").to_dict()
    for part, fields in options.items():
        values[part] |= fields
    model = InfiMMHD(InfiMMHDConfig.from_dict(values))
    with torch.no_grad():
        for block in model.gated_blocks.values():
            block.attn_gate.fill_(0.5)
            block.ffn_gate.fill_(0.5)
    return model


def stage_config(
    output_dir: Path,
    steps: int,
    *,
    zero_stage: int,
    workers: int = 0,
    window: int = STEP_WINDOW,
    mode: str = "single",
) -> TrainConfig:
    """Everything learns, in fp32; images are one window each."""
    values = {
        "output_dir": str(output_dir),
        "trainable": ("vision", "gated_cross_attention", "language"),
        "log_interval": max(1, steps // 4),
        "image.window_size": window,
        "image.mode": mode,
        "data.prompt": "plain",
        "data.sequence_length": 96,
        "data.shuffle": False,
        "data.workers": workers,
        "optimizer.lr_peak": 1e-4,
        "optimizer.lr_min": 1e-5,
        "schedule.steps": steps,
        "schedule.warmup_steps": max(1, steps // 10),
        "parallel.global_batch_size": BATCH,
        "parallel.gradient_accumulation_steps": 1,
        "parallel.precision": "fp32",
        "parallel.zero_stage": zero_stage,
    }
    return override(RECIPES["IFT"](), values)


def write_conversations(folder: Path, photographs: Sequence[tuple[str, int]]) -> ConversationDataset:
    """Photographs as JPEG files, and a question about each of their corners."""
    paths = write_photographs(folder, photographs)
    records = []
    for corner in ("left top", "right bottom"):
        for path in paths:
            question = f"<image>\nwhich characters are at the {corner} ?"
            pairs = zip(("human", "gpt"), (question, "4 7 1"), strict=True)
            messages = [{"from": sender, "value": text} for sender, text in pairs]
            records.append({"image": path.name, "conversations": messages})
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return ConversationDataset(path)


def step_reader(config: TrainConfig, model: InfiMMHD, dataset: Dataset) -> StepReader:
    """The reader of one rank, made from its public parts."""
    images = ImageProcessor(
        window_size=config.image.window_size,
        mode=config.image.mode,
        max_windows_per_side=config.image.max_windows_per_side,
        resize=model.config.image.resize,
    )
    encoder = RowEncoder(
        build_tokenizer(),
        images,
        prompt=config.data.prompt,
        sequence_length=config.data.sequence_length,
        image_token_id=model.config.image_token_id,
        end_token_id=model.config.end_of_chunk_token_id,
    )
    return StepReader(
        dataset,
        encoder,
        config.data,
        seed=config.seed,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        pad_token_id=model.config.pad_token_id,
        rank=0,
        world_size=1,
    )

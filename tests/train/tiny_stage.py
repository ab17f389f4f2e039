"""What the trainer's tests share: stages of a size that trains in milliseconds, and what they left."""

import json
from pathlib import Path

import torch

from bench.reliability.tiny import (
    ALL_PARTS,
    COLOURS,
    MODEL_OPTIONS,
    WORDS,
    Colours,
    messages,
    tiny_config,
    tiny_model,
    word_tokenizer,
    write_conversations,
)
from model import ImageProcessor, InfiMMHD
from train.batch import RowEncoder, StepReader
from train.config import TrainConfig

__all__ = [
    "ALL_PARTS",
    "COLOURS",
    "MODEL_OPTIONS",
    "WORDS",
    "Colours",
    "assert_weights_close",
    "log_of",
    "messages",
    "reader_of",
    "tiny_config",
    "tiny_model",
    "weights_of",
    "word_tokenizer",
    "write_conversations",
]


def log_of(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


def weights_of(output_dir: Path) -> dict[str, torch.Tensor]:
    return InfiMMHD.from_pretrained(output_dir / "model").state_dict()


def assert_weights_close(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def reader_of(config: TrainConfig, dataset, tokenizer, micro_batch_size: int) -> StepReader:
    encoder = RowEncoder(
        tokenizer,
        ImageProcessor(window_size=config.image.window_size, mode=config.image.mode),
        prompt=config.data.prompt,
        sequence_length=config.data.sequence_length,
        image_token_id=2,
        end_token_id=3,
    )
    return StepReader(
        dataset,
        encoder,
        config.data,
        seed=config.seed,
        global_batch_size=config.parallel.global_batch_size,
        micro_batch_size=micro_batch_size,
        pad_token_id=0,
        rank=0,
        world_size=1,
    )

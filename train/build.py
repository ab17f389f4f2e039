"""From a config to the objects of a stage: model, tokenizer, reader."""

import zlib
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from model import ImageProcessor, InfiMMHD, InfiMMHDConfig, preset, presets

from . import output
from .batch import RowEncoder, StepReader
from .config import PARTS, TrainConfig
from .data import Dataset
from .distributed import Ranks
from .fields import nearest_name


def build_model(config: TrainConfig) -> InfiMMHD:
    """The model of `config.init_from`, or a new one of `config.model` with weights made by `config.seed`."""
    if config.init_from is not None:
        return output.load_model(config.init_from)
    name, options = config.model.preset, config.model.options
    if name not in presets():
        nearest = nearest_name(name, presets())
        raise ValueError(
            f"model.preset must be one of {', '.join(presets())}, got {name!r}; did you mean {nearest!r}?"
        )
    torch.manual_seed(config.seed)
    try:
        return InfiMMHD(InfiMMHDConfig.from_dict(_merged(preset(name).to_dict(), options)))
    except ValueError as error:
        raise ValueError(f"model.options must fit preset {name!r}, got {options}: {error}") from error


def _merged(values: dict[str, Any], options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    nested = {}
    for key in options:
        if isinstance(values.get(key), dict):
            if not isinstance(options[key], dict):
                raise ValueError(f"{prefix}{key} must be an object, got {options[key]!r}")
            nested[key] = _merged(values[key], options[key], f"{prefix}{key}.")
    return values | options | nested


def check_random_frozen(config: TrainConfig) -> None:
    """ValueError for a stage that freezes weights which nothing was loaded into."""
    frozen = [part for part in PARTS if part not in config.trainable]
    if frozen and not config.model.allow_random_frozen:
        raise ValueError(
            f"init_from must name a model whose frozen parts ({', '.join(frozen)}) are trained, got None; "
            "model.allow_random_frozen=true freezes random weights"
        )


def prepare_model(model: InfiMMHD, config: TrainConfig, device: torch.device) -> None:
    """Sets what the stage asks of the model: image sizes, what learns, how it computes."""
    longest = model.language.config.max_position_embeddings
    if config.data.sequence_length > longest:
        rule = f"be at most the LLM's max_position_embeddings {longest}"
        raise ValueError(f"data.sequence_length must {rule}, got {config.data.sequence_length}")
    model.set_window_size(config.image.window_size)
    model.config.image.mode = config.image.mode
    model.config.image.max_windows_per_side = config.image.max_windows_per_side
    model.set_trainable(config.trainable)
    model.gradient_checkpointing = config.gradient_checkpointing
    if device.type == "cpu" and config.parallel.precision.startswith("bf16"):
        # torch's fused attention, the default, has a slow bfloat16 backward on the CPU
        model.language.set_attn_implementation("eager")
    model.train()


def load_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    if config.data.tokenizer is not None:
        return output.load_tokenizer(config.data.tokenizer)
    if config.init_from is not None:
        return output.load_tokenizer(output.model_folder(config.init_from))
    raise ValueError("data.tokenizer must be a folder with a saved tokenizer, got None and no init_from")


def build_reader(
    config: TrainConfig, model: InfiMMHD, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, ranks: Ranks
) -> StepReader:
    vocab_size = model.config.text_config.vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(f"tokenizer must have at most the model's {vocab_size} tokens, got {len(tokenizer)}")
    image, data = config.image, config.data
    encoder = RowEncoder(
        tokenizer,
        ImageProcessor(
            window_size=image.window_size,
            mode=image.mode,
            max_windows_per_side=image.max_windows_per_side,
            resize=model.config.image.resize,
        ),
        prompt=data.prompt,
        sequence_length=data.sequence_length,
        image_token_id=model.config.image_token_id,
        end_token_id=model.config.end_of_chunk_token_id,
        image_seq_length=model.config.image_seq_length,
    )
    return StepReader(
        dataset,
        encoder,
        data,
        seed=config.seed,
        global_batch_size=config.parallel.global_batch_size,
        micro_batch_size=config.parallel.micro_batch(ranks.world_size),
        pad_token_id=model.config.pad_token_id,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


def frozen_checksum(model: InfiMMHD) -> int:
    """CRC-32 of the names and bytes of all weights that do not learn: a checkpoint leaves them out."""
    checksum = 0
    for name, parameter in model.named_parameters():
        checksum = zlib.crc32(f"{name} {tuple(parameter.shape)}".encode(), checksum)
        if not parameter.requires_grad:
            checksum = zlib.crc32(_bytes(parameter), checksum)
    return checksum


def _bytes(parameter: torch.nn.Parameter) -> np.ndarray:
    return parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()

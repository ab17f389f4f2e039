"""Tensors that change on the way: the position table of other windows, a larger vocabulary."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..checks import require
from ..vision import VisionTransformer
from ..vision_config import VisionConfig
from .checkpoint import Tensors
from .report import Report

_TABLE = "vision.position_table"
_VOCABULARY = ("language.model.embed_tokens.weight", "language.lm_head.weight")


def fit_window(
    tensors: Tensors, config: VisionConfig, window_size: int | None, report: Report
) -> VisionConfig:
    """The configuration for windows of `window_size` pixels; the position table is interpolated when read."""
    if window_size is None or window_size == config.input_size:
        return config
    rule = "be left away for a mixture of resolutions, whose parts have sizes of their own"
    require(config.mixture_of_resolution is None, "--window-size", rule, window_size)
    larger = copy.deepcopy(config)
    larger.set_input_size(window_size)
    tensors[_TABLE] = partial(_interpolated, tensors[_TABLE], config, window_size)
    sizes = f"{config.grid_size} x {config.grid_size} to {larger.grid_size} x {larger.grid_size}"
    report.changed.append(f"interpolated: {_TABLE}, from {sizes} patches")
    return larger


def _interpolated(read: Callable[[], Tensor], config: VisionConfig, window_size: int) -> Tensor:
    """By the model's own code, on a ViT that has nothing but the table."""
    config = copy.deepcopy(config)
    config.num_layers, config.feature_layer = 1, -1
    with torch.device("meta"):
        vit = VisionTransformer(config)
    vit.position_table = nn.Parameter(read(), requires_grad=False)
    vit.set_window_size(window_size)
    return vit.position_table.detach()


def fit_vocabulary(
    tensors: Tensors, config: PreTrainedConfig, vocab_size: int, report: Report
) -> PreTrainedConfig:
    """The configuration for `vocab_size` tokens; new rows, the mean of the others, are made when read."""
    old = config.vocab_size
    rule = f"have at most the {vocab_size} tokens of the target's vocabulary in {_VOCABULARY[0]}"
    require(old <= vocab_size, "language", rule, old)
    if old == vocab_size:
        return config
    config = copy.deepcopy(config)
    config.vocab_size = vocab_size
    for name in _VOCABULARY:
        if name in tensors:
            tensors[name] = partial(_with_mean_rows, tensors[name], vocab_size - old)
            rows = f"from {old} to {vocab_size} rows, the new ones the mean of the others"
            report.changed.append(f"grown: {name}, {rows}")
    return config


def _with_mean_rows(read: Callable[[], Tensor], count: int) -> Tensor:
    table = read()
    wide = torch.promote_types(table.dtype, torch.float32)
    mean = table.mean(0, keepdim=True, dtype=wide).to(table.dtype)
    return torch.cat([table, mean.expand(count, -1)])

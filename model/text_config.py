"""The language model's configuration: any transformers config of the Llama family, checked before use."""

import copy
import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .checks import is_finite_number, require, require_choice, require_known_keys, require_positive_ints

TEXT_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose decoder is embeddings, layers under one rotary embedding, and a final norm: what
`model.language` runs."""

VICUNA_13B = dict(
    vocab_size=32002,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
"""Vicuna-13B v1.5 with `<|endofchunk|>` and `<image>` added to its vocabulary."""

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def checked_text_config(value: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    """A config object of its own for `value` (None: Vicuna-13B), after building one layer without storage.

    transformers keeps an unknown argument as an attribute nobody reads, and accepts values that only building
    the model refuses. ValueError names the argument, the rule and the value."""
    if value is None:
        value = VICUNA_13B
    if isinstance(value, PreTrainedConfig):
        model_type, values = value.model_type, value.to_dict()
    else:
        require(isinstance(value, dict), "text_config", "be a dict or a transformers config", value)
        values = copy.deepcopy(value)  # transformers writes into a nested dict of its arguments
        model_type = values.get("model_type", "llama")
    require_choice("text_config.model_type", model_type, TEXT_MODEL_TYPES)
    values.pop("model_type", None)
    plain = AutoConfig.for_model(model_type)
    known = set(inspect.signature(type(plain)).parameters) | set(plain.to_dict())
    known |= {"rope_theta", "rope_scaling", "attn_implementation", "torch_dtype", "_name_or_path"}
    if not isinstance(value, PreTrainedConfig):  # a config of a checkpoint may carry keys of its own
        require_known_keys(values, known, type(plain).__name__, "text_config.")
    given = {field: values[field] for field in _SIZES if values.get(field) is not None}
    require_positive_ints(given, "text_config.")
    try:
        config = AutoConfig.for_model(model_type, **values)
        one_layer = copy.deepcopy(config)
        one_layer.num_hidden_layers = 1
        if getattr(one_layer, "layer_types", None):
            one_layer.layer_types = one_layer.layer_types[:1]
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(one_layer)
    except Exception as error:  # transformers says no through a dozen types
        reason = " ".join(str(error).split())
        raise ValueError(
            f"text_config must be accepted by transformers' {model_type} model, got {value!r}: "
            f"{type(error).__name__}: {reason}"
        ) from error
    config.dtype = None  # or transformers would make this part of the model in a type of its own
    heads, groups, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    rule = f"divide num_attention_heads {heads}"
    require(heads % groups == 0, "text_config.num_key_value_heads", rule, groups)
    require(is_finite_number(eps) and eps > 0, "text_config.rms_norm_eps", "be a positive number", eps)
    return config

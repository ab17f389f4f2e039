"""Configuration of InfiMM-HD: plain dataclasses, limits checked when they are made, JSON in and out."""

import copy
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .checks import is_finite_number, is_int, require, require_known_keys, require_positive_ints

PositionGranularity = Literal["window", "token", "none"]


@dataclasses.dataclass(kw_only=True, slots=True)
class VisionConfig:
    """The ViT that reads every window. The defaults are EVA2-CLIP-E ("ViT-E")."""

    window_size: int = 448
    """Side of a window in pixels; the position table has (window_size / patch_size)^2 + 1 rows."""
    patch_size: int = 14
    hidden_size: int = 1792
    num_layers: int = 64
    num_heads: int = 16
    intermediate_size: int = 15360
    layer_norm_eps: float = 1e-6
    feature_layer: int = -2
    """Which block's output is the feature: -1 the last, -2 the one before it (the paper). Blocks after it are
    kept, so that released weights fit, but never run or trained."""
    norm_gain_init: float = 1.0
    """Start of the post-norm gains; a residual branch that starts below 1 trains faster from scratch."""
    position_init: Literal["normal", "sincos"] = "normal"
    """Start of the learned position table: N(0, 0.02), or a smooth 2-D sine table for short trainings."""

    def __post_init__(self) -> None:
        sizes = ("window_size", "patch_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
        require_positive_ints({field: getattr(self, field) for field in sizes}, "vision.")
        for field, divisor in (("window_size", "patch_size"), ("hidden_size", "num_heads")):
            value, of = getattr(self, field), getattr(self, divisor)
            require(value % of == 0, f"vision.{field}", f"be a multiple of {divisor} {of}", value)
        require(
            self.hidden_size % 4 == 0,
            "vision.hidden_size",
            "be a multiple of 4 (2-D position)",
            self.hidden_size,
        )
        layer = self.feature_layer
        legal = is_int(layer, -self.num_layers) and layer <= -1
        require(legal, "vision.feature_layer", f"be an int between {-self.num_layers} and -1", layer)
        legal = is_finite_number(self.layer_norm_eps) and self.layer_norm_eps > 0
        require(legal, "vision.layer_norm_eps", "be a positive number", self.layer_norm_eps)
        gain = self.norm_gain_init
        require(is_finite_number(gain), "vision.norm_gain_init", "be a finite number", gain)
        require(
            self.position_init in ("normal", "sincos"),
            "vision.position_init",
            "be 'normal' or 'sincos'",
            self.position_init,
        )

    @property
    def grid_size(self) -> int:
        """Patches along one side of a window."""
        return self.window_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of one window: its patches and the CLS token in front."""
        return self.grid_size**2 + 1

    @property
    def num_active_layers(self) -> int:
        return self.num_layers + 1 + self.feature_layer


@dataclasses.dataclass(kw_only=True, slots=True)
class GatedCrossAttentionConfig:
    """The gated cross-attention blocks between the decoder layers, and what stands before their keys."""

    interval: int = 4
    """A block stands before decoder layer i when (i + 1) % interval == 0."""
    num_heads: int = 12
    head_dim: int = 64
    ffn_ratio: int = 1
    visual_token_transform: bool = True
    """The paper's MLP on the visual tokens; off for released stage-1 weights."""
    position: PositionGranularity = "window"
    """2-D position of a window in its image: one vector per window, one per patch, or none."""

    def __post_init__(self) -> None:
        sizes = ("interval", "num_heads", "head_dim", "ffn_ratio")
        require_positive_ints({field: getattr(self, field) for field in sizes}, "gated_cross_attention.")
        require(
            isinstance(self.visual_token_transform, bool),
            "gated_cross_attention.visual_token_transform",
            "be True or False",
            self.visual_token_transform,
        )
        require(
            self.position in ("window", "token", "none"),
            "gated_cross_attention.position",
            "be 'window', 'token' or 'none'",
            self.position,
        )


@dataclasses.dataclass(kw_only=True, slots=True)
class InfiMMHDConfig:
    """Everything that fixes the shape of an InfiMM-HD model."""

    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    gated_cross_attention: GatedCrossAttentionConfig = dataclasses.field(
        default_factory=GatedCrossAttentionConfig
    )
    language: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of `transformers.LlamaConfig`."""
    image_token_id: int = 32001
    end_of_chunk_token_id: int = 32000
    """End of an answer; `generate` stops there."""
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        parts = {"vision": VisionConfig, "gated_cross_attention": GatedCrossAttentionConfig, "language": dict}
        for field, part in parts.items():
            value = getattr(self, field)
            require(isinstance(value, part), field, f"be a {part.__name__}", value)
        vocab_size = _checked_language(self.language).vocab_size
        for field in ("image_token_id", "end_of_chunk_token_id", "pad_token_id"):
            value = getattr(self, field)
            legal = is_int(value, 0) and value < vocab_size
            require(legal, field, f"be a token id below vocab_size {vocab_size}", value)
            distinct = field == "image_token_id" or value != self.image_token_id
            require(distinct, field, "differ from image_token_id", value)
        interval = self.gated_cross_attention.interval
        require(
            bool(self.gated_layers), "gated_cross_attention.interval", "leave at least one block", interval
        )

    @property
    def gated_layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers that have a gated cross-attention block in front of them."""
        interval = self.gated_cross_attention.interval
        return tuple(i for i in range(self.language.get("num_hidden_layers", 32)) if (i + 1) % interval == 0)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "InfiMMHDConfig":
        """The inverse of `to_dict`; an unknown key is a ValueError naming the nearest known one."""
        require(isinstance(values, dict), "values", "be a dict", values)
        values = dict(values)
        parts = {"vision": VisionConfig, "gated_cross_attention": GatedCrossAttentionConfig}
        for name, part in parts.items():
            if isinstance(values.get(name), dict):
                require_known_keys(values[name], _field_names(part), part.__name__, f"{name}.")
                values[name] = part(**values[name])
        require_known_keys(values, _field_names(cls), cls.__name__)
        return cls(**values)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "InfiMMHDConfig":
        """Reads what `save` wrote; ValueError names the file."""
        if not path.is_file():
            raise ValueError(f"path must name a model's config.json, got {str(path)!r} (no such file)")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:  # broken JSON and wrong encodings are ValueErrors too
            raise ValueError(f"path must hold a model's config, got {str(path)!r}: {error}") from error


def _field_names(part: type) -> list[str]:
    return [field.name for field in dataclasses.fields(part)]


def _checked_language(language: dict[str, Any]) -> LlamaConfig:
    """The `LlamaConfig` of these arguments, after building one layer without storage.

    `LlamaConfig` keeps an unknown argument as an attribute nobody reads, and accepts values that only
    `LlamaForCausalLM` refuses."""
    known = set(inspect.signature(LlamaConfig).parameters) | set(LlamaConfig().to_dict())
    known |= {"rope_theta", "rope_scaling", "attn_implementation", "torch_dtype"}  # read from its **kwargs
    require_known_keys(language, known, "LlamaConfig", "language.")
    # fmt: off
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings")
    # fmt: on
    given = {field: language[field] for field in sizes if language.get(field) is not None}
    require_positive_ints(given, "language.")
    try:
        config = LlamaConfig(**copy.deepcopy(language))  # it writes into a nested dict of its arguments
        one_layer = copy.deepcopy(config)
        one_layer.num_hidden_layers = 1
        with torch.device("meta"):
            LlamaForCausalLM(one_layer)
    except Exception as error:  # transformers says no through a dozen types
        reason = " ".join(str(error).split())
        raise ValueError(
            f"language must be accepted by transformers' Llama, got {language!r}: "
            f"{type(error).__name__}: {reason}"
        ) from error
    heads, groups, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    rule = f"divide num_attention_heads {heads}"
    require(heads % groups == 0, "language.num_key_value_heads", rule, groups)
    require(is_finite_number(eps) and eps > 0, "language.rms_norm_eps", "be a positive number", eps)
    return config


def _tiny() -> InfiMMHDConfig:
    """A demo's size, real structure: ViT head_dim 112, a gated block before each of 4 layers, 1.6 M."""
    return InfiMMHDConfig(
        vision=VisionConfig(
            window_size=28,
            patch_size=7,
            hidden_size=112,
            num_layers=4,
            num_heads=1,
            intermediate_size=448,
            feature_layer=-1,
            norm_gain_init=0.5,
            position_init="sincos",
        ),
        gated_cross_attention=GatedCrossAttentionConfig(interval=1, num_heads=4, head_dim=32),
        language=dict(
            vocab_size=64,
            initializer_range=0.06,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=3,
        ),
        image_token_id=2,
        end_of_chunk_token_id=3,
    )


def _infimm_hd_13b() -> InfiMMHDConfig:
    """EVA2-CLIP-E with Vicuna-13B v1.5, as the paper builds it, before its position table is enlarged."""
    return InfiMMHDConfig(
        vision=VisionConfig(window_size=224),
        language=dict(
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
        ),
    )


_PRESETS = {"tiny": _tiny, "infimm_hd_13b": _infimm_hd_13b}


def presets() -> list[str]:
    """Names that `preset` takes."""
    return sorted(_PRESETS)


def preset(name: str) -> InfiMMHDConfig:
    """A fresh configuration by name, "tiny" or "infimm_hd_13b"; ValueError for another name."""
    if name not in _PRESETS:
        raise ValueError(f"name must be one of {presets()}, got {name!r}")
    return _PRESETS[name]()

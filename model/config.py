"""Configuration of InfiMM-HD: plain dataclasses, limits checked when they are made, JSON in and out."""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any, Literal

PositionGranularity = Literal["window", "token", "none"]


def _require(condition: bool, field: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{field} must {rule}, got {value!r}")


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
        for field in (
            "window_size",
            "patch_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "intermediate_size",
        ):
            value = getattr(self, field)
            _require(isinstance(value, int) and value > 0, f"vision.{field}", "be a positive int", value)
        _require(
            self.window_size % self.patch_size == 0,
            "vision.window_size",
            f"be a multiple of patch_size {self.patch_size}",
            self.window_size,
        )
        _require(
            self.hidden_size % self.num_heads == 0,
            "vision.hidden_size",
            f"be a multiple of num_heads {self.num_heads}",
            self.hidden_size,
        )
        _require(
            self.hidden_size % 4 == 0,
            "vision.hidden_size",
            "be a multiple of 4 (2-D position)",
            self.hidden_size,
        )
        _require(
            -self.num_layers <= self.feature_layer <= -1,
            "vision.feature_layer",
            f"be between {-self.num_layers} and -1",
            self.feature_layer,
        )
        _require(
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
        for field in ("interval", "num_heads", "head_dim", "ffn_ratio"):
            value = getattr(self, field)
            _require(
                isinstance(value, int) and value > 0,
                f"gated_cross_attention.{field}",
                "be a positive int",
                value,
            )
        _require(
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
        vocab_size = self.language.get("vocab_size", 32000)
        for field in ("image_token_id", "end_of_chunk_token_id", "pad_token_id"):
            value = getattr(self, field)
            _require(
                isinstance(value, int) and 0 <= value < vocab_size,
                field,
                f"be a token id below vocab_size {vocab_size}",
                value,
            )
        _require(bool(self.gated_layers), "gated_cross_attention.interval", "leave at least one block", self)

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
        values = dict(values)
        parts = {"vision": VisionConfig, "gated_cross_attention": GatedCrossAttentionConfig}
        for name, part in parts.items():
            if isinstance(values.get(name), dict):
                values[name] = part(**_known_keys(part, values[name], f"{name}."))
        return cls(**_known_keys(cls, values, ""))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "InfiMMHDConfig":
        if not path.is_file():
            raise ValueError(f"path must name a model's config.json, got {str(path)!r} (no such file)")
        return cls.from_dict(json.loads(path.read_text()))


def _known_keys(part: type, values: dict[str, Any], prefix: str) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(part)]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"key must be a field of {part.__name__}, got {prefix + key!r}; did you mean {nearest!r}?"
            )
    return values


def _tiny() -> InfiMMHDConfig:
    """A demo's size, real structure: ViT head_dim 112, a gated block before each of 4 layers; 1.6 M weights."""
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

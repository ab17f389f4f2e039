"""Configuration of InfiMM-HD and its variants: a transformers `PreTrainedConfig` whose limits are checked
when it is made. The defaults are the paper's model; every variant that the papers compare is a field."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import AutoConfig, PreTrainedConfig

from .checks import is_int, require, require_bool, require_choice, require_known_keys, require_positive_ints
from .text_config import checked_text_config
from .vision_config import VisionConfig

PositionGranularity = Literal["window", "token", "none"]
POSITIONS = ("window", "token", "none")
FUSIONS = ("gated_cross_attention", "concatenation")
CONNECTORS = ("none", "residual_mlp", "mlp", "resampler")


@dataclasses.dataclass(kw_only=True, slots=True)
class ConnectorConfig:
    """What transforms the visual tokens between the ViT and the language model."""

    kind: Literal["none", "residual_mlp", "mlp", "resampler"] = "residual_mlp"
    """"residual_mlp": LN(x) + W2 gelu(W1 LN(x)), starts as the norm alone; "mlp": W2 gelu(W1 x); "resampler":
    Flamingo's Perceiver, which leaves `num_latents` tokens of every window; "none" for released stage-1
    weights."""
    num_layers: int = 6
    """Of the resampler, like the fields below."""
    num_latents: int = 64
    num_heads: int = 8
    head_dim: int = 64

    def __post_init__(self) -> None:
        require_choice("connector.kind", self.kind, CONNECTORS)
        sizes = ("num_layers", "num_latents", "num_heads", "head_dim")
        require_positive_ints({field: getattr(self, field) for field in sizes}, "connector.")


@dataclasses.dataclass(kw_only=True, slots=True)
class GatedCrossAttentionConfig:
    """The gated cross-attention blocks between the decoder layers."""

    interval: int = 4
    """A block stands before decoder layer i when (i + 1) % interval == 0."""
    num_heads: int = 12
    head_dim: int = 64
    ffn_ratio: int = 1
    only_attend_immediate_media: bool = True
    """A text token sees the image before it; False: all images before it."""
    ffn_before_image: bool = False
    """True: in a sample with an image the feed-forward branch also serves the text before its first image, as
    the code of the released stage-1 weights does; False: that text passes both branches unchanged."""

    def __post_init__(self) -> None:
        sizes = ("interval", "num_heads", "head_dim", "ffn_ratio")
        require_positive_ints({field: getattr(self, field) for field in sizes}, "gated_cross_attention.")
        for field in ("only_attend_immediate_media", "ffn_before_image"):
            require_bool(f"gated_cross_attention.{field}", getattr(self, field))


@dataclasses.dataclass(kw_only=True, slots=True)
class ImageConfig:
    """How an image becomes windows (`model.ImageProcessor`); the side of a window is the vision encoder's."""

    mode: Literal["single", "dynamic"] = "dynamic"
    """One window an image, or as many as its size asks for and a thumbnail."""
    max_windows_per_side: int | None = 3
    """Limit in "dynamic": 3 windows of 448 are the paper's 1344 pixels; None: the processor's own limit."""
    resize: Literal["stretch", "letterbox"] = "stretch"
    """Whether an image is stretched onto its windows (the paper) or keeps its shape and is padded."""

    def __post_init__(self) -> None:
        require_choice("image.mode", self.mode, ("single", "dynamic"))
        require_choice("image.resize", self.resize, ("stretch", "letterbox"))
        limit = self.max_windows_per_side
        legal = limit is None or is_int(limit, 1)
        require(legal, "image.max_windows_per_side", "be a positive int or None", limit)


_PARTS = {
    "vision_config": VisionConfig,
    "connector": ConnectorConfig,
    "gated_cross_attention": GatedCrossAttentionConfig,
    "image": ImageConfig,
}


class InfiMMHDConfig(PreTrainedConfig):
    """Everything that fixes the shape of a model.

    `vision_config`, `connector`, `gated_cross_attention`, `image`: the dataclasses above, or dicts of their
    fields. `text_config`: a transformers config of the Llama family (see `model.text_config`), or a dict of
    its arguments with its `model_type` (default "llama"); None is Vicuna-13B v1.5.

    `fusion`: "gated_cross_attention" (InfiMM-HD), or "concatenation" (LLaVA): the visual tokens take the
    places of the `<image>` tokens, of which the text then has `image_seq_length` for every window.
    `position`: 2-D position of a window in its image, one vector per window ("window"), one per patch
    ("token"), or "none".
    `image_token_id` stands for an image in the text, `end_of_chunk_token_id` ends an answer and is where
    `generate` stops.

    ValueError for values that break a rule, and for unknown keys, naming the nearest known one."""

    model_type = "infimm_hd"
    sub_configs: ClassVar[dict[str, type]] = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "images"]

    def __init__(
        self,
        *,
        vision_config: VisionConfig | dict[str, Any] | None = None,
        connector: ConnectorConfig | dict[str, Any] | None = None,
        gated_cross_attention: GatedCrossAttentionConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        image: ImageConfig | dict[str, Any] | None = None,
        fusion: Literal["gated_cross_attention", "concatenation"] = "gated_cross_attention",
        position: PositionGranularity = "window",
        image_token_id: int = 32001,
        end_of_chunk_token_id: int = 32000,
        pad_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        require_known_keys(kwargs, {*_OWN_KEYS, *_INHERITED_KEYS}, "InfiMMHDConfig")
        given = dict(
            vision_config=vision_config,
            connector=connector,
            gated_cross_attention=gated_cross_attention,
            image=image,
        )
        parts = {name: _part(name, value) for name, value in given.items()}
        text = checked_text_config(text_config)
        require_choice("fusion", fusion, FUSIONS)
        require_choice("position", position, POSITIONS)
        own = dict(
            **parts,
            text_config=text,
            fusion=fusion,
            position=position,
            image_token_id=image_token_id,
            end_of_chunk_token_id=end_of_chunk_token_id,
            pad_token_id=pad_token_id,
        )
        for name, value in own.items():
            setattr(self, name, value)
        kwargs.pop("tie_word_embeddings", None)
        # the base class hands `tie_word_embeddings` and generation's token ids on to whoever reads them here
        super().__init__(tie_word_embeddings=bool(getattr(text, "tie_word_embeddings", False)), **kwargs)
        for name, value in own.items():  # pad_token_id is one that it takes away
            setattr(self, name, value)
        self.check()

    def check(self) -> None:
        """ValueError where the parts do not fit each other."""
        vocab_size = self.text_config.vocab_size
        for field in ("image_token_id", "end_of_chunk_token_id", "pad_token_id"):
            value = getattr(self, field)
            legal = is_int(value, 0) and value < vocab_size
            require(legal, field, f"be a token id below vocab_size {vocab_size}", value)
            distinct = field == "image_token_id" or value != self.image_token_id
            require(distinct, field, "differ from image_token_id", value)
        kind = self.connector.kind
        if self.fusion == "concatenation":
            fits = kind in ("mlp", "resampler")
            rule = "be 'mlp' or 'resampler' with fusion 'concatenation' (they end at the LLM's width)"
            require(fits, "connector.kind", rule, kind)
        else:
            interval = self.gated_cross_attention.interval
            rule = "leave at least one block"
            require(bool(self.gated_layers), "gated_cross_attention.interval", rule, interval)
        legal = self.position != "token" or kind != "resampler"
        require(
            legal, "position", "be 'window' or 'none' with a resampler (its latents have no place)", "token"
        )
        width = self.text_config.hidden_size if self.fusion == "concatenation" else 4
        legal = self.position == "none" or width % 4 == 0
        require(legal, "text_config.hidden_size", "be a multiple of 4 (2-D position)", width)

    @property
    def gated_layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers that have a gated cross-attention block in front of them."""
        if self.fusion == "concatenation":
            return ()
        interval = self.gated_cross_attention.interval
        return tuple(i for i in range(self.text_config.num_hidden_layers) if (i + 1) % interval == 0)

    @property
    def num_prefix_tokens(self) -> int:
        """Visual tokens of a window that are no patch and stand in front: the CLS token, where it is kept."""
        kept = self.fusion == "gated_cross_attention" and self.connector.kind != "resampler"
        return self.vision_config.num_prefix_tokens if kept else 0

    @property
    def visual_tokens_per_window(self) -> int:
        """Visual tokens that the language model reads of a window; concatenation drops the CLS token."""
        if self.connector.kind == "resampler":
            return self.connector.num_latents
        dropped = self.vision_config.num_prefix_tokens - self.num_prefix_tokens
        return self.vision_config.num_tokens - dropped

    @property
    def image_seq_length(self) -> int | None:
        """`<image>` tokens in the text for every window; None: one for the whole image."""
        return self.visual_tokens_per_window if self.fusion == "concatenation" else None

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The language model's config, where transformers looks for vocabulary, layers and cache."""
        return self.text_config

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        for name in _PARTS:
            values[name] = dataclasses.asdict(getattr(self, name))
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: whole, because a default may change."""
        values = self.to_dict()
        inherited = {
            key: value for key, value in PreTrainedConfig().to_dict().items() if key not in _OWN_KEYS
        }
        return {
            key: value
            for key, value in values.items()
            if key == "transformers_version" or key not in inherited or value != inherited[key]
        }

    def __eq__(self, other: object) -> bool:
        """Equal settings; the library's version and the class names of a saved file do not count."""
        if not isinstance(other, InfiMMHDConfig):
            return NotImplemented
        return _settings(self) == _settings(other)

    __hash__ = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "InfiMMHDConfig":
        """The inverse of `to_dict`."""
        require(isinstance(config_dict, dict), "values", "be a dict", config_dict)
        model_type = config_dict.get("model_type", cls.model_type)
        require(model_type == cls.model_type, "model_type", f"be {cls.model_type!r}", model_type)
        return super().from_dict(copy.deepcopy(config_dict), **kwargs)

    def save(self, path: str | Path) -> None:
        """Writes JSON to the file `path`."""
        Path(path).write_text(self.to_json_string(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "InfiMMHDConfig":
        """Reads what `save` (or `save_pretrained`) wrote; ValueError names a file that cannot be used."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"path must name a model's config.json, got {str(path)!r} (no such file)")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:  # broken JSON and wrong encodings are ValueErrors too
            raise ValueError(f"path must hold a model's config, got {str(path)!r}: {error}") from error


_OWN_KEYS = (
    *_PARTS,
    "text_config",
    "fusion",
    "position",
    "image_token_id",
    "end_of_chunk_token_id",
    "pad_token_id",
)
_INHERITED_KEYS = {
    *PreTrainedConfig().to_dict(),
    "model_type",
    "transformers_version",
    "architectures",
    "auto_map",
    "attn_implementation",
    "dtype",
    "torch_dtype",
    "name_or_path",
    "tie_word_embeddings",
    # what transformers itself hands to from_dict
    "_commit_hash",
    "experts_implementation",
    "num_labels",
    "output_attentions",
}
_VOLATILE_KEYS = ("transformers_version", "architectures", "_name_or_path", "dtype", "auto_map")


def _settings(config: InfiMMHDConfig) -> dict[str, Any]:
    values = config.to_dict()
    for part in (values, values["text_config"]):
        for key in _VOLATILE_KEYS:
            part.pop(key, None)
    return values


def _part(name: str, value: Any) -> Any:
    part = _PARTS[name]
    if value is None:
        return part()
    if isinstance(value, part):
        return copy.deepcopy(value)
    require(isinstance(value, dict), name, f"be a {part.__name__} or a dict", value)
    require_known_keys(value, [field.name for field in dataclasses.fields(part)], part.__name__, f"{name}.")
    return part(**copy.deepcopy(value))

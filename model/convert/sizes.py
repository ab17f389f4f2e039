"""The configuration that belongs to a checkpoint: sizes from its tensors' shapes, the rest from its
config.json, from a preset that has these sizes, or not at all."""

import copy
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..checks import require
from ..config import InfiMMHDConfig
from ..presets import checked, preset
from ..text_config import TEXT_MODEL_TYPES, checked_text_config
from ..vision_config import VisionConfig
from .files import read_json
from .forms import EVA_CLIP, INFIMM_STAGE1, OPEN_CLIP, OPEN_CLIP_TIMM, TIMM, TRANSFORMERS_CLIP, Form
from .links import Shapes

_EVA = (TIMM.name, EVA_CLIP.name, OPEN_CLIP_TIMM.name, INFIMM_STAGE1.name)
_EVA_KNOWN = ("infimm_hd_13b", "infimm_hd_7b")
"""Presets whose ViT or whole sizes are enough to recognise a checkpoint of EVA names."""
_WINDOW = ("window_size",)
_NO_SIZES = ("window_size", "feature_layer", "norm_gain_init", "position_init")
_TEXT_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")


def vision_sizes(shapes: Shapes) -> dict[str, Any]:
    """The fields of `VisionConfig` that shapes tell."""
    hidden, patch_values = _shape(shapes, "vision.patch_embed.weight", 2)
    rows, _ = _shape(shapes, "vision.position_table", 2)
    patch, grid = math.isqrt(patch_values // 3), math.isqrt(rows - 1)
    require(3 * patch**2 == patch_values, "SRC", "have square patches of 3 colours", patch_values)
    require(1 + grid**2 == rows, "SRC", "have a position table of a CLS token and a square grid", rows)
    return dict(
        window_size=grid * patch,
        patch_size=patch,
        hidden_size=hidden,
        num_layers=_count(shapes, r"vision\.blocks\.(\d+)\..*"),
        intermediate_size=_shape(shapes, "vision.blocks.0.mlp_in.weight", 2)[0],
        key_bias="vision.blocks.0.attn.k_bias" in shapes,
        patch_bias="vision.patch_embed.bias" in shapes,
        embedding_norm="vision.embedding_norm.weight" in shapes,
    )


def text_sizes(shapes: Shapes) -> dict[str, int]:
    """The fields of a Llama's config that shapes tell."""
    vocab_size, hidden = _shape(shapes, "language.model.embed_tokens.weight", 2)
    return dict(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=_shape(shapes, "language.model.layers.0.mlp.gate_proj.weight", 2)[0],
        num_hidden_layers=_count(shapes, r"language\.model\.layers\.(\d+)\..*"),
    )


def vision_config(form: Form, folder: Path, shapes: Shapes, wanted: VisionConfig | None) -> VisionConfig:
    """Of a vision tower. `wanted`, a preset's, has to agree in everything but the size of the window.

    ValueError where nothing tells what shapes do not: heads, kind of block, activation."""
    sizes, config = vision_sizes(shapes), None
    try:
        if told := vision_hints(form, folder):
            config = VisionConfig(**(told | sizes))
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _unusable(folder, error) from error
    if wanted is None and config is None and form.name in _EVA:
        known = preset(_EVA_KNOWN[0]).vision_config
        wanted = None if _differing(known, sizes, ignored=_WINDOW) else known
    if wanted is None:
        rule = "come with a config file, or with --preset, which tells heads, kind of block and activation"
        require(config is not None, "SRC", rule, f"{form.name} weights of sizes {sizes}")
        return config
    given = sizes if config is None else sizes | {name: getattr(config, name) for name in _SHAPELESS}
    _refuse(_differing(wanted, given, "vision_config.", _WINDOW))
    own = copy.deepcopy(wanted) if config is None else config
    own.feature_layer, own.window_size = wanted.feature_layer, sizes["window_size"]
    return own


_SHAPELESS = {"num_heads", "block", "activation", "layer_norm_eps"}


def vision_hints(form: Form, folder: Path) -> dict[str, Any]:
    """What a config file beside the weights tells of what shapes do not; {} where there is none."""
    if form is TRANSFORMERS_CLIP:
        values = read_json(folder, "config.json")
        values = values.get("vision_config", values)
        if "num_attention_heads" not in values and "hidden_act" not in values:
            return {}
        return dict(
            num_heads=values.get("num_attention_heads", 12),
            activation=values.get("hidden_act", "quick_gelu"),
            layer_norm_eps=values.get("layer_norm_eps", 1e-5),
            block="pre_norm",
        )
    if form is OPEN_CLIP:
        return _open_clip_hints(folder)
    if form is TIMM:
        values = read_json(folder, "config.json")
        if not str(values.get("architecture", "")).startswith("eva02_enormous"):
            return {}
        heads = values.get("model_args", {}).get("num_heads", 16)
        return dict(num_heads=heads, activation="gelu", layer_norm_eps=1e-6, block="post_norm")
    return {}


def _open_clip_hints(folder: Path) -> dict[str, Any]:
    values = read_json(folder, "open_clip_config.json").get("model_cfg", {})
    vision = values.get("vision_cfg", {})
    if "width" not in vision:
        return {}
    return dict(
        num_heads=vision["width"] // vision.get("head_width", 64),
        activation="quick_gelu" if values.get("quick_gelu") else "gelu",
        layer_norm_eps=1e-5,
        block="pre_norm",
    )


def text_config(folder: Path, shapes: Shapes) -> PreTrainedConfig:
    """Of a transformers folder, whose config.json has to agree with the shapes."""
    values = read_json(folder, "config.json")
    require(bool(values), "SRC", "have a config.json beside a language model's weights", str(folder))
    model_type = values.get("model_type")
    rule = f"have a config.json of model_type {', '.join(TEXT_MODEL_TYPES)}"
    require(model_type in TEXT_MODEL_TYPES, "SRC", rule, model_type)
    try:
        config = checked_text_config(AutoConfig.for_model(**values))
    except Exception as error:  # transformers says no through a dozen types
        raise _unusable(folder, error) from error
    _refuse(_differing(config, text_sizes(shapes)), f"{str(folder / 'config.json')!r}")
    return config


def stage1_config(folder: Path, shapes: Shapes, wanted: InfiMMHDConfig | None) -> InfiMMHDConfig:
    """Of the released stage-1 model: no connector, the last block's output, one letter-boxed window."""
    vision, text = vision_sizes(shapes), text_sizes(shapes)
    layers = sorted(
        int(found[1])
        for name in shapes
        if (found := re.fullmatch(r"gated_blocks\.(\d+)\.q_proj\.weight", name))
    )
    require(bool(layers), "SRC", "have gated cross-attention blocks (attn.to_q.weight)", "none")
    interval = layers[0] + 1
    legal = layers == list(range(layers[0], text["num_hidden_layers"], interval))
    require(legal, "SRC", "have a gated block before every n-th layer", layers)
    inner, _ = _shape(shapes, f"gated_blocks.{layers[0]}.q_proj.weight", 2)
    ffn, hidden = _shape(shapes, f"gated_blocks.{layers[0]}.ffn_in.weight", 2)
    gated = dict(interval=interval, inner_size=inner, ffn_ratio=ffn // hidden)

    given = wanted or _written_config(folder)
    for config in [given] if given else map(preset, _EVA_KNOWN):
        own = config.gated_cross_attention
        found = SimpleNamespace(
            interval=own.interval, inner_size=own.num_heads * own.head_dim, ffn_ratio=own.ffn_ratio
        )
        differences = [
            *_differing(config.vision_config, vision, "vision_config.", _WINDOW),
            *_differing(config.text_config, text, "text_config."),
            *_differing(found, gated, "gated_cross_attention."),
        ]
        if not differences:
            return _as_stage1(config, vision["window_size"])
        if given:
            _refuse(differences, "--preset" if wanted else f"{str(folder / 'config.json')!r}")
    raise ValueError(
        f"SRC must have the sizes of {' or '.join(_EVA_KNOWN)}, or come with config.json or --preset, "
        f"got vision {vision}, language {text}, gated blocks {gated}"
    )


def _written_config(folder: Path) -> InfiMMHDConfig | None:
    """From the training program's own settings as JSON: "visual", "language", token ids, interval."""
    values = read_json(folder, "config.json")
    if not {"visual", "language"} <= values.keys():
        return None
    visual, language = values["visual"], dict(values["language"])
    language.pop("_name_or_path", None)
    try:
        config = InfiMMHDConfig(
            vision_config=VisionConfig(
                window_size=visual["image_size"],
                patch_size=visual["patch_size"],
                hidden_size=visual["width"],
                num_layers=visual["layers"],
                num_heads=visual["width"] // visual["head_width"],
                intermediate_size=round(visual["width"] * visual["mlp_ratio"]),
                block="post_norm" if visual.get("postnorm") else "pre_norm",
                feature_layer=-1,
            ),
            text_config=AutoConfig.for_model(**language),
            image_token_id=values["image_token_id"],
            end_of_chunk_token_id=values["eoc_token_id"],
            pad_token_id=language.get("pad_token_id") or 0,
        )
        config.gated_cross_attention.interval = values["cross_attn_every_n_layers"]
        for name in ("num_heads", "head_dim", "ffn_ratio"):
            if name in values.get("gated_cross_attention", {}):
                setattr(config.gated_cross_attention, name, values["gated_cross_attention"][name])
        return checked(config)
    except Exception as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(
        f"SRC must have a usable config file, got {str(folder)!r}: {type(error).__name__}: {reason}"
    )


def _as_stage1(config: InfiMMHDConfig, window_size: int) -> InfiMMHDConfig:
    config = copy.deepcopy(config)
    config.vision_config.window_size = window_size
    config.vision_config.feature_layer = -1
    config.connector.kind = "none"
    config.image.mode, config.image.resize = "single", "letterbox"
    config.gated_cross_attention.ffn_before_image = True
    return checked(config)


def require_sizes_of(wanted: InfiMMHDConfig, config: InfiMMHDConfig) -> None:
    """ValueError unless a model that is read whole has the sizes of the preset that was named."""
    differences = []
    for name in ("vision_config", "gated_cross_attention", "connector"):
        values = dataclasses.asdict(getattr(config, name))
        differences += _differing(getattr(wanted, name), values, f"{name}.", _NO_SIZES)
    text = {name: getattr(config.text_config, name) for name in _TEXT_SIZES}
    _refuse([*differences, *_differing(wanted.text_config, text, "text_config.")])


def _differing(
    config: Any, sizes: Mapping[str, Any], prefix: str = "", ignored: Sequence[str] = ()
) -> list[str]:
    return [
        f"{prefix}{name} {getattr(config, name)} for {value}"
        for name, value in sizes.items()
        if name not in ignored and getattr(config, name) != value
    ]


def _refuse(differences: Sequence[str], argument: str = "--preset") -> None:
    rule = f"{argument} must have the sizes of SRC's tensors"
    if differences:
        raise ValueError(f"{rule}, got {', '.join(differences)}")


def _shape(shapes: Shapes, name: str, dimensions: int) -> list[int]:
    require(name in shapes, "SRC", f"have the tensor that becomes {name}", "a checkpoint without it")
    rule = f"have {dimensions} dimensions in the tensor that becomes {name}"
    require(len(shapes[name]) == dimensions, "SRC", rule, shapes[name])
    return shapes[name]


def _count(names: Iterable[str], pattern: str) -> int:
    numbers = [int(found[1]) for name in names if (found := re.fullmatch(pattern, name))]
    return max(numbers, default=0) + 1

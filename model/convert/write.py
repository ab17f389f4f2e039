"""Writes a folder of a form: weights shard by shard, the configuration that belongs to it, the tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..checks import require
from ..config import InfiMMHDConfig
from ..generation import default_generation_config
from ..vision_config import VisionConfig
from .checkpoint import Tensors, links_of
from .forms import (
    EVA_CLIP,
    INFIMM_STAGE1,
    OPEN_CLIP,
    OPEN_CLIP_TIMM,
    OWN,
    TIMM,
    TRANSFORMERS_CLIP,
    TRANSFORMERS_LLAMA,
    Form,
)
from .report import Report
from .shards import ShardWriter

TARGETS: dict[str, tuple[Form, ...]] = {
    "infimm-hd": (OWN,),
    "infimm-stage1": (INFIMM_STAGE1,),
    "timm": (TIMM,),
    "eva-clip": (EVA_CLIP,),
    "open-clip": (OPEN_CLIP_TIMM, OPEN_CLIP),
    "transformers-clip": (TRANSFORMERS_CLIP,),
    "transformers-llama": (TRANSFORMERS_LLAMA,),
}
"""Forms by a target's name; open_clip has one for post-norm blocks (timm's), one for pre-norm blocks."""


def form_of_target(target: str, config: VisionConfig | None) -> Form:
    """The form that a vision tower is written in."""
    forms = TARGETS[target]
    pre_norm = config is not None and config.block == "pre_norm"
    form = forms[-1] if pre_norm else forms[0]
    if form in (TRANSFORMERS_CLIP, OPEN_CLIP):
        require(pre_norm, "--to", "be a form for post-norm blocks (timm, open-clip, eva-clip)", target)
    return form


def write_weights(writer: ShardWriter, form: Form, tensors: Tensors, config: InfiMMHDConfig | None) -> None:
    """Writes our `tensors` under the form's names."""
    for link in links_of(form, tensors, config):
        results = link.to_theirs([tensors[name]() for name in link.ours])
        for name, tensor in zip(link.theirs, results, strict=True):
            writer.add(form.prefixes[0] + name, tensor)
    writer.finish()


def write_own_config(folder: Path, config: InfiMMHDConfig, dtype: torch.dtype) -> None:
    config.dtype = dtype
    config.text_config.dtype = None  # or the language model would be made in a type of its own
    config.save(folder / "config.json")
    default_generation_config(config).save_pretrained(folder)


def write_config(
    folder: Path,
    form: Form,
    config: InfiMMHDConfig | None,
    vision: VisionConfig | None,
    text: PreTrainedConfig | None,
    dtype: torch.dtype,
    report: Report,
) -> None:
    """The config file of one of the other forms."""
    if form is INFIMM_STAGE1:
        _write_json(folder / "config.json", _stage1_settings(config, dtype))
    elif form is TRANSFORMERS_LLAMA:
        text.dtype = dtype
        text.architectures = [_causal_lm(text)]
        text.save_pretrained(folder)
    elif form is TIMM:
        _write_json(folder / "config.json", _timm_settings(vision))
    elif form is TRANSFORMERS_CLIP:
        _write_json(folder / "config.json", _transformers_clip_settings(vision, dtype))
    elif form is OPEN_CLIP:
        _write_json(folder / "open_clip_config.json", _open_clip_settings(vision))
    else:
        report.notes.append(f"no config file: {form.name} has none for a vision tower alone")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _causal_lm(text: PreTrainedConfig) -> str:
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(text)).__name__


def _stage1_settings(config: InfiMMHDConfig, dtype: torch.dtype) -> dict[str, Any]:
    vision, gated = config.vision_config, config.gated_cross_attention
    require(vision.activation == "gelu", "model", "have GELU in its ViT for infimm-stage1", vision.activation)
    language = config.text_config.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    return dict(
        image_token_id=config.image_token_id,
        eoc_token_id=config.end_of_chunk_token_id,
        cross_attn_every_n_layers=gated.interval,
        gated_cross_attention=dict(
            num_heads=gated.num_heads, head_dim=gated.head_dim, ffn_ratio=gated.ffn_ratio
        ),
        visual=dict(
            image_size=vision.window_size,
            layers=vision.num_layers,
            width=vision.hidden_size,
            head_width=vision.hidden_size // vision.num_heads,
            patch_size=vision.patch_size,
            mlp_ratio=vision.intermediate_size / vision.hidden_size,
            postnorm=vision.block == "post_norm",
            xattn=False,
            fusedLN=False,
        ),
        language=language,
    )


def _timm_settings(vision: VisionConfig) -> dict[str, Any]:
    """What `timm.create_model("local-dir:...")` reads; the model has no head and no norm before it."""
    require(vision.block == "post_norm", "model", "have post-norm blocks for timm's EVA", vision.block)
    model_args = dict(
        img_size=vision.window_size,
        patch_size=vision.patch_size,
        embed_dim=vision.hidden_size,
        depth=vision.num_layers,
        num_heads=vision.num_heads,
        mlp_ratio=vision.intermediate_size / vision.hidden_size,
    )
    return dict(architecture="eva02_enormous_patch14_clip_224", num_classes=0, model_args=model_args)


def _transformers_clip_settings(vision: VisionConfig, dtype: torch.dtype) -> dict[str, Any]:
    return dict(
        architectures=["CLIPVisionModel"],
        model_type="clip_vision_model",
        dtype=str(dtype).removeprefix("torch."),
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
        image_size=vision.window_size,
        patch_size=vision.patch_size,
        hidden_act=vision.activation,
        layer_norm_eps=vision.layer_norm_eps,
    )


def _open_clip_settings(vision: VisionConfig) -> dict[str, Any]:
    vision_cfg = dict(
        image_size=vision.window_size,
        layers=vision.num_layers,
        width=vision.hidden_size,
        head_width=vision.hidden_size // vision.num_heads,
        patch_size=vision.patch_size,
        mlp_ratio=vision.intermediate_size / vision.hidden_size,
    )
    return dict(model_cfg=dict(quick_gelu=vision.activation == "quick_gelu", vision_cfg=vision_cfg))

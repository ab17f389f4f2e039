"""The checkpoint forms that are known: the one place with the names of other people's weights."""

import dataclasses
import fnmatch
from collections.abc import Iterable

from .links import DIVIDED, JOINED, KEYS_VALUES, PATCH_KERNEL, Rule, leading_ones

BLOCK = "vision.blocks.{block}."
GATED = "gated_blocks.{gated}."

_EVA_BLOCK = {
    "attn.qkv_proj.weight": "attn.qkv.weight",
    "attn.q_bias": "attn.q_bias",
    "attn.v_bias": "attn.v_bias",
    "attn.out_proj.{rest}": "attn.proj.{rest}",
    "attn_norm.{rest}": "norm1.{rest}",
    "mlp_in.{rest}": "mlp.fc1.{rest}",
    "mlp_out.{rest}": "mlp.fc2.{rest}",
    "mlp_norm.{rest}": "norm2.{rest}",
}
"""EVA-CLIP's own visual tower and timm's `eva02_enormous_patch14_clip_224`."""


def _eva(prefix: str) -> tuple[Rule, ...]:
    return (
        Rule("vision.patch_embed.weight", prefix + "patch_embed.proj.weight", PATCH_KERNEL),
        Rule("vision.patch_embed.bias", prefix + "patch_embed.proj.bias"),
        Rule("vision.cls_token", prefix + "cls_token", leading_ones(2)),
        Rule("vision.position_table", prefix + "pos_embed", leading_ones(1)),
        *(Rule(BLOCK + ours, f"{prefix}blocks.{{block}}.{theirs}") for ours, theirs in _EVA_BLOCK.items()),
    )


_OPENAI_BLOCK = "transformer.resblocks.{block}."
_OPENAI_CLIP = (
    Rule("vision.patch_embed.weight", "conv1.weight", PATCH_KERNEL),
    Rule("vision.cls_token", "class_embedding"),
    Rule("vision.position_table", "positional_embedding"),
    Rule("vision.embedding_norm.{rest}", "ln_pre.{rest}"),
    Rule(BLOCK + "attn.qkv_proj.weight", _OPENAI_BLOCK + "attn.in_proj_weight"),
    Rule(
        (BLOCK + "attn.q_bias", BLOCK + "attn.k_bias", BLOCK + "attn.v_bias"),
        _OPENAI_BLOCK + "attn.in_proj_bias",
        DIVIDED,
    ),
    Rule(BLOCK + "attn.out_proj.{rest}", _OPENAI_BLOCK + "attn.out_proj.{rest}"),
    Rule(BLOCK + "attn_norm.{rest}", _OPENAI_BLOCK + "ln_1.{rest}"),
    Rule(BLOCK + "mlp_in.{rest}", _OPENAI_BLOCK + "mlp.c_fc.{rest}"),
    Rule(BLOCK + "mlp_out.{rest}", _OPENAI_BLOCK + "mlp.c_proj.{rest}"),
    Rule(BLOCK + "mlp_norm.{rest}", _OPENAI_BLOCK + "ln_2.{rest}"),
)

_HF_LAYER = "encoder.layers.{block}."
_TRANSFORMERS_CLIP = (
    Rule("vision.patch_embed.weight", "embeddings.patch_embedding.weight", PATCH_KERNEL),
    Rule("vision.cls_token", "embeddings.class_embedding"),
    Rule("vision.position_table", "embeddings.position_embedding.weight"),
    Rule("vision.embedding_norm.{rest}", "pre_layrnorm.{rest}"),  # transformers' own spelling
    Rule(
        BLOCK + "attn.qkv_proj.weight",
        tuple(f"{_HF_LAYER}self_attn.{part}_proj.weight" for part in "qkv"),
        JOINED,
    ),
    *(Rule(f"{BLOCK}attn.{part}_bias", f"{_HF_LAYER}self_attn.{part}_proj.bias") for part in "qkv"),
    Rule(BLOCK + "attn.out_proj.{rest}", _HF_LAYER + "self_attn.out_proj.{rest}"),
    Rule(BLOCK + "attn_norm.{rest}", _HF_LAYER + "layer_norm1.{rest}"),
    Rule(BLOCK + "mlp_in.{rest}", _HF_LAYER + "mlp.fc1.{rest}"),
    Rule(BLOCK + "mlp_out.{rest}", _HF_LAYER + "mlp.fc2.{rest}"),
    Rule(BLOCK + "mlp_norm.{rest}", _HF_LAYER + "layer_norm2.{rest}"),
)

_FLAMINGO = "lang_encoder.gated_cross_attn_layers."
_FLAMINGO_GATED = {
    "attn_norm.{rest}": "attn.norm.{rest}",
    "q_proj.weight": "attn.to_q.weight",
    "out_proj.weight": "attn.to_out.weight",
    "attn_gate": "attn_gate",
    "ffn_norm.{rest}": "ff.0.{rest}",
    "ffn_in.weight": "ff.1.weight",
    "ffn_out.weight": "ff.3.weight",
    "ffn_gate": "ff_gate",
}
_INFIMM_STAGE1 = (
    *_eva("vision_encoder."),
    Rule("vision_keys_values.weight", _FLAMINGO + "{every_gated}.attn.to_kv.weight", KEYS_VALUES),
    *(Rule(GATED + ours, f"{_FLAMINGO}{{gated}}.{theirs}") for ours, theirs in _FLAMINGO_GATED.items()),
    Rule("language.model.layers.{layer}.{rest}", "lang_encoder.old_decoder_blocks.{layer}.{rest}"),
    Rule("language.{rest}", "lang_encoder.{rest}"),
)

_NO_TEXT = "text tower: the model has its own language model"
_NO_HEAD = "head behind the features: features are a block's output"
_COMPUTED = "computed, not learned"
_EVA_HEADS = {"norm.*": _NO_HEAD, "fc_norm.*": _NO_HEAD, "head.*": _NO_HEAD}
_NO_HEAD_WRITTEN = ("not written: norm and head behind the features, which the model does not have",)
_CLIP_SCALES = {"logit_scale": _NO_TEXT, "logit_bias": _NO_TEXT}
_OPENAI_TEXT = {
    "transformer.*": _NO_TEXT,
    "token_embedding.*": _NO_TEXT,
    "positional_embedding": _NO_TEXT,
    "ln_final.*": _NO_TEXT,
    "text_projection*": _NO_TEXT,
    "text.*": _NO_TEXT,
    **_CLIP_SCALES,
}
_ROTARY = {"*rotary_emb.inv_freq": _COMPUTED}


@dataclasses.dataclass(frozen=True)
class Form:
    """A checkpoint form: how it is recognised, its names, and what of it the model has no place for."""

    name: str
    parts: tuple[str, ...]
    """What it holds: "vision", "gated", "language"."""
    rules: tuple[Rule, ...]
    signature: str
    """A name, behind one of `prefixes`, by which a checkpoint of this form is recognised."""
    prefixes: tuple[str, ...] = ("",)
    """What may stand in front of all names; an export writes the first."""
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    """Names (wildcards) that the model has no place for, and why."""
    left_out_beside: dict[str, str] = dataclasses.field(default_factory=dict)
    """The same for names that do not stand behind the prefix."""
    zero: tuple[str, ...] = ()
    """Names that may be there if all their values are zero."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Other names of the same tensors, and the names that the rules know."""
    not_written: tuple[str, ...] = ()
    """What an export lacks of the form, for the report."""

    def prefix_in(self, names: Iterable[str]) -> str | None:
        """The prefix with which the form occurs in `names`."""
        names = set(names)
        for prefix in sorted(self.prefixes, key=len, reverse=True):
            if prefix + self.signature in names:
                return prefix
        return None


OWN = Form(
    "infimm-hd",
    ("vision", "gated", "language"),
    (Rule("{rest}", "{rest}"),),
    "language.model.embed_tokens.weight",
)
INFIMM_STAGE1 = Form(
    "infimm-stage1",
    ("vision", "gated", "language"),
    _INFIMM_STAGE1,
    "vision_encoder.patch_embed.proj.weight",
    ("", "model."),
    left_out={f"vision_encoder.{name}": reason for name, reason in _EVA_HEADS.items()} | _ROTARY,
    zero=("vision_encoder.blocks.*.attn.k_bias",),
    aliases=(
        ("lang_encoder.model.layers.{n}.decoder_layer.{rest}", "lang_encoder.old_decoder_blocks.{n}.{rest}"),
        ("lang_encoder.model.layers.{n}.gated_cross_attn_layer.{rest}", _FLAMINGO + "{n}.{rest}"),
    ),
    not_written=(
        *_NO_HEAD_WRITTEN,
        "not written: second names (lang_encoder.model.layers), which a module's loader fills with the first",
    ),
)
_EVA_FORM = dict(
    parts=("vision",),
    rules=_eva(""),
    signature="blocks.0.attn.qkv.weight",
    left_out=_EVA_HEADS,
    left_out_beside={"visual.head.*": _NO_HEAD, **_OPENAI_TEXT},
    zero=("blocks.*.attn.k_bias",),
    not_written=_NO_HEAD_WRITTEN,
)
TIMM = Form("timm", **_EVA_FORM)
EVA_CLIP = Form("eva-clip", prefixes=("visual.",), **_EVA_FORM)
OPEN_CLIP_TIMM = Form("open-clip-timm", prefixes=("visual.trunk.", "trunk."), **_EVA_FORM)
OPEN_CLIP = Form(
    "open-clip",
    ("vision",),
    _OPENAI_CLIP,
    "conv1.weight",
    ("visual.", ""),
    left_out={"ln_post.*": _NO_HEAD, "proj": _NO_HEAD},
    left_out_beside=_OPENAI_TEXT,
    not_written=_NO_HEAD_WRITTEN,
)
TRANSFORMERS_CLIP = Form(
    "transformers-clip",
    ("vision",),
    _TRANSFORMERS_CLIP,
    "embeddings.patch_embedding.weight",
    ("", "vision_model.", "vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."),
    left_out={"post_layernorm.*": _NO_HEAD, "embeddings.position_ids": _COMPUTED},
    left_out_beside={
        "text_model.*": _NO_TEXT,
        "text_projection.weight": _NO_TEXT,
        "visual_projection.weight": _NO_HEAD,
        **_CLIP_SCALES,
    },
    not_written=_NO_HEAD_WRITTEN,
)
TRANSFORMERS_LLAMA = Form(
    "transformers-llama",
    ("language",),
    (Rule("language.{rest}", "{rest}"),),
    "model.embed_tokens.weight",
    left_out=_ROTARY,
)
FORMS = {
    form.name: form
    for form in (
        OWN,
        INFIMM_STAGE1,
        TIMM,
        EVA_CLIP,
        OPEN_CLIP_TIMM,
        OPEN_CLIP,
        TRANSFORMERS_CLIP,
        TRANSFORMERS_LLAMA,
    )
}
"""All forms by name; a checkpoint is of the first that is recognised in it."""


def reason_for(name: str, patterns: dict[str, str]) -> str | None:
    """Why `name` is left out by one of the wildcards of `patterns`, or None."""
    for pattern, reason in patterns.items():
        if fnmatch.fnmatchcase(name, pattern):
            return reason
    return None

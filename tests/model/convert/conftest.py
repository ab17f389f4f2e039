"""Small models and checkpoints of other people's forms, written by the tests' own hand."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model import InfiMMHD, InfiMMHDConfig, VisionConfig, preset
from model.presets import clip_vit_l_14

GATED_LAYERS = (1, 3)


def stage1_model_config() -> InfiMMHDConfig:
    """A released stage-1 model in small: no connector, the last block's output, gates every 2 layers."""
    config = preset("tiny")
    config.connector.kind = "none"
    config.gated_cross_attention.interval = 2
    config.image.mode, config.image.resize = "single", "letterbox"
    config.gated_cross_attention.ffn_before_image = True
    return InfiMMHDConfig.from_dict(config.to_dict())


def clip_config(window_size: int = 56) -> VisionConfig:
    """CLIP's ViT in small."""
    config = clip_vit_l_14(window_size)
    config.hidden_size, config.num_layers, config.num_heads, config.intermediate_size = 32, 3, 2, 64
    return config


def random_weights(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight away from its start: norms and gates too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator) * 0.1
            weight.copy_(1 + noise if name.endswith("norm.weight") else noise)
    return module.eval()


def stage1_tensors(model: InfiMMHD, gated_layers: Sequence[int] = GATED_LAYERS) -> dict[str, torch.Tensor]:
    """The names of the public stage-1 program, written down here a second time, from its modules."""
    ours = {name: weight.detach() for name, weight in model.state_dict().items()}
    theirs = eva_tensors(model, "vision_encoder.")
    width = model.config.vision_config.hidden_size
    theirs |= {
        "vision_encoder.norm.weight": torch.ones(width),
        "vision_encoder.norm.bias": torch.zeros(width),
        "vision_encoder.head.weight": torch.ones(16, width),
        "vision_encoder.head.bias": torch.zeros(16),
        "lang_encoder.model.embed_tokens.weight": ours["language.model.embed_tokens.weight"],
        "lang_encoder.model.norm.weight": ours["language.model.norm.weight"],
        "lang_encoder.lm_head.weight": ours["language.lm_head.weight"],
    }
    for name, weight in ours.items():
        if name.startswith("language.model.layers."):
            layer, _, rest = name.removeprefix("language.model.layers.").partition(".")
            theirs[f"lang_encoder.old_decoder_blocks.{layer}.{rest}"] = weight
            theirs[f"lang_encoder.model.layers.{layer}.decoder_layer.{rest}"] = weight
    for number, layer in enumerate(gated_layers):
        block = f"gated_blocks.{layer}."
        keys, values = ours["vision_keys_values.weight"][number]
        gated = {
            "attn.norm.weight": ours[block + "attn_norm.weight"],
            "attn.norm.bias": ours[block + "attn_norm.bias"],
            "attn.to_q.weight": ours[block + "q_proj.weight"],
            "attn.to_kv.weight": torch.cat([keys, values]),
            "attn.to_out.weight": ours[block + "out_proj.weight"],
            "attn_gate": ours[block + "attn_gate"],
            "ff.0.weight": ours[block + "ffn_norm.weight"],
            "ff.0.bias": ours[block + "ffn_norm.bias"],
            "ff.1.weight": ours[block + "ffn_in.weight"],
            "ff.3.weight": ours[block + "ffn_out.weight"],
            "ff_gate": ours[block + "ffn_gate"],
        }
        for name, weight in gated.items():
            theirs[f"lang_encoder.gated_cross_attn_layers.{layer}.{name}"] = weight
            theirs[f"lang_encoder.model.layers.{layer}.gated_cross_attn_layer.{name}"] = weight
    return theirs


def eva_tensors(model: InfiMMHD, prefix: str) -> dict[str, torch.Tensor]:
    """The names of EVA-CLIP's visual tower and of timm."""
    vision, config = model.vision, model.config.vision_config
    patch = config.patch_size
    theirs = {
        "cls_token": vision.cls_token[None, None],
        "pos_embed": vision.position_table[None],
        "patch_embed.proj.weight": vision.patch_embed.weight.view(-1, 3, patch, patch),
        "patch_embed.proj.bias": vision.patch_embed.bias,
    }
    for number, block in enumerate(vision.blocks):
        parts = {
            "attn.proj": block.attn.out_proj,
            "norm1": block.attn_norm,
            "norm2": block.mlp_norm,
            "mlp.fc1": block.mlp_in,
            "mlp.fc2": block.mlp_out,
        }
        for name, module in parts.items():
            theirs[f"blocks.{number}.{name}.weight"] = module.weight
            theirs[f"blocks.{number}.{name}.bias"] = module.bias
        theirs[f"blocks.{number}.attn.qkv.weight"] = block.attn.qkv_proj.weight
        theirs[f"blocks.{number}.attn.q_bias"] = block.attn.q_bias
        theirs[f"blocks.{number}.attn.v_bias"] = block.attn.v_bias
    return {prefix + name: weight.detach().clone() for name, weight in theirs.items()}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], count: int = 3) -> None:
    """safetensors shards and their index."""
    folder.mkdir(exist_ok=True)
    names, weight_map = list(tensors), {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name].clone().contiguous() for name in names[number::count]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def stage1_model() -> InfiMMHD:
    return random_weights(InfiMMHD(stage1_model_config()))


@pytest.fixture
def stage1_file(stage1_model, tmp_path) -> Path:
    """As the released checkpoint: one torch file whose aliases share their storage."""
    path = tmp_path / "stage1.ckpt"
    torch.save(stage1_tensors(stage1_model), path)
    return path


@pytest.fixture
def stage1_config_file(tmp_path) -> Path:
    path = tmp_path / "stage1-preset.json"
    stage1_model_config().save(path)
    return path

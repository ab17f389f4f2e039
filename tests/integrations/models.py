"""Random transformers models, two narrow layers each."""

from collections.abc import Callable

import torch
import transformers
from transformers.models.qwen2_vl import configuration_qwen2_vl, modeling_qwen2_vl

NARROW = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
VISION = dict(**NARROW, image_size=28, patch_size=7)
TEXT = dict(**NARROW, vocab_size=40, bos_token_id=1, eos_token_id=2, pad_token_id=0)

# name -> (model class, config class, its arguments)
TOWERS = {
    "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig, VISION),
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig, VISION),
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config, VISION),
    "dinov2 with registers": (
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig,
        VISION,
    ),
    "vit": (transformers.ViTModel, transformers.ViTConfig, VISION),
}


def build(
    model_class: type, config_class: type, arguments: dict, attn_implementation: str
) -> torch.nn.Module:
    """The same weights for every implementation; not training, so that no dropout acts."""
    torch.manual_seed(0)
    return model_class._from_config(config_class(**arguments), attn_implementation=attn_implementation).eval()


def tower(name: str, attn_implementation: str) -> torch.nn.Module:
    return build(*TOWERS[name], attn_implementation)


def bert(attn_implementation: str, **changes) -> torch.nn.Module:
    return build(transformers.BertModel, transformers.BertConfig, TEXT | changes, attn_implementation)


def llama(attn_implementation: str, **changes) -> torch.nn.Module:
    """Four query heads share two key heads."""
    arguments = TEXT | dict(num_attention_heads=4, num_key_value_heads=2) | changes
    return build(transformers.LlamaForCausalLM, transformers.LlamaConfig, arguments, attn_implementation)


def qwen2_vl_tower(attn_implementation: str) -> torch.nn.Module:
    arguments = dict(depth=2, embed_dim=32, hidden_size=48, num_heads=2, mlp_ratio=2, patch_size=4)
    return build(
        modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel,
        configuration_qwen2_vl.Qwen2VLVisionConfig,
        arguments,
        attn_implementation,
    )


def outputs_and_gradients(model: Callable, parameters: dict, inputs: dict) -> dict[str, torch.Tensor]:
    """The last hidden states of a call and the gradients of a fixed weighted sum of them."""
    torch.manual_seed(1)
    out = model(**inputs).last_hidden_state
    floating = {name: x for name, x in inputs.items() if torch.is_tensor(x) and x.requires_grad}
    leaves = parameters | floating
    grads = torch.autograd.grad((out * torch.randn_like(out)).sum(), list(leaves.values()), allow_unused=True)
    named = dict(zip(leaves, grads, strict=True))
    return {"out": out} | {name: grad for name, grad in named.items() if grad is not None}

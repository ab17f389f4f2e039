"""Window attention in the ViTs of timm: the layers keep their parameters, only their forward changes.

    from infimm_kernels.integrations.timm import use_window_attention

    model = timm.create_model("eva02_enormous_patch14_clip_224", img_size=448)
    use_window_attention(model)  # returns 64, the number of its layers

Attention without a mask and without rotary positions is served, which is all that ViT-E and a plain ViT need.
"""

from typing import NamedTuple

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional as F

from infimm_kernels import checks
from infimm_kernels.attention import window_attention
from infimm_kernels.integrations.batched import batched_attention


def use_window_attention(module: nn.Module) -> int:
    """Run every `Attention` and `EvaAttention` of timm inside `module` on this package's attention, in place.

    softmax(q k^T / sqrt(head_dim)) v as before, on the CPU or a GPU: a fused projection goes to
    `window_attention` as it is; queries, keys and values that are projected apart or normalised go to
    `varlen_attention`, without a copy. Each layer changes its class to a subclass with another forward;
    parameters, buffers, `state_dict` and hooks stay, and copying, pickling and torch.compile work as before.
    The number of prefix tokens (CLS, registers) comes from the layer or the model around it. Other kinds of
    attention, such as a pooling head, are left alone, and so is a layer that was changed before.

    Args:
        module: a timm model, or any module with its layers inside, on any device, in any dtype of
            `window_attention`.

    Returns:
        The number of layers that were changed by this call.

    Raises:
        ValueError: `module` holds no such layer.
        NotImplementedError: rotary positions, a gate, or a class derived from timm's, with the names of all
            layers concerned; nothing is changed then. A changed layer raises it with its own name when called
            with rotary positions, an attention mask or is_causal, or with attention dropout in training.
    """
    if not isinstance(module, nn.Module):
        checks.fail("module", "be a torch.nn.Module", type(module).__name__)
    sites = _sites(module, "", _Surroundings(0, None))
    if not sites:
        checks.fail("module", "contain an Attention or EvaAttention of timm", type(module).__name__)
    reasons = [f"{site.name or 'module'}: {site.reason}" for site in sites if site.reason is not None]
    if reasons:
        raise NotImplementedError(f"window_attention cannot serve {'; '.join(reasons)}")
    replaced = 0
    for site in sites:
        replacement = REPLACEMENTS.get(type(site.layer))
        if replacement is not None:
            site.layer.__class__ = replacement
            site.layer.window_attention_name = site.name or "module"
            site.layer.window_attention_prefix = min(site.num_prefix_tokens, checks.MAX_PREFIX_TOKENS)
            replaced += 1
    return replaced


class _Surroundings(NamedTuple):
    """What the modules around a layer tell about it."""

    num_prefix_tokens: int
    rope_owner: str | None


class _Site(NamedTuple):
    """A layer, its name in the module, and why it cannot be served (None when it can)."""

    name: str
    layer: nn.Module
    num_prefix_tokens: int
    reason: str | None


def _sites(module: nn.Module, name: str, around: _Surroundings) -> list[_Site]:
    """Every attention layer of timm in `module`, changed ones too, in the order of its children."""
    if getattr(module, "rope", None) is not None:
        around = around._replace(rope_owner=f"{name}.rope".lstrip("."))
    num_prefix_tokens = getattr(module, "num_prefix_tokens", None)
    if checks.is_int(num_prefix_tokens):
        around = around._replace(num_prefix_tokens=num_prefix_tokens)
    if isinstance(module, (Attention, AttentionRope, EvaAttention)):
        return [_Site(name, module, around.num_prefix_tokens, _why_not(module, around.rope_owner))]
    sites = []
    for child_name, child in module.named_children():
        sites += _sites(child, f"{name}.{child_name}".lstrip("."), around)
    return sites


def _why_not(layer: nn.Module, rope_owner: str | None) -> str | None:
    if isinstance(layer, AttentionRope):
        return f"{type(layer).__name__} has rotary positions"
    if type(layer) not in (*REPLACEMENTS, *REPLACEMENTS.values()):
        return f"{type(layer).__name__} is derived from timm's attention and may compute something else"
    if getattr(layer, "gate", None) is not None:
        return "its output has a gate"
    if isinstance(layer, EvaAttention) and rope_owner is not None:
        return f"it is called with the rotary positions of {rope_owner}"
    return None


class WindowAttention(Attention):
    """timm's `Attention` on `window_attention`; made by `use_window_attention` alone."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: [batch, seqlen, dim] -> [batch, seqlen, dim_out]."""
        _check_call(self, attn_mask=attn_mask, is_causal=is_causal)
        return _project(self, _attend_packed(self, self.qkv(x)))


class WindowEvaAttention(EvaAttention):
    """timm's `EvaAttention` on `window_attention`; made by `use_window_attention` alone."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """x: [batch, seqlen, dim] -> [batch, seqlen, dim]."""
        _check_call(self, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        if self.qkv is None:
            projections = (self.q_proj, self.k_proj, self.v_proj)
            q, k, v = (project(x).unflatten(-1, (self.num_heads, -1)) for project in projections)
            return _project(self, _attend(self, q, k, v))
        if self.q_bias is None:
            return _project(self, _attend_packed(self, self.qkv(x)))
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        separate = self.qkv_bias_separate
        qkv = self.qkv(x) + bias if separate else F.linear(x, self.qkv.weight, bias)
        return _project(self, _attend_packed(self, qkv))


REPLACEMENTS = {Attention: WindowAttention, EvaAttention: WindowEvaAttention}


def _check_call(layer: nn.Module, **arguments: object) -> None:
    """Raise NotImplementedError for what the layer is asked for, in this call or by its dropout."""
    reasons = [name for name, value in arguments.items() if value is not None and value is not False]
    if layer.training and layer.attn_drop.p > 0:
        reasons.append(f"attention dropout {layer.attn_drop.p} in training")
    if reasons:
        raise NotImplementedError(
            f"window_attention cannot serve {layer.window_attention_name}: {', '.join(reasons)}"
        )


def _attend_packed(layer: nn.Module, qkv: Tensor) -> Tensor:
    """[batch, seqlen, 3 * num_heads * head_dim] -> [batch, seqlen, num_heads * head_dim]."""
    qkv = qkv.unflatten(-1, (3, layer.num_heads, -1))
    if not (isinstance(layer.q_norm, nn.Identity) and isinstance(layer.k_norm, nn.Identity)):
        return _attend(layer, *qkv.unbind(2))
    return window_attention(qkv, num_prefix_tokens=layer.window_attention_prefix).flatten(2)


def _attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k and v [batch, seqlen, num_heads, head_dim] -> [batch, seqlen, num_heads * head_dim]."""
    q, k = layer.q_norm(q), layer.k_norm(k)
    return batched_attention(q, k, v, num_prefix_tokens=layer.window_attention_prefix).flatten(2)


def _project(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.proj_drop(layer.proj(layer.norm(x)))

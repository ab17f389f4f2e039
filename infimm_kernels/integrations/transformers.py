"""attn_implementation="infimm": the encoders of transformers on this package's attention.

    from infimm_kernels.integrations.transformers import register

    register()
    model = AutoModel.from_pretrained("openai/clip-vit-large-patch14", attn_implementation="infimm")

What is served is attention without a mask: vision towers and unpadded encoders. transformers states a mask in
two places, and both are guarded. The mask function, called once per forward, returns None for a bidirectional
mask without padding and refuses every other. The attention function, called by each layer, refuses whatever a
model can ask for past it: a decoder that leaves causality to the kernel, a ready-made mask, an argument that
would change the result. So a model is computed exactly or not at all.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function
from transformers.utils import output_capturing

from infimm_kernels import checks
from infimm_kernels.attention import varlen_attention
from infimm_kernels.integrations.batched import batched_attention

# transformers reads a meaning into a name that contains one of these, and loads or checks another backend.
RESERVED = ("eager", "sdpa", "flash", "flex", "paged")

# What a model hands down to its layers without changing softmax(scale q k^T) v. An argument that is not here
# is refused: a newer model may bring a new one, and ignoring it would give another model's numbers.
HARMLESS = frozenset(
    {
        "cache_position",
        "interpolate_pos_encoding",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


def register(name: str = "infimm") -> None:
    """Make `attn_implementation=name` known to transformers, in this process; calling it again is harmless.

    From then on `from_pretrained(..., attn_implementation=name)` and `model.set_attn_implementation(name)`
    run the non-causal, unpadded attention of a model on `varlen_attention`, on the CPU or a GPU, with grouped
    keys and values where the model has them, with gradients, and under `torch.compile(fullgraph=True)`.
    Sequences packed in one row are served by the arguments FlashAttention has for them (`cu_seq_lens_q`,
    `cu_seq_lens_k`). A vision tower that packs only when the name contains "flash" (Qwen2-VL) attends image
    by image instead, with the same result.

    Everything else raises NotImplementedError with its reasons: causal models such as Llama, with a cache or
    without, unless transformers itself is told is_causal=False; padding or another mask; dropout in training;
    sliding windows, soft caps, sinks, a position bias; the request for attention weights; any argument
    unknown here. To find padding, the mask function reads the padding mask, if there is one, once per
    forward, which waits for a GPU; inside torch.compile it cannot, and a model must be called with
    attention_mask=None. A model outside transformers' attention interface (DeBERTa) ignores every name.

    Args:
        name: a Python identifier without "eager", "sdpa", "flash", "flex" or "paged", which transformers
            takes for its own.

    Raises:
        ValueError: `name` breaks the rule above, or is registered for something else.
    """
    if not isinstance(name, str) or not name.isidentifier() or any(word in name for word in RESERVED):
        checks.fail("name", f"be an identifier without {', '.join(RESERVED)}", repr(name))
    for interface, function in ((AttentionInterface, _attention), (AttentionMaskInterface, _mask)):
        if interface().get(name, function) is not function:
            checks.fail("name", f"not be registered in {interface.__name__} by others", repr(name))
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, _mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function: query, [batch, num_heads, seqlen_q, head_dim], attends to key and value.

    They are [batch, num_kv_heads, seqlen_k, head_dim]; the result is [batch, seqlen_q, num_heads, head_dim].
    With cu_seq_lens_q and cu_seq_lens_k the rows are one packed sequence, as in FlashAttention's varlen
    interface. The second result stands for the attention weights, which are never made.
    """
    reasons = _why_not(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    if (cu_seq_lens_q is None) != (cu_seq_lens_k is None):
        reasons.append("cu_seq_lens_q and cu_seq_lens_k must be given together")
    if reasons:
        raise NotImplementedError(
            f"infimm_kernels cannot serve the attention of {type(module).__name__}: {'; '.join(reasons)}"
        )
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if cu_seq_lens_q is None:
        return batched_attention(q, k, v, softmax_scale=scaling), None
    out = varlen_attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seq_lens_q.to(torch.int32),
        cu_seq_lens_k.to(torch.int32),
        max_seqlen_q=max_length_q if checks.is_int(max_length_q) else None,
        max_seqlen_k=max_length_k if checks.is_int(max_length_k) else None,
        softmax_scale=scaling,
    )
    return out.unflatten(0, q.shape[:2]), None


def _why_not(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    others: dict[str, object],
) -> list[str]:
    """Why this call cannot be computed exactly; empty when it can."""
    reasons = []
    # The call outweighs the module, as in transformers' own functions. A module that says nothing may be a
    # decoder: sdpa takes it for one.
    if is_causal is None:
        is_causal = getattr(module, "is_causal", None)
    if is_causal is None:
        reasons.append("neither the call nor the module says is_causal=False")
    elif is_causal:
        reasons.append("causal attention")
    if attention_mask is not None:
        reasons.append(f"an attention mask {list(attention_mask.shape)}")
    if dropout:
        reasons.append(f"dropout {dropout}")
    if isinstance(scaling, Tensor):
        reasons.append("a tensor as scaling")
    if query.shape[0] != key.shape[0]:
        reasons.append(f"a batch of {query.shape[0]} queries and {key.shape[0]} keys")
    if key.shape[-1] != value.shape[-1]:
        reasons.append(f"head_dim {key.shape[-1]} of the keys and {value.shape[-1]} of the values")
    for argument, given in others.items():
        if argument not in HARMLESS and given is not None and given is not False:
            reasons.append(f"the argument {argument}")
    if "output_attentions" not in others and _weights_are_recorded():
        reasons.append("the argument output_attentions")
    return reasons


def _weights_are_recorded() -> bool:
    """Whether the model was called with output_attentions=True and keeps it from its layers.

    transformers would answer with an empty tuple of weights. Its record is private, and inside torch.compile
    it can break the graph.
    """
    recorded = getattr(output_capturing, "_active_collector", None)
    if recorded is None or torch.compiler.is_compiling():
        return False
    return any(name.endswith("attentions") for name in recorded.get() or ())


def _mask(
    *,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **kwargs,
) -> None:
    """The mask function: None, for "no mask", when every query sees every key; NotImplementedError otherwise.

    mask_function: the rule (batch, head, query, key) -> bool of the mask, transformers' own object for "all".
    attention_mask: None or bool [batch, number of keys], False where a key is padding.
    """
    reason = None
    if mask_function is not bidirectional_mask_function:
        reason = "the model needs a causal, sliding or custom mask"
    elif not allow_is_bidirectional_skip:
        reason = "the model needs its mask as a tensor"
    elif attention_mask is not None:
        if torch.compiler.is_compiling():
            reason = "padding cannot be looked for inside torch.compile; call it with attention_mask=None"
        elif attention_mask.shape[-1] < kv_offset + kv_length:
            reason = f"padding: {kv_offset + kv_length} keys, attention_mask {list(attention_mask.shape)}"
        elif not attention_mask[:, kv_offset : kv_offset + kv_length].all():
            reason = "padding in attention_mask"
    if reason is not None:
        raise NotImplementedError(f"infimm_kernels serves attention without a mask only: {reason}")

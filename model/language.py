"""The decoder loop of a transformers Llama with a gated cross-attention block before some of its layers.

The loop is written out, instead of hooking or wrapping layers, so that vision keys and values are arguments:
nothing is stored on a layer between calls, and with all gates at zero it is the bare LLM bit for bit."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from infimm_kernels import MediaSegments

from .cross_attention import GatedCrossAttentionBlock, KeyValue


def hidden_states(
    language: LlamaForCausalLM,
    blocks: Mapping[str, GatedCrossAttentionBlock],
    keys_values: Mapping[str, KeyValue],
    segments: MediaSegments,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None = None,
    gradient_checkpointing: bool = False,
) -> Tensor:
    """Last hidden states [batch, text_len, hidden] of the LLM, after its final norm.

    `blocks` and `keys_values` are keyed by the index of the decoder layer they stand before, as a string.
    `attention_mask` [batch, past + text_len] is True at real tokens; padding may stand on either side."""
    decoder = language.model
    x = decoder.embed_tokens(input_ids)
    past = cache.get_seq_length() if cache is not None else 0
    position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
    if attention_mask is not None:  # positions count from the first real token of a left-padded row
        left_padding = (attention_mask.long().cumsum(1) == 0).sum(1, keepdim=True)
        position_ids = (position_ids - left_padding).clamp_min(0)
    causal_mask = create_causal_mask(
        config=decoder.config,
        inputs_embeds=x,
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=position_ids,
    )
    position_embeddings = decoder.rotary_emb(x, position_ids=position_ids)

    def step(x: Tensor, index: int, key: Tensor | None, value: Tensor | None) -> Tensor:
        if key is not None:
            x = blocks[str(index)](x, key, value, segments)
        return decoder.layers[index](
            x,
            attention_mask=causal_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            position_embeddings=position_embeddings,
        )

    for index in range(decoder.config.num_hidden_layers):
        key, value = keys_values.get(str(index), (None, None))
        if gradient_checkpointing:
            x = checkpoint(step, x, index, key, value, use_reentrant=False)
        else:
            x = step(x, index, key, value)
    return decoder.norm(x)

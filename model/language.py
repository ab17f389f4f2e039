"""The decoder loop of a Llama-family model of transformers, a gated cross-attention block before some layers.

The loop is written out, instead of hooking or wrapping layers, so that vision keys and values are arguments:
nothing is stored on a layer between calls, and with all gates at zero it is the bare LLM bit for bit."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from infimm_kernels import MediaSegments

from .cross_attention import GatedCrossAttentionBlock, KeyValue


def hidden_states(
    language: PreTrainedModel,
    blocks: Mapping[str, GatedCrossAttentionBlock],
    keys_values: Mapping[str, KeyValue],
    segments: MediaSegments | None,
    x: Tensor,
    *,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    cache: Cache | None = None,
    gradient_checkpointing: bool = False,
) -> Tensor:
    """Last hidden states [batch, text_len, hidden] of the LLM, after its final norm, from embeddings `x`.

    `blocks` and `keys_values` are keyed by the index of the decoder layer they stand before, as a string.
    `attention_mask` [batch, past + text_len] is True at real tokens; padding may stand on either side.
    `position_ids` [batch or 1, text_len] count from the first real token of a row when None."""
    decoder = language.model
    if position_ids is None:
        past = int(cache.get_seq_length()) if cache is not None else 0
        position_ids = _positions(past, x, attention_mask)
    masks = create_masks_for_generate(
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
        # families that mix full and sliding attention have a mask for each kind of layer
        mask = masks[decoder.config.layer_types[index]] if isinstance(masks, dict) else masks
        return decoder.layers[index](
            x,
            attention_mask=mask,
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


def _positions(past: int, x: Tensor, attention_mask: Tensor | None) -> Tensor:
    positions = torch.arange(past, past + x.shape[1], device=x.device)[None]
    if attention_mask is None or attention_mask.ndim != 2:
        return positions
    left_padding = (attention_mask.long().cumsum(1) == 0).sum(1, keepdim=True)
    return (positions - left_padding).clamp_min(0)

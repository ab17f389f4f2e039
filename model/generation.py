"""`generate` on transformers' GenerationMixin: images are encoded once, before the first token."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from .checks import is_int, require, text_arguments, vision_arguments
from .config import InfiMMHDConfig
from .encoded_images import EncodedImages

MAX_NEW_TOKENS = 256
"""Default length of an answer; shorter where the language model has less room behind the prompt."""


def default_generation_config(config: InfiMMHDConfig) -> GenerationConfig:
    """Greedy; stops at the end of a chunk (and at the LLM's own end); never writes `<image>`."""
    text = config.text_config
    own = text.eos_token_id
    ends = [config.end_of_chunk_token_id, *(own if isinstance(own, list) else [own])]
    ends = sorted({end for end in ends if is_int(end, 0)} - {config.image_token_id})
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=ends,
        pad_token_id=config.pad_token_id,
        suppress_tokens=[config.image_token_id],
    )


class ImageGenerationMixin(GenerationMixin):
    """The part of `InfiMMHD` that generates."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        window_positions: Tensor | None = None,
        windows_per_image: Tensor | Sequence[int] = (),
        images_per_sample: Tensor | Sequence[int] | None = None,
        images: EncodedImages | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continues left-padded prompts; transformers' `generate` with all its options (`max_new_tokens`,
        `do_sample`, `num_beams`, `streamer`, ...), greedy unless they say otherwise.

        `input_ids` (or the first argument), `attention_mask` and the images as in `forward`. Returns the
        prompts and their continuations [batch, text_len + new_tokens], or what `return_dict_in_generate` asks
        for. The vision keys and values are made once. A sample stops at `end_of_chunk_token_id` and is filled
        with `pad_token_id`; `<image>` is never generated. Prompt and `max_new_tokens` together fit into
        `max_position_embeddings`. ValueError as `forward`, and for padding on the right."""
        require((inputs is None) != (input_ids is None), "input_ids", "be given once", "both or none")
        input_ids = inputs if input_ids is None else input_ids
        attention_mask = text_arguments(self.language.config, input_ids, attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        elif not bool(attention_mask[:, -1].all()):
            raise ValueError(
                "attention_mask must be True in its last column (left padding), got padding on the right"
            )
        kwargs |= self._length_arguments(generation_config, input_ids.shape[1], kwargs)
        if images is None:
            windows, counts = vision_arguments(
                len(input_ids), pixel_values, window_positions, windows_per_image, images_per_sample
            )
            images = self.encode_images(pixel_values, window_positions, windows, counts)
        return super().generate(
            input_ids, generation_config, attention_mask=attention_mask, images=images, **kwargs
        )

    def _length_arguments(
        self, config: GenerationConfig | None, prompt: int, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        room = self.language.config.max_position_embeddings - prompt
        wanted = kwargs.get("max_new_tokens", None if config is None else config.max_new_tokens)
        if wanted is None:
            total = kwargs.get("max_length", None if config is None else config.max_length)
            if total is None:
                require(room > 0, "input_ids", "leave room for a token in max_position_embeddings", prompt)
                return {"max_new_tokens": min(MAX_NEW_TOKENS, room)}
            wanted = total - prompt if is_int(total, 1) else total
        require(is_int(wanted, 1), "max_new_tokens", "be a positive int", wanted)
        if wanted > room:
            raise ValueError(
                f"max_new_tokens must be at most max_position_embeddings less the prompt's "
                f"{prompt} tokens ({room}), got {wanted}"
            )
        return {}

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        images = kwargs.get("images")
        if images is not None and expand_size > 1:
            kwargs["images"] = images.repeat_interleave(expand_size)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )

"""What the language model reads of a batch's images, made once and kept while text is generated."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from infimm_kernels import MediaSegments, decode_segments, media_segments

from .config import GatedCrossAttentionConfig
from .cross_attention import KeyValue


@dataclasses.dataclass(slots=True)
class EncodedImages:
    """The images of a batch as the language model reads them; `InfiMMHD.encode_images` makes it.

    `seqlens` [num_images]: visual tokens of each image, `images_per_sample` [batch]; `gated`: which
    images a text sees. `keys_values`: for every gated block, by the index of the decoder layer it stands
    before, key and value [sum(seqlens), num_heads, head_dim]. `tokens` [sum(seqlens), hidden]: with
    concatenation instead, what takes the places of the `<image>` tokens. Both are None before the vision
    encoder has run."""

    seqlens: list[int]
    images_per_sample: list[int]
    gated: GatedCrossAttentionConfig
    keys_values: Mapping[str, KeyValue] | None = None
    tokens: Tensor | None = None
    _decode: dict[int, MediaSegments] = dataclasses.field(default_factory=dict, repr=False)

    def segments(self, media_locations: Tensor) -> MediaSegments:
        """The pieces of the prompts, cut at their `<image>` tokens [batch, text_len] bool."""
        segments = media_segments(
            media_locations,
            self.seqlens,
            self.images_per_sample,
            only_attend_immediate_media=self.gated.only_attend_immediate_media,
        )
        if not self.gated.ffn_before_image:
            return segments
        # attention gives the text before any image nothing anyway, so that the mask decides the other branch
        has_image = segments.text_mask.any(1, keepdim=True)
        return segments._replace(text_mask=has_image.repeat(1, media_locations.shape[1]))

    def decode_segments(self, text_len: int, device: torch.device) -> MediaSegments:
        """The pieces of `text_len` new tokens behind the prompts; made once and kept for all steps."""
        if text_len not in self._decode:
            self._decode[text_len] = decode_segments(
                self.seqlens,
                self.images_per_sample,
                text_len=text_len,
                only_attend_immediate_media=self.gated.only_attend_immediate_media,
                device=device,
            )
        return self._decode[text_len]

    def repeat_interleave(self, repeats: int) -> "EncodedImages":
        """Every sample `repeats` times in a row, as beam search and several returned sequences need it."""
        return self.select([i for i in range(len(self.images_per_sample)) for _ in range(repeats)])

    def select(self, samples: Sequence[int]) -> "EncodedImages":
        """The images of these samples of the batch, in this order."""
        first_image = [0]
        for count in self.images_per_sample:
            first_image.append(first_image[-1] + count)
        images = [j for i in samples for j in range(first_image[i], first_image[i + 1])]
        first_token = [0]
        for seqlen in self.seqlens:
            first_token.append(first_token[-1] + seqlen)

        def rows(x: Tensor) -> Tensor:
            parts = [x[first_token[j] : first_token[j + 1]] for j in images]
            return torch.cat(parts) if parts else x[:0]

        keys_values = self.keys_values
        if keys_values is not None:
            keys_values = {name: (rows(key), rows(value)) for name, (key, value) in keys_values.items()}
        return EncodedImages(
            seqlens=[self.seqlens[j] for j in images],
            images_per_sample=[self.images_per_sample[i] for i in samples],
            gated=self.gated,
            keys_values=keys_values,
            tokens=None if self.tokens is None else rows(self.tokens),
        )

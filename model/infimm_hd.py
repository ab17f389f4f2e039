"""InfiMM-HD: windows -> one ViT -> token transform -> 2-D position -> gated cross-attention in a Llama.

The same class is LLaVA: with `fusion="concatenation"` the visual tokens take the places of the `<image>`
tokens."""

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import ModelOutput, can_return_tuple

from infimm_kernels import MediaSegments, add_position_2d

from .checks import (
    IGNORE_INDEX,
    image_marks,
    is_readable,
    require,
    text_arguments,
    vision_arguments,
)
from .config import InfiMMHDConfig
from .connector import build_connector
from .cross_attention import GatedCrossAttentionBlock, KeyValue, VisionKeysValues
from .encoded_images import EncodedImages
from .generation import ImageGenerationMixin, default_generation_config
from .language import hidden_states
from .vision import build_vision_encoder
from .weights import check_finite, check_folder, refuse_loading_info

PARTS = ("vision", "gated_cross_attention", "language")
"""The parts that the training stages freeze and train. The second is all that joins the other two: the gated
blocks, the connector, and the adapters of a mixture of resolutions."""


@dataclasses.dataclass
class InfiMMHDOutput(ModelOutput):
    """What `InfiMMHD.forward` returns; fields that were not asked for are None."""

    loss: Tensor | None = None
    """Sum of the answer tokens' cross entropies / num_answer_tokens."""
    logits: Tensor | None = None
    """[batch, text_len, vocab_size]; None when labels were given, then only the answers' logits are made."""
    past_key_values: Cache | None = None
    images: EncodedImages | None = None
    """What the next call with `past_key_values` needs."""
    loss_sum: Tensor | None = None
    num_answer_tokens: int | None = None
    """Answer tokens of this batch."""
    answer_logits: Tensor | None = None
    """[num_answer_tokens, vocab_size], the predictions of `answer_labels`."""
    answer_labels: Tensor | None = None


class InfiMMHD(ImageGenerationMixin, PreTrainedModel):
    """The model, a transformers one: `forward` computes logits or a loss, `generate` continues a text.

    `config` is copied: `set_window_size` changes this model's own.

    Arguments of `forward`: `input_ids` [batch, text_len] int64 or int32 holds one `image_token_id` for every
    image, in sample order (with concatenation `config.image_seq_length` for every window of it), and at most
    `max_position_embeddings` tokens a row. `attention_mask` [batch, past + text_len], bool or integer 0 and
    1, is True at real tokens. `labels` [batch, text_len] int64, `IGNORE_INDEX` (-100) ignored; they are
    shifted here. `pixel_values` [num_windows, 3, P, P], P the vision encoder's `input_size`, and
    `window_positions` [num_windows, 2] are the windows of all images in order, `windows_per_image`
    [num_images] and `images_per_sample` [batch] say whose they are; `images`, from `encode_images` or an
    earlier output, takes the place of the four. `num_answer_tokens` divides the loss (default: this batch's
    own count); a trainer passes the count of the global batch. With `use_cache` or `past_key_values` the
    output carries what the next tokens need; new tokens behind a cache hold no `<image>`. `logits_to_keep` >
    0 makes the last logits only. A batch without any image runs every parameter all the same, so that ranks
    never disagree about a collective. ValueError for types, shapes or counts that do not fit, ids beyond the
    vocabulary and `pixel_values` that are not finite."""

    config_class = InfiMMHDConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _no_split_modules = ["Block", "GatedCrossAttentionBlock"]

    def __init__(self, config: InfiMMHDConfig) -> None:
        super().__init__(copy.deepcopy(config))
        config = self.config
        config.check()
        self.vision = build_vision_encoder(config.vision_config)
        config.vision_config = self.vision.config  # one object, so that the model's config follows its ViT
        vision_hidden = config.vision_config.hidden_size
        self.language = AutoModelForCausalLM.from_config(config.text_config)
        config.text_config = self.language.config
        hidden, gated = config.text_config.hidden_size, config.gated_cross_attention
        self.is_gated = config.fusion == "gated_cross_attention"
        self.connector = build_connector(
            config.connector, vision_hidden, vision_hidden if self.is_gated else hidden
        )
        if self.is_gated:
            layers, num_prefix_tokens = config.gated_layers, config.num_prefix_tokens
            self.vision_keys_values = VisionKeysValues(
                len(layers), vision_hidden, gated, config.position, num_prefix_tokens
            )
        self.gated_blocks = nn.ModuleDict(
            {str(index): GatedCrossAttentionBlock(hidden, gated) for index in config.gated_layers}
        )
        self._gradient_checkpointing = False
        self.vision.freeze_inactive_blocks()
        self.post_init()
        self.generation_config = default_generation_config(config)

    def _init_weights(self, module: nn.Module) -> None:
        """The modules of this package start as their constructors leave them."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        window_positions: Tensor | None = None,
        windows_per_image: Tensor | Sequence[int] = (),
        images_per_sample: Tensor | Sequence[int] | None = None,
        num_answer_tokens: int | Tensor | None = None,
        images: EncodedImages | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> InfiMMHDOutput:
        """Logits, or with `labels` the loss; the arguments are described at the class."""
        cache = self._cache(use_cache, past_key_values)
        attention_mask = self._checked_text(input_ids, attention_mask, labels, num_answer_tokens, cache)
        if images is None:
            counts = vision_arguments(
                len(input_ids), pixel_values, window_positions, windows_per_image, images_per_sample
            )
            images = self._counted(*counts, cache)
        segments = self._segments(input_ids, images, cache)
        if images.keys_values is None:
            self._encode(images, pixel_values, window_positions, input_ids.device)
        x = hidden_states(
            self.language,
            self.gated_blocks,
            images.keys_values,
            segments,
            self._embedded(input_ids, images, cache),
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            gradient_checkpointing=self._gradient_checkpointing and self.training,
        )
        return self._output(x, labels, num_answer_tokens, logits_to_keep, cache, images)

    def encode_windows(self, pixel_values: Tensor) -> Tensor:
        """Windows [n, 3, P, P] -> visual tokens [n, tokens, width], before their 2-D position.

        The width is the vision encoder's, with concatenation the language model's."""
        features = self.vision(pixel_values)
        if not self.is_gated and self.config.connector.kind != "resampler":
            features = features[:, self.config.vision_config.num_prefix_tokens :]  # LLaVA drops the CLS token
        return self.connector(features)

    def _encode(
        self,
        images: EncodedImages,
        pixel_values: Tensor | None,
        window_positions: Tensor | None,
        device: torch.device,
    ) -> None:
        """Fills `images` from its checked windows."""
        no_window = pixel_values is None or len(pixel_values) == 0
        if no_window and not torch.is_grad_enabled() and not _has_other_ranks():
            images.keys_values, images.tokens = self._nothing_seen()
            return
        if no_window:
            # a blank window keeps every parameter in the graph and every rank in step; none of its tokens is
            # read
            size = self.config.vision_config.input_size
            pixel_values = torch.zeros(1, 3, size, size, device=device)
            window_positions = torch.full((1, 2), -1, device=device)
        tokens = self.encode_windows(pixel_values)
        if self.is_gated:
            pairs = self.vision_keys_values(tokens, window_positions)
            if no_window:
                pairs = [(key[:0], value[:0]) for key, value in pairs]
            images.keys_values = dict(zip(self.gated_blocks, pairs, strict=True))
            return
        if self.config.position != "none":
            tokens = add_position_2d(tokens, window_positions, granularity=self.config.position)
        images.keys_values = {}
        images.tokens = tokens.flatten(0, 1)[: sum(images.seqlens)]

    def _nothing_seen(self) -> tuple[dict[str, KeyValue], Tensor | None]:
        """Keys and values, or tokens, of no image at all."""
        if not self.is_gated:
            return {}, self.get_input_embeddings().weight.new_empty(0, self.config.text_config.hidden_size)
        gated = self.config.gated_cross_attention
        empty = self.vision_keys_values.weight.new_empty(0, gated.num_heads, gated.head_dim)
        return {name: (empty, empty) for name in self.gated_blocks}, None

    def encode_images(
        self,
        pixel_values: Tensor | None,
        window_positions: Tensor | None,
        windows_per_image: Tensor | Sequence[int],
        images_per_sample: Tensor | Sequence[int],
    ) -> EncodedImages:
        """What the language model reads of the images, for the `images` of `forward` and `generate`:
        questions about the same images then share one pass through the vision encoder. Arguments as there."""
        num_samples = len(images_per_sample)
        counts = vision_arguments(
            num_samples, pixel_values, window_positions, windows_per_image, images_per_sample
        )
        images = self._counted(*counts)
        self._encode(images, pixel_values, window_positions, self.device)
        return images

    def _counted(
        self, windows_per_image: list[int], images_per_sample: list[int], cache: Cache | None = None
    ) -> EncodedImages:
        require(
            _length(cache) == 0, "images", "be the `images` of the output that gave past_key_values", None
        )
        tokens = self.config.visual_tokens_per_window
        seqlens = [n * tokens for n in windows_per_image]
        return EncodedImages(seqlens, images_per_sample, self.config.gated_cross_attention)

    def _cache(self, use_cache: bool | None, past_key_values: Cache | None) -> Cache | None:
        if use_cache and past_key_values is None:
            return DynamicCache(config=self.language.config)
        return past_key_values

    def _checked_text(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        num_answer_tokens: int | Tensor | None,
        cache: Cache | None,
    ) -> Tensor | None:
        return text_arguments(
            self.language.config, input_ids, attention_mask, labels, num_answer_tokens, _length(cache)
        )

    def _segments(
        self, input_ids: Tensor, images: EncodedImages, cache: Cache | None
    ) -> MediaSegments | None:
        """The text's pieces by image. Before the vision, so that a GPU that has to be waited for has no ViT
        in front of it."""
        is_image = input_ids == self.config.image_token_id
        rule = f"have one entry per sample ({len(input_ids)})"
        counts = images.images_per_sample
        require(len(counts) == len(input_ids), "images.images_per_sample", rule, counts)
        if _length(cache) > 0:
            if is_readable(is_image) and bool(is_image.any()):
                raise ValueError("input_ids must hold no <image> behind past_key_values, got one")
            return images.decode_segments(input_ids.shape[1], input_ids.device) if self.is_gated else None
        if self.is_gated:
            return images.segments(is_image)
        if is_readable(is_image):
            image_marks(is_image, images.seqlens, counts)
        return None

    def _embedded(self, input_ids: Tensor, images: EncodedImages, cache: Cache | None) -> Tensor:
        """Token embeddings [batch, text_len, hidden]; with concatenation visual tokens at the `<image>`s."""
        x = self.language.get_input_embeddings()(input_ids)
        if images.tokens is None or _length(cache) > 0:
            return x
        is_image = input_ids == self.config.image_token_id
        return x.masked_scatter(is_image[..., None], images.tokens.to(x.dtype))

    def _output(
        self,
        x: Tensor,
        labels: Tensor | None,
        num_answer_tokens: int | Tensor | None,
        logits_to_keep: int,
        cache: Cache | None,
        images: EncodedImages,
    ) -> InfiMMHDOutput:
        lm_head = self.language.get_output_embeddings()
        output = InfiMMHDOutput() if cache is None else InfiMMHDOutput(past_key_values=cache, images=images)
        if labels is None:
            output.logits = lm_head(x[:, -logits_to_keep:])
            return output
        is_answer = labels[:, 1:] != IGNORE_INDEX
        output.answer_labels = labels[:, 1:][is_answer]  # [num_answers]
        output.answer_logits = lm_head(x[:, :-1][is_answer]).float()  # [num_answers, vocab_size]
        loss_sum = F.cross_entropy(output.answer_logits, output.answer_labels, reduction="sum")
        output.num_answer_tokens = count = len(output.answer_labels)
        output.loss = loss_sum / (max(count, 1) if num_answer_tokens is None else num_answer_tokens)
        output.loss_sum = loss_sum.detach()
        return output

    @property
    def gradient_checkpointing(self) -> bool:
        """Recompute ViT blocks and decoder layers in the backward instead of keeping their activations."""
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._gradient_checkpointing = self.vision.gradient_checkpointing = bool(value)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """transformers' way of setting `gradient_checkpointing`; the only way is `use_reentrant=False`."""
        given = gradient_checkpointing_kwargs
        rule = "be None or {'use_reentrant': False}"
        require(given in (None, {}, {"use_reentrant": False}), "gradient_checkpointing_kwargs", rule, given)
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.gradient_checkpointing = False

    def get_input_embeddings(self) -> nn.Module:
        return self.language.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language.set_output_embeddings(new_embeddings)

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """All parameters by part (`PARTS`), each exactly once, with their names."""
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
        for name, parameter in self.named_parameters():
            root = name.partition(".")[0]
            joins = root not in groups or name.startswith("vision.adapters.")
            groups["gated_cross_attention" if joins else root].append((name, parameter))
        return groups

    def set_trainable(self, parts: Iterable[str]) -> None:
        """Trains the named parts and freezes the others; ViT blocks behind the feature layer stay frozen."""
        parts = tuple(parts)
        for part in parts:
            if part not in PARTS:
                raise ValueError(f"parts must be among {PARTS}, got {part!r}")
        for part, parameters in self.parameter_groups().items():
            for _, parameter in parameters:
                parameter.requires_grad_(part in parts)
        self.vision.freeze_inactive_blocks()

    def set_window_size(self, window_size: int) -> None:
        """Interpolates the ViT's position table for windows of this many pixels (224 -> 448), in place."""
        self.vision.set_window_size(window_size)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        config: InfiMMHDConfig | None = None,
        **kwargs: Any,
    ) -> "InfiMMHD":
        """transformers' `from_pretrained` (streamed, `dtype`, `device_map`, ...), strict: ValueError naming
        the folder, the file and the tensor for a config or a file that cannot be read, and for weights that
        are missing, unexpected, misshapen, not floating or not finite."""
        folder = Path(pretrained_model_name_or_path)
        wants_info = kwargs.pop("output_loading_info", False)
        if folder.is_dir():
            config = InfiMMHDConfig.load(folder / "config.json") if config is None else config
            with torch.device("meta"):
                check_folder(folder, cls(config))
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, config=config, output_loading_info=True, **kwargs
        )
        refuse_loading_info(info, str(pretrained_model_name_or_path))
        check_finite(model, str(pretrained_model_name_or_path))
        return (model, info) if wants_info else model


def _has_other_ranks() -> bool:
    """Whether other processes may gather the parameters that this one would leave out (ZeRO 3, FSDP)."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _length(cache: Cache | None) -> int:
    """Tokens that the cache holds."""
    return int(cache.get_seq_length()) if cache is not None else 0

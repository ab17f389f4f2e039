"""InfiMM-HD: windows -> one ViT -> token transform -> 2-D position -> gated cross-attention in a Llama."""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from infimm_kernels import decode_segments, media_segments

from .checks import IGNORE_INDEX, require_positive_ints, text_arguments, vision_arguments
from .config import InfiMMHDConfig
from .cross_attention import GatedCrossAttentionBlock, KeyValue, VisionKeysValues, VisualTokenTransform
from .language import hidden_states
from .vision import VisionTransformer
from .weights import load_weights

PARTS = ("vision", "gated_cross_attention", "language")
"""The parts that the training stages freeze and train; the visual-token transform belongs to the second."""


class InfiMMHDOutput(NamedTuple):
    """A tuple, so that DeepSpeed's hooks find its tensors."""

    logits: Tensor | None = None
    """[batch, text_len, vocab_size]; None when labels were given, then only the answers' logits are made."""
    loss: Tensor | None = None
    """Sum of the answer tokens' cross entropies / num_answer_tokens."""
    loss_sum: Tensor | None = None
    num_answer_tokens: int | None = None
    """Answer tokens of this batch."""
    answer_logits: Tensor | None = None
    """[num_answer_tokens, vocab_size], the predictions of `answer_labels`."""
    answer_labels: Tensor | None = None


class InfiMMHD(nn.Module):
    """The model. `forward` computes logits or a loss, `generate` continues greedily; see their docstrings.

    `config` is copied: `set_window_size` changes this model's own."""

    def __init__(self, config: InfiMMHDConfig) -> None:
        super().__init__()
        self.vision = VisionTransformer(config.vision)
        self.config = config = copy.deepcopy(config)
        config.vision = self.vision.config  # one object, so that the model's config follows its ViT
        gated, vision_hidden = config.gated_cross_attention, config.vision.hidden_size
        self.visual_token_transform = (
            VisualTokenTransform(vision_hidden) if gated.visual_token_transform else nn.Identity()
        )
        self.language = LlamaForCausalLM(LlamaConfig(**copy.deepcopy(config.language)))
        hidden = self.language.config.hidden_size
        self.vision_keys_values = VisionKeysValues(len(config.gated_layers), vision_hidden, gated)
        self.gated_blocks = nn.ModuleDict(
            {str(index): GatedCrossAttentionBlock(hidden, gated) for index in config.gated_layers}
        )
        self._gradient_checkpointing = False

    @property
    def gradient_checkpointing(self) -> bool:
        """Recompute ViT blocks and decoder layers in the backward instead of keeping their activations."""
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._gradient_checkpointing = self.vision.gradient_checkpointing = bool(value)

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """All parameters by part (`PARTS`), each exactly once, with their names."""
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
        for name, parameter in self.named_parameters():
            root = name.partition(".")[0]
            groups[root if root in ("vision", "language") else "gated_cross_attention"].append(
                (name, parameter)
            )
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
        for block in self.vision.blocks[self.config.vision.num_active_layers :]:
            block.requires_grad_(False)

    def set_window_size(self, window_size: int) -> None:
        """Interpolates the ViT's position table for windows of this many pixels (224 -> 448), in place."""
        self.vision.set_window_size(window_size)

    def encode_windows(self, pixel_values: Tensor) -> Tensor:
        """Windows [n, 3, P, P] -> visual tokens [n, tokens, vision_hidden], before their 2-D position."""
        return self.visual_token_transform(self.vision(pixel_values))

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
    ) -> InfiMMHDOutput:
        """Logits, or with `labels` the loss.

        `input_ids` [batch, text_len] int64 or int32 holds one `image_token_id` for every image, in sample
        order, and at most `max_position_embeddings` tokens a row. `attention_mask` [batch, text_len], bool
        or integer 0 and 1, is True at real tokens. `labels` [batch, text_len] int64, `IGNORE_INDEX` (-100)
        ignored; they are shifted here. `pixel_values` [num_windows, 3, P, P] and `window_positions`
        [num_windows, 2] are the windows of all images in order, `windows_per_image` [num_images] and
        `images_per_sample` [batch] say whose they are. `num_answer_tokens` divides the loss (default: this
        batch's own count); a trainer passes the count of the global batch. A batch without any image runs
        every parameter all the same, so that ranks never disagree about a collective. ValueError for types,
        shapes or counts that do not fit, ids beyond the vocabulary and `pixel_values` that are not finite."""
        attention_mask = text_arguments(
            self.language.config, input_ids, attention_mask, labels, num_answer_tokens
        )
        windows, images = vision_arguments(
            len(input_ids), pixel_values, window_positions, windows_per_image, images_per_sample
        )
        # before the vision, so that a GPU that has to be waited for has no ViT in front of it
        segments = media_segments(
            input_ids == self.config.image_token_id, self._vision_seqlens(windows), images
        )
        keys_values = self._keys_values(pixel_values, window_positions, input_ids.device)
        x = hidden_states(
            self.language,
            self.gated_blocks,
            keys_values,
            segments,
            input_ids=input_ids,
            attention_mask=attention_mask,
            gradient_checkpointing=self._gradient_checkpointing and self.training,
        )
        if labels is None:
            return InfiMMHDOutput(logits=self.language.lm_head(x))
        is_answer = labels[:, 1:] != IGNORE_INDEX
        answer_labels = labels[:, 1:][is_answer]  # [num_answers]
        answer_logits = self.language.lm_head(x[:, :-1][is_answer]).float()  # [num_answers, vocab_size]
        loss_sum = F.cross_entropy(answer_logits, answer_labels, reduction="sum")
        count = len(answer_labels)
        return InfiMMHDOutput(
            loss=loss_sum / (max(count, 1) if num_answer_tokens is None else num_answer_tokens),
            loss_sum=loss_sum.detach(),
            num_answer_tokens=count,
            answer_logits=answer_logits,
            answer_labels=answer_labels,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        window_positions: Tensor | None = None,
        windows_per_image: Tensor | Sequence[int] = (),
        images_per_sample: Tensor | Sequence[int] | None = None,
        max_new_tokens: int = 32,
    ) -> Tensor:
        """Greedy continuation [batch, new_tokens] of left-padded prompts; arguments and errors as `forward`.

        The vision keys and values are made once, the LLM keeps a KV cache. A sample stops at
        `end_of_chunk_token_id` and is filled with `pad_token_id`; `<image>` is never generated. Prompt and
        `max_new_tokens` together fit into `max_position_embeddings`."""
        require_positive_ints({"max_new_tokens": max_new_tokens})
        attention_mask = text_arguments(self.language.config, input_ids, attention_mask)
        room = self.language.config.max_position_embeddings - input_ids.shape[1]
        if max_new_tokens > room:
            raise ValueError(
                f"max_new_tokens must be at most max_position_embeddings less the prompt's "
                f"{input_ids.shape[1]} tokens ({room}), got {max_new_tokens}"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        elif not bool(attention_mask[:, -1].all()):
            raise ValueError(
                "attention_mask must be True in its last column (left padding), got padding on the right"
            )
        windows, images = vision_arguments(
            len(input_ids), pixel_values, window_positions, windows_per_image, images_per_sample
        )
        vision_seqlens = self._vision_seqlens(windows)
        segments = media_segments(input_ids == self.config.image_token_id, vision_seqlens, images)
        step_segments = decode_segments(vision_seqlens, images, device=input_ids.device)
        keys_values = self._keys_values(pixel_values, window_positions, input_ids.device)
        cache = DynamicCache(config=self.language.config)
        finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tokens, generated = input_ids, []
        for _ in range(max_new_tokens):
            x = hidden_states(
                self.language,
                self.gated_blocks,
                keys_values,
                segments,
                input_ids=tokens,
                attention_mask=attention_mask,
                cache=cache,
            )
            logits = self.language.lm_head(x[:, -1])
            logits[:, self.config.image_token_id] = float("-inf")
            next_token = logits.argmax(-1).masked_fill(finished, self.config.pad_token_id)
            generated.append(next_token)
            finished |= next_token == self.config.end_of_chunk_token_id
            if bool(finished.all()):
                break
            tokens, segments = next_token[:, None], step_segments
            attention_mask = F.pad(attention_mask, (0, 1), value=True)
        return torch.stack(generated, dim=1)

    def _vision_seqlens(self, windows_per_image: list[int]) -> list[int]:
        return [n * self.config.vision.num_tokens for n in windows_per_image]

    def _keys_values(
        self, pixel_values: Tensor | None, window_positions: Tensor | None, device: torch.device
    ) -> dict[str, KeyValue]:
        """Keys and values of all blocks, from checked arguments."""
        no_window = pixel_values is None or len(pixel_values) == 0
        if no_window:
            size = self.config.vision.window_size
            pixel_values = torch.zeros(1, 3, size, size, device=device)
            window_positions = torch.full((1, 2), -1, device=device)
        pairs = self.vision_keys_values(self.encode_windows(pixel_values), window_positions)
        if no_window:
            # the blank window only keeps every parameter in the graph: none of its tokens is a key
            pairs = [(key[:0], value[:0]) for key, value in pairs]
        return dict(zip(self.gated_blocks, pairs, strict=True))

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.json` and safetensors (sharded above 5 GB) into `directory`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.config.save(directory / "config.json")
        save_torch_state_dict(self.state_dict(), directory)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "InfiMMHD":
        """Reads what `save_pretrained` wrote.

        ValueError naming the folder for a config or a file that cannot be read, and for weights that are
        missing, unexpected, misshapen, not floating or not finite."""
        directory = Path(directory)
        model = cls(InfiMMHDConfig.load(directory / "config.json"))
        load_weights(model, directory)
        return model

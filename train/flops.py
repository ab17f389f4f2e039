"""Floating-point operations of a training step, in closed form: cheap enough to be asked at every step.

A multiply-add is two operations; only products count (linear layers, convolutions, attention), attention in
full, also where a causal mask or padding hides a part. The backward is what autograd computes: a layer's
gradient with respect to its input costs its forward once, if anything before it learns; that with respect to
its weight once more, if the weight learns; frozen layers with nothing trainable before them have none.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from model import IGNORE_INDEX, InfiMMHDConfig
from model.vision_config import VisionConfig

_ATTENTION_BACKWARD = 5, 2
"""Products of attention's backward over those of its forward: fused kernels make the scores again."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """Operations of a piece of work: forward, backward, and of the two together what is only made again."""

    forward: int = 0
    backward: int = 0
    recomputed: int = 0
    """Part of `backward`: attention scores, and checkpointed blocks."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recomputed + other.recomputed,
        )

    def __mul__(self, factor: int) -> "Cost":
        return Cost(self.forward * factor, self.backward * factor, self.recomputed * factor)

    __rmul__ = __mul__

    def again(self, forward: int | None = None) -> "Cost":
        """The same checkpointed: its forward, or the given part of it, runs once more in the backward."""
        extra = self.forward if forward is None else forward
        return self if self.backward == 0 else self + Cost(0, extra, extra)

    @property
    def total(self) -> int:
        return self.forward + self.backward


def _linear(rows: int, size_in: int, size_out: int, needs_input: bool, trainable: bool) -> Cost:
    product = 2 * rows * size_in * size_out
    return Cost(product, product * (needs_input + trainable))


def _attention(pairs: int, channels: int, needs_grad: bool) -> Cost:
    """`pairs` of a query and a key, `channels` over all heads."""
    product = 4 * pairs * channels
    if not needs_grad:
        return Cost(product)
    made, of = _ATTENTION_BACKWARD
    backward = product * made // of
    return Cost(product, backward, backward - 2 * product)


@dataclasses.dataclass(kw_only=True, slots=True)
class Work:
    """What one forward and backward of one rank reads."""

    num_windows: int
    """A batch without any image runs one blank window all the same."""
    num_rows: int
    row_length: int
    """Tokens of a row, padding included; with concatenation visual tokens too."""
    num_answer_tokens: int
    """Positions whose logits are made."""
    num_pairs: int
    """Sum over text tokens of the visual tokens each attends to in a gated block; 0 with concatenation."""


def work_of_batch(config: InfiMMHDConfig, batch: Mapping[str, Any]) -> Work:
    """The `Work` of keyword arguments of `model.InfiMMHD`, as `train.batch.collate` makes them.

    Reads values: hand it the tensors on the CPU."""
    ids: Tensor = batch["input_ids"]
    windows = _ints(batch["windows_per_image"])
    return Work(
        num_windows=sum(windows),
        num_rows=ids.shape[0],
        row_length=ids.shape[1],
        num_answer_tokens=int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()),
        num_pairs=_num_pairs(config, ids, windows, _ints(batch["images_per_sample"])),
    )


def _ints(values: Any) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def _num_pairs(config: InfiMMHDConfig, ids: Tensor, windows: list[int], images_per_sample: list[int]) -> int:
    """A token sees the image before it, or all images before it in its row."""
    if config.fusion == "concatenation":
        return 0
    places = (ids == config.image_token_id).nonzero().tolist()  # of all images, in order
    immediate, length = config.gated_cross_attention.only_attend_immediate_media, ids.shape[1]
    total = image = 0
    for count in images_per_sample:
        for number in range(count):
            column = places[image][1]
            is_last = number + 1 == count or not immediate
            end = length if is_last else places[image + 1][1]
            total += (end - column) * windows[image]
            image += 1
    return total * config.visual_tokens_per_window


class StepFlops:
    """Operations of a forward and backward of `config` with the parts `trainable` (`model.PARTS`) learning.

    `cost(work)` and `of(...)` take no time: all sums over layers are made here. The config's
    `vision_config` must already have the stage's window size (`VisionConfig.set_input_size`)."""

    def __init__(
        self, config: InfiMMHDConfig, trainable: Collection[str], gradient_checkpointing: bool = False
    ) -> None:
        self.config = config
        self.checkpointing = gradient_checkpointing
        self.vision, self.gated, self.language = (
            part in trainable for part in ("vision", "gated_cross_attention", "language")
        )
        self.features_need = self.vision
        self.vision_encoder = self._vision_encoder(config.vision_config)
        """Of one window."""
        if config.vision_config.mixture_of_resolution is not None:
            self.features_need = self.vision or self.gated
        self.connector = self._connector()
        """Of one window."""
        has_weights = config.connector.kind != "none"
        self.tokens_need = self.features_need or (self.gated and has_weights)
        self.keys_values = self._keys_values()
        """Of one window, for all gated blocks."""
        text = self._text()
        self.text_token, self.token_pair, self.visual_pair, self.answer_token = text
        """Of one text token in all layers, of a pair of tokens of one row, of a pair of a text and a visual
        token, of one token's logits."""

    def cost(self, work: Work) -> Cost:
        """Of one forward and backward."""
        window = self.vision_encoder + self.connector + self.keys_values
        return (
            window * max(work.num_windows, 1)
            + self.text_token * (work.num_rows * work.row_length)
            + self.token_pair * (work.num_rows * work.row_length**2)
            + self.visual_pair * work.num_pairs
            + self.answer_token * work.num_answer_tokens
        )

    def of(
        self,
        *,
        num_windows: int,
        num_rows: int,
        row_length: int,
        num_answer_tokens: int | None = None,
        num_pairs: int | None = None,
        recomputed: bool = True,
    ) -> int:
        """Operations of one forward and backward.

        `num_answer_tokens` (default: all tokens) positions get logits; `num_pairs` as in `Work` (default: all
        text sees the images of its row, these being equally many). `recomputed=False` leaves out what is only
        made again, as the usual model FLOPs utilisation (MFU, Chowdhery et al. 2022) does."""
        sizes = dict(num_windows=num_windows, num_rows=num_rows, row_length=row_length)
        for name, value in sizes.items():
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        tokens = num_rows * row_length
        if num_pairs is None:
            num_pairs = row_length * num_windows * self.config.visual_tokens_per_window
        if num_answer_tokens is None:
            num_answer_tokens = tokens
        cost = self.cost(Work(**sizes, num_answer_tokens=num_answer_tokens, num_pairs=num_pairs))
        return cost.total if recomputed else cost.total - cost.recomputed

    def of_batch(self, batch: Mapping[str, Any], *, recomputed: bool = True) -> int:
        """`of` the keyword arguments of one forward of the model; see `work_of_batch`."""
        cost = self.cost(work_of_batch(self.config, batch))
        return cost.total if recomputed else cost.total - cost.recomputed

    # --- vision ---------------------------------------------------------------------------------------------

    def _vision_encoder(self, vision: VisionConfig) -> Cost:
        tokens, hidden = vision.num_tokens, vision.hidden_size
        # the CLS token goes through the product too
        patches = _linear(tokens, 3 * vision.patch_size**2, hidden, False, self.vision)
        if vision.mixture_of_resolution is None:
            return patches + self._vision_block(vision, self.vision) * vision.num_active_layers
        # blocks behind the first adapter have something trainable before them if the adapter is
        mixture = vision.mixture_of_resolution
        first = vision.num_active_layers // (mixture.num_adapters + 1)
        blocks = self._vision_block(vision, self.vision) * first
        blocks += self._vision_block(vision, self.vision or self.gated) * (vision.num_active_layers - first)
        return patches + blocks + self._convnext(vision) + self._adapters(vision)

    def _vision_block(self, vision: VisionConfig, needs_input: bool) -> Cost:
        tokens, hidden, wide = vision.num_tokens, vision.hidden_size, vision.intermediate_size
        flags = needs_input, self.vision
        mlp_out = _linear(tokens, wide, hidden, *flags)
        block = _linear(tokens, hidden, 4 * hidden, *flags) + _linear(tokens, hidden, wide, *flags) + mlp_out
        block += _attention(tokens**2, hidden, any(flags))
        if not self.checkpointing:
            return block
        # recomputation stops at the last kept tensor: for a block that ends in a product, its input
        skipped = 0 if vision.block == "post_norm" else mlp_out.forward
        return block.again(block.forward - skipped)

    def _convnext(self, vision: VisionConfig) -> Cost:
        mixture, learns = vision.mixture_of_resolution, self.vision
        side = mixture.image_size // 4
        cost = _linear(side**2, 3 * 4**2, mixture.hidden_sizes[0], False, learns)
        for number, (depth, width) in enumerate(zip(mixture.depths, mixture.hidden_sizes, strict=True)):
            if number > 0:
                side //= 2
                cost += _linear(side**2, 4 * mixture.hidden_sizes[number - 1], width, learns, learns)
            layer = _linear(side**2 * width, 7**2, 1, learns, learns)  # a depth-wise convolution
            layer += 2 * _linear(side**2, width, 4 * width, learns, learns)
            cost += depth * (layer.again() if self.checkpointing else layer)
        return cost

    def _adapters(self, vision: VisionConfig) -> Cost:
        mixture, learns = vision.mixture_of_resolution, self.gated
        tokens, width, channels = vision.num_tokens, vision.hidden_size, mixture.hidden_sizes[-1]
        cells = (mixture.image_size // mixture.stride) ** 2
        needs = self.vision or learns
        cost = _linear(tokens, width, width, needs, learns) + _linear(
            cells, channels, width, self.vision, learns
        )
        for number in range(mixture.num_adapters):
            before = self.vision if number == 0 else needs
            adapter = _linear(tokens * width, mixture.adapter_kernel_size**2, 1, before, learns)
            adapter += _linear(tokens, width, width, needs, learns)
            adapter += _linear(cells, channels, channels, self.vision, learns)
            adapter += _linear(cells, channels, width, needs, learns)
            adapter += _linear(1, 2 * width, width // 2, needs, learns)
            adapter += _linear(1, width // 2, 1, needs, learns)
            cost += adapter.again() if self.checkpointing else adapter
        return cost

    # --- between vision and language ------------------------------------------------------------------------

    def _connector(self) -> Cost:
        config, learns = self.config.connector, self.gated
        width, needs = self.config.vision_config.hidden_size, self.features_need or self.gated
        is_gated = self.config.fusion == "gated_cross_attention"
        size_out = width if is_gated else self.config.text_config.hidden_size
        if config.kind == "none":
            return Cost()
        if config.kind == "resampler":
            return self._resampler(size_out)
        tokens = self.config.visual_tokens_per_window
        first_needs = needs if config.kind == "residual_mlp" else self.features_need
        first = _linear(tokens, width, size_out, first_needs, learns)
        return first + _linear(tokens, size_out, size_out, needs, learns)

    def _resampler(self, size_out: int) -> Cost:
        config, vision, learns = self.config.connector, self.config.vision_config, self.gated
        width, inner, latents = vision.hidden_size, config.num_heads * config.head_dim, config.num_latents
        needs, cost = self.features_need or learns, Cost()
        for number in range(config.num_layers):
            before = learns if number == 0 else needs  # the first layer's latents are a parameter
            cost += _linear(latents, width, 3 * inner, before, learns)
            cost += _linear(vision.num_tokens, width, 2 * inner, needs, learns)
            cost += _attention(latents * (latents + vision.num_tokens), inner, needs)
            cost += _linear(latents, inner, width, needs, learns)
            cost += 2 * _linear(latents, width, 4 * width, needs, learns)
        if size_out != width:
            cost += _linear(latents, width, size_out, needs, learns)
        return cost

    def _keys_values(self) -> Cost:
        gated = self.config.gated_cross_attention
        size = 2 * gated.num_heads * gated.head_dim * len(self.config.gated_layers)
        tokens, width = self.config.visual_tokens_per_window, self.config.vision_config.hidden_size
        return _linear(tokens, width, size, self.tokens_need, self.gated)

    # --- language -------------------------------------------------------------------------------------------

    def _text(self) -> tuple[Cost, Cost, Cost, Cost]:
        text = self.config.text_config
        token = token_pair = visual_pair = Cost()
        needs = self.language or (self.config.fusion == "concatenation" and self.tokens_need)
        for index in range(text.num_hidden_layers):
            if index in self.config.gated_layers:
                block, pair = self._gated_block(needs)
                token, visual_pair = token + block, visual_pair + pair
                needs = needs or self.gated or self.tokens_need
            layer, pair = self._decoder_layer(needs)
            token, token_pair = token + layer, token_pair + pair
        logits = _linear(1, text.hidden_size, text.vocab_size, needs, self.language)
        return token, token_pair, visual_pair, logits

    def _gated_block(self, needs_input: bool) -> tuple[Cost, Cost]:
        gated, hidden, learns = (
            self.config.gated_cross_attention,
            self.config.text_config.hidden_size,
            self.gated,
        )
        inner, needs = gated.num_heads * gated.head_dim, needs_input or learns or self.tokens_need
        token = _linear(1, hidden, inner, needs_input or learns, learns)
        token += _linear(1, inner, hidden, needs, learns)
        token += 2 * _linear(1, hidden, gated.ffn_ratio * hidden, needs, learns)
        pair = _attention(1, inner, needs)
        return (token.again(), pair.again()) if self.checkpointing else (token, pair)

    def _decoder_layer(self, needs_input: bool) -> tuple[Cost, Cost]:
        text = self.config.text_config
        hidden, channels = text.hidden_size, head_dim(text)
        heads, kept = text.num_attention_heads * channels, text.num_key_value_heads * channels
        flags = needs_input, self.language
        down = _linear(1, text.intermediate_size, hidden, *flags)
        token = _linear(1, hidden, 2 * heads + 2 * kept, *flags)
        token += 2 * _linear(1, hidden, text.intermediate_size, *flags) + down
        pair = _attention(1, heads, any(flags))
        if not self.checkpointing:
            return token, pair
        return token.again(token.forward - down.forward), pair.again()


def head_dim(text: Any) -> int:
    """Of a transformers config, which may leave it out."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

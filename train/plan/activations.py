"""Bytes of activations of one forward and backward, in closed form.

What autograd keeps is listed layer by layer as the modules of `model/` and transformers' Llama run on a GPU,
attention fused; what a layer needs beside it for a moment is estimated by its widest tensors. Two sizes of a
number: `stream` of the residual stream and the norms, `narrow` of what products read and write; they differ
under autocast alone. Kernels' workspaces and the allocator's fragmentation are not in it."""

import dataclasses
from collections.abc import Collection

from model import InfiMMHDConfig
from model.vision_config import VisionConfig

from ..flops import Work, head_dim

SIZES = {"fp32": (4, 4), "bf16": (2, 2), "fp16": (2, 2), "bf16_autocast": (4, 2)}
"""Bytes of (stream, narrow) by `parallel.precision`."""
_FLOAT = 4
_STATS = 2 * _FLOAT
"""Mean and reciprocal deviation of a row, in float32 at most."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of a layer's pass: `kept` for its backward, and beside them the most at one moment."""

    kept: float = 0
    forward: float = 0
    backward: float = 0

    def __mul__(self, factor: float) -> "Kept":
        return Kept(self.kept * factor, self.forward * factor, self.backward * factor)

    def checkpointed(self, inputs: float) -> "Kept":
        """Only `inputs` bytes are kept; the rest is made again, for one layer at a time."""
        if self.kept == 0:
            return self
        return Kept(inputs, max(self.forward, self.kept - inputs), self.kept + self.backward)


def _in_turn(layers: list[tuple[int, Kept]]) -> Kept:
    """So many of each layer after each other: what is kept adds up, the moments do not."""
    present = [(count, layer) for count, layer in layers if count > 0]
    return Kept(
        sum(count * layer.kept for count, layer in present),
        max((layer.forward for _, layer in present), default=0),
        max((layer.backward for _, layer in present), default=0),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class ActivationBytes:
    """Of one forward and backward of a rank."""

    vision: float
    """Kept for the backward of vision encoder and connector."""
    keys_values: float
    """Keys and values of all gated blocks, or the visual tokens in the text's width; kept in any case."""
    text: float
    """Kept by gated blocks and decoder layers."""
    logits: float
    """Of the answers: in float32 for the caller and the loss, their gradients, and what they are made of."""
    peak: float
    """The most at one time, the batch's pixels with it."""


class Activations:
    """`of(work)` for `config` with the parts `trainable` learning, at a precision of `ParallelConfig`."""

    def __init__(
        self,
        config: InfiMMHDConfig,
        trainable: Collection[str],
        precision: str,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.config, self.checkpointing = config, gradient_checkpointing
        self.stream, self.narrow = SIZES[precision]
        self.learns_vision, self.learns_gated, self.learns_language = (
            part in trainable for part in ("vision", "gated_cross_attention", "language")
        )
        vision = config.vision_config
        is_mixture = vision.mixture_of_resolution is not None
        self.features_need = self.learns_vision or (is_mixture and self.learns_gated)
        self.tokens_need = self.features_need or (self.learns_gated and config.connector.kind != "none")
        self.vision = self._vision(vision)
        self.connector = self._connector()
        self.layers = self._text_layers()

    def of(self, work: Work) -> ActivationBytes:
        config, text = self.config, self.config.text_config
        windows, tokens = max(work.num_windows, 1), work.num_rows * work.row_length
        vision, connector = self.vision * windows, self.connector * windows
        pixels = 3 * config.vision_config.input_size**2 * _FLOAT * work.num_windows
        seen = windows * config.visual_tokens_per_window
        if config.fusion == "concatenation":
            keys_values = seen * text.hidden_size * self.narrow
        else:
            gated = config.gated_cross_attention
            keys_values = 2 * gated.num_heads * gated.head_dim * len(config.gated_layers) * seen * self.narrow
        pairs = work.num_rows * work.row_length**2
        layers = _in_turn([(1, layer * tokens) for layer in self.layers])
        # one mask of booleans, and for each layer's attention one of numbers to add
        number_mask, masked = pairs * self.narrow, sum(layer.kept > 0 for layer in self.layers)
        masks = pairs + number_mask * (0 if self.checkpointing else masked)
        final = (_FLOAT + self.stream * self.learns_language) * text.hidden_size * tokens
        kept_text = layers.kept + masks + final
        answers = work.num_answer_tokens
        caller = answers * text.vocab_size * _FLOAT  # the engine holds the output until its next forward
        loss = (
            answers * text.vocab_size * (2 * _FLOAT + self.narrow) + answers * text.hidden_size * self.narrow
        )
        before_text = vision.kept + connector.kept + keys_values
        moments = [
            vision.kept + vision.forward,
            vision.kept + connector.kept + connector.forward + keys_values,
            before_text + kept_text + max(layers.forward, caller + loss),
            before_text + kept_text + caller + layers.backward + number_mask * self.checkpointing,
        ]
        if self.tokens_need:
            # the gradients of the keys and values wait for those of the first block, and are put together
            moments.append(before_text + caller + keys_values + layers.backward)
            moments.append(before_text + caller + 2 * keys_values)
            moments.append(before_text + caller + keys_values + connector.backward)
        if self.features_need:
            moments.append(vision.kept + caller + vision.backward)
        return ActivationBytes(
            vision=vision.kept + connector.kept,
            keys_values=keys_values,
            text=kept_text,
            logits=caller + loss,
            peak=pixels + max(moments),
        )

    # --- vision, a window -----------------------------------------------------------------------------------

    def _vision(self, vision: VisionConfig) -> Kept:
        tokens, patch_values = vision.num_tokens, 3 * vision.patch_size**2
        learns = self.learns_vision
        patches = Kept(patch_values * self.narrow * learns * tokens, 2 * patch_values * self.narrow * tokens)
        plain = self._block(vision, learns)
        if vision.mixture_of_resolution is None:
            return _in_turn([(1, patches), (vision.num_active_layers, plain)])
        mixture = vision.mixture_of_resolution
        first = vision.num_active_layers // (mixture.num_adapters + 1)
        layers = [(1, patches), (first, plain)]
        layers.append((vision.num_active_layers - first, self._block(vision, self.features_need)))
        layers += self._convnext(vision) + self._adapters(vision)
        # the ConvNeXt's last grid, which all adapters read
        cells = (mixture.image_size // mixture.stride) ** 2
        return _in_turn([*layers, (1, Kept(cells * mixture.hidden_sizes[-1] * self.narrow))])

    def _block(self, vision: VisionConfig, needs_input: bool) -> Kept:
        hidden, wide, heads = vision.hidden_size, vision.intermediate_size, vision.num_heads
        learns, stream, narrow = self.learns_vision, self.stream, self.narrow
        gates = 2 if vision.activation == "quick_gelu" else 1
        tokens = vision.num_tokens
        transient = 2 * wide * narrow + 2 * hidden * stream
        if not (learns or needs_input):
            return Kept(0, transient * tokens)
        attention = (3 + 1) * hidden * narrow + heads * _FLOAT  # q, k, v; output; sums of exponentials
        kept = attention + gates * wide * narrow + 2 * _STATS
        if vision.block == "post_norm":
            kept += 2 * hidden * narrow  # the branches, which their norms read
            kept += (2 * hidden + wide) * narrow * learns  # what the products of qkv and MLP read
        else:
            kept += 2 * hidden * stream
            kept += (2 * hidden + wide) * narrow * learns
        block = Kept(kept * tokens, transient * tokens, (wide * narrow + 2 * hidden * stream) * tokens)
        return block.checkpointed(hidden * stream * tokens) if self.checkpointing else block

    def _convnext(self, vision: VisionConfig) -> list[tuple[int, Kept]]:
        mixture, learns, narrow = vision.mixture_of_resolution, self.learns_vision, self.narrow
        side, layers = mixture.image_size // 4, []
        for number, (depth, width) in enumerate(zip(mixture.depths, mixture.hidden_sizes, strict=True)):
            side //= 1 if number == 0 else 2
            cells = side**2 * narrow
            # input, convolution, its norm's output, 4 wide before and behind GELU, output before its scale
            layer = Kept((4 + 8) * width * cells * learns, 9 * width * cells, 6 * width * cells)
            layers.append((depth, layer.checkpointed(width * cells) if self.checkpointing else layer))
            before = 3 * 4**2 if number == 0 else 2 * 4 * mixture.hidden_sizes[number - 1]
            norm = width if number == 0 else 0  # of the stem
            layers.append((1, Kept((before + norm) * cells * learns, before * cells)))
        return layers

    def _adapters(self, vision: VisionConfig) -> list[tuple[int, Kept]]:
        mixture, narrow = vision.mixture_of_resolution, self.narrow
        tokens, width = vision.num_tokens, vision.hidden_size
        channels, cells = mixture.hidden_sizes[-1], (mixture.image_size // mixture.stride) ** 2
        last = Kept(self.learns_gated * narrow * tokens * width, 2 * narrow * tokens * width)
        if not self.features_need:
            return [(1, last)]
        learns = self.learns_gated
        # input and output of the convolution, behind GELU, the high branch at its end
        kept = narrow * tokens * width * (2 + 2 * learns) + narrow * cells * channels * (1 + learns)
        adapter = Kept(kept, 2 * narrow * tokens * width, 3 * narrow * tokens * width)
        if self.checkpointing:
            adapter = adapter.checkpointed(narrow * tokens * width)
        return [(mixture.num_adapters, adapter), (1, last)]

    # --- between vision and language, a window --------------------------------------------------------------

    def _connector(self) -> Kept:
        config, learns, narrow = self.config, self.learns_gated, self.narrow
        width, tokens = config.vision_config.hidden_size, config.visual_tokens_per_window
        size_out = width if config.fusion == "gated_cross_attention" else config.text_config.hidden_size
        kind, is_gated = config.connector.kind, config.fusion == "gated_cross_attention"
        # what the keys' and values' product reads, which keeps it in any case; an encoder whose last kept
        # tensor it is has it in its own list
        output = width * self.stream * tokens * is_gated
        if kind == "none":
            return Kept(output)
        if kind == "resampler":
            return self._resampler(size_out, output)
        if not self.tokens_need:
            return Kept(output, 3 * size_out * narrow * tokens)
        hidden = size_out * narrow * (1 + learns)  # before and behind GELU
        if kind == "residual_mlp":
            hidden += width * self.stream + _STATS + width * narrow * learns  # norm
        else:
            hidden += width * narrow * learns
        return Kept(hidden * tokens + output, 2 * size_out * narrow * tokens, 4 * size_out * narrow * tokens)

    def _resampler(self, size_out: int, output: float) -> Kept:
        config, width, narrow = self.config.connector, self.config.vision_config.hidden_size, self.narrow
        tokens, latents, inner = self.config.vision_config.num_tokens, config.num_latents, 0
        inner = config.num_heads * config.head_dim
        one = (tokens * width + (tokens + latents) * 4 * inner + latents * 10 * width) * narrow
        if not self.tokens_need:
            return Kept(output, one)
        learns = self.learns_gated
        kept = 2 * (tokens + latents) * inner * narrow  # keys and values
        kept += tokens * (width * narrow * learns + _STATS)
        kept += latents * (2 * inner * narrow + config.num_heads * _FLOAT)
        kept += latents * (width * (2 * self.stream + 2 * narrow * learns) + 2 * _STATS)
        kept += latents * 4 * width * narrow * (1 + learns)
        features = tokens * width * self.stream
        last = latents * width * (self.stream + narrow * (size_out != width) * learns)
        return _in_turn(
            [(config.num_layers, Kept(kept, one, one)), (1, Kept(features + last + output * (latents > 0)))]
        )

    # --- language, a text token -----------------------------------------------------------------------------

    def _text_layers(self) -> list[Kept]:
        """Every decoder layer, with the gated block before it."""
        needs = self.learns_language or (self.config.fusion == "concatenation" and self.tokens_need)
        layers = []
        for index in range(self.config.text_config.num_hidden_layers):
            block = Kept()
            if index in self.config.gated_layers:
                block = self._gated_block(needs)
                needs = needs or self.learns_gated or self.tokens_need
            layer = _in_turn([(1, block), (1, self._decoder_layer(needs))])
            if self.checkpointing:
                layer = layer.checkpointed(self.config.text_config.hidden_size * self.stream)
            layers.append(layer)
        return layers

    def _gated_block(self, needs_input: bool) -> Kept:
        gated, hidden = self.config.gated_cross_attention, self.config.text_config.hidden_size
        inner, wide = gated.num_heads * gated.head_dim, gated.ffn_ratio * hidden
        learns, stream, narrow = self.learns_gated, self.stream, self.narrow
        if not (needs_input or learns or self.tokens_need):
            return Kept(0, 2 * wide * narrow + 3 * hidden * stream)
        kept = 2 * inner * narrow + gated.num_heads * _FLOAT  # query, output, sums of exponentials
        kept += hidden * stream + _STATS + 1  # what the second norm reads, and its mask
        kept += 2 * wide * narrow + hidden * narrow * learns  # before and behind GELU; the norm's output
        if needs_input or learns:
            kept += hidden * stream + _STATS + hidden * narrow * learns  # the first norm
        return Kept(kept, hidden * (stream + narrow), wide * narrow + 2 * hidden * stream)

    def _decoder_layer(self, needs_input: bool) -> Kept:
        text, learns = self.config.text_config, self.learns_language
        stream, narrow = self.stream, self.narrow
        hidden, wide = text.hidden_size, text.intermediate_size
        heads = text.num_attention_heads * head_dim(text)
        transient = 3 * wide * narrow + 2 * hidden * stream
        if not needs_input:
            return Kept(0, transient)
        # keys and values are repeated for groups of query heads
        kept = 4 * heads * narrow + text.num_attention_heads * _FLOAT
        kept += 3 * wide * narrow + wide * narrow * learns
        kept += 2 * (hidden * _FLOAT + _FLOAT)  # the norms compute in float32
        kept += 2 * hidden * (stream + narrow) * learns
        return Kept(kept, hidden * (stream + narrow), (3 - learns) * wide * narrow + hidden * stream)

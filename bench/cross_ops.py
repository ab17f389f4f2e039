"""The problems of gated cross-attention: keys and values of all layers, a whole text, and one new token."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import baselines
from bench.functions import Function, places
from bench.problem import Implementation, Prepared
from infimm_kernels import decode_segments, gated_cross_attention, media_segments
from infimm_kernels.gated_cross_attention.decode import CANDIDATES as DECODE_CANDIDATES
from infimm_kernels.gated_residual import op as gated_op
from infimm_kernels.position_2d import reference as position_reference
from infimm_kernels.vision_keys_values import op as keys_values_op
from infimm_kernels.vision_keys_values import vision_keys_values


class VisionKeysValues(Function):
    """vision_keys_values of `num_layers` layers; beside it the position is added first, layer by layer.

    Results are the keys and values of all layers, one tensor each; a backward starts from a gradient of each.
    """

    op = "vision_keys_values"
    gradient_names = ("dfeatures", "dweight")

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        num_windows: int,
        seqlen: int,
        hidden: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        granularity: str = "window",
        num_prefix_tokens: int = 0,
    ):
        super().__init__(device, dtype)
        self.num_heads, self.granularity, self.num_prefix_tokens = num_heads, granularity, num_prefix_tokens
        self.side = round((seqlen - num_prefix_tokens) ** 0.5)
        self.positions = places(num_windows, device)
        inner = num_heads * head_dim
        make = functools.partial(torch.empty, dtype=dtype, device=device)
        self.inputs = make(num_windows, seqlen, hidden), make(num_layers, 2, inner, hidden)
        self.dout = make(2 * num_layers, num_windows * seqlen, num_heads, head_dim)
        self.draw()

    def draw(self) -> None:
        super().draw()
        self.inputs[1].mul_(self.inputs[1].shape[-1] ** -0.5)

    def eager(self, features: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        shape = (1, 1) if self.granularity == "window" else (self.side, self.side)
        options = self.positions, self.granularity, shape, self.num_prefix_tokens
        features = position_reference.forward(features, *options).flatten(0, 1)
        found = []
        for layer in weight:
            joint = F.linear(features, layer.flatten(0, 1)).unflatten(-1, (2, self.num_heads, -1))
            found += joint.unbind(1)
        return tuple(found)

    def implementations(self) -> list[Implementation]:
        def ours(features: Tensor, weight: Tensor, backend: str | None) -> tuple[Tensor, ...]:
            pairs = vision_keys_values(
                features,
                weight,
                num_heads=self.num_heads,
                positions=self.positions,
                granularity=self.granularity,
                num_prefix_tokens=self.num_prefix_tokens,
                backend=backend,
            )
            return tuple(x for pair in pairs for x in pair)

        return self.own_and_eager(keys_values_op.CANDIDATES, (*self.inputs, self.positions), ours)

    def backward(self, prepared: Prepared, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, prepared.leaves, self.dout.to(out[0].dtype).unbind())

    def _evaluate(self, prepared: Prepared, backward: bool) -> dict[str, Tensor]:
        if not backward:
            with torch.no_grad():
                return {"out": torch.stack(prepared.forward())}
        return dict(zip(self.gradient_names, self.gradients(prepared), strict=True))

    def flops(self, backward: bool) -> int:
        features, weight = self.inputs
        return (4 if backward else 2) * features.numel() * weight.numel() // weight.shape[-1]

    def bytes(self, backward: bool) -> int:
        features, weight = self.inputs
        passes = 2 if backward else 1
        return passes * (features.nbytes + weight.nbytes) + self.dout.nbytes


class _CrossAttention(Function):
    """What a text of a batch and its new tokens have in common: the inputs and the plain projection."""

    gradient_names = ("dx", "dquery", "dkey", "dvalue", "dout_weight", "dattn_gate")

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        batch: int,
        text_len: int,
        total_keys: int,
        hidden: int,
        num_heads: int,
        head_dim: int,
    ):
        super().__init__(device, dtype)
        self.batch, self.text_len, self.num_heads, self.head_dim = batch, text_len, num_heads, head_dim
        make = functools.partial(torch.empty, dtype=dtype, device=device)
        heads = num_heads, head_dim
        keys = make(total_keys, *heads), make(total_keys, *heads)
        out_weight = make(hidden, num_heads * head_dim)
        self.inputs = (
            make(batch, text_len, hidden),
            make(batch, text_len, *heads),
            *keys,
            out_weight,
            make(hidden),
        )
        self.dout = make(batch, text_len, hidden)

    def gated(self, x: Tensor, attended: Tensor, out_weight: Tensor, gate: Tensor) -> Tensor:
        """attended [batch, heads, text_len, head_dim] -> x + tanh(gate) * its projection."""
        return x + gate.tanh() * F.linear(attended.transpose(1, 2).flatten(2), out_weight)

    def ours(self, segments):
        def function(*inputs: Tensor, backend: str | None) -> Tensor:
            return gated_cross_attention(*inputs, segments, backend=backend)

        return function


class GatedCrossAttention(_CrossAttention):
    """gated_cross_attention of one text over images of num_windows each, the first after its first sixteenth.

    Of several images a token sees all those before it, whose keys overlap with other tokens' keys.
    """

    op = "gated_cross_attention"

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        text_len: int,
        num_windows: int,
        seqlen: int,
        hidden: int,
        num_heads: int,
        head_dim: int,
        num_images: int = 1,
    ):
        image = num_windows * seqlen
        total = num_images * image
        super().__init__(device, dtype, 1, text_len, total, hidden, num_heads, head_dim)
        first = text_len // 16
        locations = torch.zeros(text_len, dtype=torch.bool, device=device)
        locations[[first + i * (text_len - first) // num_images for i in range(num_images)]] = True
        lengths, option = [image] * num_images, {"only_attend_immediate_media": num_images == 1}
        self.segments = media_segments(locations[None], lengths, [num_images], **option)
        images_before = locations.cumsum(0)  # [text_len]
        self.sees = images_before > 0
        self.mask = torch.arange(total, device=device) < (images_before * image)[:, None]
        self.pairs, self.seen = int(self.mask.sum()), int(self.sees.sum())
        self.mask[:, 0] = True  # a softmax over nothing is NaN; rows that see nothing are left out afterwards
        self.draw()

    def eager(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, out_weight: Tensor, gate) -> Tensor:
        query, key, value = query.transpose(1, 2), key.transpose(0, 1)[None], value.transpose(0, 1)[None]
        scores = query @ key.transpose(2, 3) * self.head_dim**-0.5
        scores = scores.masked_fill(~self.mask, torch.finfo(scores.dtype).min)
        attended = scores.softmax(3) @ value
        return self._gated(x, attended, out_weight, gate)

    def _masked_sdpa(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, out_weight: Tensor, gate):
        query, key, value = query.transpose(1, 2), key.transpose(0, 1)[None], value.transpose(0, 1)[None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
        return self._gated(x, attended, out_weight, gate)

    def _gated(self, x: Tensor, attended: Tensor, out_weight: Tensor, gate: Tensor) -> Tensor:
        return self.gated(x, attended.masked_fill(~self.sees[:, None], 0), out_weight, gate)

    def implementations(self) -> list[Implementation]:
        return [
            *self.own_and_eager(gated_op.CANDIDATES, self.inputs, self.ours(self.segments)),
            self.function("sdpa_masked", self._masked_sdpa),
        ]

    def flops(self, backward: bool) -> int:
        x, query, key, _, out_weight, _ = self.inputs
        attention = 4 * self.pairs * key[0].numel()
        projection = 2 * self.seen * out_weight.numel()
        return attention * 5 // 2 + 2 * projection if backward else attention + projection


class GatedCrossAttentionDecode(_CrossAttention):
    """gated_cross_attention of one new token per sample over keys and values that are kept.

    Beside it: the same keys and values through SDPA, and what keeps none: they are made of the features and a
    weight again for every token, so that is what they are drawn from.
    """

    op = "gated_cross_attention_decode"

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        batch: int,
        num_windows: int,
        seqlen: int,
        hidden: int,
        num_heads: int,
        head_dim: int,
        vision_hidden: int,
        text_len: int = 1,
    ):
        keys = num_windows * seqlen
        super().__init__(device, dtype, batch, text_len, batch * keys, hidden, num_heads, head_dim)
        self.segments = decode_segments([keys] * batch, [1] * batch, text_len=text_len, device=device)
        make = functools.partial(torch.empty, dtype=dtype, device=device)
        self.features = make(batch * num_windows, seqlen, vision_hidden)
        self.key_value_weight = make(2 * num_heads * head_dim, vision_hidden)
        self.positions = places(len(self.features), device)
        self.draw()

    def draw(self) -> None:
        super().draw()
        self.features.normal_(generator=self._generator)
        self.key_value_weight.normal_(std=len(self.features[0, 0]) ** -0.5, generator=self._generator)
        for kept, made in zip(self.inputs[2:4], self._keys_values(), strict=True):
            kept.copy_(made)

    def _keys_values(self) -> tuple[Tensor, Tensor]:
        features = position_reference.forward(self.features, self.positions, "window", (1, 1), 0)
        joint = F.linear(features.flatten(0, 1), self.key_value_weight)
        return joint.unflatten(1, (2, self.num_heads, self.head_dim)).unbind(1)

    def _heads_first(self, x: Tensor) -> Tensor:
        """[total, heads, head_dim] -> [batch, heads, keys, head_dim], a view."""
        return x.unflatten(0, (self.batch, -1)).transpose(1, 2)

    def eager(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, out_weight: Tensor, gate) -> Tensor:
        heads_first = query.transpose(1, 2), self._heads_first(key), self._heads_first(value)
        return self.gated(x, baselines.eager(*heads_first), out_weight, gate)

    def _sdpa(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, out_weight: Tensor, gate):
        heads_first = query.transpose(1, 2), self._heads_first(key), self._heads_first(value)
        return self.gated(x, F.scaled_dot_product_attention(*heads_first), out_weight, gate)

    def _recompute(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, out_weight: Tensor, gate):
        return self._sdpa(x, query, *self._keys_values(), out_weight, gate)

    def implementations(self) -> list[Implementation]:
        tensors = *self.inputs, self.segments.key_ranges
        return [
            *self.own_and_eager(DECODE_CANDIDATES, tensors, self.ours(self.segments)),
            self.function("sdpa_cached", self._sdpa),
            self.function("recompute", self._recompute),
        ]

    def flops(self, backward: bool) -> int:
        _, _, key, _, out_weight, _ = self.inputs
        return 4 * self.text_len * key.numel() + 2 * self.batch * self.text_len * out_weight.numel()

    def bytes(self, backward: bool) -> int:
        x, query, key, value, out_weight, gate = self.inputs
        return 2 * x.nbytes + sum(t.nbytes for t in (query, key, value, out_weight, gate))

"""A gated cross-attention block as one writes it down from the Flamingo paper, in plain PyTorch.

What `bench.cross_attention` compares with: dense scores of every text token with every vision token under a
boolean mask, keys and values made again by every call. Nothing here comes from this package.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


class Weights(NamedTuple):
    """Of one block: vectors [hidden]; the others in the layout of torch.nn.Linear."""

    norm_weight: Tensor
    norm_bias: Tensor
    query: Tensor  # [inner, hidden]
    key_value: Tensor  # [2 * inner, vision_hidden], keys first
    out: Tensor  # [hidden, inner]
    attn_gate: Tensor
    ffn_norm_weight: Tensor
    ffn_norm_bias: Tensor
    ffn_in: Tensor  # [ffn_hidden, hidden]
    ffn_out: Tensor  # [hidden, ffn_hidden]
    ffn_gate: Tensor


def random_weights(hidden: int, vision_hidden: int, inner: int, ffn_hidden: int) -> Weights:
    """float32 weights that keep a signal's size, gates about half open, norms that are not the identity."""

    def linear(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns) * columns**-0.5

    def vector(mean: float) -> Tensor:
        return mean + 0.5 * torch.randn(hidden)

    return Weights(
        vector(1.0),
        vector(0.0),
        linear(inner, hidden),
        linear(2 * inner, vision_hidden),
        linear(hidden, inner),
        vector(0.5),
        vector(1.0),
        vector(0.0),
        linear(ffn_hidden, hidden),
        linear(hidden, ffn_hidden),
        vector(0.5),
    )


def encoding(places: Tensor, channels: int) -> Tensor:
    """places [num_windows, 2], (row, column) or negative -> float64 [num_windows, 1, channels].

    The first half of the channels holds sines and cosines of the column, the second half those of the row.
    """
    half = channels // 2
    rates = torch.exp(-math.log(10000.0) / half * torch.arange(0, half, 2, dtype=torch.float64))
    row, column = places.double().cpu().unbind(1)
    found = torch.empty(len(places), channels, dtype=torch.float64)
    for first, coordinate in ((0, column), (half, row)):
        angles = coordinate[:, None] * rates
        found[:, first : first + half : 2] = angles.sin()
        found[:, first + 1 : first + half : 2] = angles.cos()
    found[(places.cpu() < 0).any(1)] = 0.0
    return found[:, None]


def keys_values(
    weights: Weights, features: Tensor, position: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """features [num_windows, seqlen, vision_hidden] -> key and value [1, num_heads, keys, head_dim]."""
    tokens = (features + position).reshape(1, -1, features.shape[-1])
    key, value = F.linear(tokens, weights.key_value).chunk(2, -1)
    return tuple(x.unflatten(-1, (num_heads, -1)).transpose(1, 2).contiguous() for x in (key, value))


def media_mask(media_locations: Tensor, image_of_key: Tensor, text_len: int) -> Tensor:
    """[text_len, keys], True where one of the last tokens sees a key: its image is the last one before it.

    media_locations: bool [length of the whole text]; image_of_key [keys] counts images from 1.
    """
    images_so_far = media_locations.cumsum(0)[-text_len:]
    return images_so_far[:, None] == image_of_key[None, :]


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """[1, num_heads, text_len, head_dim] over all keys; exactly 0 for a token that sees none."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).masked_fill(~mask.any(1)[:, None], 0.0)


def queries(weights: Weights, x: Tensor, num_heads: int) -> Tensor:
    """x [1, text_len, hidden] -> [1, num_heads, text_len, head_dim]."""
    normed = F.layer_norm(x, x.shape[-1:], weights.norm_weight, weights.norm_bias, EPS)
    return F.linear(normed, weights.query).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def branches(weights: Weights, x: Tensor, attended: Tensor, sees: Tensor) -> Tensor:
    """Both gated branches after the attention; the second is zero too for a token that sees no image."""
    update = F.linear(attended.transpose(1, 2).flatten(2), weights.out)
    x = x + weights.attn_gate.tanh() * update
    normed = F.layer_norm(x, x.shape[-1:], weights.ffn_norm_weight, weights.ffn_norm_bias, EPS)
    update = F.linear(F.gelu(F.linear(normed, weights.ffn_in)), weights.ffn_out)
    return x + weights.ffn_gate.tanh() * update * sees[:, None]


def dense_block(
    weights: Weights,
    x: Tensor,
    features: Tensor,
    position: Tensor,
    media_locations: Tensor,
    image_of_key: Tensor,
    num_heads: int,
) -> Tensor:
    """The block on x [1, text_len, hidden], the last tokens of a text; keys and values are made here."""
    key, value = keys_values(weights, features, position, num_heads)
    mask = media_mask(media_locations, image_of_key, x.shape[1])
    attended = dense_attention(queries(weights, x, num_heads), key, value, mask)
    return branches(weights, x, attended, mask.any(1))


def cached_block(weights: Weights, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The block on new tokens, all of which see the one image whose keys and values were kept."""
    attended = F.scaled_dot_product_attention(queries(weights, x, key.shape[1]), key, value)
    return branches(weights, x, attended, torch.ones(x.shape[1], dtype=torch.bool, device=x.device))

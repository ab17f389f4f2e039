"""The gated cross-attention block, and the keys and values it reads."""

import math

import torch
from torch import Tensor, nn

from infimm_kernels import MediaSegments, gated_cross_attention, gated_feed_forward, vision_keys_values

from .config import GatedCrossAttentionConfig, PositionGranularity

KeyValue = tuple[Tensor, Tensor]


class VisionKeysValues(nn.Module):
    """The keys and values of all gated blocks, with the windows' 2-D positions, in one matrix product.

    `weight` [num_blocks, 2, num_heads * head_dim, vision_hidden], keys before values; each slice is the
    weight of a linear layer without bias and starts like `torch.nn.Linear`'s."""

    def __init__(
        self,
        num_blocks: int,
        vision_hidden_size: int,
        config: GatedCrossAttentionConfig,
        position: PositionGranularity,
        num_prefix_tokens: int,
    ) -> None:
        super().__init__()
        self.num_heads, self.granularity = config.num_heads, position
        self.num_prefix_tokens = num_prefix_tokens
        inner_size = config.num_heads * config.head_dim
        self.weight = nn.Parameter(torch.empty(num_blocks, 2, inner_size, vision_hidden_size))
        bound = 1 / math.sqrt(vision_hidden_size)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, features: Tensor, window_positions: Tensor) -> tuple[KeyValue, ...]:
        """Visual tokens [n, tokens, vision_hidden] and their windows' (row, column) [n, 2] -> for each block
        key, value [n * tokens, num_heads, head_dim]."""
        position = {}
        if self.granularity != "none":
            position = dict(positions=window_positions, granularity=self.granularity)
        return vision_keys_values(
            features,
            self.weight,
            num_heads=self.num_heads,
            num_prefix_tokens=self.num_prefix_tokens,
            **position,
        )


class GatedCrossAttentionBlock(nn.Module):
    """x = x + tanh(attn_gate) * attn(x, image); x = x + tanh(ffn_gate) * ffn(x); both gates start at zero.

    A text token sees the tokens of the image before it only; a token with no image before it is left
    untouched by both branches. The weights of `out_proj`, `ffn_norm`, `ffn_in` and `ffn_out` are handed to
    the ops, so hooks on these modules do not run."""

    def __init__(self, hidden_size: int, config: GatedCrossAttentionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        inner_size = config.num_heads * config.head_dim
        ffn_size = config.ffn_ratio * hidden_size
        self.attn_norm = nn.LayerNorm(hidden_size)
        self.q_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.out_proj = nn.Linear(inner_size, hidden_size, bias=False)
        self.attn_gate = nn.Parameter(torch.zeros(hidden_size))
        self.ffn_norm = nn.LayerNorm(hidden_size)
        self.ffn_in = nn.Linear(hidden_size, ffn_size, bias=False)
        self.ffn_out = nn.Linear(ffn_size, hidden_size, bias=False)
        self.ffn_gate = nn.Parameter(torch.zeros(hidden_size))

    def query(self, x: Tensor) -> Tensor:
        """[batch, text_len, hidden] -> [batch, text_len, num_heads, head_dim]."""
        return self.q_proj(self.attn_norm(x)).unflatten(-1, (self.num_heads, self.head_dim))

    def forward(self, x: Tensor, key: Tensor, value: Tensor, segments: MediaSegments) -> Tensor:
        x = gated_cross_attention(
            x, self.query(x), key, value, self.out_proj.weight, self.attn_gate, segments
        )
        return gated_feed_forward(
            x,
            self.ffn_norm.weight,
            self.ffn_norm.bias,
            self.ffn_in.weight,
            self.ffn_out.weight,
            self.ffn_gate,
            row_mask=segments.text_mask,
            eps=self.ffn_norm.eps,
        )

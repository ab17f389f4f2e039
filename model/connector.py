"""What stands between the vision encoder and the language model: an MLP, a resampler, or nothing."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infimm_kernels import varlen_attention

from .checks import require
from .config import ConnectorConfig


def build_connector(config: ConnectorConfig, in_size: int, out_size: int) -> nn.Module:
    """A module from [n, tokens, in_size] to [n, tokens, out_size]; "resampler": [n, num_latents, out_size].

    "none" and "residual_mlp" keep the width: ValueError where `out_size` is another."""
    if config.kind in ("none", "residual_mlp"):
        rule = f"equal in_size {in_size} with connector {config.kind!r}"
        require(out_size == in_size, "out_size", rule, out_size)
        return nn.Identity() if config.kind == "none" else ResidualMlp(in_size)
    if config.kind == "mlp":
        return Mlp(in_size, out_size)
    return PerceiverResampler(
        in_size,
        out_size,
        num_layers=config.num_layers,
        num_latents=config.num_latents,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
    )


class ResidualMlp(nn.Module):
    """y = LN(x) + W2 gelu(W1 LN(x)), [..., hidden] -> [..., hidden]; W2 starts at zero, so y starts as LN(x).

    The norm stands here and not at the keys and values, so that a position added after the transform can be
    folded into their projection. Without the skip the MLP first has to learn to pass the features on."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.linear_in = nn.Linear(hidden_size, hidden_size)
        self.linear_out = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.linear_out(F.gelu(self.linear_in(x)))


class Mlp(nn.Module):
    """y = W2 gelu(W1 x), [..., in_size] -> [..., out_size], LLaVA-1.5's projector (Liu et al. 2023)."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(in_size, out_size)
        self.linear_out = nn.Linear(out_size, out_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(F.gelu(self.linear_in(x)))


class PerceiverResampler(nn.Module):
    """Features [n, tokens, in_size], any number of tokens -> [n, num_latents, out_size]; each window alone.

    Flamingo's (Alayrac et al. 2022): learned latents z go through layers of

        z = z + attention(LN(z); keys and values of [LN(features); LN(z)])
        z = z + W2 gelu(W1 LN(z))

    and a final LayerNorm; where out_size is another width, a linear layer follows. No biases but the norms'
    and that layer's. ValueError for features of another width."""

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        num_layers: int = 6,
        num_latents: int = 64,
        num_heads: int = 8,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, in_size) * 0.02)
        self.layers = nn.ModuleList(ResamplerLayer(in_size, num_heads, head_dim) for _ in range(num_layers))
        self.norm = nn.LayerNorm(in_size)
        self.proj = nn.Identity() if in_size == out_size else nn.Linear(in_size, out_size)

    def forward(self, features: Tensor) -> Tensor:
        num_latents, width = self.latents.shape
        legal = features.ndim == 3 and features.shape[1] > 0 and features.shape[2] == width
        require(legal, "features", f"have shape [n, tokens, {width}]", list(features.shape))
        n, tokens, _ = features.shape
        # On a GPU made there, so that nothing waits for the host.
        ends = torch.arange(n + 1, dtype=torch.int32, device=features.device)
        cu_seqlens = ends * num_latents, ends * (tokens + num_latents)
        z = self.latents.expand(n, -1, -1)
        for layer in self.layers:
            z = layer(z, features, *cu_seqlens)
        return self.proj(self.norm(z))


class ResamplerLayer(nn.Module):
    """z [n, latents, hidden], features [n, tokens, hidden] -> z; the cumulative lengths of both sides."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        inner_size = num_heads * head_dim
        self.features_norm = nn.LayerNorm(hidden_size)
        self.latents_norm = nn.LayerNorm(hidden_size)
        self.q_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.kv_proj = nn.Linear(hidden_size, 2 * inner_size, bias=False)
        self.out_proj = nn.Linear(inner_size, hidden_size, bias=False)
        self.ffn_norm = nn.LayerNorm(hidden_size)
        self.ffn_in = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.ffn_out = nn.Linear(4 * hidden_size, hidden_size, bias=False)

    def forward(self, z: Tensor, features: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
        heads = self.num_heads, self.head_dim
        normed = self.latents_norm(z)
        q = self.q_proj(normed).view(-1, *heads)
        # Joined behind the projection, where the rows are the narrower ones.
        kv = torch.cat([self.kv_proj(self.features_norm(features)), self.kv_proj(normed)], dim=1)
        k, v = kv.view(-1, 2, *heads).unbind(1)  # [n * (tokens + latents), heads, head_dim]
        lengths = dict(max_seqlen_q=z.shape[1], max_seqlen_k=kv.shape[1])
        attended = varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **lengths)
        z = z + self.out_proj(attended.view(*z.shape[:2], -1))
        return z + self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(z))))

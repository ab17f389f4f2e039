"""The vision encoder: a ViT that reads every window on its own, with learned positions and a CLS token.

Post-norm blocks are EVA2-CLIP-E's, x = x + LN(attn(x)), x = x + LN(mlp(x)), made of `window_attention` and
`residual_post_norm`; pre-norm blocks, x = x + f(LN(x)), are CLIP's (Radford et al. 2021)."""

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infimm_kernels import residual_post_norm, window_attention

from .checks import require, require_choice
from .vision_config import VisionConfig

Interpolation = Literal["bicubic", "bilinear"]


def build_vision_encoder(config: VisionConfig) -> nn.Module:
    """A `VisionTransformer`, or a `MixtureOfResolutionEncoder` where `config.mixture_of_resolution` is set.

    Either maps `pixel_values` [n, 3, P, P], P = config.input_size, to [n, config.num_tokens, hidden_size]."""
    if config.mixture_of_resolution is None:
        return VisionTransformer(config)
    from .mixture_of_resolution import MixtureOfResolutionEncoder  # which is made of the ViT below

    return MixtureOfResolutionEncoder(config)


class Attention(nn.Module):
    """`k_bias` changes no result, as a constant on all keys leaves softmax alone; CLIP's weights have it."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads, self.num_prefix_tokens = config.num_heads, config.num_prefix_tokens
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.k_bias = nn.Parameter(torch.zeros(config.hidden_size)) if config.key_bias else None
        self.v_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, qkv_bias: Tensor) -> Tensor:
        qkv = F.linear(x, self.qkv_proj.weight, qkv_bias)
        qkv = qkv.view(*x.shape[:2], 3, self.num_heads, -1)  # [n, tokens, 3, heads, head_dim]
        out = window_attention(qkv, num_prefix_tokens=self.num_prefix_tokens)
        return self.out_proj(out.flatten(2))


class Block(nn.Module):
    """[n, tokens, hidden] and the bias of q, k and v [3 * hidden] -> [n, tokens, hidden].

    The bias is made by the encoder, for all blocks at once (`VisionTransformer.run_blocks`)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.is_post_norm, self.activation = config.block == "post_norm", config.activation
        self.attn = Attention(config)
        self.attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_in = nn.Linear(config.hidden_size, config.intermediate_size)
        self.mlp_out = nn.Linear(config.intermediate_size, config.hidden_size)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if self.is_post_norm:
            nn.init.constant_(self.attn_norm.weight, config.norm_gain_init)
            nn.init.constant_(self.mlp_norm.weight, config.norm_gain_init)

    def forward(self, x: Tensor, qkv_bias: Tensor) -> Tensor:
        if self.is_post_norm:
            x = _add_normed(x, self.attn(x, qkv_bias), self.attn_norm)
            return _add_normed(x, self._mlp(x), self.mlp_norm)
        x = x + self.attn(self.attn_norm(x), qkv_bias)
        return x + self._mlp(self.mlp_norm(x))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.mlp_out(_activated(self.mlp_in(x), self.activation))


def _activated(x: Tensor, activation: str) -> Tensor:
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if torch.is_grad_enabled():
        return F.gelu(x)
    return torch.ops.aten.gelu_(x)  # nothing else reads x, the widest tensor of the block


def _add_normed(x: Tensor, branch: Tensor, norm: nn.LayerNorm) -> Tensor:
    return residual_post_norm(x, branch, norm.weight, norm.bias, eps=norm.eps)


class VisionTransformer(nn.Module):
    """`pixel_values` [n, 3, P, P], P = config.window_size -> features [n, config.num_tokens, hidden], the
    output of the block that `config.feature_layer` names, CLS token first. Without a CLS token in the config
    (mixture of resolutions) the blocks see the patches alone.

    Any floating pixels, cast to the weights' dtype; features in that dtype, under autocast in float32, as the
    residual stream is. ValueError for another shape. `config` is copied: `set_window_size` changes this
    model's own. `gradient_checkpointing`: keep only the blocks' inputs for the backward, in training mode."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = copy.deepcopy(config)
        self.gradient_checkpointing = False
        hidden_size, patch_values = config.hidden_size, 3 * config.patch_size**2
        # A linear layer over flattened patches is the strided convolution of the released weights.
        self.patch_embed = nn.Linear(patch_values, hidden_size, bias=config.patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(hidden_size))
        self.position_table = nn.Parameter(_initial_position_table(config))  # [1 + grid * grid, hidden]
        self.embedding_norm = (
            nn.LayerNorm(hidden_size, eps=config.layer_norm_eps) if config.embedding_norm else nn.Identity()
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        nn.init.normal_(self.cls_token, std=0.02)
        self.freeze_inactive_blocks()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.run_blocks(self.embed(pixel_values), 0, self.config.num_active_layers)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """The input of the first block, [n, config.num_tokens, hidden]."""
        check_pixels(pixel_values, self.config.window_size)
        grid, patch = self.config.grid_size, self.config.patch_size
        prefix, weight = self.config.num_prefix_tokens, self.patch_embed.weight
        # The CLS token goes through the product as a row of zeros and gets its value from the table, so that
        # pixels are the only thing that is copied.
        rows = weight.new_zeros(len(pixel_values), prefix + grid * grid, weight.shape[1])
        patches = (
            pixel_values.unflatten(3, (grid, patch)).unflatten(2, (grid, patch)).permute(0, 2, 4, 1, 3, 5)
        )
        rows[:, prefix:].view(patches.shape).copy_(patches)  # [n, grid, grid, 3, patch, patch]
        table = self.position_table[1:]
        if self.patch_embed.bias is not None:
            table = table + self.patch_embed.bias
        if prefix:
            table = torch.cat([self.position_table[:1] + self.cls_token, table])
        return self.embedding_norm(F.linear(rows, weight) + table)

    def run_blocks(self, x: Tensor, start: int, end: int) -> Tensor:
        """Blocks start to end - 1 on [n, tokens, hidden]."""
        blocks = self.blocks[start:end]
        for block, qkv_bias in zip(blocks, _qkv_biases(blocks), strict=True):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, qkv_bias, use_reentrant=False)
            else:
                x = block(x, qkv_bias)
        return x

    def set_window_size(self, window_size: int, interpolation: Interpolation = "bicubic") -> None:
        """Makes windows of `window_size` pixels the input, and fits the position table: its CLS row is kept,
        its grid interpolated, in float32 at least, antialiased where it shrinks.

        "bicubic" is what EVA's tools do, and the default because it keeps more of a table that changes from
        cell to cell: a wave of 6 cells loses 3 % of its height in doubling, with "bilinear", which the paper
        names, 9 %.
        ValueError, and nothing changed, for a size that the patches do not fill or another interpolation."""
        require_choice("interpolation", interpolation, ("bicubic", "bilinear"))
        self.config.set_input_size(window_size)
        table, new = self.position_table.detach(), self.config.grid_size
        old = math.isqrt(len(table) - 1)
        if old == new:
            return
        dtype = torch.promote_types(table.dtype, torch.float32)
        rows = table[1:].to(dtype).view(1, old, old, -1).permute(0, 3, 1, 2)
        rows = F.interpolate(rows, size=(new, new), mode=interpolation, antialias=new < old)
        rows = rows.permute(0, 2, 3, 1).reshape(new * new, -1).to(table.dtype)
        requires_grad = self.position_table.requires_grad
        self.position_table = nn.Parameter(torch.cat([table[:1], rows]), requires_grad=requires_grad)

    def freeze_inactive_blocks(self) -> None:
        """No gradients for what never runs: blocks behind the feature layer, an unused CLS token."""
        for block in self.blocks[self.config.num_active_layers :]:
            block.requires_grad_(False)
        if not self.config.num_prefix_tokens:
            self.cls_token.requires_grad_(False)


def check_pixels(pixel_values: Tensor, size: int) -> None:
    """ValueError unless `pixel_values` are floating [n, 3, size, size]."""
    shape = list(pixel_values.shape)
    rule = f"have shape [num_windows, 3, {size}, {size}]"
    require(len(shape) == 4 and shape[1:] == [3, size, size], "pixel_values", rule, shape)
    require(pixel_values.is_floating_point(), "pixel_values", "be floating", pixel_values.dtype)


def _qkv_biases(blocks: Sequence[Block]) -> tuple[Tensor, ...]:
    """The bias of q, k and v [3 * hidden] of every block: one concatenation, instead of one a block."""
    attns = [block.attn for block in blocks]
    if not attns:
        return ()
    zero = torch.zeros_like(attns[0].q_bias)
    keys = [zero if attn.k_bias is None else attn.k_bias for attn in attns]
    biases = [(attn.q_bias, key, attn.v_bias) for attn, key in zip(attns, keys, strict=True)]
    return torch.cat([bias for of_block in biases for bias in of_block]).view(len(attns), -1).unbind()


def _initial_position_table(config: VisionConfig) -> Tensor:
    grid, hidden = config.grid_size, config.hidden_size
    if config.position_init == "normal":
        return torch.randn(1 + grid * grid, hidden) * 0.02
    # Wavelengths from 5 to 64 cells of an 8 x 8 grid over the window, amplitude of the patch features.
    quarter = hidden // 4
    frequency = 2 * math.pi / torch.logspace(math.log10(5.0), math.log10(64.0), quarter)
    coordinate = (torch.arange(grid) + 0.5) * (8.0 / grid)
    angle = coordinate[:, None] * frequency  # [grid, quarter]
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)
    table = torch.cat(
        [wave[:, None].expand(grid, grid, -1), wave[None, :].expand(grid, grid, -1)], dim=2
    )  # [grid, grid, hidden]
    return 0.7 * torch.cat([torch.zeros(1, hidden), table.reshape(grid * grid, hidden)])

"""The ViT that reads each window on its own: residual post-norm blocks, a CLS token, learned positions.

EVA2-CLIP-E: x = x + LN(attn(x)), x = x + LN(mlp(x)); the query and value projections have a bias, the key
projection has none. Windows are independent, so attention is `window_attention` with one CLS prefix token."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infimm_kernels import residual_post_norm, window_attention

from .checks import is_int
from .config import VisionConfig

NUM_PREFIX_TOKENS = 1


class Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        num_windows, seqlen, hidden_size = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv_proj.weight, bias)
        qkv = qkv.view(num_windows, seqlen, 3, self.num_heads, hidden_size // self.num_heads)
        out = window_attention(
            qkv, num_prefix_tokens=NUM_PREFIX_TOKENS
        )  # [num_windows, seqlen, heads, head_dim]
        return self.out_proj(out.reshape(num_windows, seqlen, hidden_size))


class Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_in = nn.Linear(config.hidden_size, config.intermediate_size)
        self.mlp_out = nn.Linear(config.intermediate_size, config.hidden_size)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        nn.init.constant_(self.attn_norm.weight, config.norm_gain_init)
        nn.init.constant_(self.mlp_norm.weight, config.norm_gain_init)

    def forward(self, x: Tensor) -> Tensor:
        x = _add_normed(x, self.attn(x), self.attn_norm)
        return _add_normed(x, self.mlp_out(F.gelu(self.mlp_in(x))), self.mlp_norm)


def _add_normed(x: Tensor, branch: Tensor, norm: nn.LayerNorm) -> Tensor:
    return residual_post_norm(x, branch, norm.weight, norm.bias, eps=norm.eps)


class VisionTransformer(nn.Module):
    """`pixel_values` [num_windows, 3, size, size] -> features [num_windows, 1 + patches, hidden].

    `config` is copied: `set_window_size` changes this model's own."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = copy.deepcopy(config)
        self.gradient_checkpointing = False
        patch_values = 3 * config.patch_size**2
        # a linear layer over flattened patches is the strided convolution of the released weights
        self.patch_embed = nn.Linear(patch_values, config.hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.position_table = nn.Parameter(_initial_position_table(config))  # [1 + grid * grid, hidden]
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        nn.init.normal_(self.cls_token, std=0.02)
        for block in self.blocks[config.num_active_layers :]:
            block.requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        size = self.config.window_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            rule = f"have shape [num_windows, 3, {size}, {size}]"
            raise ValueError(f"pixel_values must {rule}, got {list(pixel_values.shape)}")
        grid, patch = self.config.grid_size, self.config.patch_size
        pixel_values = pixel_values.to(self.patch_embed.weight.dtype)
        patches = pixel_values.reshape(-1, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(-1, grid * grid, 3 * patch * patch)
        tokens = self.patch_embed(patches)
        x = torch.cat([self.cls_token.to(tokens.dtype).expand(len(tokens), 1, -1), tokens], dim=1)
        x = x + self.position_table
        for block in self.blocks[: self.config.num_active_layers]:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def set_window_size(self, window_size: int) -> None:
        """Interpolates the position table to the grid of `window_size` pixels, bicubic; keeps the CLS row."""
        patch = self.config.patch_size
        if not is_int(window_size, 1) or window_size % patch:
            raise ValueError(
                f"window_size must be a positive multiple of patch_size {patch}, got {window_size!r}"
            )
        old, new = self.config.grid_size, window_size // patch
        self.config.window_size = window_size
        if old == new:
            return
        table = self.position_table.detach()
        rows = table[1:].float().view(1, old, old, -1).permute(0, 3, 1, 2)
        rows = F.interpolate(rows, size=(new, new), mode="bicubic", align_corners=False)
        rows = rows.permute(0, 2, 3, 1).reshape(new * new, -1).to(table.dtype)
        requires_grad = self.position_table.requires_grad
        self.position_table = nn.Parameter(torch.cat([table[:1], rows]), requires_grad=requires_grad)


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

"""EVA2-CLIP-E's ViT in plain PyTorch: the oracle of `model.vision`, and the rival in bench.encoder.

Written from the equations: softmax attention through SDPA, x + LN(attn(x)), x + LN(mlp(x)), a bias on queries
and values alone, patches by a strided convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.proj = nn.Linear(width, width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=eps) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [n, heads, tokens, head_dim]
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.norm1(self.proj(attended))
        return x + self.norm2(self.fc2(F.gelu(self.fc1(x))))


class PlainViT(nn.Module):
    """`pixel_values` [n, 3, side, side] -> [n, 1 + patches, width], the output of the last block."""

    def __init__(
        self, side: int, patch: int, width: int, heads: int, mlp_width: int, depth: int, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.checkpointing = False
        self.conv = nn.Conv2d(3, width, patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (side // patch) ** 2, width))
        self.blocks = nn.ModuleList(PlainBlock(width, heads, mlp_width, eps) for _ in range(depth))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.conv(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(patches), -1, -1), patches], dim=1) + self.positions
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


# Names of parameters, or what they begin with, by those of `model.vision`.
PLAIN_NAMES = {
    "patch_embed": "conv",
    "cls_token": "cls",
    "position_table": "positions",
    "attn.qkv_proj": "qkv",
    "attn.q_bias": "q_bias",
    "attn.v_bias": "v_bias",
    "attn.out_proj": "proj",
    "attn_norm": "norm1",
    "mlp_in": "fc1",
    "mlp_out": "fc2",
    "mlp_norm": "norm2",
}
TIMM_NAMES = {
    "patch_embed": "patch_embed.proj",
    "cls_token": "cls_token",
    "position_table": "pos_embed",
    "attn.qkv_proj": "attn.qkv",
    "attn.q_bias": "attn.q_bias",
    "attn.v_bias": "attn.v_bias",
    "attn.out_proj": "attn.proj",
    "attn_norm": "norm1",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
    "mlp_norm": "norm2",
}


def renamed(name: str, names: dict[str, str]) -> str:
    """What the parameter `name` of a `VisionTransformer` is called there."""
    start = ".".join(name.split(".")[:2]) + "." if name.startswith("blocks.") else ""
    inner = name.removeprefix(start)
    own = next(key for key in names if inner == key or inner.startswith(key + "."))
    return start + names[own] + inner[len(own) :]


def share_weights(module: nn.Module, vit: nn.Module, names: dict[str, str]) -> None:
    """Makes the parameters of `module` views of those of the active blocks of `vit`."""
    given = {renamed(name, names): parameter.detach() for name, parameter in vit.named_parameters()}
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    module.load_state_dict({name: given[name].view(shape) for name, shape in shapes.items()}, assign=True)


def plain_vit_like(vit: nn.Module) -> PlainViT:
    """A `PlainViT` with the weights of `vit`, in the same memory."""
    config = vit.config
    sizes = config.hidden_size, config.num_heads, config.intermediate_size, config.num_active_layers
    with torch.device("meta"):
        plain = PlainViT(config.window_size, config.patch_size, *sizes, eps=config.layer_norm_eps)
    share_weights(plain, vit, PLAIN_NAMES)
    return plain


def timm_vit_like(vit: nn.Module) -> nn.Module:
    """timm's EVA2-CLIP-E with the weights of `vit`, in the same memory, and without its last norm: its
    `forward_features` gives what `vit` gives. ImportError without timm."""
    import timm

    config = vit.config
    with torch.device("meta"):
        theirs = timm.create_model(
            "eva02_enormous_patch14_clip_224",
            img_size=config.window_size,
            patch_size=config.patch_size,
            embed_dim=config.hidden_size,
            depth=config.num_active_layers,
            num_heads=config.num_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            num_classes=0,
        )
    theirs.norm = nn.Identity()
    share_weights(theirs, vit, TIMM_NAMES)
    for block in theirs.blocks:  # the only buffers: key biases, which are zero
        block.attn.k_bias = torch.zeros_like(block.attn.q_bias)
    return theirs

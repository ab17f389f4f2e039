"""Mixture-of-resolution adaptation: one image, read small by the ViT and large by a ConvNeXt beside it.

Luo et al. 2024 (LLaVA-HR). After 1/4, 2/4 and 3/4 of the ViT's blocks, with v its patch tokens and c the last
grid of the ConvNeXt, an adapter computes

    y = v + f_l(v)                      f_l: depth-wise convolution, GELU, linear
    out = y + tanh(g) * f_h(c)          f_h: linear, GELU, linear, brought to the ViT's grid
    g = MLP([mean(y), mean(f_h(c))])    means over tokens; one number an image

and the features are proj_v(v) + proj_c(c), at the ViT's width. As in the authors' code the ViT has no CLS
token from the start. Theirs resizes images and grids from corner to corner; here cells of the two grids that
cover each other stay so, and the small image is antialiased."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import ConvNextConfig, ConvNextModel

from .vision import Interpolation, VisionTransformer, check_pixels
from .vision_config import MixtureOfResolutionConfig, VisionConfig


class MixtureOfResolutionEncoder(nn.Module):
    """`pixel_values` [n, 3, P, P], P = config.input_size -> features [n, config.num_tokens, hidden].

    The ConvNeXt reads the pixels, the ViT what is left of them at config.window_size, made here. Parameters:
    `vit.` with the names of `VisionTransformer`, `convnext.` with those of transformers' ConvNextModel (less
    its last norm, which belongs to a pooled output), `adapters.` all that is new. Dtypes, errors and
    `gradient_checkpointing` as in `VisionTransformer`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vit = VisionTransformer(config)
        self.convnext = _convnext(config.mixture_of_resolution)
        self.adapters = Adapters(config)

    @property
    def config(self) -> VisionConfig:
        """The ViT's: one object, so that both always have the same sizes."""
        return self.vit.config

    @property
    def gradient_checkpointing(self) -> bool:
        return self.vit.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.vit.gradient_checkpointing = value

    def forward(self, pixel_values: Tensor) -> Tensor:
        check_pixels(pixel_values, self.config.input_size)
        coarse = self.convnext_tokens(pixel_values)  # [n, cells, channels]
        x = self.vit.embed(_resized_image(pixel_values, self.config.window_size))
        start = 0
        for adapter, end in zip(self.adapters.stages, self._adapter_places(), strict=True):
            x = self._run(adapter, self.vit.run_blocks(x, start, end), coarse)
            start = end
        x = self.vit.run_blocks(x, start, self.config.num_active_layers)
        return self.adapters.vit_proj(x) + _resized_grid(self.adapters.convnext_proj(coarse), x.shape[1])

    def set_window_size(self, window_size: int, interpolation: Interpolation = "bicubic") -> None:
        """Makes images of `window_size` pixels the input, and fits the ViT's position table to the grid that
        follows; see `VisionTransformer.set_window_size`. The ConvNeXt takes any size."""
        self.vit.set_window_size(window_size, interpolation)

    def freeze_inactive_blocks(self) -> None:
        """As `VisionTransformer.freeze_inactive_blocks`."""
        self.vit.freeze_inactive_blocks()

    def _adapter_places(self) -> list[int]:
        """Blocks before each adapter; the config leaves at least one between two."""
        parts = len(self.adapters.stages) + 1
        return [i * self.config.num_active_layers // parts for i in range(1, parts)]

    def convnext_tokens(self, pixel_values: Tensor) -> Tensor:
        """The last grid, without pooling, [n, cells, channels], row by row."""
        embeddings = self.convnext.embeddings
        x = embeddings(pixel_values.to(embeddings.patch_embeddings.weight.dtype))
        for stage in self.convnext.encoder.stages:
            for layer in (*stage.downsampling_layer, *stage.layers):
                x = self._run(layer, x)
        return x.flatten(2).transpose(1, 2)

    def _run(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)


class Adapters(nn.Module):
    """All that the adaptation adds to the two encoders."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        mixture = config.mixture_of_resolution
        width, channels = config.hidden_size, mixture.hidden_sizes[-1]
        self.stages = nn.ModuleList(
            Adapter(width, channels, mixture.adapter_kernel_size) for _ in range(mixture.num_adapters)
        )
        self.vit_proj = nn.Linear(width, width)
        self.convnext_proj = nn.Linear(channels, width)


class Adapter(nn.Module):
    """v [n, tokens, width], c [n, cells, channels], both square grids row by row -> [n, tokens, width].

    The last layers of both branches start at zero: v passes through unchanged, and the gate's first gradient
    comes once the high-resolution branch has left zero."""

    def __init__(self, width: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.low_conv = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.low_out = nn.Linear(width, width)
        self.high_in = nn.Linear(channels, channels)
        self.high_out = nn.Linear(channels, width)
        self.gate_in = nn.Linear(2 * width, width // 2)
        self.gate_out = nn.Linear(width // 2, 1)
        for last in (self.low_out, self.high_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, v: Tensor, c: Tensor) -> Tensor:
        convolved = self.low_conv(_grid_of(v)).flatten(2).transpose(1, 2)
        v = v + self.low_out(F.gelu(convolved))
        c = _resized_grid(self.high_out(F.gelu(self.high_in(c))), v.shape[1])
        means = torch.cat([v.mean(1), c.mean(1)], dim=1)  # [n, 2 * width]
        gate = torch.tanh(self.gate_out(F.gelu(self.gate_in(means))))
        return v + gate[:, None] * c


def _convnext(mixture: MixtureOfResolutionConfig) -> ConvNextModel:
    config = ConvNextConfig(
        num_stages=len(mixture.depths), depths=mixture.depths, hidden_sizes=mixture.hidden_sizes
    )
    convnext = ConvNextModel(config)
    convnext.layernorm = nn.Identity()  # of the pooled output: it would never get a gradient
    return convnext


def _resized_image(pixel_values: Tensor, size: int) -> Tensor:
    if pixel_values.shape[-1] == size:
        return pixel_values
    wide = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32))
    return F.interpolate(wide, size=(size, size), mode="bilinear", antialias=True)


def _grid_of(tokens: Tensor) -> Tensor:
    """[n, side * side, channels] -> [n, channels, side, side], a view whose channels lie together."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def _resized_grid(tokens: Tensor, num_tokens: int) -> Tensor:
    """[n, cells, channels] -> [n, num_tokens, channels], bilinear; the ViT's grid is never the smaller."""
    if tokens.shape[1] == num_tokens:
        return tokens
    side = round(num_tokens**0.5)
    resized = F.interpolate(_grid_of(tokens), size=(side, side), mode="bilinear")
    return resized.flatten(2).transpose(1, 2)

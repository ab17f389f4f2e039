"""Configuration of the vision encoder: a ViT over windows, alone or with a ConvNeXt beside it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from .checks import (
    is_finite_number,
    is_int,
    require,
    require_bool,
    require_choice,
    require_known_keys,
    require_positive_ints,
)

ACTIVATIONS = ("gelu", "quick_gelu")


@dataclasses.dataclass(kw_only=True, slots=True)
class MixtureOfResolutionConfig:
    """Mixture-of-resolution adaptation (LLaVA-HR): the ViT reads an image at low resolution, a ConvNeXt reads
    it at high resolution, and adapters after 1/4, 2/4 and 3/4 of the ViT's blocks mix the second into the
    first. The defaults are CLIP's ConvNeXt-L at 1024 pixels."""

    image_size: int = 1024
    """Side in pixels of what the ConvNeXt reads, and of the windows that the encoder is given."""
    depths: Sequence[int] = (3, 3, 27, 3)
    hidden_sizes: Sequence[int] = (192, 384, 768, 1536)
    min_vit_size: int = 336
    """The ViT's image has max(image_size / stride * patch_size, min_vit_size) pixels a side; both grids have
    the same number of tokens where the first is the larger."""
    num_adapters: int = 3
    adapter_kernel_size: int = 7

    def __post_init__(self) -> None:
        prefix = "vision_config.mixture_of_resolution."
        sizes = ("image_size", "min_vit_size", "num_adapters", "adapter_kernel_size")
        require_positive_ints({field: getattr(self, field) for field in sizes}, prefix)
        for field in ("depths", "hidden_sizes"):
            value = getattr(self, field)
            legal = isinstance(value, (list, tuple)) and value and all(is_int(n, 1) for n in value)
            require(legal, prefix + field, "be a list of positive ints", value)
            setattr(self, field, list(value))  # what JSON gives back
        legal = len(self.depths) == len(self.hidden_sizes)
        rule = f"have one entry per stage of depths ({len(self.depths)})"
        require(legal, prefix + "hidden_sizes", rule, self.hidden_sizes)
        rule = f"be a multiple of the ConvNeXt's stride {self.stride}"
        require(self.image_size % self.stride == 0, prefix + "image_size", rule, self.image_size)
        kernel = self.adapter_kernel_size
        require(kernel % 2 == 1, prefix + "adapter_kernel_size", "be odd", kernel)

    @property
    def stride(self) -> int:
        """Pixels of a cell of the ConvNeXt's last grid: 4 in the stem, 2 before each later stage."""
        return 4 * 2 ** (len(self.depths) - 1)


@dataclasses.dataclass(kw_only=True, slots=True)
class VisionConfig:
    """The ViT that reads every window. The defaults are EVA2-CLIP-E ("ViT-E")."""

    window_size: int = 448
    """Side of the ViT's image in pixels; the position table has (window_size / patch_size)^2 + 1 rows."""
    patch_size: int = 14
    hidden_size: int = 1792
    num_layers: int = 64
    num_heads: int = 16
    intermediate_size: int = 15360
    layer_norm_eps: float = 1e-6
    feature_layer: int = -2
    """Which block's output is the feature: -1 the last, -2 the one before it (the paper). Blocks after it are
    kept, so that released weights fit, but never run or trained."""
    block: Literal["post_norm", "pre_norm"] = "post_norm"
    """"post_norm": x + LN(f(x)), EVA2-CLIP-E; "pre_norm": x + f(LN(x)), CLIP's ViT."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """"quick_gelu": x * sigmoid(1.702 x), OpenAI's CLIP."""
    key_bias: bool = False
    patch_bias: bool = True
    embedding_norm: bool = False
    """A LayerNorm between the embeddings and the first block (CLIP)."""
    mixture_of_resolution: MixtureOfResolutionConfig | None = None
    norm_gain_init: float = 1.0
    """Start of the post-norm gains; a residual branch that starts below 1 trains faster from scratch."""
    position_init: Literal["normal", "sincos"] = "normal"
    """Start of the learned position table: N(0, 0.02), or a smooth 2-D sine table for short trainings."""

    def __post_init__(self) -> None:
        prefix = "vision_config."
        sizes = ("window_size", "patch_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
        require_positive_ints({field: getattr(self, field) for field in sizes}, prefix)
        for field, divisor in (("window_size", "patch_size"), ("hidden_size", "num_heads")):
            value, of = getattr(self, field), getattr(self, divisor)
            require(value % of == 0, prefix + field, f"be a multiple of {divisor} {of}", value)
        rule = "be a multiple of 4 (2-D position)"
        require(self.hidden_size % 4 == 0, prefix + "hidden_size", rule, self.hidden_size)
        layer = self.feature_layer
        legal = is_int(layer, -self.num_layers) and layer <= -1
        require(legal, prefix + "feature_layer", f"be an int between {-self.num_layers} and -1", layer)
        legal = is_finite_number(self.layer_norm_eps) and self.layer_norm_eps > 0
        require(legal, prefix + "layer_norm_eps", "be a positive number", self.layer_norm_eps)
        gain = self.norm_gain_init
        require(is_finite_number(gain), prefix + "norm_gain_init", "be a finite number", gain)
        require_choice(prefix + "position_init", self.position_init, ("normal", "sincos"))
        require_choice(prefix + "block", self.block, ("post_norm", "pre_norm"))
        require_choice(prefix + "activation", self.activation, ACTIVATIONS)
        for field in ("key_bias", "patch_bias", "embedding_norm"):
            require_bool(prefix + field, getattr(self, field))
        self.mixture_of_resolution = _mixture(self.mixture_of_resolution)
        if self.mixture_of_resolution is not None:
            self.set_input_size(self.mixture_of_resolution.image_size)
            limit = self.num_active_layers - 1
            legal = self.mixture_of_resolution.num_adapters <= limit
            rule = f"be at most {limit}, the ViT's active blocks less one"
            value = self.mixture_of_resolution.num_adapters
            require(legal, prefix + "mixture_of_resolution.num_adapters", rule, value)

    @property
    def input_size(self) -> int:
        """Side in pixels of the windows that the encoder is given."""
        mixture = self.mixture_of_resolution
        return self.window_size if mixture is None else mixture.image_size

    def set_input_size(self, size: int) -> None:
        """Makes `input_size` this many pixels, and `window_size` what the ViT then reads."""
        mixture, patch = self.mixture_of_resolution, self.patch_size
        divisor, name = (
            (patch, "patch_size") if mixture is None else (mixture.stride, "the ConvNeXt's stride")
        )
        require(
            is_int(size, 1) and size % divisor == 0,
            "window_size",
            f"be a positive multiple of {name} {divisor}",
            size,
        )
        self.window_size = size
        if mixture is not None:
            mixture.image_size = size
            smallest = -(-mixture.min_vit_size // patch) * patch  # the next whole number of patches
            self.window_size = max(size // mixture.stride * patch, smallest)

    @property
    def grid_size(self) -> int:
        """Patches along one side of the ViT's image."""
        return self.window_size // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """The CLS token in front of a window's features, which the mixture of resolutions drops."""
        return 0 if self.mixture_of_resolution is not None else 1

    @property
    def num_tokens(self) -> int:
        """Feature tokens of one window: its patches, and the CLS token in front where there is one."""
        return self.grid_size**2 + self.num_prefix_tokens

    @property
    def num_active_layers(self) -> int:
        return self.num_layers + 1 + self.feature_layer


def _mixture(value: Any) -> MixtureOfResolutionConfig | None:
    if isinstance(value, dict):
        known = [field.name for field in dataclasses.fields(MixtureOfResolutionConfig)]
        require_known_keys(value, known, "MixtureOfResolutionConfig", "vision_config.mixture_of_resolution.")
        value = MixtureOfResolutionConfig(**value)
    legal = value is None or isinstance(value, MixtureOfResolutionConfig)
    require(
        legal, "vision_config.mixture_of_resolution", "be a MixtureOfResolutionConfig, a dict or None", value
    )
    return value

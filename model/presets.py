"""Configurations by name, and the systems that the papers compare as changes to any of them."""

import copy
from collections.abc import Callable

from .checks import require_choice
from .config import (
    ConnectorConfig,
    GatedCrossAttentionConfig,
    ImageConfig,
    InfiMMHDConfig,
)
from .text_config import VICUNA_13B
from .vision_config import MixtureOfResolutionConfig, VisionConfig

VICUNA_7B = VICUNA_13B | dict(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
)


def clip_vit_l_14(window_size: int = 336) -> VisionConfig:
    """OpenAI's CLIP ViT-L/14, whose penultimate layer LLaVA reads."""
    return VisionConfig(
        window_size=window_size,
        hidden_size=1024,
        num_layers=24,
        num_heads=16,
        intermediate_size=4096,
        layer_norm_eps=1e-5,
        block="pre_norm",
        activation="quick_gelu",
        key_bias=True,
        patch_bias=False,
        embedding_norm=True,
    )


def _tiny() -> InfiMMHDConfig:
    """A demo's size, real structure: ViT head_dim 112, a gated block before each of 4 layers, 1.6 M."""
    return InfiMMHDConfig(
        vision_config=VisionConfig(
            window_size=28,
            patch_size=7,
            hidden_size=112,
            num_layers=4,
            num_heads=1,
            intermediate_size=448,
            feature_layer=-1,
            norm_gain_init=0.5,
            position_init="sincos",
        ),
        gated_cross_attention=GatedCrossAttentionConfig(interval=1, num_heads=4, head_dim=32),
        text_config=dict(
            vocab_size=64,
            initializer_range=0.06,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=3,
        ),
        image_token_id=2,
        end_of_chunk_token_id=3,
    )


def _infimm_hd_13b() -> InfiMMHDConfig:
    """EVA2-CLIP-E with Vicuna-13B v1.5, as the paper builds it, before its position table is enlarged."""
    return InfiMMHDConfig(vision_config=VisionConfig(window_size=224))


def _infimm_hd_7b() -> InfiMMHDConfig:
    """The same with Vicuna-7B."""
    return InfiMMHDConfig(vision_config=VisionConfig(window_size=224), text_config=VICUNA_7B)


def _llava_7b() -> InfiMMHDConfig:
    """LLaVA-1.5: CLIP ViT-L/14 at 336 pixels, a two-layer MLP, Vicuna-7B reading its 576 tokens an image."""
    return InfiMMHDConfig(
        vision_config=clip_vit_l_14(),
        connector=ConnectorConfig(kind="mlp"),
        text_config=VICUNA_7B,
        image=ImageConfig(mode="single"),
        fusion="concatenation",
        position="none",
    )


def _llava_hr_7b() -> InfiMMHDConfig:
    """LLaVA-HR: the same with CLIP's ConvNeXt-L at 1024 pixels beside the ViT."""
    config = _llava_7b()
    config.vision_config = clip_vit_l_14(448)
    config.vision_config.mixture_of_resolution = MixtureOfResolutionConfig()
    config.vision_config.feature_layer = -1  # unlike LLaVA, it runs all blocks
    return checked(config)


_PRESETS: dict[str, Callable[[], InfiMMHDConfig]] = {
    "tiny": _tiny,
    "infimm_hd_7b": _infimm_hd_7b,
    "infimm_hd_13b": _infimm_hd_13b,
    "llava_7b": _llava_7b,
    "llava_hr_7b": _llava_hr_7b,
}


def presets() -> list[str]:
    """Names that `preset` takes."""
    return sorted(_PRESETS)


def preset(name: str) -> InfiMMHDConfig:
    """A fresh configuration by name (`presets()`); ValueError for another name."""
    require_choice("name", name, presets())
    return _PRESETS[name]()


def checked(config: InfiMMHDConfig) -> InfiMMHDConfig:
    """`config` made anew from its fields, so that all its limits are checked."""
    return InfiMMHDConfig.from_dict(config.to_dict())


def _without_position(config: InfiMMHDConfig) -> None:
    config.position = "none"


def _mlp(config: InfiMMHDConfig) -> None:
    config.connector.kind = "mlp"


def _no_connector(config: InfiMMHDConfig) -> None:
    config.connector.kind = "none"


def _resampler(config: InfiMMHDConfig) -> None:
    config.connector.kind = "resampler"


def _interval_2(config: InfiMMHDConfig) -> None:
    config.gated_cross_attention.interval = 2


def _all_earlier_images(config: InfiMMHDConfig) -> None:
    config.gated_cross_attention.only_attend_immediate_media = False


def _token_position(config: InfiMMHDConfig) -> None:
    config.position = "token"


def _llava_style(config: InfiMMHDConfig) -> None:
    config.fusion, config.position = "concatenation", "none"
    config.connector.kind = "mlp"


def _mixture_of_resolution(config: InfiMMHDConfig) -> None:
    """The ViT keeps its size; the ConvNeXt's grid is as fine (one cell for every patch)."""
    vision = config.vision_config
    wide = vision.hidden_size >= 1024
    mixture = MixtureOfResolutionConfig() if wide else _small_mixture(vision)
    mixture.image_size = vision.grid_size * mixture.stride
    mixture.min_vit_size = vision.patch_size
    vision.mixture_of_resolution = mixture
    config.image.mode = "single"


def _small_mixture(vision: VisionConfig) -> MixtureOfResolutionConfig:
    """A ConvNeXt of two stages beside a ViT that is no pretrained one."""
    adapters = min(3, vision.num_active_layers - 1)
    return MixtureOfResolutionConfig(
        image_size=8, depths=[1, 1], hidden_sizes=[32, 64], num_adapters=adapters, adapter_kernel_size=3
    )


def _llava_hr_style(config: InfiMMHDConfig) -> None:
    _llava_style(config)
    _mixture_of_resolution(config)


_VARIANTS: dict[str, Callable[[InfiMMHDConfig], None]] = {
    "infimm-hd": lambda config: None,
    "interval-2": _interval_2,
    "no-position": _without_position,
    "token-position": _token_position,
    "mlp": _mlp,
    "no-connector": _no_connector,
    "resampler": _resampler,
    "all-earlier-images": _all_earlier_images,
    "llava-style": _llava_style,
    "mixture-of-resolution": _llava_hr_style,
    "mixture-of-resolution-gated": _mixture_of_resolution,
}


def variants() -> list[str]:
    """Names that `variant` takes."""
    return list(_VARIANTS)


def variant(config: InfiMMHDConfig, name: str) -> InfiMMHDConfig:
    """A copy of `config` as another of the compared systems; ValueError for another name.

    "interval-2": a gated block before every second layer. "no-position", "token-position": other 2-D
    positions. "mlp", "no-connector", "resampler": a plain MLP, nothing, or a Perceiver between the ViT and
    the keys. "all-earlier-images": for every text token. "llava-style": visual tokens through an MLP into
    the LLM's own sequence. "mixture-of-resolution": LLaVA-HR, a ConvNeXt mixed into the ViT and
    concatenation; "mixture-of-resolution-gated" the same encoder behind gated cross-attention."""
    require_choice("name", name, variants())
    changed = copy.deepcopy(config)
    _VARIANTS[name](changed)
    return checked(changed)

"""InfiMM-HD on the `infimm_kernels` ops: a ViT over windows, gated cross-attention, a transformers LLM.

Importing it makes the model known to transformers' Auto classes. The package knows the kernels and nothing of
the trainer."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from .checks import IGNORE_INDEX
from .config import ConnectorConfig, GatedCrossAttentionConfig, ImageConfig, InfiMMHDConfig
from .encoded_images import EncodedImages
from .image import ImageProcessor, ProcessedImage
from .infimm_hd import InfiMMHD, InfiMMHDOutput
from .presets import preset, presets, variant, variants
from .processing import InfiMMHDProcessor, register
from .vision_config import MixtureOfResolutionConfig, VisionConfig

AutoConfig.register(InfiMMHDConfig.model_type, InfiMMHDConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForImageTextToText):
    _auto.register(InfiMMHDConfig, InfiMMHD, exist_ok=True)
register(InfiMMHDConfig)

__all__ = [
    "IGNORE_INDEX",
    "ConnectorConfig",
    "EncodedImages",
    "GatedCrossAttentionConfig",
    "ImageConfig",
    "ImageProcessor",
    "InfiMMHD",
    "InfiMMHDConfig",
    "InfiMMHDOutput",
    "InfiMMHDProcessor",
    "MixtureOfResolutionConfig",
    "ProcessedImage",
    "VisionConfig",
    "preset",
    "presets",
    "variant",
    "variants",
]

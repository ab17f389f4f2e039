"""InfiMM-HD on the `infimm_kernels` ops: a ViT over windows, gated cross-attention, a transformers Llama.

The package knows the kernels and nothing of the trainer."""

from .checks import IGNORE_INDEX
from .config import GatedCrossAttentionConfig, InfiMMHDConfig, VisionConfig, preset, presets
from .image import ImageProcessor, ProcessedImage
from .infimm_hd import InfiMMHD, InfiMMHDOutput

__all__ = [
    "IGNORE_INDEX",
    "GatedCrossAttentionConfig",
    "ImageProcessor",
    "InfiMMHD",
    "InfiMMHDConfig",
    "InfiMMHDOutput",
    "ProcessedImage",
    "VisionConfig",
    "preset",
    "presets",
]

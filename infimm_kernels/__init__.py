"""Kernels of InfiMM-HD: attention in windows and to images, their gate and their positions.

Importing this imports neither triton nor the compiled extension; a backend is looked for when an op first
needs it.
"""

from infimm_kernels.attention import varlen_attention, window_attention
from infimm_kernels.backends import availability
from infimm_kernels.gated_cross_attention import (
    MediaSegments,
    decode_segments,
    gated_cross_attention,
    media_segments,
)
from infimm_kernels.gated_feed_forward import gated_feed_forward
from infimm_kernels.gated_residual import gated_residual_projection
from infimm_kernels.position_2d import add_position_2d
from infimm_kernels.post_norm import residual_post_norm
from infimm_kernels.vision_keys_values import vision_keys_values

__version__ = "0.1.0"
__all__ = [
    "MediaSegments",
    "add_position_2d",
    "availability",
    "decode_segments",
    "gated_cross_attention",
    "gated_feed_forward",
    "gated_residual_projection",
    "media_segments",
    "residual_post_norm",
    "varlen_attention",
    "vision_keys_values",
    "window_attention",
]

"""Text attends to the image before it, through a gate."""

from infimm_kernels.gated_cross_attention.op import gated_cross_attention
from infimm_kernels.gated_cross_attention.segments import MediaSegments, decode_segments, media_segments

__all__ = ["MediaSegments", "decode_segments", "gated_cross_attention", "media_segments"]

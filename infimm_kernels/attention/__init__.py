"""Attention inside segments of packed tokens."""

from infimm_kernels.attention.op import varlen_attention, window_attention

__all__ = ["varlen_attention", "window_attention"]

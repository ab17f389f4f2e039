"""The feed-forward half of a gated cross-attention block."""

from infimm_kernels.gated_feed_forward.op import gated_feed_forward

__all__ = ["gated_feed_forward"]

"""The residual of a post-norm block, its LayerNorm and optionally a position in one op."""

from infimm_kernels.post_norm.op import residual_post_norm

__all__ = ["residual_post_norm"]

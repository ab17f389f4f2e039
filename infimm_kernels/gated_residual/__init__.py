"""A projection, its element-wise tanh gate and the residual in one op."""

from infimm_kernels.gated_residual.op import gated_residual_projection

__all__ = ["gated_residual_projection"]

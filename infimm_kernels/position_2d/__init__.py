"""The two-dimensional sinusoidal position of sub-images."""

from infimm_kernels.position_2d.op import add_position_2d

__all__ = ["add_position_2d"]

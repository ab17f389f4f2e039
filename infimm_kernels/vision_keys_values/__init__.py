"""Keys and values of all cross-attention layers from the features of the windows, in one op."""

from infimm_kernels.vision_keys_values.op import vision_keys_values

__all__ = ["vision_keys_values"]

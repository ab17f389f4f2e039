"""Hooks into other people's models: `integrations.transformers` and `integrations.timm`.

Each module imports its library; importing infimm_kernels imports neither.
"""

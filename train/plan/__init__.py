"""Memory, operations and hours of stages on so many GPUs: `python -m train plan`."""

from .cli import main

__all__ = ["main"]

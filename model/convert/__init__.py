"""Weights of other people's forms in and out: `python -m model convert`, `build` and `inspect`.

A checkpoint (`files`) is recognised as one of the `forms`, whose rules (`links`) say which of its tensors
become which of ours; its configuration comes from shapes and config files (`sizes`). Reading and writing are
lazy, one shard at a time (`checkpoint`, `shards`)."""

from .forms import FORMS
from .report import ConversionError, Report
from .run import build, convert, inspect
from .write import TARGETS

__all__ = ["FORMS", "TARGETS", "ConversionError", "Report", "build", "convert", "inspect"]

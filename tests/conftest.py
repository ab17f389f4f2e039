"""What every test needs before anything imports Triton, and the skip rule of GPU tests."""

import contextlib
import os

import pytest
import torch

with contextlib.suppress(ImportError):
    # DeepSpeed imports distutils, and torch.compile then setuptools, which refuses to come second.
    import setuptools  # noqa: F401

try:
    import hypothesis
except ImportError:  # `make gpu` runs the tests that need none on machines without it
    pass
else:
    # The same examples in every run, and no folder of remembered ones in the checkout.
    hypothesis.settings.register_profile("tests", derandomize=True, database=None, deadline=None)
    hypothesis.settings.load_profile("tests")

if not torch.cuda.is_available():
    # Triton reads it when its decorators run. With a GPU the kernels themselves run instead.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible"))

"""What every test needs before anything imports Triton, which cases are long, the skip rule of GPU tests."""

import collections
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


# Compiling every shipped kernel, or csrc, takes more than the limit of other tests where cores are busy.
LONG_TIMEOUT_S = 1800


@pytest.hookimpl(tryfirst=True)  # before pytest drops what -m does not ask for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases = collections.Counter()
    for item in items:
        sample = item.get_closest_marker("sample")
        if sample is not None:
            function = item.nodeid.split("[")[0]
            if cases[function] % sample.args[0] != 0:
                item.add_marker(pytest.mark.long)
            cases[function] += 1
        builds = {"cuda_wheel", "extension_file"} & set(getattr(item, "fixturenames", ()))
        if (item.get_closest_marker("long") or builds) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG_TIMEOUT_S))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible"))

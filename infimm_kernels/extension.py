"""The compiled module ``infimm_kernels._C``, imported on first use.

It may be absent (installed without nvcc) or unloadable. Neither breaks the package: the reason is kept for
`why_not` and the other backends serve.
"""

import functools
import importlib
import re
from types import ModuleType

MODULE = "infimm_kernels._C"


@functools.cache
def _attempt() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(MODULE), None
    except ModuleNotFoundError as error:
        if error.name != MODULE:
            return None, f"the CUDA extension does not load: {error}"
        return None, "the CUDA extension is not built (install again with nvcc on PATH or under CUDA_HOME)"
    except ImportError as error:
        return None, f"the CUDA extension does not load: {error}"


def load() -> ModuleType | None:
    """The module, or None; see `why_not`."""
    return _attempt()[0]


def why_not() -> str | None:
    """None when the module is loaded, else a sentence that says why it is not."""
    return _attempt()[1]


def why_not_capability(capability: tuple[int, int], archs: list[str]) -> str | None:
    """Whether code compiled for `archs` runs on a GPU of compute capability `capability`.

    Args:
        capability: (major, minor), e.g. (9, 0).
        archs: as in ``build_info()["archs"]``: "90" runs on 9.0 and later 9.x, "90a" on 9.0 alone, "100f" on
            10.0 and later 10.x; with "+PTX", "90" runs on every newer GPU too.

    Returns:
        None when one of `archs` fits, else a sentence that names both.
    """
    for arch in archs:
        number, suffix, ptx = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", arch).groups()
        built = int(number[:-1]), int(number[-1])
        if capability == built:
            return None
        if suffix != "a" and capability[0] == built[0] and capability >= built:
            return None
        if ptx and not suffix and capability >= built:
            return None
    major, minor = capability
    return (
        f"the CUDA extension is built for {';'.join(archs)}, the GPU has compute capability {major}.{minor}"
    )

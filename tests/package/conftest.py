import importlib.util
import os

import pytest
from filelock import FileLock

from tests.package import building

DEFAULT_ARCHS = ["80+PTX", "90a"]
BUILD_TOOLS = [name for name in ("pip", "setuptools", "pybind11") if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A factory of fresh copies of the checkout."""
    if BUILD_TOOLS:
        pytest.skip(f"building needs {', '.join(BUILD_TOOLS)}")
    return lambda: building.copy_checkout(tmp_path_factory.mktemp("checkout") / "copy")


@pytest.fixture(scope="session")
def cuda_wheel(checkout, tmp_path_factory):
    """(wheel, its content unpacked, the build's output) of the default build, made once, for all of
    pytest-xdist's processes."""
    if not building.have_nvcc():
        pytest.skip("no nvcc")
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_wheel"
    with FileLock(f"{out}.lock"):
        if not (out / "printed").exists():
            wheel, printed = building.build_wheel(checkout(), out, building.environment())
            building.unpack(wheel, out / "site")
            (out / "printed").write_text(printed)
    (wheel,) = out.glob("*.whl")
    return wheel, out / "site", (out / "printed").read_text()


@pytest.fixture(scope="session")
def extension_file(request):
    """The compiled module: the checkout's own where it is the default build of these sources, else that of
    `cuda_wheel`."""
    installed = building.installed_extension()
    if installed is not None and building.load_extension(installed).build_info()["archs"] == DEFAULT_ARCHS:
        return installed
    return building.extension_in(request.getfixturevalue("cuda_wheel")[1])


@pytest.fixture(scope="session")
def compiled(extension_file):
    """`extension_file`, imported."""
    return building.load_extension(extension_file)


@pytest.fixture(scope="session")
def pure_wheel(checkout, tmp_path_factory):
    """(wheel, the build's output) where no nvcc can be found."""
    return building.build_wheel(checkout(), tmp_path_factory.mktemp("pure_wheel"), building.without_nvcc())

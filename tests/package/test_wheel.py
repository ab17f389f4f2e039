"""What pip builds and installs: contents, metadata, the pure wheel, editable installs, refused settings."""

import email
import re
import subprocess
import sys
import zipfile

import pytest

from tests.package import building

needs_nvcc = pytest.mark.skipif(not building.have_nvcc(), reason="no nvcc")
NOTICE = "no CUDA extension"
CHECKOUT_PACKAGES = [name for name in ("model", "train", "bench") if (building.ROOT / name).is_dir()]


def python_files():
    return {str(path.relative_to(building.ROOT)) for path in (building.ROOT / "infimm_kernels").rglob("*.py")}


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(name).decode())


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.mark.long
def test_cuda_wheel_holds_the_package_alone(cuda_wheel):
    wheel, _, printed = cuda_wheel
    extra = contents(wheel) - python_files()
    assert python_files() <= contents(wheel)
    assert [re.sub(r"\.cpython.*", "", name) for name in extra] == ["infimm_kernels/_C"]
    assert "none-any" not in wheel.name
    assert wheel.stat().st_size < 10e6
    assert NOTICE not in printed


def test_pure_wheel_says_so_in_one_line(pure_wheel):
    wheel, printed = pure_wheel
    assert contents(wheel) == python_files()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert [line for line in printed.splitlines() if NOTICE in line] == [
        "  infimm_kernels: no CUDA extension (nvcc was not found through CUDA_HOME or PATH); "
        "Triton serves the GPU"
    ]


def test_metadata(pure_wheel):
    found = metadata(pure_wheel[0])
    literal = re.search(
        r'^__version__ = "(.+)"$', (building.ROOT / "infimm_kernels/__init__.py").read_text(), re.M
    )
    assert found["Name"] == "infimm-kernels"
    assert found["Version"] == literal.group(1)
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == ">=3.10"
    assert [need for need in found.get_all("Requires-Dist") if "extra ==" not in need] == ["torch>=2.9"]
    assert set(found.get_all("Provides-Extra")) == {
        "triton",
        "model",
        "train",
        "demo",
        "bench",
        "lmms",
        "rivals",
        "test",
    }


def test_archs_none_builds_no_extension(checkout, tmp_path):
    env = building.environment(INFIMM_CUDA_ARCHS="none")
    wheel, printed = building.build_wheel(checkout(), tmp_path, env)
    assert contents(wheel) == python_files()
    assert printed.count(NOTICE) == 1


@needs_nvcc
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"INFIMM_CUDA_ARCHS": "8.0"}, "INFIMM_CUDA_ARCHS must be 'none' or a list separated by ';'"),
        ({"INFIMM_CUDA_ARCHS": "80;37"}, "INFIMM_CUDA_ARCHS must name capabilities that nvcc"),
        # With nvcc at hand a broken host compiler is an error, not a silent pure-Python install.
        ({"NVCC_CCBIN": "/bin/false"}, "exited with"),
    ],
)
def test_a_build_that_cannot_work_fails_with_the_reason(checkout, tmp_path, changes, message):
    done = building.pip(
        "wheel", str(checkout()), "-v", "-w", str(tmp_path), env=building.environment(**changes)
    )
    assert done.returncode != 0
    assert message in done.stdout
    assert not list(tmp_path.glob("*.whl"))


def imported_from(site, cwd):
    """Where a fresh interpreter finds each package after an editable install into `site`.

    -S keeps out this environment's own site-packages, in which `make` has installed the checkout too."""
    names = ["infimm_kernels", *CHECKOUT_PACKAGES]
    code = (
        f"import site, importlib.util; site.addsitedir({str(site)!r})\n"
        f"for name in {names!r}: print(importlib.util.find_spec(name).submodule_search_locations[0])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=building.environment(),
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(names, done.stdout.split(), strict=True))


@pytest.mark.parametrize("archs", ["none", pytest.param("80", marks=[needs_nvcc, pytest.mark.long])])
def test_editable_install_shows_the_whole_checkout(checkout, tmp_path, archs):
    """A wheel holds infimm_kernels alone, but who works in a checkout needs model, train and bench too."""
    source = checkout()
    done = building.pip(
        "install",
        "-e",
        str(source),
        "--target",
        str(tmp_path),
        env=building.environment(INFIMM_CUDA_ARCHS=archs),
    )
    assert done.returncode == 0, done.stdout
    assert CHECKOUT_PACKAGES
    for name, folder in imported_from(tmp_path, tmp_path).items():
        assert folder == str(source / name)
    if archs != "none":
        assert building.load_extension(building.extension_in(source)).build_info()["archs"] == [archs]


@pytest.mark.long
def test_isolated_build_needs_no_torch(checkout, tmp_path):
    """As a user's `pip install .` builds it: a fresh environment with the build requirements alone."""
    wheel, _ = building.build_wheel(checkout(), tmp_path, building.environment(), isolated=True)
    assert python_files() <= contents(wheel)

"""Builds the package from a copy of the checkout, so that no test leaves build products in it."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGING = ["pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"]
PACKAGES = ["csrc", "infimm_kernels", "model", "train", "bench", "tests"]


def have_nvcc() -> bool:
    return ask_setup("setup.find_nvcc()") is not None


@functools.cache
def ask_setup(expression: str, definitions: str = "") -> object:
    """The value of `expression`, where `setup` is setup.py as a module: it builds only when run as a script.

    In its own process: setuptools replaces distutils, which other packages may have imported already.
    """
    code = f"import json, setup\n{definitions}\nprint(json.dumps({expression}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def copy_checkout(target: Path) -> Path:
    """What packaging reads: its files, csrc, and every top-level package, those that must stay out too."""
    target.mkdir()
    for name in PACKAGING:
        shutil.copy(ROOT / name, target / name)
    for name in PACKAGES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so", "results")
            shutil.copytree(ROOT / name, target / name, ignore=ignore)
    return target


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment without the build's own variables, then `changes` (None removes)."""
    found = {k: v for k, v in os.environ.items() if k not in ("INFIMM_CUDA_ARCHS", "PYTHONPATH")}
    for name, value in changes.items():
        found.pop(name, None)
        if value is not None:
            found[name] = value
    return found


def without_nvcc() -> dict[str, str]:
    """An environment in which no nvcc can be found."""
    folders = os.environ["PATH"].split(os.pathsep)
    return environment(
        PATH=os.pathsep.join(folder for folder in folders if not (Path(folder) / "nvcc").exists()),
        CUDA_HOME=None,
    )


def pip(*arguments: str, env: dict[str, str], isolated: bool = False) -> subprocess.CompletedProcess:
    """pip with --no-deps and, unless `isolated`, with the setuptools and pybind11 of this environment."""
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps"]
    if not isolated:
        command.append("--no-build-isolation")
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def build_wheel(source: Path, out: Path, env: dict[str, str], isolated: bool = False) -> tuple[Path, str]:
    """The wheel and what the build printed."""
    done = pip("wheel", str(source), "-v", "-w", str(out), env=env, isolated=isolated)
    assert done.returncode == 0, done.stdout
    (wheel,) = out.glob("*.whl")
    return wheel, done.stdout


def unpack(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def installed_extension() -> Path | None:
    """The checkout's own extension, as `make` builds it; None where it is missing or older than a source."""
    found = list((ROOT / "infimm_kernels").glob("_C*.so"))
    sources = [ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    newest = max(path.stat().st_mtime for path in sources)
    return found[0] if len(found) == 1 and found[0].stat().st_mtime > newest else None


def extension_in(folder: Path) -> Path:
    (found,) = (folder / "infimm_kernels").glob("_C*.so")
    return found


def load_extension(path: Path):
    """The compiled module alone, without infimm_kernels around it.

    pybind11 returns the module it made before under the same name, so every path gets a name of its own.
    """
    spec = importlib.util.spec_from_file_location(f"at_{zlib.crc32(bytes(path))}._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

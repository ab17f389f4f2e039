"""Builds infimm_kernels._C from csrc/ with nvcc. Without nvcc the package installs as pure Python.

INFIMM_CUDA_ARCHS  what to compile for: "none" (pure Python), or a list separated by ";" of
                   <compute capability without its dot>[a|f][+PTX], default "80+PTX;90a".
                   "90" gives machine code for that GPU and later ones of its generation, "90a" for that GPU
                   alone with all its instructions, "100f" for its family; "+PTX" adds PTX, which the driver
                   compiles for newer GPUs.
CUDA_HOME, PATH    where nvcc is looked for, in this order.
NVCC_CCBIN         the host compiler nvcc uses (its own variable).
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, OptionError

# Both lists: the longest to compile first.
SOURCES = ["csrc/decode_attention.cu", "csrc/bindings.cpp", "csrc/add_position_2d.cu"]
# In instructions of sm_90a alone: compiled for that, and left out where it is not asked for.
SM90A_SOURCES = [
    "csrc/window_attention_bindings.cpp",
    "csrc/window_attention.cu",
    "csrc/window_attention_backward.cu",
]
DEFAULT_ARCHS = "80+PTX;90a"
JOBS = 2


def parse_archs(text: str) -> list[str]:
    """["80+PTX", "90a"] for "80+ptx; 90a", [] for "none"."""
    if text.strip().lower() == "none":
        return []
    archs = [re.sub(r"\+ptx$", "+PTX", item.strip(), flags=re.IGNORECASE) for item in text.split(";")]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch):
            raise OptionError(
                "INFIMM_CUDA_ARCHS must be 'none' or a list separated by ';' of <capability>[a|f][+PTX] "
                f"like {DEFAULT_ARCHS!r}, got {text!r}"
            )
    return archs


def gencode_flags(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if number != arch:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def find_nvcc() -> str | None:
    """The path of nvcc; None on a system that has none, or that is not Linux."""
    if not sys.platform.startswith("linux"):
        return None
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")


def run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(command)}\nexited with {done.returncode}:\n{done.stdout}")
    return done.stdout


class BuildCuda(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        nvcc_version = re.search(r"V(\d+\.\d+\.\d+)", run([NVCC, "--version"])).group(1)
        known = re.findall(r"compute_(\d+)", run([NVCC, "--list-gpu-arch"]))
        for arch in ARCHS:
            if re.match(r"\d+", arch).group() not in known:
                raise OptionError(
                    f"INFIMM_CUDA_ARCHS must name capabilities that nvcc {nvcc_version} knows "
                    f"({' '.join(known)}), got {arch!r}"
                )
        flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wno-psabi"]
        flags += ["-I", "csrc", "-I", pybind11.get_include(), "-I", sysconfig.get_path("include")]
        flags += [f'-DINFIMM_CUDA_ARCHS="{";".join(ARCHS)}"', f'-DINFIMM_NVCC_VERSION="{nvcc_version}"']
        if SM90A:
            flags.append("-DINFIMM_SM90A")
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        objects, commands = [], []
        for source in ext.sources:
            objects.append(os.path.join(self.build_temp, Path(source).name + ".o"))
            archs = gencode_flags(["90a"] if source in SM90A_SOURCES else ARCHS)
            commands.append([NVCC, *flags, *archs, "-c", source, "-o", objects[-1]])
        with ThreadPoolExecutor(JOBS) as pool:
            list(pool.map(run, commands))
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        link = [NVCC, "-shared", "--no-device-link", "-cudart", "static", "-Xlinker", "-s"]
        run([*link, *objects, "-o", target])


class BuildPython(build_py):
    def run(self) -> None:
        if not EXTENSIONS:
            reason = "INFIMM_CUDA_ARCHS=none" if NVCC else "nvcc was not found through CUDA_HOME or PATH"
            print(f"infimm_kernels: no CUDA extension ({reason}); Triton serves the GPU", file=sys.stderr)
        super().run()


if __name__ == "__main__":
    ARCHS = parse_archs(os.environ.get("INFIMM_CUDA_ARCHS", DEFAULT_ARCHS))
    NVCC = find_nvcc()
    SM90A = any(arch.removesuffix("+PTX") == "90a" for arch in ARCHS)
    FILES = [SOURCES[0], *SM90A_SOURCES, *SOURCES[1:]] if SM90A else SOURCES
    EXTENSIONS = [Extension("infimm_kernels._C", FILES)] if ARCHS and NVCC else []
    setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildCuda, "build_py": BuildPython})

"""The compiled module: its links, contents and errors; and the loader that may not find it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infimm_kernels import extension
from infimm_kernels.position_2d import cuda
from tests.package import building

CALL = {
    **dict.fromkeys(("x", "out", "positions"), 4096),
    **dict(dtype=1, positions_are_int64=True, num_windows=3, seqlen=1025, hidden=1792),
    **dict(x_stride_window=1836800, x_stride_token=1792, out_stride_window=1836800, out_stride_token=1792),
    **dict(positions_stride_window=2, positions_stride_axis=1, per_token=False),
    **dict(window_height=0, window_width=0, num_prefix_tokens=1, device=0, stream=0),
}


def cuda_tool(name):
    """cuobjdump from PATH, or the copy inside the triton package."""
    found = shutil.which(name)
    if found is None:
        triton = pytest.importorskip("triton", reason=f"neither {name} on PATH nor triton, which carries one")
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        found = str(bundled) if bundled.exists() else None
    if found is None:
        pytest.skip(f"no {name}")
    return found


def output_of(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_links_neither_torch_nor_cuda(extension_file):
    libraries = output_of("ldd", str(extension_file))
    assert "libstdc++" in libraries
    assert not re.search(r"torch|c10|cudart|libcuda|python", libraries)


def test_holds_machine_code_and_ptx(extension_file):
    path, tool = str(extension_file), cuda_tool("cuobjdump")
    assert set(re.findall(r"sm_\d+\w?", output_of(tool, "--list-elf", path))) == {"sm_80", "sm_90a"}
    assert set(re.findall(r"sm_\d+\w?", output_of(tool, "--list-ptx", path))) == {"sm_80"}


def test_build_info(compiled):
    info = compiled.build_info()
    assert info["archs"] == ["80+PTX", "90a"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["nvcc"])
    assert re.fullmatch(r"\d+\.\d+\.\d+\w*", info["pybind11"])


def test_dtype_codes_are_torch_names(compiled):
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in compiled.DTYPES)
    assert sorted(compiled.DTYPES.values()) == [0, 1, 2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_a_launch_is_an_error_not_a_crash(compiled):
    assert compiled.device_count() == 0
    with pytest.raises(RuntimeError) as caught:
        compiled.add_position_2d(**CALL)
    assert re.fullmatch(
        r"add_position_2d: CUDA error \d+ \(.+\) for x \[3, 1025, 1792\] float16 on device 0",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=0), "x must be a device address, got 0"),
        (dict(out=0), "out must be a device address, got 0"),
        (dict(positions=0), "positions must be a device address, got 0"),
        (dict(dtype=3), "dtype must be a code of DTYPES, got 3"),
        (dict(dtype=-1), "dtype must be a code of DTYPES, got -1"),
        (dict(hidden=1794), "hidden must be a positive multiple of 4, got 1794"),
        (dict(hidden=0), "hidden must be a positive multiple of 4, got 0"),
        (dict(num_windows=-1), "num_windows must be at least 0, got -1"),
        (dict(seqlen=-5), "seqlen must be at least 0, got -5"),
        (dict(num_prefix_tokens=-1), "num_prefix_tokens must be at least 0, got -1"),
        (dict(device=-1), "device must be at least 0, got -1"),
        (
            dict(per_token=True, window_height=32, window_width=31),
            "window_height * window_width must be seqlen - num_prefix_tokens = 1024, got 32 * 31",
        ),
        (
            dict(per_token=True, window_height=0, window_width=0),
            "window_height * window_width must be seqlen - num_prefix_tokens = 1024, got 0 * 0",
        ),
        (
            dict(per_token=True, window_height=2**62, window_width=4),
            f"window_height * window_width must be seqlen - num_prefix_tokens = 1024, got {2**62} * 4",
        ),
    ],
    ids=str,
)
def test_bad_arguments(compiled, changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        compiled.add_position_2d(**{**CALL, **changes})


@pytest.mark.parametrize(
    "changes", [dict(x=None), dict(x=-1), dict(x="a"), dict(seqlen=1.5), dict(hidden=2**70)], ids=str
)
def test_bad_types(compiled, changes):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        compiled.add_position_2d(**{**CALL, **changes})


def test_nothing_to_do_launches_nothing(compiled):
    assert compiled.add_position_2d(**{**CALL, "num_windows": 0, "x": 0}) is None


def loader_in(package_parent, code):
    """Runs `code` in a fresh interpreter that finds infimm_kernels in `package_parent` only."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import json\nfrom infimm_kernels import extension\nprint(json.dumps({code}))",
        ],
        cwd=package_parent,
        env=building.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.long
def test_loader_finds_the_module(cuda_wheel):
    found = loader_in(cuda_wheel[1], "[extension.why_not(), extension.load().build_info()['archs']]")
    assert found == [None, ["80+PTX", "90a"]]


def test_loader_keeps_the_reason(checkout):
    """A missing or damaged module must not break `import infimm_kernels`, and the reason is kept."""
    source = checkout()
    code = "[extension.why_not(), extension.load()]"
    missing = "the CUDA extension is not built (install again with nvcc on PATH or under CUDA_HOME)"
    assert loader_in(source, code) == [missing, None]
    (source / "infimm_kernels" / "_C.abi3.so").write_bytes(b"\x7fELF damaged")
    reason, module = loader_in(source, code)
    assert module is None
    assert reason.startswith("the CUDA extension does not load: ") and "_C.abi3.so" in reason


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((8, 0), ["80"], True),
        ((8, 6), ["80"], True),
        ((8, 0), ["86"], False),
        ((9, 0), ["80"], False),
        ((9, 0), ["80+PTX"], True),
        ((12, 0), ["80+PTX", "90a"], True),
        ((7, 5), ["80+PTX", "90a"], False),
        ((9, 0), ["90a"], True),
        ((10, 0), ["90a"], False),
        ((10, 0), ["90a+PTX"], False),
        ((10, 3), ["100f"], True),
        ((10, 3), ["100a"], False),
        ((12, 1), ["120"], True),
        ((12, 1), ["100f+PTX"], False),
        ((9, 0), [], False),
    ],
)
def test_which_gpus_an_arch_serves(capability, archs, runs):
    reason = extension.why_not_capability(capability, archs)
    assert (reason is None) == runs
    if not runs:
        assert f"built for {';'.join(archs)}, the GPU has compute capability {capability[0]}." in reason


def test_cuda_backend_says_why_not(compiled, monkeypatch):
    x, positions = torch.zeros(1, 2, 8), torch.zeros(1, 2, dtype=torch.int64)
    monkeypatch.setattr(extension, "_attempt", lambda: (None, "not here"))
    assert cuda.why_not_cuda(x, positions) == "not here"
    monkeypatch.setattr(extension, "_attempt", lambda: (compiled, None))
    assert cuda.why_not_cuda(x, positions) == "needs tensors on an NVIDIA GPU, x is on cpu"

"""The Python side of the CUDA backend: its launch, with the emulated kernel in the place of the extension."""

import shutil
import types

import pytest
import torch

import infimm_kernels
from infimm_kernels import extension
from infimm_kernels.position_2d import cuda
from tests.emulate import add_position_2d as emulator

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the emulation")


class EmulatedExtension:
    """Takes what `_C.add_position_2d` takes, as integers, and runs the launcher compiled for the CPU."""

    DTYPES = {str(dtype).removeprefix("torch."): code for dtype, code in emulator.DTYPE_CODES.items()}

    def __init__(self, library):
        self.library = library
        self.streams = []

    def add_position_2d(self, *, x, out, positions, device, stream, **numbers):
        assert device is None, "tensors of this test are on the CPU"
        self.streams.append(stream)
        # Keyword order in the launch is the order of the parameter struct, which is what the harness takes.
        error = emulator.call(self.library, x, 1 << 40, out, 1 << 40, positions, numbers.values())
        assert error == 0


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulator.build(tmp_path_factory.mktemp("emulate"))


@pytest.fixture
def emulated(library, monkeypatch):
    module = EmulatedExtension(library)
    streams = iter(range(100, 200))
    monkeypatch.setattr(extension, "_attempt", lambda: (module, None))
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=next(streams))
    )
    return module


@pytest.mark.parametrize("dtype", emulator.DTYPE_CODES, ids=str)
@pytest.mark.parametrize("positions_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("granularity", "window_shape", "num_prefix_tokens", "seqlen"),
    [("window", None, 1, 10), ("token", (2, 4), 2, 10), ("token", (0, 0), 3, 3)],
)
def test_launch_equals_the_reference(
    emulated, dtype, positions_dtype, granularity, window_shape, num_prefix_tokens, seqlen
):
    x = torch.randn(3, 2 * seqlen, 24, generator=torch.Generator().manual_seed(0)).to(dtype)[:, ::2]
    positions = torch.tensor([[5, 3], [0, 2], [-1, 0]], dtype=positions_dtype)
    out = cuda.launch_add_position_2d(x, positions, granularity, window_shape, num_prefix_tokens)
    exact = infimm_kernels.add_position_2d(
        x.double(),
        positions,
        granularity=granularity,
        window_shape=window_shape,
        num_prefix_tokens=num_prefix_tokens,
    )
    assert out.dtype == dtype and out.is_contiguous() and out.data_ptr() != x.data_ptr()
    torch.testing.assert_close(out, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert not torch.equal(out, x) or window_shape == (0, 0)


def test_other_last_strides_are_copied(emulated):
    x = torch.randn(2, 8, 5).transpose(1, 2)
    positions = torch.tensor([[1, 2], [3, 4]])
    out = cuda.launch_add_position_2d(x, positions, "window", None, 0)
    torch.testing.assert_close(out, infimm_kernels.add_position_2d(x, positions))


def test_the_stream_is_asked_for_at_every_launch(emulated):
    """A stream kept from an earlier launch would record an empty CUDA graph."""
    x, positions = torch.zeros(1, 2, 8), torch.zeros(1, 2, dtype=torch.int64)
    for _ in range(3):
        cuda.launch_add_position_2d(x, positions, "window", None, 0)
    assert emulated.streams == [100, 101, 102]

import math

import pytest
import torch

from infimm_kernels import add_position_2d
from infimm_kernels.testing import assert_within_twice_eager, max_error
from tests.kernels.cases import eager_position

CASES = (
    {},
    {"num_prefix_tokens": 1},
    {"granularity": "token", "num_prefix_tokens": 1},
    {"granularity": "token", "window_shape": (2, 5)},
    {"granularity": "token", "window_shape": (8, 1), "num_prefix_tokens": 2},
)
POSITIONS = torch.tensor([[0, 0], [3, 1], [-1, -1], [0, 7], [2, -4]])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_equals_the_equation_in_float64(options, index_dtype):
    x = torch.randn(5, 10, 12, dtype=torch.float64)
    y = add_position_2d(x, POSITIONS.to(index_dtype), **options)
    assert max_error(y, eager_position(x, POSITIONS, **options)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", CASES[1:3], ids=str)
def test_twice_eager(options, dtype):
    x = torch.randn(5, 10, 112).to(dtype)
    y, eager = add_position_2d(x, POSITIONS, **options), eager_position(x, POSITIONS, **options)
    assert_within_twice_eager("y", y, eager, eager_position(x.double(), POSITIONS, **options))


def test_first_half_is_the_column():
    """Order of (row, column) and of the halves, by hand: window at row 1, column 2, hidden 4."""
    y = add_position_2d(torch.zeros(1, 1, 4, dtype=torch.float64), torch.tensor([[1, 2]]))
    expected = torch.tensor([math.sin(2), math.cos(2), math.sin(1), math.cos(1)], dtype=torch.float64)
    assert max_error(y[0, 0], expected) < 1e-15


@pytest.mark.parametrize("granularity", ["window", "token"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_window_without_position_is_copied_bit_for_bit(granularity, dtype):
    x = torch.randn(5, 9, 8).to(dtype)
    x[:, ::2] = -0.0
    y = add_position_2d(x, POSITIONS, granularity=granularity)
    for window in (2, 4):
        assert torch.equal(y[window].view(torch.uint8), x[window].view(torch.uint8))


def test_tokens_of_neighbouring_windows_continue():
    """Patch coordinates run through the whole image: the seam between windows is one step wide."""
    x = torch.zeros(2, 9, 16, dtype=torch.float64)
    y = add_position_2d(x, torch.tensor([[0, 0], [0, 1]]), granularity="token")
    wide = add_position_2d(
        x.view(1, 18, 16), torch.zeros(1, 2).long(), granularity="token", window_shape=(3, 6)
    )
    expected = wide.view(3, 2, 3, 16).transpose(0, 1).reshape(2, 9, 16)
    assert max_error(y, expected) < 1e-14


def test_prefix_tokens():
    x = torch.randn(5, 10, 8)
    by_token = add_position_2d(x, POSITIONS, granularity="token", num_prefix_tokens=1)
    assert torch.equal(by_token[:, 0], x[:, 0])
    by_window = add_position_2d(x, POSITIONS, num_prefix_tokens=1)
    assert not torch.equal(by_window[1, 0], x[1, 0])


def test_gradient_is_the_identity():
    x = torch.randn(5, 10, 8, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(1, 1, 8, dtype=torch.float64).expand(5, 10, 8)
    assert torch.equal(torch.autograd.grad(add_position_2d(x, POSITIONS), x, dy)[0], dy)
    small = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: add_position_2d(x, POSITIONS[:2], granularity="token"), small)


@pytest.mark.parametrize("shape", [(0, 9, 8), (5, 0, 8), (5, 1, 8)], ids=str)
@pytest.mark.parametrize("granularity", ["window", "token"])
def test_nothing_to_do(shape, granularity):
    x = torch.randn(shape)
    positions = POSITIONS[: shape[0]]
    prefix = 1 if shape[1] == 1 else 0
    y = add_position_2d(x, positions, granularity=granularity, num_prefix_tokens=prefix)
    assert y.shape == shape
    if granularity == "token":
        assert torch.equal(y, x)


def test_layouts():
    x = torch.randn(5, 10, 8, dtype=torch.float64)
    expected = add_position_2d(x, POSITIONS)
    assert torch.equal(add_position_2d(x.mT.contiguous().mT, POSITIONS), expected)
    assert torch.equal(add_position_2d(x, POSITIONS.t().contiguous().t()), expected)

"""A few rows times a large weight on the CPU."""

from unittest import mock

import pytest
import torch

from infimm_kernels import few_rows
from infimm_kernels.testing import max_error


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2,), (3, 5), (16,), (17,), (0,)], ids=str)
def test_equals_linear(shape, threads):
    x = torch.randn(*shape, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    with mock.patch.object(few_rows, "LARGE_WEIGHT", 1):
        ours, expected = few_rows.linear(x, weight), torch.nn.functional.linear(x, weight)
    assert ours.shape == expected.shape
    assert max_error(ours, expected) < 1e-13
    dy = torch.randn_like(expected)
    grads = (torch.autograd.grad(y, (x, weight), dy) for y in (ours, expected))
    assert max(map(max_error, *grads)) < 1e-13


@pytest.mark.parametrize(
    ("rows", "outer", "size", "dtype", "taken"),
    [
        (1, 6, 1, torch.float32, True),
        (16, 6, 1, torch.float32, True),
        (17, 6, 1, torch.float32, False),
        (1, 5, 1, torch.float32, False),
        (1, 6, 1 << 20, torch.float32, False),
        (1, 6, 1, torch.bfloat16, False),
    ],
)
def test_who_shares_the_weight_among_threads(rows, outer, size, dtype, taken, threads):
    x, weight = torch.randn(rows, 32, dtype=dtype), torch.randn(outer, 32, dtype=dtype)
    with mock.patch.object(few_rows, "LARGE_WEIGHT", size), mock.patch("torch.bmm", wraps=torch.bmm) as bmm:
        few_rows.linear(x, weight)
    assert bmm.called == taken

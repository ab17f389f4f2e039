"""The gated projection and the gated feed-forward against eager PyTorch and what torch.compile makes of it.

See test_window_attention.py for what is timed.
"""

import pytest

from bench import suite
from bench.harness import Case
from infimm_kernels.gated_residual.op import CANDIDATES

ROWS = (32, 128, 384, 1024, 2048, 8192) if suite.ON_GPU else (1, 128)
HIDDEN = 5120 if suite.ON_GPU else 1024
NAMES = suite.own_names(CANDIDATES) + suite.EAGER


@pytest.mark.kernels
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("inner", [768, HIDDEN])
@pytest.mark.parametrize("rows", ROWS)
def test_gated_residual_projection(benchmark, rows, inner, dtype, backward, name):
    shape = {"rows": rows, "hidden": HIDDEN, "inner": inner}
    case = Case("suite", "gated_residual_projection", shape, dtype, backward, compiled=True)
    suite.run(benchmark, case, name)


@pytest.mark.kernels
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_gated_feed_forward(benchmark, rows, dtype, backward, name):
    shape = {"rows": rows, "hidden": HIDDEN, "inner": HIDDEN}
    suite.run(benchmark, Case("suite", "gated_feed_forward", shape, dtype, backward, compiled=True), name)

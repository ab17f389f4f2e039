"""add_position_2d and gated_residual_projection against eager PyTorch and what torch.compile makes of it.

See test_window_attention.py for what is timed.
"""

import pytest

from bench import suite
from bench.harness import Case
from infimm_kernels.gated_residual.op import CANDIDATES as GATED_CANDIDATES
from infimm_kernels.position_2d.op import CANDIDATES as POSITION_CANDIDATES

ON_GPU = suite.DEVICE.type == "cuda"
EAGER = ["eager", "compiled_eager"]
WINDOWS = {"num_windows": 40 if ON_GPU else 4, "seqlen": 1025, "hidden": 1792, "num_prefix_tokens": 1}
TEXT = {"rows": 8192 if ON_GPU else 256, "hidden": 5120 if ON_GPU else 1024, "inner": 768}


@pytest.mark.kernels
@pytest.mark.parametrize("name", suite.own_names(POSITION_CANDIDATES) + EAGER)
@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("granularity", ["window", "token"])
def test_add_position_2d(benchmark, granularity, dtype, name):
    case = Case("suite", "add_position_2d", {**WINDOWS, "granularity": granularity}, dtype, compiled=True)
    suite.run(benchmark, case, name)


@pytest.mark.kernels
@pytest.mark.parametrize("name", suite.own_names(GATED_CANDIDATES) + EAGER)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", suite.DTYPES)
def test_gated_residual_projection(benchmark, dtype, backward, name):
    suite.run(
        benchmark, Case("suite", "gated_residual_projection", TEXT, dtype, backward, compiled=True), name
    )

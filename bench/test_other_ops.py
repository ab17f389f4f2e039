"""The memory-bound ops against eager PyTorch and what torch.compile makes of it.

See test_window_attention.py for what is timed.
"""

import pytest

from bench import suite
from bench.harness import Case
from infimm_kernels.position_2d.op import CANDIDATES as POSITION_CANDIDATES
from infimm_kernels.post_norm.op import CANDIDATES as POST_NORM_CANDIDATES

WINDOWS = {"num_windows": 40 if suite.ON_GPU else 4, "seqlen": 1025, "hidden": 1792}


@pytest.mark.kernels
@pytest.mark.parametrize("name", suite.own_names(POSITION_CANDIDATES) + suite.EAGER)
@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in_place"])
@pytest.mark.parametrize("granularity", ["window", "token"])
def test_add_position_2d(benchmark, granularity, in_place, dtype, name):
    shape = {**WINDOWS, "num_prefix_tokens": 1, "granularity": granularity, "in_place": in_place}
    suite.run(benchmark, Case("suite", "add_position_2d", shape, dtype, compiled=True), name)


@pytest.mark.kernels
@pytest.mark.parametrize("name", suite.own_names(POST_NORM_CANDIDATES) + suite.EAGER)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", suite.DTYPES)
def test_residual_post_norm(benchmark, dtype, backward, name):
    suite.run(benchmark, Case("suite", "residual_post_norm", WINDOWS, dtype, backward, compiled=True), name)

"""window_attention, forward and backward apart, against every attention that can be had here.

Groups by shape and pass, so that pytest-benchmark prints the ratios in each. Runs on the GPU at hand, else on
the CPU. Times are those of the host around one synchronized call; `python -m bench.gpu` times the device.
"""

import pytest

from bench import suite
from bench.harness import Case
from infimm_kernels.attention.choice import WINDOW_CANDIDATES

EVA_E = {"num_heads": 16, "head_dim": 112, "num_prefix_tokens": 1}
SHAPES = {
    "demo": {"num_windows": 160, "seqlen": 65, "num_heads": 1, "head_dim": 112, "num_prefix_tokens": 1},
    "vit_e_224": {"num_windows": 160 if suite.ON_GPU else 4, "seqlen": 257, **EVA_E},
    "vit_e_448": {"num_windows": 40 if suite.ON_GPU else 1, "seqlen": 1025, **EVA_E},
    "ragged": {"lengths": [257, 1025, 577, 325] * (10 if suite.ON_GPU else 1), **EVA_E},
}


@pytest.mark.kernels
@pytest.mark.parametrize("name", suite.attention_names(WINDOW_CANDIDATES))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_window_attention(benchmark, shape, dtype, backward, name):
    case = Case("suite", "window_attention", SHAPES[shape], dtype, backward, compiled=True)
    suite.run(benchmark, case, name)

"""varlen_attention as a text asks an image: forward and backward apart, against every attention at hand.

See test_window_attention.py for what is timed.
"""

import pytest

from bench import suite
from bench.harness import Case
from infimm_kernels.attention.choice import VARLEN_CANDIDATES

HEADS = {"num_heads": 12, "num_kv_heads": 12, "head_dim": 64}
TOKENS = 10250 if suite.ON_GPU else 1025
SHAPES = {
    "demo": {
        "lengths_q": [40] * 32,
        "lengths_k": [325] * 32,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 32,
    },
    "answers": {"lengths_q": [512] * 4, "lengths_k": [TOKENS] * 4, **HEADS},
    "grouped": {"lengths_q": [512] * 4, "lengths_k": [TOKENS] * 4, **HEADS, "num_kv_heads": 3},
    "several_images": {"lengths_q": [200, 60, 400, 31], "lengths_k": [257, TOKENS, 257, TOKENS], **HEADS},
    "decode": {"lengths_q": [1] * 8, "lengths_k": [TOKENS] * 8, **HEADS},
}


@pytest.mark.kernels
@pytest.mark.parametrize("name", suite.attention_names(VARLEN_CANDIDATES))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_varlen_attention(benchmark, shape, dtype, backward, name):
    case = Case("suite", "varlen_attention", SHAPES[shape], dtype, backward, compiled=True)
    suite.run(benchmark, case, name)

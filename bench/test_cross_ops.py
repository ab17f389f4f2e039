"""Gated cross-attention: keys and values of all layers, a text over an image, one new token per sample.

Beside eager PyTorch and what torch.compile makes of it stand SDPA with a dense mask (a text), SDPA on kept
keys and values, and making them again (a token). See test_window_attention.py for what is timed.
"""

import pytest

from bench import suite
from bench.harness import Case
from infimm_kernels.gated_cross_attention.decode import CANDIDATES as DECODE_CANDIDATES
from infimm_kernels.gated_residual.op import CANDIDATES as GATED_CANDIDATES
from infimm_kernels.vision_keys_values.op import CANDIDATES as KEYS_VALUES_CANDIDATES

HEADS = {"num_heads": 12, "head_dim": 64}
HIDDEN = 5120 if suite.ON_GPU else 1024
WINDOWS = (1, 5, 10) if suite.ON_GPU else (1,)
TEXTS = (32, 128, 384, 1024, 2048) if suite.ON_GPU else (32,)
BATCHES = (1, 8, 64) if suite.ON_GPU else (1, 4)


@pytest.mark.kernels
@pytest.mark.parametrize("name", suite.own_names(KEYS_VALUES_CANDIDATES) + suite.EAGER)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("granularity", ["window", "token"])
@pytest.mark.parametrize("num_layers", [1, 10] if suite.ON_GPU else [1])
def test_vision_keys_values(benchmark, num_layers, granularity, dtype, backward, name):
    shape = {"num_windows": WINDOWS[-1], "seqlen": 1025, "hidden": 1792, "num_prefix_tokens": 1, **HEADS}
    shape |= {"num_layers": num_layers, "granularity": granularity}
    suite.run(benchmark, Case("suite", "vision_keys_values", shape, dtype, backward, compiled=True), name)


@pytest.mark.kernels
@pytest.mark.parametrize("name", [*suite.own_names(GATED_CANDIDATES), *suite.EAGER, "sdpa_masked"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("num_windows", WINDOWS)
@pytest.mark.parametrize("text_len", TEXTS)
def test_gated_cross_attention(benchmark, text_len, num_windows, dtype, backward, name):
    shape = {"text_len": text_len, "num_windows": num_windows, "seqlen": 1025, "hidden": HIDDEN, **HEADS}
    suite.run(benchmark, Case("suite", "gated_cross_attention", shape, dtype, backward, compiled=True), name)


@pytest.mark.kernels
@pytest.mark.parametrize(
    "name", [*suite.own_names(DECODE_CANDIDATES), *suite.EAGER, "sdpa_cached", "recompute"]
)
@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("num_windows", WINDOWS)
@pytest.mark.parametrize("batch", BATCHES)
def test_gated_cross_attention_decode(benchmark, batch, num_windows, dtype, name):
    shape = {"batch": batch, "num_windows": num_windows, "seqlen": 1025, "hidden": HIDDEN, **HEADS}
    case = Case(
        "suite", "gated_cross_attention_decode", {**shape, "vision_hidden": 1792}, dtype, compiled=True
    )
    suite.run(benchmark, case, name)

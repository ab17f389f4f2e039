"""bench.tune in Triton's interpreter, where the times mean nothing and the results do."""

import pytest
import torch

pytest.importorskip("triton")
from bench import tune
from infimm_kernels.attention import triton_launch
from infimm_kernels.attention.triton_config import BackwardConfig, ForwardConfig

CASES = {
    False: ForwardConfig((16,), 16, 16, 16, 4, 1, True, False),
    True: BackwardConfig((16,), 16, 16, 4, 1),
}


@pytest.fixture
def qkv(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the command itself runs there")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.manual_seed(0)
    return torch.randn(1, 17, 3, 1, 16, dtype=torch.float16)


@pytest.mark.parametrize("backward", CASES)
def test_candidates_are_checked_and_timed(qkv, backward):
    good = CASES[backward]
    bad = good._replace(pieces=(5,))
    rows = tune.compare({"good": good, "bad": bad}, qkv, backward, 0.0)
    status = {row["name"]: row["status"] for row in rows}
    assert status == {"good": "ok", "bad": "failed", tune.SHIPPED: "ok"}
    assert rows[-1]["name"] == "bad" and rows[-1]["reason"]


def test_a_wrong_candidate_is_not_timed(qkv, monkeypatch):
    real = tune.window_attention

    def wrong(*args, **options):
        out = real(*args, **options)
        return out + 1 if triton_launch.forward_config is not shipped else out

    shipped = triton_launch.forward_config
    monkeypatch.setattr(tune, "window_attention", wrong)
    rows = tune.compare({"good": CASES[False]}, qkv, False, 0.0)
    assert [row["status"] for row in rows] == ["ok", "wrong"]
    assert triton_launch.forward_config is shipped


def test_candidates_have_distinct_names_and_hold_the_shipped_ones():
    forward, backward = tune.forward_candidates(), tune.backward_candidates()
    for capability in ((8, 0), (9, 0)):
        assert triton_launch.forward_config(tune.HEAD_DIM, torch.bfloat16, capability) in forward.values()
        assert triton_launch.backward_config(tune.HEAD_DIM, capability).fused in backward.values()
    assert len(forward) == 40 and len(backward) == 36

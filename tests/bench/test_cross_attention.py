"""bench.cross_attention: its command, its baselines, and that a wrong result gets no number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cross_attention, flamingo
from infimm_kernels.position_2d import reference as position_reference

ROOT = Path(__file__).parents[2]
TINY = {
    "tokens": 20,
    "windows": 3,
    "seqlen": 7,
    "hidden": 24,
    "vision_hidden": 16,
    "heads": 2,
    "head_dim": 8,
    "ffn_hidden": 40,
}
RATIOS = ("decode_speedup", "decode_vs_cached_sdpa", "prefill_cached_speedup", "prefill_speedup")


def options(**changes) -> list[str]:
    values = {**TINY, "threads": 1, "repeats": 2, **changes}
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_json_is_one_document_with_its_provenance():
    command = [sys.executable, "-m", "bench.cross_attention", "--json", *options()]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["shape"] == TINY and document["threads"] == 1 and document["dtype"] == "fp32"
    assert document["torch"] == torch.__version__ and document["command"].startswith("python -m bench.cross_")
    assert document.keys() >= {"cpu", "date", "device", "repeats"}
    for key in RATIOS:
        row = document["comparisons"][key]
        assert document[key] == row["ratio"] > 0
        assert row["ratio"] == pytest.approx(row["theirs_ms"] / row["ours_ms"], rel=0.02)
        assert 0 < row["ours_ms_shortest"] <= row["ours_ms"] and row["theirs_ms_shortest"] > 0
        assert 0 <= row["ours_error"] < 1e-5 and 0 <= row["theirs_error"] < 1e-5
    assert f"decode_speedup: {document['decode_speedup']}" in done.stderr


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_other_dtypes(dtype, capsys, threads):
    cross_attention.main(options(dtype=dtype))
    out = capsys.readouterr().out
    assert all(key in out for key in RATIOS) and f"dtype {dtype}" in out


@pytest.mark.parametrize("which", ["ours", "theirs"])
def test_a_wrong_result_gets_no_number(monkeypatch, capsys, threads, which):
    owner, name = (cross_attention, "our_block") if which == "ours" else (flamingo, "cached_block")
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: right(*arguments) * 1.001)
    with pytest.raises(AssertionError, match=f"decode_.*: {which} is off by"):
        cross_attention.main(["--json", *options()])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 0}, "--threads must be at least 1, got 0"),
        ({"head_dim": 0}, "--head-dim must be at least 1, got 0"),
        ({"vision_hidden": 6}, "--vision-hidden must be a multiple of 4, got 6"),
        ({"dtype": "fp8"}, "invalid choice: 'fp8'"),
    ],
)
def test_wrong_options_end_with_one_line(capsys, changes, message):
    with pytest.raises(SystemExit, match="2"):
        cross_attention.main(options(**changes))
    assert message in capsys.readouterr().err


def test_a_token_sees_the_last_image_before_it():
    locations = torch.tensor([False, True, False, True, False])
    image_of_key = torch.tensor([1, 1, 2])
    mask = flamingo.media_mask(locations, image_of_key, 5)
    assert mask.int().tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert torch.equal(flamingo.media_mask(locations, image_of_key, 2), mask[-2:])


def test_the_dense_block_is_the_sum_over_what_a_token_sees():
    """Each row against the same block on its own keys alone; a row without an image is left as it is."""
    torch.manual_seed(1)
    weights = flamingo.Weights(*(w.double() for w in flamingo.random_weights(24, 16, 16, 40)))
    features = torch.randn(3, 5, 16, dtype=torch.float64)
    x = torch.randn(1, 6, 24, dtype=torch.float64)
    position = torch.zeros(3, 1, 16, dtype=torch.float64)
    locations = torch.tensor([False, True, False, False, True, False])
    image_of_key = torch.tensor([1, 1, 2]).repeat_interleave(5)
    y = flamingo.dense_block(weights, x, features, position, locations, image_of_key, 2)
    assert torch.equal(y[:, 0], x[:, 0])
    for row, windows in ((1, slice(0, 2)), (3, slice(0, 2)), (4, slice(2, 3)), (5, slice(2, 3))):
        kept = flamingo.keys_values(weights, features[windows], position[windows], 2)
        alone = flamingo.cached_block(weights, x[:, row : row + 1], *kept)
        torch.testing.assert_close(y[:, row : row + 1], alone)


def test_the_encoding_is_the_ops():
    places = torch.tensor([[0, 0], [2, 1], [-1, -1], [5, 40]])
    x = torch.randn(4, 3, 32, dtype=torch.float64)
    expected = position_reference.forward(x, places, "window", (1, 1), 0)
    torch.testing.assert_close(x + flamingo.encoding(places, 32), expected, rtol=1e-12, atol=1e-12)

"""bench.cost: what is counted against independent sums, and the document as its reader gets it."""

import json
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bench import cost, report, results
from bench.flops import FORMULAS, counting
from infimm_kernels import varlen_attention, vision_keys_values, window_attention
from infimm_kernels.gated_residual import gated_residual_projection
from model import InfiMMHD

TEXT = 8


def plain_flops(config, windows: int) -> int:
    """The products of a prompt's forward, summed from the sizes in the config; no ConvNeXt, no resampler."""
    vision, text, gated = config.vision_config, config.text_config, config.gated_cross_attention
    hidden, wide = vision.hidden_size, vision.intermediate_size
    tokens = vision.grid_size**2 + 1
    products = windows * tokens * hidden * 3 * vision.patch_size**2
    block = tokens * hidden * (4 * hidden + 2 * wide) + 2 * tokens**2 * hidden
    products += windows * vision.num_active_layers * block
    seen = windows * config.visual_tokens_per_window
    if config.fusion == "concatenation":
        products += seen * (hidden * text.hidden_size + text.hidden_size**2)
    else:
        products += seen * 2 * hidden**2
    length = TEXT + (seen if config.fusion == "concatenation" else 1)
    inner = gated.num_heads * gated.head_dim
    gates = length * text.hidden_size * (2 * inner + 2 * gated.ffn_ratio * text.hidden_size)
    products += len(config.gated_layers) * (gates + 2 * seen * hidden * inner + 2 * length * seen * inner)
    width, heads = text.hidden_size, text.num_attention_heads * text.head_dim
    kept = text.num_key_value_heads * text.head_dim
    layer = length * width * (2 * heads + 2 * kept + 3 * text.intermediate_size) + 2 * length**2 * heads
    products += text.num_hidden_layers * layer + width * text.vocab_size  # logits of the last token
    return 2 * products


@pytest.mark.parametrize("system", ["infimm-hd", "llava-style"])
@pytest.mark.parametrize("resolution", [224, 896])
def test_counted_flops_are_the_sum_of_all_products(system, resolution):
    config = cost.system_config("small", system, resolution)
    windows = cost.num_windows(system, resolution)
    assert cost.count(config, windows, TEXT)["flops"] == plain_flops(config, windows)


def test_the_formulas_of_the_ops_are_their_products():
    """Against torch's own counter on the same products written plainly."""
    x, features = torch.randn(2, 3, 5, 3, 4, 8), torch.randn(3, 5, 16)
    q, k = torch.randn(7, 2, 8), torch.randn(9, 2, 8)
    o, weight, gate = torch.randn(1, 6, 8), torch.randn(16, 8), torch.randn(16)
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 3, 7], [0, 4, 9]))

    def attention(q, k):
        return q.transpose(0, 1) @ k.permute(1, 2, 0) @ k.transpose(0, 1)

    cases = [
        (
            lambda: window_attention(x[0]),
            lambda: [attention(window[:, 0], window[:, 1]) for window in x[0]],
        ),
        (
            lambda: vision_keys_values(features, torch.ones(2, 2, 8, 16), num_heads=2),
            lambda: features @ torch.ones(16, 32),
        ),
        (
            lambda: gated_residual_projection(torch.ones(1, 6, 16), o, weight, gate),
            lambda: o @ weight.T,
        ),
    ]
    for ours, plain in cases:
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counted, torch.no_grad():
            ours()
        with FlopCounterMode(display=False) as expected:
            plain()
        assert counted.get_total_flops() == expected.get_total_flops() > 0
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counted, torch.no_grad():
        varlen_attention(q, k, k, cu_q, cu_k, max_seqlen_q=4, max_seqlen_k=5)
    assert counted.get_total_flops() == 4 * 2 * 8 * (3 * 4 + 4 * 5)
    with FakeTensorMode() as fake, torch.no_grad():
        inputs = [fake.from_tensor(x) for x in (q, k, k, cu_q, cu_k)]
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counted:
            varlen_attention(*inputs, max_seqlen_q=4, max_seqlen_k=5)
    assert counted.get_total_flops() == 4 * 2 * 8 * 7 * 9 // 2  # without their lengths: equal halves


def test_live_bytes_on_real_tensors_are_those_on_tensors_without_storage():
    """The same forward with storage in float32 has twice the bytes of the counted one in bfloat16."""
    config = cost.system_config("small", "llava-style", 224)
    model = InfiMMHD(config).eval().requires_grad_(False)
    ids, _ = cost.prompt(config, 1, TEXT)
    with torch.no_grad(), counting(model) as (flops, live):
        model(ids, **cost.image_arguments(config, 1, torch.float32), use_cache=True, logits_to_keep=1)
    counted = cost.count(config, 1, TEXT)
    assert flops.get_total_flops() == counted["flops"]
    assert math.isclose(live.peak, 2 * counted["activation_bytes"], rel_tol=0.1)


def test_live_bytes_follow_allocation_and_release():
    with counting(torch.nn.Linear(1, 1)) as (_, live):
        a = torch.zeros(1000)
        b = a.view(10, 100)
        assert live.live == 4000
        c = b + 1
        assert live.live == live.peak == 8000
        del a, b
        assert live.live == 4000 and c.shape == (10, 100)
    assert live.peak == 8000


@pytest.mark.long
def test_the_papers_argument_at_13b():
    """9,216 tokens and more for concatenation at 1344 pixels, none but `<image>` for cross-attention."""
    rows = {}
    for system in ("infimm-hd", "llava-style"):
        config, windows = cost.system_config("13b", system, 1344), cost.num_windows(system, 1344)
        assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (5120, 40)
        rows[system] = cost.count(config, windows, 128)
    ours, llava = rows["infimm-hd"], rows["llava-style"]
    assert ours["llm_tokens_added"] == 1 and llava["llm_tokens_added"] == 10240 >= 9216
    assert ours["vision_tokens"] == 10250
    assert ours["flops"] < llava["flops"] / 3
    assert ours["activation_bytes"] < llava["activation_bytes"] / 3
    # a cache of 129 and 10,368 tokens, 40 layers x keys and values x 5120 channels, bfloat16
    language = 40 * 2 * 5120 * 2
    assert llava["kv_cache_bytes"] == 10368 * language
    assert ours["kv_cache_bytes"] == 129 * language + 10 * 10250 * 2 * 768 * 2


def test_tokens_that_an_image_of_1344_pixels_adds_at_13b():
    for system, added in (("infimm-hd", 1), ("llava-style", 10240), ("resampler", 1)):
        config = cost.system_config("13b", system, 1344)
        assert cost.prompt(config, cost.num_windows(system, 1344), TEXT)[1] == added


def test_mixture_of_resolution_keeps_its_tokens_few():
    for resolution, tokens in ((448, 576), (896, 784), (1344, 1764)):
        config = cost.system_config("7b", "mixture-of-resolution", resolution)
        assert config.vision_config.input_size == resolution
        assert config.visual_tokens_per_window == tokens
        assert cost.num_windows("mixture-of-resolution", resolution) == 1


def test_the_document_has_a_row_for_every_system_and_resolution(capsys, tmp_path):
    picture = tmp_path / "cost.png"
    arguments = ["--size", "small", "--json", "--resolutions", "224", "--text-tokens", "4"]
    cost.main([*arguments, "--repeats", "1", "--plot", str(picture)])
    document = json.loads(capsys.readouterr().out)
    names = {(row["system"], row["resolution"]) for row in document["rows"]}
    assert names == {(system, 224) for system in cost.SYSTEMS}
    keys = "system resolution vision_tokens llm_tokens_added flops activation_bytes kv_cache_bytes seconds"
    for row in document["rows"]:
        assert list(row) == keys.split() and all(row[key] > 0 for key in keys.split()[2:])
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resolutions", "300"], "--resolutions must be 224 or multiples of 448, got 300"),
        (["--text-tokens", "0"], "--text-tokens must be at least 1, got 0"),
        (["--mfu", "0"], "--mfu must be positive, got 0.0"),
        (["--plot", "nowhere/a.png"], "--plot must be a file in an existing folder, got 'nowhere/a.png'"),
        (["--size", "70b"], "argument --size: invalid choice: '70b'"),
    ],
)
def test_wrong_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit):
        cost.main(arguments)
    assert message in capsys.readouterr().err


def test_what_is_saved_is_the_document_and_its_table(monkeypatch, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- cost -->\nold\n<!-- /cost -->\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "bench" / "results")
    monkeypatch.setattr(cost, "SYSTEMS", ("infimm-hd",))
    cost.main(["--size", "small", "--save", "--resolutions", "224", "448", "--repeats", "1"])
    (saved,) = (tmp_path / "bench" / "results" / "cost").glob("small-*.json")
    document = json.loads(saved.read_text())
    text = readme.read_text()
    row = document["rows"][1]
    assert f"| infimm-hd | 448 | 1,025 | 1 | {row['flops'] / 1e12:.1f} |" in text and "old" not in text
    assert "| 224 |" not in text and text.startswith("before\n<!-- cost -->\nSize small")
    assert "--size small --save" in document["command"]
    assert (tmp_path / f"bench/results/cost/{saved.stem}.png").is_file()
    assert f"(bench/results/cost/{saved.stem}.png)" in text and text.endswith("<!-- /cost -->\nafter\n")

"""The public stage-1 form: in, out again, and the published formula of its gated block."""

import json

import pytest
import torch
import torch.nn.functional as F

from infimm_kernels import media_segments
from model import InfiMMHD, preset
from model.convert import ConversionError, convert, inspect
from tests.model.convert.conftest import (
    GATED_LAYERS,
    random_weights,
    stage1_model_config,
    stage1_tensors,
    tensors_in,
    write_shards,
)


def test_a_released_checkpoint_becomes_the_model_bit_for_bit(
    stage1_model, stage1_file, stage1_config_file, tmp_path
):
    tensors = torch.load(stage1_file)
    buffer = "lang_encoder.old_decoder_blocks.0.self_attn.rotary_emb.inv_freq"
    torch.save(tensors | {buffer: torch.ones(4)}, stage1_file)
    report = convert(stage1_file, tmp_path / "out", preset=stage1_config_file)
    assert report.left_out[buffer] == "computed, not learned"
    loaded = InfiMMHD.from_pretrained(tmp_path / "out")
    assert loaded.config == stage1_model.config and loaded.config.vision_config.feature_layer == -1
    for name, weight in stage1_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    heads = [name for name, reason in report.left_out.items() if "head behind the features" in reason]
    assert sorted(heads) == [
        f"vision_encoder.{part}" for part in ("head.bias", "head.weight", "norm.bias", "norm.weight")
    ]
    assert len(report.aliases) == sum(
        name.startswith("lang_encoder.model.layers.") for name in stage1_tensors(stage1_model)
    )
    assert not report.missing and not report.unexpected
    assert "vision_encoder.head.weight" in report.text()


def test_export_and_import_are_bit_identical_and_carry_the_configuration(stage1_model, tmp_path):
    stage1_model.save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "theirs", target="infimm-stage1")
    written, expected = tensors_in(tmp_path / "theirs"), stage1_tensors(stage1_model)
    assert written.keys() == {
        name for name in expected if "vision_encoder.norm" not in name and "vision_encoder.head" not in name
    } - {name for name in expected if name.startswith("lang_encoder.model.layers.")}
    for name, weight in written.items():
        assert torch.equal(weight, expected[name]), name
    convert(tmp_path / "theirs", tmp_path / "back")
    assert tensors_in(tmp_path / "back").keys() == tensors_in(tmp_path / "model").keys()
    back = InfiMMHD.from_pretrained(tmp_path / "back")
    for field in ("norm_gain_init", "position_init"):  # how training starts is in no other form
        setattr(back.config.vision_config, field, getattr(stage1_model.config.vision_config, field))
    assert back.config == stage1_model.config
    for name, weight in stage1_model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name


@pytest.mark.parametrize("wrap", ["model.", "module.", "module.model."])
def test_wrappers_and_shards_and_a_training_state_change_nothing(
    wrap, stage1_model, stage1_config_file, tmp_path
):
    tensors = {wrap + name: weight for name, weight in stage1_tensors(stage1_model).items()}
    write_shards(tmp_path / "shards", tensors)
    state = {"module": tensors, "global_step": 7, "optimizer": {"lr": 0.1}}
    torch.save(state, tmp_path / "mp_rank_00_model_states.pt")
    convert(tmp_path / "shards", tmp_path / "a", preset=stage1_config_file)
    report = convert(tmp_path / "mp_rank_00_model_states.pt", tmp_path / "b", preset=stage1_config_file)
    assert report.left_out["global_step"].startswith("no weights")
    first, second = tensors_in(tmp_path / "a"), tensors_in(tmp_path / "b")
    assert first.keys() == second.keys() == tensors_in(tmp_path / "a").keys()
    for name, weight in stage1_model.state_dict().items():
        assert torch.equal(first[name], weight) and torch.equal(second[name], weight), name


@pytest.mark.parametrize("kept", ["old_decoder_blocks", "decoder_layer"])
def test_one_of_two_names_is_enough(kept, stage1_model, stage1_config_file, tmp_path):
    dropped = {"old_decoder_blocks": "decoder_layer", "decoder_layer": "old_decoder_blocks"}[kept]
    tensors = {name: w for name, w in stage1_tensors(stage1_model).items() if f".{dropped}." not in name}
    write_shards(tmp_path / "in", tensors)
    convert(tmp_path / "in", tmp_path / "out", preset=stage1_config_file)
    name = "language.model.layers.2.mlp.up_proj.weight"
    assert torch.equal(tensors_in(tmp_path / "out")[name], stage1_model.state_dict()[name])


def test_second_names_with_other_values_are_refused(stage1_model, stage1_config_file, tmp_path):
    tensors = stage1_tensors(stage1_model)
    name = "lang_encoder.model.layers.1.gated_cross_attn_layer.attn_gate"
    tensors[name] = tensors[name] + 1e-3
    write_shards(tmp_path / "in", tensors)
    message = f"{name} in .* must equal lang_encoder.gated_cross_attn_layers.1.attn_gate in .*second name"
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "in", tmp_path / "out", preset=stage1_config_file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "stage1-preset.json"]


def test_missing_and_unexpected_tensors_are_an_error_with_a_report(
    stage1_model, stage1_config_file, tmp_path
):
    tensors = stage1_tensors(stage1_model)
    missing = f"lang_encoder.gated_cross_attn_layers.{GATED_LAYERS[0]}.attn.to_kv.weight"
    del tensors[missing], tensors["lang_encoder.model.layers.1.gated_cross_attn_layer.attn.to_kv.weight"]
    tensors["vision_encoder.rope.freqs_cos"] = torch.ones(3)
    write_shards(tmp_path / "in", tensors)
    message = f"1 missing: {missing}; 1 unexpected: vision_encoder.rope.freqs_cos in .*model-0000"
    with pytest.raises(ConversionError, match=message) as caught:
        convert(tmp_path / "in", tmp_path / "out", preset=stage1_config_file)
    assert caught.value.report.missing == [missing]
    assert caught.value.report.unexpected == ["vision_encoder.rope.freqs_cos"]


def test_a_presets_connector_and_layer_are_not_the_releases(stage1_file, tmp_path):
    config = preset("tiny")
    config.vision_config.feature_layer = -2
    config.gated_cross_attention.interval = 2
    assert config.connector.kind == "residual_mlp"
    convert(stage1_file, tmp_path / "out", preset=config)
    found = InfiMMHD.from_pretrained(tmp_path / "out").config
    assert found.connector.kind == "none" and found.vision_config.feature_layer == -1


def test_sizes_that_nothing_tells_ask_for_a_preset(stage1_file, tmp_path):
    with pytest.raises(ValueError, match="sizes of infimm_hd_13b or infimm_hd_7b, or come with"):
        convert(stage1_file, tmp_path / "out")
    message = "got .*vision_config.hidden_size 1792 for 112, .*text_config.vocab_size 32002 for 64"
    with pytest.raises(ValueError, match=message):
        convert(stage1_file, tmp_path / "out", preset="infimm_hd_13b")


def test_the_released_sizes_need_neither_preset_nor_config(tmp_path):
    """18 billion parameters whose storage is one number: only names and shapes are read."""
    with torch.device("meta"):
        model = InfiMMHD(stage1_config_13b())
    tensors = stage1_tensors(model, model.config.gated_layers)
    sizes = {name: torch.zeros(1).expand(weight.shape) for name, weight in tensors.items()}
    torch.save(sizes, tmp_path / "vite_vicuna13b_bf16.ckpt")
    text = inspect(tmp_path / "vite_vicuna13b_bf16.ckpt")
    assert "infimm-stage1" in text and "missing: none" in text and "unexpected: none" in text
    vision = "vision: 64 post_norm blocks of 1792, 16 heads, MLP 15360, patch 14, windows of 224 pixels"
    language = "language: llama, 40 layers of 5120, 40 heads, vocabulary 32002"
    assert vision in text and language in text
    assert "gated: 630,763,520 parameters" in text  # 10 blocks of 63.1 million


def stage1_config_13b():
    config = preset("infimm_hd_13b")
    config.connector.kind = "none"
    return config


def test_the_settings_file_has_the_training_programs_fields(stage1_model, tmp_path):
    stage1_model.save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "theirs", target="infimm-stage1")
    values = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert values["cross_attn_every_n_layers"] == 2 and values["visual"]["head_width"] == 112
    assert values["visual"]["postnorm"] is True and values["language"]["vocab_size"] == 64


def test_a_connector_has_no_place_in_stage_1(tmp_path):
    config = stage1_model_config()
    config.connector.kind = "residual_mlp"
    InfiMMHD(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="model must have only tensors that infimm-stage1 .*connector"):
        convert(tmp_path / "model", tmp_path / "theirs", target="infimm-stage1")


def published_block(theirs: dict, x, media, text_time, heads: int):
    """x + tanh(gate) * attention, then x + tanh(gate) * feed-forward, for tokens with an image before them;
    by masks, in their names. `media` [images, tokens, width], `text_time` [batch, text] counts images."""
    norm = F.layer_norm(x, x.shape[-1:], theirs["attn.norm.weight"], theirs["attn.norm.bias"])
    q = norm @ theirs["attn.to_q.weight"].T
    k, v = (media.flatten(0, 1) @ theirs["attn.to_kv.weight"].T).chunk(2, dim=-1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(-2, -3) for t in (q, k, v))
    image = torch.arange(len(media)).repeat_interleave(media.shape[1])
    visible = text_time[:, None, :, None] == image + 1
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~visible, -1e30)
    attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ theirs["attn.to_out.weight"].T
    has_image = (text_time > 0)[..., None]
    x = x + has_image * attended * theirs["attn_gate"].tanh()
    norm = F.layer_norm(x, x.shape[-1:], theirs["ff.0.weight"], theirs["ff.0.bias"])
    ffn = F.gelu(norm @ theirs["ff.1.weight"].T) @ theirs["ff.3.weight"].T
    return x + has_image * ffn * theirs["ff_gate"].tanh()


@pytest.mark.parametrize("direction", ["in", "out"])
def test_the_gated_block_is_the_published_formula_through_the_names(direction, stage1_model, tmp_path):
    if direction == "in":
        theirs = stage1_tensors(random_weights(InfiMMHD(stage1_model_config()), seed=5))
        write_shards(tmp_path / "theirs", theirs)
        stage1_model_config().save(tmp_path / "preset.json")
        convert(tmp_path / "theirs", tmp_path / "ours", preset=tmp_path / "preset.json")
        model = InfiMMHD.from_pretrained(tmp_path / "ours").eval()
    else:
        model = stage1_model
        model.save_pretrained(tmp_path / "ours")
        convert(tmp_path / "ours", tmp_path / "theirs", target="infimm-stage1")
        theirs = tensors_in(tmp_path / "theirs")
    generator = torch.Generator().manual_seed(1)
    media, x = torch.randn(2, 17, 112, generator=generator), torch.randn(1, 7, 128, generator=generator)
    is_image = torch.tensor([[False, True, False, False, True, False, False]])
    segments = media_segments(is_image, [17, 17], [2])
    with torch.no_grad():
        pairs = model.vision_keys_values(media, torch.full((2, 2), -1))
        for layer, pair in zip(GATED_LAYERS, pairs, strict=True):
            prefix = f"lang_encoder.gated_cross_attn_layers.{layer}."
            block = {n.removeprefix(prefix): w for n, w in theirs.items() if n.startswith(prefix)}
            expected = published_block(block, x, media, is_image.cumsum(1), heads=4)
            out = model.gated_blocks[str(layer)](x, *pair, segments)
            assert not torch.allclose(out, x, atol=1e-3)
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
